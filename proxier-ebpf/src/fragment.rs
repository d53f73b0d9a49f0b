//! Fragments: only the first one has the transport header, and what it led to holds for the rest of the packet.

use proxier_common::{Address, FragmentKey, FragmentValue, timeout::SECOND};

use crate::{
    family::{Family, Payload},
    tables::Tables,
};

/// How long the rest of a fragmented packet may take: a receiver gives up after 60 s (RFC 8200, section 4.5).
const TIMEOUT: u64 = 60 * SECOND;

/// Which packet a fragment is of, whose address `local` is to be replaced. Both addresses as they came. `delivery` is as
/// [`FragmentKey::delivery`].
#[inline(always)]
pub(crate) fn key<F: Family>(local: Address, peer: Address, payload: &Payload, delivery: u8) -> FragmentKey {
    FragmentKey {
        local,
        peer,
        identification: payload.identification,
        protocol: F::fragment_protocol(payload),
        delivery,
        padding: [0; 2],
    }
}

/// Finds what the first fragment's address became. `false` if it was not ours, or has not passed yet.
#[inline(always)]
pub(crate) fn find<T: Tables>(tables: &T, key: &FragmentKey, address: &mut Address) -> bool {
    match tables.fragment(key) {
        Some(fragment) if tables.now().saturating_sub(fragment.seen) <= TIMEOUT => {
            *address = fragment.address;
            true
        }
        _ => false,
    }
}

/// Remembers what the first fragment's address became.
#[inline(always)]
pub(crate) fn remember<T: Tables>(tables: &T, key: &FragmentKey, address: Address) {
    tables.put_fragment(key, &FragmentValue { address, seen: tables.now() });
}
