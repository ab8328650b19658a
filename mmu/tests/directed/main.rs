//! One test for each rule, and for each mistake that shadow MMUs are known to have made.
#![allow(missing_docs, reason = "a test")]
#![allow(
    clippy::too_many_lines,
    clippy::verbose_bit_mask,
    clippy::nonminimal_bool,
    clippy::struct_excessive_bools,
    clippy::precedence,
    reason = "bits are written as the manual draws them"
)]

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod memory;
mod reclaim;
mod sharing;
mod sync;
mod tables;
