//! Internet checksum arithmetic (RFC 1071, RFC 1624): one's complement sums of 16-bit words.
//!
//! The sum does not care about byte order as long as all words are taken in the same one, so words are taken as they
//! lie in memory.

use proxier_common::Address;

/// What a checksum gains when the IPv4 address `old` is replaced by `new`, for [`apply`] or the kernel's
/// `bpf_l4_csum_replace`.
///
/// RFC 1624, equation 3: `~m + m'`.
#[inline(always)]
#[must_use]
pub const fn v4_difference(old: Address, new: Address) -> u32 {
    // What is before the four bytes is the same in both.
    fold_to_32(halves(!old.words()[1]) + halves(new.words()[1]))
}

/// As [`v4_difference`], over all 16 bytes.
#[inline(always)]
#[must_use]
pub const fn v6_difference(old: Address, new: Address) -> u32 {
    let (old, new) = (old.words(), new.words());
    fold_to_32(halves(!old[0]) + halves(!old[1]) + halves(new[0]) + halves(new[1]))
}

/// The sum of an IPv4 pseudo-header (RFC 768), folded to 16 bits.
#[inline(always)]
#[must_use]
pub const fn v4_pseudo_header_sum(source: Address, destination: Address, protocol: u8, length: u32) -> u16 {
    // What is before the four bytes of an IPv4 address is no part of it: zeros and ones, in one half of the word.
    let (source, destination) = (source.v4_octets(), destination.v4_octets());
    let addresses = u32::from_ne_bytes(source) as u64 + u32::from_ne_bytes(destination) as u64;
    fold_to_16(addresses + protocol_and_length(protocol, length))
}

/// The sum of an IPv6 pseudo-header (RFC 8200, section 8.1), folded to 16 bits.
#[inline(always)]
#[must_use]
pub const fn v6_pseudo_header_sum(source: Address, destination: Address, protocol: u8, length: u32) -> u16 {
    let (source, destination) = (source.words(), destination.words());
    let addresses = halves(source[0]) + halves(source[1]) + halves(destination[0]) + halves(destination[1]);
    fold_to_16(addresses + protocol_and_length(protocol, length))
}

#[inline(always)]
const fn protocol_and_length(protocol: u8, length: u32) -> u64 {
    length.to_be() as u64 + (protocol as u16).to_be() as u64
}

#[inline(always)]
const fn fold_to_16(sum: u64) -> u16 {
    let sum = fold_to_32(sum);
    let sum = (sum & 0xffff) + (sum >> 16);
    (((sum & 0xffff) + (sum >> 16)) & 0xffff) as u16
}

/// The checksum field's new value: RFC 1624, equation 3, `HC' = ~(~HC + difference)`.
#[inline(always)]
#[must_use]
pub const fn apply(field: u16, difference: u32) -> u16 {
    let mut sum = !field as u32 + (difference & 0xffff) + (difference >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    // Folded twice, three 16-bit terms leave 16 bits.
    !((sum & 0xffff) as u16)
}

/// As [`apply`]; where a field of zero says that there is no checksum, none becomes zero but all ones, which is the same
/// sum (RFC 768).
#[inline(always)]
#[must_use]
pub const fn apply_as(zero_means_none: bool, field: u16, difference: u32) -> u16 {
    match apply(field, difference) {
        0 if zero_means_none => 0xffff,
        field => field,
    }
}

/// What becomes of a transport checksum that is complete. Where zero says that there is none, zero stays.
#[inline(always)]
#[must_use]
pub const fn adjust(zero_means_none: bool, field: u16, difference: u32) -> u16 {
    if zero_means_none && field == 0 { 0 } else { apply_as(zero_means_none, field, difference) }
}

/// The checksum field over words of this sum (RFC 1071).
#[inline(always)]
#[must_use]
pub const fn of_sum(sum: u64) -> u16 {
    !fold_to_16(sum)
}

/// What a checksum gains when the 16-bit word `old` becomes `new`.
#[inline(always)]
#[must_use]
pub const fn word_difference(old: u16, new: u16) -> u32 {
    !old as u32 + new as u32
}

/// The sum of a word's two halves, which the one's complement sum of its 16-bit words equals.
#[inline(always)]
const fn halves(word: u64) -> u64 {
    (word & 0xffff_ffff) + (word >> 32)
}

/// Folds the carries of up to 2^32 words back in.
#[inline(always)]
#[must_use]
pub const fn fold_to_32(sum: u64) -> u32 {
    let sum = halves(halves(sum));
    (sum & 0xffff_ffff) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 1624, section 4: a word 0x5555 becomes 0x3285 and the checksum 0xdd2f becomes 0x0000.
    #[test]
    fn the_example_of_rfc_1624_holds() {
        let mut old = Address::from_v4([0; 4]);
        let mut new = old;
        old.bytes[12..14].copy_from_slice(&0x5555u16.to_ne_bytes());
        new.bytes[12..14].copy_from_slice(&0x3285u16.to_ne_bytes());
        assert_eq!(apply(0xdd2f, v4_difference(old, new)), 0x0000);
    }

    #[test]
    fn going_back_restores_the_checksum() {
        let (a, b) = (Address::from_v6([0xab; 16]), Address::from_v6([3; 16]));
        for field in [0x0001, 0x1234, 0x8000, 0xfffe] {
            let there = apply(field, v6_difference(a, b));
            assert_eq!(apply(there, v6_difference(b, a)), field);
        }
    }
}
