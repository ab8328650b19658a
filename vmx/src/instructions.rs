//! The VMX instructions, and access to the fields of the current VMCS.
//!
//! Protocol: [`CurrentVmcs`] exists only while its VMCS is the core's current one and interrupts
//! are off, so nothing else on this core can make another VMCS current in between.

use core::arch::asm;
use core::marker::PhantomData;

use umbra_vcpu::address::{Gva, Hpa};

use crate::fields::{Field, ReadWrite, Width};

/// A VMX instruction failed: the flags said VMfailInvalid or VMfailValid (SDM vol. 3C 31.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmFail;

/// Runs one VMX instruction with an operand in memory and turns its flags into a result.
macro_rules! vmx_instruction {
    ($text:literal, $($operands:tt)*) => {{
        let failed: u8;
        asm!($text, "setbe {failed}", failed = lateout(reg_byte) failed, $($operands)*);
        if failed == 0 { Ok(()) } else { Err(VmFail) }
    }};
}

/// Enters VMX operation.
///
/// # Safety
/// Ring 0, CR4.VMXE set, CR0 and CR4 with VMX's fixed bits; `region` is a page that begins with the
/// revision identifier and is left alone until [`vmxoff`].
pub unsafe fn vmxon(region: Hpa) -> Result<(), VmFail> {
    let operand = region.as_u64();
    // SAFETY: the caller's promise; the operand is read only.
    unsafe {
        vmx_instruction!("vmxon [{operand}]", operand = in(reg) &raw const operand, options(nostack))
    }
}

/// Leaves VMX operation.
///
/// # Safety
/// The core is in VMX operation, and no VMCS of it is used any more.
pub unsafe fn vmxoff() {
    // SAFETY: the caller's promise.
    unsafe { asm!("vmxoff", options(nostack)) };
}

/// Writes a VMCS back to memory and marks it as not launched.
///
/// # Safety
/// The core is in VMX operation; `vmcs` is a page that the caller owns.
pub unsafe fn vmclear(vmcs: Hpa) -> Result<(), VmFail> {
    let operand = vmcs.as_u64();
    // SAFETY: the caller's promise; the operand is read only.
    unsafe {
        vmx_instruction!("vmclear [{operand}]", operand = in(reg) &raw const operand, options(nostack))
    }
}

/// Makes a VMCS the current one.
///
/// # Safety
/// The core is in VMX operation; `vmcs` is a page that has been through [`vmclear`] on the core
/// that used it last, and that stays allocated while it is current.
pub unsafe fn vmptrld(vmcs: Hpa) -> Result<(), VmFail> {
    let operand = vmcs.as_u64();
    // SAFETY: the caller's promise; the operand is read only.
    unsafe {
        vmx_instruction!("vmptrld [{operand}]", operand = in(reg) &raw const operand, options(nostack))
    }
}

/// What [`invvpid`] drops (SDM vol. 3C 31.3, INVVPID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invvpid {
    /// The translations of one linear address.
    IndividualAddress(Gva),
    /// All translations of the identifier.
    SingleContext,
}

/// Drops translations that are tagged with `vpid`.
///
/// # Safety
/// The core is in VMX operation and has the requested type of INVVPID.
pub unsafe fn invvpid(vpid: u16, what: Invvpid) -> Result<(), VmFail> {
    let (kind, address) = match what {
        Invvpid::IndividualAddress(address) => (0_u64, address.as_u64()),
        Invvpid::SingleContext => (1, 0),
    };
    let descriptor = [u64::from(vpid), address];
    // SAFETY: the caller's promise; the descriptor is read only.
    unsafe {
        vmx_instruction!(
            "invvpid {kind}, [{descriptor}]",
            kind = in(reg) kind,
            descriptor = in(reg) &raw const descriptor,
            options(nostack)
        )
    }
}

/// The VMCS that is current on this core, while interrupts are off.
#[derive(Debug)]
pub struct CurrentVmcs {
    not_send: PhantomData<*const ()>,
}

#[allow(
    clippy::unused_self,
    reason = "the token proves that a VMCS is current, which the processor knows by itself"
)]
impl CurrentVmcs {
    /// The token that stands for the current VMCS.
    ///
    /// # Safety
    /// A VMCS is current on this core and stays so, with interrupts off, while the token lives.
    pub const unsafe fn new() -> Self {
        Self {
            not_send: PhantomData,
        }
    }

    /// Reads a field.
    ///
    /// # Panics
    /// If the processor has no such field: callers ask only for fields whose controls exist.
    #[inline]
    pub fn read<W: Width, A: crate::fields::Access>(&self, field: Field<W, A>) -> W::Value {
        let value: u64;
        let result = {
            // SAFETY: a VMCS is current, so VMREAD does nothing but set registers.
            unsafe {
                vmx_instruction!(
                    "vmread {value}, {field}",
                    value = out(reg) value,
                    field = in(reg) field.encoding(),
                    options(nostack, nomem)
                )
            }
        };
        assert_field(result, "VMREAD", field.encoding());
        W::narrow(value)
    }

    /// Reads a field that every processor with VMX has, on the way of every exit: cannot fail, and is
    /// not checked.
    #[inline]
    pub fn read_certain<W: Width, A: crate::fields::Access>(&self, field: Field<W, A>) -> W::Value {
        let value: u64;
        // SAFETY: a VMCS is current, so VMREAD does nothing but set registers.
        unsafe {
            asm!(
                "vmread {value}, {field}",
                value = out(reg) value,
                field = in(reg) field.encoding(),
                options(nostack, nomem)
            );
        }
        W::narrow(value)
    }

    /// Writes a field. What a wrong value does is decided at the next VM entry, by whoever holds the
    /// `unsafe` of the entry.
    ///
    /// # Panics
    /// As [`CurrentVmcs::read`].
    #[inline]
    pub fn write<W: Width>(&self, field: Field<W, ReadWrite>, value: W::Value) {
        let result = {
            // SAFETY: a VMCS is current; VMWRITE changes nothing else.
            unsafe {
                vmx_instruction!(
                    "vmwrite {field}, {value}",
                    value = in(reg) W::widen(value),
                    field = in(reg) field.encoding(),
                    options(nostack)
                )
            }
        };
        assert_field(result, "VMWRITE", field.encoding());
    }
}

#[inline]
fn assert_field(result: Result<(), VmFail>, instruction: &str, encoding: u64) {
    assert!(
        result.is_ok(),
        "{instruction} of VMCS field {encoding:#x} failed"
    );
}
