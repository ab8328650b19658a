//! The loader's tests with the fuzzer's bytes as the image: it is loaded into RAM that checks every
//! write, or refused with one line.
#![no_main]
#![allow(dead_code, unused_imports, reason = "the tests use more of it")]

#[path = "../../tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = common::assert_loads_or_refuses(data);
});
