//! The addresses of this node's interfaces, as far as taking one would cut the node off. Asks the kernel once; when to ask
//! again is the caller's business.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::Context as _;
use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    net::if_::InterfaceFlags,
};

/// Addresses that no Service may have on this node.
///
/// # Errors
///
/// The kernel would not list them.
pub(super) fn of_this_node() -> anyhow::Result<BTreeSet<IpAddr>> {
    let interfaces =
        getifaddrs().context("the addresses of this node's interfaces cannot be listed (netlink)")?;
    Ok(interfaces.filter_map(|interface| identity(&interface)).collect())
}

/// The address, if the node is reached by it.
fn identity(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    let address = address
        .as_sockaddr_in()
        .map(|v4| IpAddr::from(v4.ip()))
        .or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))?;
    // BGP speakers announce what they find on `lo`, so that is where people put an external address to attract its
    // traffic. Packets for it come in by an uplink, and there they are for the Service.
    let attracts = interface.flags.contains(InterfaceFlags::IFF_LOOPBACK) && !address.is_loopback();
    (!attracts).then_some(address)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike as _, SockaddrStorage};

    use super::*;

    fn interface(flags: InterfaceFlags, address: &str) -> InterfaceAddress {
        let storage = |address: &dyn nix::sys::socket::SockaddrLike| {
            // SAFETY: the pointer and the length are those of an address that lives until the end of the function.
            unsafe { SockaddrStorage::from_raw(address.as_ptr(), Some(address.len())) }
        };
        let address = match address.parse().unwrap() {
            std::net::SocketAddr::V4(v4) => storage(&SockaddrIn::from(v4)),
            std::net::SocketAddr::V6(v6) => storage(&SockaddrIn6::from(v6)),
        };
        InterfaceAddress {
            interface_name: "any".to_owned(),
            flags,
            address,
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
            let expected = counts.then(|| address.parse::<std::net::SocketAddr>().unwrap().ip());
            assert_eq!(identity(&interface), expected, "{address} with {flags:?}");
        }
    }

    #[test]
    fn an_interface_without_an_address_has_none() {
        let interface =
            InterfaceAddress { address: None, ..interface(InterfaceFlags::IFF_BROADCAST, "192.0.2.1:0") };
        assert_eq!(identity(&interface), None);
    }
}
