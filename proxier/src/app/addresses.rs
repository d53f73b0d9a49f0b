//! The addresses of this node's interfaces. Asks the kernel once; when to ask again is the caller's business.

use std::net::IpAddr;

use anyhow::Context as _;
use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    net::if_::InterfaceFlags,
    sys::socket::SockaddrStorage,
};

use crate::desired::LocalAddresses;

/// Where kube-proxy's IPVS mode keeps what is none of the node's own.
const IPVS: &str = "kube-ipvs0";

/// Every address of every interface.
///
/// # Errors
///
/// The kernel would not list them.
pub(super) fn of_this_node() -> anyhow::Result<LocalAddresses> {
    let interfaces =
        getifaddrs().context("the addresses of this node's interfaces cannot be listed (netlink)")?;
    Ok(of_interfaces(interfaces))
}

fn of_interfaces(interfaces: impl IntoIterator<Item = InterfaceAddress>) -> LocalAddresses {
    let mut addresses = LocalAddresses::default();
    for interface in interfaces {
        // kube-proxy's IPVS mode puts the addresses of all Services there.
        if interface.interface_name == IPVS {
            continue;
        }
        addresses.broadcasts.extend(interface.broadcast.as_ref().and_then(ip));
        let Some(address) = interface.address.as_ref().and_then(ip) else { continue };
        // BGP speakers announce what they find on `lo`, so that is where people put an external address to attract its
        // traffic. Packets for it come in by an uplink, and there they are for the Service.
        let attracts = interface.flags.contains(InterfaceFlags::IFF_LOOPBACK) && !address.is_loopback();
        let kind = if attracts { &mut addresses.attracting } else { &mut addresses.identities };
        kind.insert(address);
    }
    addresses
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike as _};

    use super::*;

    fn storage(address: &str) -> Option<SockaddrStorage> {
        let storage = |address: &dyn nix::sys::socket::SockaddrLike| {
            // SAFETY: the pointer and the length are those of an address that lives until the end of the function.
            unsafe { SockaddrStorage::from_raw(address.as_ptr(), Some(address.len())) }
        };
        match address.parse().unwrap() {
            std::net::SocketAddr::V4(v4) => storage(&SockaddrIn::from(v4)),
            std::net::SocketAddr::V6(v6) => storage(&SockaddrIn6::from(v6)),
        }
    }

    fn interface(flags: InterfaceFlags, address: &str) -> InterfaceAddress {
        InterfaceAddress {
            interface_name: "any".to_owned(),
            flags,
            address: storage(address),
            netmask: None,
            broadcast: None,
            destination: None,
        }
    }

    #[test]
    fn an_external_address_on_lo_attracts_traffic_and_is_no_address_of_the_node() {
        let (lo, other) = (InterfaceFlags::IFF_LOOPBACK, InterfaceFlags::IFF_BROADCAST);
        for (flags, address, counts) in [
            (other, "192.168.1.1:0", true),
            (other, "[fd00::1]:0", true),
            (lo, "10.0.0.55:0", false),
            (lo, "[1000::55]:0", false),
            (lo, "127.0.0.1:0", true),
            (lo, "127.8.0.1:0", true),
            (lo, "[::1]:0", true),
        ] {
            let interface = interface(flags, address);
            let expected = address.parse::<std::net::SocketAddr>().unwrap().ip();
            let LocalAddresses { identities, attracting, broadcasts } = of_interfaces([interface]);
            assert_eq!(broadcasts, [].into());
            let (there, elsewhere) = if counts { (identities, attracting) } else { (attracting, identities) };
            assert_eq!(there, [expected].into(), "{address} with {flags:?}");
            assert_eq!(elsewhere, [].into(), "{address} with {flags:?}");
        }
    }

    #[test]
    fn what_kube_proxy_keeps_for_ipvs_is_none_of_the_nodes_own() {
        let ipvs = InterfaceAddress {
            interface_name: IPVS.to_owned(),
            ..interface(InterfaceFlags::IFF_BROADCAST, "10.0.0.55:0")
        };
        assert_eq!(of_interfaces([ipvs]), LocalAddresses::default());
    }

    #[test]
    fn the_broadcast_address_of_an_interfaces_network_is_none_of_the_nodes_own_and_known() {
        let interface = InterfaceAddress {
            broadcast: storage("192.168.1.255:0"),
            ..interface(InterfaceFlags::IFF_BROADCAST, "192.168.1.1:0")
        };
        let expected = |address: &str| [address.parse().unwrap()].into();
        let LocalAddresses { identities, attracting, broadcasts } = of_interfaces([interface]);
        assert_eq!(
            (identities, attracting, broadcasts),
            (expected("192.168.1.1"), [].into(), expected("192.168.1.255"))
        );
    }

    #[test]
    fn an_interface_without_an_address_has_none() {
        let interface =
            InterfaceAddress { address: None, ..interface(InterfaceFlags::IFF_BROADCAST, "192.0.2.1:0") };
        assert_eq!(of_interfaces([interface]), LocalAddresses::default());
    }
}
