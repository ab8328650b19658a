//! Intel VMX without EPT and without unrestricted guest, behind [`umbra_vcpu::Vcpu`].
//!
//! Protocol: [`host::Vmx::enable`] puts one core into VMX operation; [`vcpu::VmxVcpu`] is one guest
//! processor on that core, with a VMCS of its own. The guest runs in protected or long mode under the
//! shadow tables that it was told; real mode is refused as a failed entry. Section numbers are those
//! of the Intel SDM, revision 085.
//!
//! `unsafe` is here for three things: VMX instructions, registers that only a hypervisor touches, and
//! the entry itself. What only computes ([`controls`], [`capabilities`], [`check`], [`event`],
//! decoding in [`exit`]) is tested on an ordinary host.
#![no_std]

extern crate alloc;

mod bank;
pub mod capabilities;
pub mod check;
pub mod controls;
mod entry;
pub mod event;
pub mod exit;
pub mod fields;
pub mod host;
mod instructions;
mod msr;
mod paging;
mod real_mode;
pub mod vcpu;

pub use host::{EnableError, Vmx, probe};
pub use vcpu::VmxVcpu;
