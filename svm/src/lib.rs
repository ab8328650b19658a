//! AMD SVM behind [`umbra_vcpu`], without nested paging (APM vol. 2 chapter 15, publication 24593).
//!
//! [`Core::enable`] switches SVM on; each [`SvmVcpu`] made from the core is one guest processor. The
//! guest runs on the shadow tables that [`umbra_vcpu::Vcpu::set_shadow_paging`] names; the VMCB's
//! CR0, CR3, CR4 and EFER are the hardware's, and the guest's own values are kept beside it.
//!
//! Protocol: a core and its vCPUs stay on the host core where they were made. `run` is the only
//! function that enters a guest.
//!
//! Emulators without NRIPS and decode assists are first-class here: lengths and operands come from
//! the instruction bytes where the processor does not give them. What QEMU 7.2's emulation lacks:
//!
//! - no XSETBV intercept: XCR0 is read back after each exit of a guest that uses XSAVE;
//! - breakpoints are armed by MOV to DR7 only: `entry` writes DR7 on both sides of VMRUN;
//! - an injected exception is forgotten when its delivery faults: see `prepare_events`;
//! - no task-switch intercept: a guest outside long mode can load CR3 from a task-state segment.
//!   The driver notices at the next exit and ends the guest, but between the two the guest has run
//!   on tables of its own choice. Under that emulator, guests are not contained.
#![no_std]

extern crate alloc;

pub mod capability;
pub mod check;
mod core_state;
mod debug;
mod decode;
mod entry;
mod exits;
mod injection;
mod permission;
mod run;
mod vcpu;
mod vmcb;

pub use core_state::{Core, EnableError};
pub use vcpu::SvmVcpu;
