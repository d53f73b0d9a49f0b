//! See `proxier_fuzz::conversation`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxier_fuzz::conversation(data));
