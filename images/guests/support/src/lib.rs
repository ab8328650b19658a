//! What our guests share: entry from the loader, console, traps, checks and page tables.
//!
//! A guest owns its whole machine and exists to try it out, so its addresses, control registers and
//! descriptors are test data. The functions here are therefore safe to call although a wrong value
//! can crash the guest: that is what the checks are for. All `unsafe` is in this crate; its SAFETY
//! comments rest on three facts:
//!
//! 1. There is one processor and no interrupt is enabled, so nothing runs beside us. (Where
//!    [`interrupts`] lets interrupts in, only its handler runs, which touches nothing but its own counters. Where [`smp`] starts more processors, they share
//!    only atomics, and `Global`s that nobody writes any more.)
//! 2. The first 32 MiB are identity-mapped whenever paging is on; the image lies below
//!    [`memory::FREE_START`], and tests write only at or above it or in their own windows.
//! 3. Every exception lands in [`trap`], which comes back to the innermost [`trap::catch`].
//!
//! Manuals: Intel SDM revision 085, AMD APM volume 2 revision 24593.

#![no_std]

pub mod apic;
pub mod boot;
pub mod check;
pub mod console;
pub mod cpu;
pub mod entry;
pub mod exceptions;
pub mod firmware;
pub mod hello;
#[cfg(target_arch = "x86_64")]
pub mod interrupts;
pub mod memory;
pub mod mmio;
pub mod paging;
#[cfg(target_arch = "x86_64")]
pub mod registers;
#[cfg(target_arch = "x86_64")]
pub mod smp;
#[cfg(target_arch = "x86_64")]
pub mod sparse;
pub mod tables;
pub mod trap;
pub mod user;

pub use boot::BootInfo;
pub use check::Checks;
