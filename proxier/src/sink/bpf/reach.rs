//! Whether packets can go to a pod past the node's stack, and by which link: what direct delivery needs to know of the node
//! (docs/decisions/017). Pure; the routes and interfaces come from `uplinks`.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

/// A route of the node's main table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Route {
    /// Where it leads.
    pub(super) destination: IpNet,
    /// By which links; several with multiple paths.
    pub(super) links: Vec<u32>,
}

/// What a link is to direct delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) kind: Kind,
}

/// Which kind of link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The node's end of a pod's own, with the programs on it.
    OfPod,
    /// The same, without.
    OfPodBare,
    /// A bridge, with the programs on all of its ports that lead to pods.
    Bridge,
    /// A bridge with a pod's port that lacks them.
    BridgeBare,
    /// Anything else.
    Other,
}

/// How a pod is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Straight into the other end of this link.
    Peer(u32),
    /// Out by this link.
    Link(u32),
    /// Through the node's stack only.
    Stack(Obstacle),
}

/// Why a pod is not reached directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    NoRoute,
    SeveralLinks,
    Bare(String),
    NoPodLink(String),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRoute => f.write_str("no route of the main table leads to it"),
            Self::SeveralLinks => f.write_str("its route has several links"),
            Self::Bare(link) => write!(f, "the programs are not on its link {link}"),
            Self::NoPodLink(link) => {
                write!(f, "{link}, to which its route leads, is neither a pod's own link nor a bridge")
            }
        }
    }
}

/// How `pod` is reached. `has_peer_redirect`: whether the kernel has `bpf_redirect_peer` (Linux 5.10).
pub(super) fn reach(pod: IpAddr, routes: &[Route], links: &[Link], has_peer_redirect: bool) -> Reach {
    let to_pod = routes.iter().filter(|route| route.destination.contains(&pod));
    let Some(route) = to_pod.max_by_key(|route| route.destination.prefix_len()) else {
        return Reach::Stack(Obstacle::NoRoute);
    };
    let [index] = route.links[..] else {
        return Reach::Stack(Obstacle::SeveralLinks);
    };
    let Some(link) = links.iter().find(|link| link.index == index) else {
        return Reach::Stack(Obstacle::NoRoute);
    };
    match link.kind {
        Kind::OfPod if has_peer_redirect => Reach::Peer(index),
        Kind::OfPod | Kind::Bridge => Reach::Link(index),
        Kind::OfPodBare | Kind::BridgeBare => Reach::Stack(Obstacle::Bare(link.name.clone())),
        Kind::Other => Reach::Stack(Obstacle::NoPodLink(link.name.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, links: &[u32]) -> Route {
        Route { destination: destination.parse().unwrap(), links: links.to_vec() }
    }

    fn link(index: u32, kind: Kind) -> Link {
        Link { index, name: format!("link{index}"), kind }
    }

    #[test]
    fn the_most_specific_route_says_which_link_leads_to_a_pod() {
        let routes = [route("0.0.0.0/0", &[1]), route("11.0.0.0/16", &[2]), route("11.0.0.5/32", &[3])];
        let links = [link(1, Kind::Other), link(2, Kind::Bridge), link(3, Kind::OfPod)];
        let reach = |pod: &str, peer| reach(pod.parse().unwrap(), &routes, &links, peer);
        assert_eq!(reach("11.0.0.5", true), Reach::Peer(3));
        assert_eq!(reach("11.0.0.5", false), Reach::Link(3), "before Linux 5.10");
        assert_eq!(reach("11.0.0.6", true), Reach::Link(2));
        assert_eq!(reach("12.0.0.1", true), Reach::Stack(Obstacle::NoPodLink("link1".to_owned())));
        assert_eq!(reach("1100::1", true), Reach::Stack(Obstacle::NoRoute));
    }

    #[test]
    fn a_pod_whose_link_lacks_the_programs_or_is_not_one_is_reached_through_the_stack() {
        let routes = [route("11.0.0.1/32", &[1, 2]), route("11.0.0.2/32", &[2]), route("11.0.0.3/32", &[3])];
        let links = [link(1, Kind::OfPod), link(2, Kind::OfPodBare), link(3, Kind::BridgeBare)];
        let reach = |pod: &str| reach(pod.parse().unwrap(), &routes, &links, true);
        assert_eq!(reach("11.0.0.1"), Reach::Stack(Obstacle::SeveralLinks));
        assert_eq!(reach("11.0.0.2"), Reach::Stack(Obstacle::Bare("link2".to_owned())));
        assert_eq!(reach("11.0.0.3"), Reach::Stack(Obstacle::Bare("link3".to_owned())));
    }
}
