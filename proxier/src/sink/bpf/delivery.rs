//! What is reported of pods that are to be reached past the node's stack: how many are, and for the others why not. Not for how
//! they are reached: that is `reach`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::reach::{Obstacle, Reach};
use crate::{
    model::ObjectName,
    observe::few::first_of,
    sink::{ByStack, DirectDelivery},
};

/// How many pods, and Services, a line of the log names: of a pod network that knows no direct delivery it would be all of a node.
const NAMED: usize = 5;

/// Follows how pods are reached, and logs what changes.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    reached: BTreeSet<IpAddr>,
    /// Those that were not reached when it was looked last.
    fallbacks: BTreeMap<IpAddr, Fallback>,
    /// What the log says of them.
    logged: BTreeMap<IpAddr, Obstacle>,
}

/// A pod that is not reached directly.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fallback {
    obstacle: Obstacle,
    /// The Services that ask for more.
    services: BTreeSet<ObjectName>,
}

/// What is worth a line in the log.
#[derive(Debug, PartialEq, Eq)]
enum Transition {
    /// These are not reached directly, for this reason.
    ToStack(Obstacle, Vec<IpAddr>),
    /// These are reached directly, of which something else was logged.
    ToDirect(Vec<IpAddr>),
}

impl Monitor {
    /// Looks at all pods that are to be reached directly, and logs what has changed. To be called once a second. `services_of`
    /// tells for whose sake a pod is one of them.
    pub(super) fn look(
        &mut self,
        pods: impl IntoIterator<Item = IpAddr>,
        reach: &Reach,
        services_of: impl Fn(IpAddr) -> BTreeSet<ObjectName>,
    ) {
        let fallback =
            |pod| reach.obstacle(pod).map(|obstacle| Fallback { obstacle, services: services_of(pod) });
        let ways = pods.into_iter().map(|pod| (pod, fallback(pod))).collect();
        for transition in self.compare(ways) {
            match transition {
                Transition::ToStack(obstacle, pods) => {
                    let services: BTreeSet<&ObjectName> =
                        pods.iter().flat_map(|pod| &self.fallbacks[pod].services).collect();
                    // Of one as an example.
                    let obstacle = obstacle.of(pods[0]);
                    tracing::warn!(
                        services = first_of(services, NAMED, ", "),
                        pods = first_of(&pods, NAMED, ", "),
                        "pods of Services that ask for direct delivery get new conversations through the node's stack: {obstacle}"
                    );
                }
                Transition::ToDirect(pods) => {
                    tracing::info!(pods = first_of(&pods, NAMED, ", "), "pods are reached directly now");
                }
            }
        }
    }

    /// A pod's link may come a moment after the pod, or go a moment before it: what is seen a second time is logged.
    fn compare(&mut self, ways: BTreeMap<IpAddr, Option<Fallback>>) -> Vec<Transition> {
        self.logged.retain(|pod, _| ways.contains_key(pod));
        self.reached.clear();
        let before = std::mem::take(&mut self.fallbacks);
        let mut by_obstacle: BTreeMap<Obstacle, Vec<IpAddr>> = BTreeMap::new();
        let mut again = Vec::new();
        for (pod, fallback) in ways {
            let Some(fallback) = fallback else {
                self.reached.insert(pod);
                if self.logged.remove(&pod).is_some() {
                    again.push(pod);
                }
                continue;
            };
            let obstacle = &fallback.obstacle;
            let lasts = before.get(&pod).is_some_and(|before| before.obstacle == *obstacle);
            if lasts && !obstacle.is_reported_elsewhere() && self.logged.get(&pod) != Some(obstacle) {
                self.logged.insert(pod, obstacle.clone());
                by_obstacle.entry(obstacle.clone()).or_default().push(pod);
            }
            self.fallbacks.insert(pod, fallback);
        }
        let to_stack = by_obstacle.into_iter().map(|(obstacle, pods)| Transition::ToStack(obstacle, pods));
        to_stack.chain((!again.is_empty()).then_some(Transition::ToDirect(again))).collect()
    }

    /// What can be asked for.
    pub(super) fn report(&self) -> DirectDelivery {
        let by_stack = self.fallbacks.iter().map(|(pod, Fallback { obstacle, services })| ByStack {
            pod: *pod,
            services: services.iter().cloned().collect(),
            reason: obstacle.of(*pod).to_string(),
        });
        DirectDelivery { reached: self.reached.len(), by_stack: by_stack.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([11, 0, 0, last])
    }

    fn fallback(obstacle: Obstacle) -> Option<Fallback> {
        Some(Fallback { obstacle, services: [ObjectName::new("default", "pbx")].into() })
    }

    fn ways<const N: usize>(ways: [(u8, Option<Obstacle>); N]) -> BTreeMap<IpAddr, Option<Fallback>> {
        ways.into_iter().map(|(last, obstacle)| (ip(last), obstacle.and_then(fallback))).collect()
    }

    #[test]
    fn what_lasts_is_logged_once_and_again_when_it_changes_or_is_over() {
        let mut monitor = Monitor::default();
        let state = || ways([(1, Some(Obstacle::NoRoute)), (2, None), (3, Some(Obstacle::NoRoute))]);
        assert_eq!(monitor.compare(state()), [], "it may be over in a moment");
        assert_eq!(monitor.compare(state()), [Transition::ToStack(Obstacle::NoRoute, vec![ip(1), ip(3)])]);
        assert_eq!(monitor.compare(state()), []);
        let report = monitor.report();
        assert_eq!((report.reached, report.by_stack.len()), (1, 2));
        let ByStack { pod, services, reason } = &report.by_stack[1];
        assert_eq!((*pod, services.as_slice()), (ip(3), &[ObjectName::new("default", "pbx")][..]));
        assert!(reason.contains("`ip route get 11.0.0.3`"), "{reason}");

        let unattached = || Obstacle::Unattached("veth1".to_owned());
        let state = || ways([(1, Some(unattached())), (2, None), (3, Some(Obstacle::NoRoute))]);
        assert_eq!(monitor.compare(state()), []);
        assert_eq!(monitor.compare(state()), [Transition::ToStack(unattached(), vec![ip(1)])]);
        // The second is gone, and what was logged of the third is as well: it has left.
        assert_eq!(monitor.compare(ways([(1, None)])), [Transition::ToDirect(vec![ip(1)])]);
        assert_eq!(monitor.compare(ways([(1, None)])), []);
        assert_eq!(monitor.report(), DirectDelivery { reached: 1, by_stack: Vec::new() });
    }

    #[test]
    fn a_link_that_comes_a_moment_after_its_pod_is_not_worth_a_line() {
        let mut monitor = Monitor::default();
        assert_eq!(monitor.compare(ways([(1, Some(Obstacle::NoRoute))])), []);
        assert_eq!(monitor.compare(ways([(1, Some(Obstacle::Unattached("veth1".to_owned())))])), []);
        assert_eq!(monitor.compare(ways([(1, None)])), []);
        assert_eq!(monitor.compare(ways([(1, Some(Obstacle::NoRoute))])), [], "the link goes first");
        assert_eq!(monitor.compare(ways([])), []);
    }

    #[test]
    fn what_the_log_says_of_the_node_is_not_said_of_each_pod_as_well() {
        let mut monitor = Monitor::default();
        for obstacle in [Obstacle::NoUplink, Obstacle::NotForwarding(crate::model::Family::V4)] {
            for _ in 0..3 {
                assert_eq!(monitor.compare(ways([(1, Some(obstacle.clone()))])), []);
            }
            assert_eq!(monitor.report().by_stack.len(), 1, "the status has it all the same");
            assert_eq!(monitor.compare(ways([(1, None)])), []);
        }
    }
}
