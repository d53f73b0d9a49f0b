//! What is there for the kernel's verifier alone.

/// The same number, of at most 16 bits, but with nothing known about it.
///
/// Linux before 6.4 takes every number for one that matters in a program of several functions, and walks on from each value
/// that the paths to a place lead to: more than it has patience for. Of a number that comes back from half a word of the
/// stack it knows nothing, and all paths are one.
#[inline(always)]
#[must_use]
pub fn forget(number: u32) -> u32 {
    let mut half_word = 0_u16;
    // SAFETY: a local variable, valid and aligned.
    unsafe { core::ptr::write_volatile(&raw mut half_word, (number & 0xffff) as u16) };
    // SAFETY: as above, and it was written just now.
    u32::from(unsafe { core::ptr::read_volatile(&raw const half_word) })
}

/// As [`forget`], of the truth of something.
#[inline(always)]
#[must_use]
pub fn forget_whether(truth: bool) -> bool {
    // The bit itself: to compare a number would be two paths again.
    forget(truth as u32) & 1 != 0
}
