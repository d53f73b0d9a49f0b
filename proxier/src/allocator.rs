//! What the C library's allocator is told before the first thread starts: the agent shares a node with those who pay for it.

/// One arena for all threads. With one each, what the threads that read the API server's answers have freed is of no use to the
/// one that keeps the objects: a sixth more memory for ever (`cargo xtask bench control`), to save waiting that there is none of.
pub(crate) fn share_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers, and may be called at any time; this is before there are other threads.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
