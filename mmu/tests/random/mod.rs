//! Random machines against a reference walker.
//!
//! Every access is compared with a walk of the guest's tables that knows nothing of shadows: frame,
//! fault code, accessed and dirty bits, memory. A stale translation is allowed exactly if each entry
//! it would come from was in the table at some time since this processor's last flush. After every
//! step all structures are audited. Up to three VMs share one pool.
#![allow(
    clippy::too_many_lines,
    clippy::verbose_bit_mask,
    clippy::nonminimal_bool,
    clippy::struct_excessive_bools,
    clippy::precedence,
    clippy::single_match_else,
    reason = "bits are written as the manual draws them"
)]

mod access;
pub mod encoding;
mod host;
mod reference;
pub mod scenario;
mod vm;
mod world;

pub use world::{run, run_quickly, steps_taken};
