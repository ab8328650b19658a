//! The processor's mode and privilege, and the registers that follow from them.

use umbra_vcpu::event::Exception;
use umbra_vcpu::registers::SegmentRegister;
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::model_specific::EferFlags;
use x86_64::registers::rflags::RFlags;

use crate::environment::Processor;

/// How segment registers are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CR0.PE is clear.
    Real,
    /// RFLAGS.VM is set.
    Virtual8086,
    /// Everything else, IA-32e mode among it.
    Protected,
}

/// The mode that the processor is in.
pub fn mode<P: Processor>(processor: &P) -> Mode {
    if processor.control_registers().cr0 & Cr0Flags::PROTECTED_MODE_ENABLE.bits() == 0 {
        Mode::Real
    } else if processor.registers().rflags & RFlags::VIRTUAL_8086_MODE.bits() != 0 {
        Mode::Virtual8086
    } else {
        Mode::Protected
    }
}

/// Whether IA-32e mode is active.
pub fn is_long_mode<P: Processor>(processor: &P) -> bool {
    processor.control_registers().efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0
}

/// The current privilege level.
pub fn level<P: Processor>(processor: &P) -> u8 {
    match mode(processor) {
        Mode::Real => 0,
        Mode::Virtual8086 => 3,
        Mode::Protected => processor.segment(SegmentRegister::Ss).privilege_level(),
    }
}

/// RFLAGS.IOPL.
pub fn io_level(rflags: u64) -> u8 {
    ((rflags >> 12) & 3) as u8
}

/// #GP(0) unless the privilege level is 0.
pub fn require_supervisor<P: Processor>(processor: &P) -> Result<(), Exception> {
    if level(processor) == 0 {
        Ok(())
    } else {
        Err(Exception::GENERAL_PROTECTION)
    }
}

/// #GP(0) in virtual-8086 mode below IOPL 3, for the instructions that such code must leave to its
/// monitor.
pub fn require_io_level_in_virtual_8086<P: Processor>(processor: &P) -> Result<(), Exception> {
    if mode(processor) == Mode::Virtual8086 && io_level(processor.registers().rflags) < 3 {
        Err(Exception::GENERAL_PROTECTION)
    } else {
        Ok(())
    }
}

/// #UD outside protected mode.
pub fn require_protected<P: Processor>(processor: &P) -> Result<(), Exception> {
    if mode(processor) == Mode::Protected {
        Ok(())
    } else {
        Err(Exception::INVALID_OPCODE)
    }
}

/// #GP(0) where CR4.UMIP hides system registers from user code.
pub fn check_user_mode_prevention<P: Processor>(processor: &P) -> Result<(), Exception> {
    let prevents =
        processor.control_registers().cr4 & Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION.bits() != 0;
    if prevents && level(processor) != 0 {
        Err(Exception::GENERAL_PROTECTION)
    } else {
        Ok(())
    }
}
