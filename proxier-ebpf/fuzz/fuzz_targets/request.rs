//! See `proxier_fuzz::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxier_fuzz::request(data));
