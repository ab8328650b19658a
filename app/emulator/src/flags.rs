//! RFLAGS as a whole: PUSHF, POPF, IRET, and the instructions for single flags.

use umbra_vcpu::event::{Blocking, Exception};
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic};
use x86_64::registers::control::Cr4Flags;
use x86_64::registers::rflags::RFlags;

use crate::environment::{Environment, Processor, Stop};
use crate::mode::{self, Mode, io_level, level, mode};
use crate::size::Size;
use crate::stack;

/// Bit 1 is always set.
pub const FIXED: u64 = 1 << 1;
/// Every bit that means something.
pub const DEFINED: u64 = 0x3f_7fd5;

const INTERRUPT: u64 = RFlags::INTERRUPT_FLAG.bits();
const IO_LEVEL: u64 = 3 << 12;
const VIRTUAL_8086: u64 = RFlags::VIRTUAL_8086_MODE.bits();
const RESUME: u64 = RFlags::RESUME_FLAG.bits();
const VIRTUAL_INTERRUPT: u64 = 1 << 19 | 1 << 20;

/// Which instruction loads the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loader {
    /// POPF, which clears RF.
    Pop,
    /// IRET, which loads it.
    InterruptReturn,
}

/// RFLAGS once `value` was loaded with the rights of the current level (SDM vol. 2B "POPF", vol. 2A
/// "IRET").
pub fn loaded<P: Processor>(processor: &P, value: u64, size: Size, loader: Loader) -> u64 {
    let old = processor.registers().rflags;
    let current = level(processor);
    let mut changed = DEFINED & !(VIRTUAL_8086 | VIRTUAL_INTERRUPT);
    let value = match loader {
        Loader::Pop => value & !RESUME,
        Loader::InterruptReturn => value,
    };
    if current == 0 {
        if loader == Loader::InterruptReturn && mode(processor) == Mode::Protected {
            changed |= VIRTUAL_INTERRUPT;
        }
    } else {
        changed &= !IO_LEVEL;
        if current > io_level(old) {
            changed &= !INTERRUPT;
        }
    }
    if size == Size::Word {
        changed &= 0xffff;
    }
    old & !changed | value & changed | FIXED
}

/// Loads RFLAGS.
pub fn load<P: Processor>(processor: &mut P, value: u64, size: Size, loader: Loader) {
    let new = loaded(processor, value, size, loader);
    processor.registers_mut().rflags = new;
}

/// PUSHF.
pub fn push<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    mode::require_io_level_in_virtual_8086(environment)?;
    let size = stack::element(instruction)?;
    let value = environment.registers().rflags & !(VIRTUAL_8086 | RESUME);
    stack::push_all(environment, size, &[value])
}

/// POPF.
pub fn pop<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    mode::require_io_level_in_virtual_8086(environment)?;
    let size = stack::element(instruction)?;
    let value = stack::pop_value(environment, size)?;
    load(environment, value, size, Loader::Pop);
    Ok(())
}

/// CLC, STC, CMC, CLD, STD, CLI and STI.
pub fn change<E: Environment>(
    environment: &mut E,
    mnemonic: Mnemonic,
) -> Result<(), Stop<E::Failure>> {
    let carry = RFlags::CARRY_FLAG.bits();
    let direction = RFlags::DIRECTION_FLAG.bits();
    if matches!(mnemonic, Mnemonic::Cli | Mnemonic::Sti) {
        return change_interrupts(environment, mnemonic);
    }
    let rflags = &mut environment.registers_mut().rflags;
    match mnemonic {
        Mnemonic::Clc => *rflags &= !carry,
        Mnemonic::Stc => *rflags |= carry,
        Mnemonic::Cmc => *rflags ^= carry,
        Mnemonic::Cld => *rflags &= !direction,
        _ => *rflags |= direction,
    }
    Ok(())
}

fn change_interrupts<E: Environment>(
    environment: &mut E,
    mnemonic: Mnemonic,
) -> Result<(), Stop<E::Failure>> {
    let rflags = environment.registers().rflags;
    if level(environment) > io_level(rflags) {
        let cr4 = Cr4Flags::from_bits_retain(environment.control_registers().cr4);
        let virtual_flag = if mode(environment) == Mode::Virtual8086 {
            Cr4Flags::VIRTUAL_8086_MODE_EXTENSIONS
        } else {
            Cr4Flags::PROTECTED_MODE_VIRTUAL_INTERRUPTS
        };
        // VIF is the processor's affair.
        return Err(if cr4.contains(virtual_flag) {
            Stop::Unsupported
        } else {
            Exception::GENERAL_PROTECTION.into()
        });
    }
    if mnemonic == Mnemonic::Cli {
        environment.registers_mut().rflags &= !INTERRUPT;
    } else {
        environment.registers_mut().rflags |= INTERRUPT;
        if rflags & INTERRUPT == 0 {
            environment.block_interrupts(Blocking::Sti);
        }
    }
    Ok(())
}
