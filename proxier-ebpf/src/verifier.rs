//! What is there for the kernel's verifier alone.

/// The same number, of at most 16 bits, but with nothing known about it.
///
/// Linux before 6.4 takes every number for one that matters in a program of several functions, and walks on from each value
/// that the paths to a place lead to: more than it has patience for. Of a number that comes back from half a word of the
/// stack it knows nothing, and all paths are one. Not from the first half: there it knows a number again that was written (5.16).
#[inline(always)]
#[must_use]
pub fn forget(number: u32) -> u32 {
    // Written at once, or the compiler would keep the half that is read, and nothing around it.
    let mut word = 0_u64;
    let halves = [0, (number & 0xffff) as u16, 0, 0];
    // SAFETY: both types have 8 bytes and every bit pattern is a valid value of both.
    let number: u64 = unsafe { core::mem::transmute::<[u16; 4], u64>(halves) };
    // SAFETY: a local variable, valid and aligned.
    unsafe { core::ptr::write_volatile(&raw mut word, number) };
    let half = (&raw const word).cast::<u16>().wrapping_add(1);
    // SAFETY: within it, aligned, and it was written just now.
    u32::from(unsafe { core::ptr::read_volatile(half) })
}

/// As [`forget`], of the truth of something.
#[inline(always)]
#[must_use]
pub fn forget_whether(truth: bool) -> bool {
    // The bit itself: to compare a number would be two paths again.
    forget(truth as u32) & 1 != 0
}
