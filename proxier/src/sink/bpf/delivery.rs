//! What is told of pods that are to be reached past the node's stack: how many are, and why the stack delivers to the others.
//! Not for how they are reached: that is `reach`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::reach::{Obstacle, Reach};
use crate::sink::{ByStack, DirectDelivery};

/// What has been seen and told.
#[derive(Debug, Default)]
pub(super) struct Tale {
    reached: BTreeSet<IpAddr>,
    /// Those that were not reached when it was looked last.
    seen: BTreeMap<IpAddr, Obstacle>,
    /// What the log says of them.
    told: BTreeMap<IpAddr, Obstacle>,
}

/// What is new.
#[derive(Debug, PartialEq, Eq)]
enum News {
    /// The stack delivers to these, for this reason.
    Stack(Obstacle, Vec<IpAddr>),
    /// These are reached directly, of which something else was told.
    Direct(Vec<IpAddr>),
}

impl Tale {
    /// Looks at all pods that are to be reached directly, and tells the log what has come of them. To be called once a second.
    pub(super) fn look(&mut self, pods: impl IntoIterator<Item = IpAddr>, reach: &Reach) {
        let ways = pods.into_iter().map(|pod| (pod, reach.of(pod).err())).collect();
        for news in self.compare(ways) {
            match news {
                News::Stack(obstacle, pods) => tracing::warn!(
                    pods = list(&pods),
                    "pods of Services that ask for direct delivery get new conversations through the node's stack: {obstacle}"
                ),
                News::Direct(pods) => {
                    tracing::info!(pods = list(&pods), "pods are reached directly now");
                }
            }
        }
    }

    /// A pod's link may come a moment after the pod, or go a moment before it: what is seen a second time is told.
    fn compare(&mut self, ways: BTreeMap<IpAddr, Option<Obstacle>>) -> Vec<News> {
        self.told.retain(|pod, _| ways.contains_key(pod));
        self.reached.clear();
        let before = std::mem::take(&mut self.seen);
        let mut by_obstacle: BTreeMap<Obstacle, Vec<IpAddr>> = BTreeMap::new();
        let mut again = Vec::new();
        for (pod, obstacle) in ways {
            let Some(obstacle) = obstacle else {
                self.reached.insert(pod);
                if self.told.remove(&pod).is_some() {
                    again.push(pod);
                }
                continue;
            };
            if before.get(&pod) == Some(&obstacle) && self.told.get(&pod) != Some(&obstacle) {
                self.told.insert(pod, obstacle.clone());
                by_obstacle.entry(obstacle.clone()).or_default().push(pod);
            }
            self.seen.insert(pod, obstacle);
        }
        let stack = by_obstacle.into_iter().map(|(obstacle, pods)| News::Stack(obstacle, pods));
        stack.chain((!again.is_empty()).then_some(News::Direct(again))).collect()
    }

    /// What can be asked for.
    pub(super) fn report(&self) -> DirectDelivery {
        let by_stack =
            self.seen.iter().map(|(pod, obstacle)| ByStack { pod: *pod, reason: obstacle.to_string() });
        DirectDelivery { reached: self.reached.len(), by_stack: by_stack.collect() }
    }
}

/// The first few; of a pod network that knows no direct delivery all pods of a node would be named.
fn list(pods: &[IpAddr]) -> String {
    const NAMED: usize = 5;
    let mut text = pods.iter().take(NAMED).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if pods.len() > NAMED {
        text += &format!(" and {} more", pods.len() - NAMED);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([11, 0, 0, last])
    }

    fn ways<const N: usize>(ways: [(u8, Option<Obstacle>); N]) -> BTreeMap<IpAddr, Option<Obstacle>> {
        ways.into_iter().map(|(last, obstacle)| (ip(last), obstacle)).collect()
    }

    #[test]
    fn what_lasts_is_told_once_and_again_when_it_changes_or_is_over() {
        let mut tale = Tale::default();
        let state = || ways([(1, Some(Obstacle::NoRoute)), (2, None), (3, Some(Obstacle::NoRoute))]);
        assert_eq!(tale.compare(state()), [], "it may be over in a moment");
        assert_eq!(tale.compare(state()), [News::Stack(Obstacle::NoRoute, vec![ip(1), ip(3)])]);
        assert_eq!(tale.compare(state()), []);
        let report = tale.report();
        assert_eq!((report.reached, report.by_stack.len()), (1, 2));
        assert!(report.by_stack[0].reason.contains("no route"), "{report:?}");

        let bare = || Obstacle::Bare("veth1".to_owned());
        let state = || ways([(1, Some(bare())), (2, None), (3, Some(Obstacle::NoRoute))]);
        assert_eq!(tale.compare(state()), []);
        assert_eq!(tale.compare(state()), [News::Stack(bare(), vec![ip(1)])]);
        // The second is gone, and what was told of the third is as well: it has left.
        assert_eq!(tale.compare(ways([(1, None)])), [News::Direct(vec![ip(1)])]);
        assert_eq!(tale.compare(ways([(1, None)])), []);
        assert_eq!(tale.report(), DirectDelivery { reached: 1, by_stack: Vec::new() });
    }

    #[test]
    fn a_link_that_comes_a_moment_after_its_pod_is_not_worth_a_line() {
        let mut tale = Tale::default();
        assert_eq!(tale.compare(ways([(1, Some(Obstacle::NoRoute))])), []);
        assert_eq!(tale.compare(ways([(1, Some(Obstacle::Bare("veth1".to_owned())))])), []);
        assert_eq!(tale.compare(ways([(1, None)])), []);
        assert_eq!(tale.compare(ways([(1, Some(Obstacle::NoRoute))])), [], "the link goes first");
        assert_eq!(tale.compare(ways([])), []);
    }

    #[test]
    fn a_line_names_a_few_pods() {
        let pods: Vec<IpAddr> = (1..=7).map(ip).collect();
        assert_eq!(list(&pods[..2]), "11.0.0.1, 11.0.0.2");
        assert!(list(&pods).ends_with("11.0.0.5 and 2 more"));
    }
}
