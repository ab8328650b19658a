//! Looking inside a guest: what it did last, what its page tables and shadow pages say, and why it
//! died.
//!
//! What guests are told to do is in [`monitor`]; nothing here changes a guest itself. What is looked at comes through [`GuestView`], so that all of it is
//! tested on an ordinary host.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod delivery;
mod exits;
pub mod flags;
pub mod monitor;
mod post_mortem;
mod processor;
pub mod trace;
mod verdict;
mod walk;

pub use delivery::handler_address;
pub use exits::ExitLog;
pub use post_mortem::{Death, PostMortem};
pub use processor::ProcessorState;
pub use walk::WalkText;

use umbra_mmu::Inspection;
use umbra_vcpu::address::Gva;

/// A guest's memory, as a debugger sees it.
pub trait GuestView {
    /// What guest and shadow say of `gva`.
    fn inspect(&self, gva: Gva) -> Inspection;

    /// Reads memory by linear address, whatever the guest's permissions; returns how many bytes were
    /// read before a page that is not mapped or is no RAM.
    fn read(&self, gva: Gva, buffer: &mut [u8]) -> usize;
}
