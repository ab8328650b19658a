//! The random machine of the tests, with the fuzzer's bytes as its choices.
#![no_main]
#![allow(dead_code, unused_imports, reason = "the tests use more of it")]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/random/mod.rs"]
mod random;

libfuzzer_sys::fuzz_target!(|data: &[u8]| random::run_quickly(&random::encoding::decode(data)));
