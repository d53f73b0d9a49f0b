//! Every entry of a hash map, bucket by bucket (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6), for which aya has no call.
//!
//! Going from key to key starts again at the beginning whenever the key that it stands at has gone meanwhile: of a full table
//! under load entries come twice, and the end may never come. Buckets stay where they are, and a thousand entries take one
//! call of the kernel.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use aya::Pod;

/// How many entries are read at once. A bucket of a hash map holds one on average, and all of one have to fit.
const AT_ONCE: u32 = 1024;

/// The part of `union bpf_attr` for BPF_MAP_LOOKUP_BATCH (linux/bpf.h).
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The entries. Those that come and go meanwhile may be there or not; all others are there once.
pub(super) struct Entries<'map, K: Pod, V: Pod> {
    map: BorrowedFd<'map>,
    /// The bucket to go on at; none at the beginning.
    bucket: Option<u32>,
    keys: Vec<MaybeUninit<K>>,
    values: Vec<MaybeUninit<V>>,
    /// Entries of the last batch that have not been handed out.
    left: std::ops::Range<usize>,
    over: bool,
}

impl<'map, K: Pod, V: Pod> Entries<'map, K, V> {
    /// The entries of `map`.
    ///
    /// # Safety
    ///
    /// `map` is a hash map, LRU or not, whose keys have the size of `K` and whose values have the size of `V`.
    pub(super) unsafe fn of(map: BorrowedFd<'map>) -> Self {
        let (keys, values) = (Vec::new(), Vec::new());
        Self { map, bucket: None, keys, values, left: 0..0, over: false }
    }

    /// Reads the next batch.
    fn read(&mut self) -> io::Result<()> {
        const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
        self.keys.resize(AT_ONCE as usize, MaybeUninit::uninit());
        self.values.resize(AT_ONCE as usize, MaybeUninit::uninit());
        let mut next_bucket = 0_u32;
        let mut batch = Batch {
            in_batch: self.bucket.as_ref().map_or(0, |bucket| std::ptr::from_ref(bucket) as u64),
            out_batch: &raw mut next_bucket as u64,
            keys: self.keys.as_mut_ptr() as u64,
            values: self.values.as_mut_ptr() as u64,
            count: AT_ONCE,
            map_fd: self.map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the attributes are laid out as the kernel expects. Its pointers cover live memory: two numbers of a bucket,
        // and room for `count` keys and values of the map's sizes, as `of` demands.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut batch, size_of::<Batch>()) };
        if result != 0 {
            let error = io::Error::last_os_error();
            // The last batch, which has entries or not.
            self.over = error.kind() == io::ErrorKind::NotFound;
            if !self.over {
                return Err(error);
            }
        }
        self.bucket = Some(next_bucket);
        self.left = 0..batch.count as usize;
        Ok(())
    }
}

impl<K: Pod, V: Pod> Iterator for Entries<'_, K, V> {
    type Item = io::Result<(K, V)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(at) = self.left.next() {
                // SAFETY: the kernel has written the keys before `left.end`.
                let key = unsafe { self.keys[at].assume_init() };
                // SAFETY: as the keys.
                let value = unsafe { self.values[at].assume_init() };
                return Some(Ok((key, value)));
            }
            if self.over {
                return None;
            }
            if let Err(error) = self.read() {
                self.over = true;
                return Some(Err(error));
            }
        }
    }
}
