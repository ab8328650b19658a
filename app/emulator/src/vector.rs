//! Moves between XMM or MMX registers and memory; for XMM in the encodings without VEX, which keep
//! what lies above bit 127.

use umbra_vcpu::event::{Exception, vector as exception_vector};
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86_64::registers::control::Cr0Flags;

use crate::address::{self, memory_operand};
use crate::environment::{Environment, Intent, Processor, Stop};

/// How memory and register meet.
#[derive(Clone, Copy)]
struct Move {
    bytes: usize,
    /// Which byte of the register meets memory's first.
    at: usize,
    alignment: Alignment,
    /// What becomes of the register's other bytes on a load.
    others: Others,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Alignment {
    Any,
    Natural,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Others {
    Kept,
    Zeroed,
}

fn kind(mnemonic: Mnemonic) -> Option<Move> {
    use Mnemonic as M;
    let (bytes, at, alignment, others) = match mnemonic {
        M::Movdqa | M::Movaps | M::Movapd | M::Movntdq | M::Movntdqa | M::Movntps | M::Movntpd => {
            (16, 0, Alignment::Natural, Others::Zeroed)
        }
        M::Movdqu | M::Movups | M::Movupd | M::Lddqu => (16, 0, Alignment::Any, Others::Zeroed),
        M::Movd | M::Movss => (4, 0, Alignment::Any, Others::Zeroed),
        M::Movq | M::Movsd | M::Movntq => (8, 0, Alignment::Any, Others::Zeroed),
        M::Movlps | M::Movlpd => (8, 0, Alignment::Any, Others::Kept),
        M::Movhps | M::Movhpd => (8, 8, Alignment::Any, Others::Kept),
        _ => return None,
    };
    Some(Move {
        bytes,
        at,
        alignment,
        others,
    })
}

/// The number of an XMM register.
fn vector_index(register: Register) -> Option<u8> {
    let index = (register as usize).checked_sub(Register::XMM0 as usize)?;
    u8::try_from(index).ok().filter(|&index| index < 16)
}

/// Carries out a move between memory and an XMM register; what is none is unsupported.
pub fn execute<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let kind = kind(instruction.mnemonic()).ok_or(Stop::Unsupported)?;
    let (register, intent) = match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Memory) => (instruction.op0_register(), Intent::Read),
        (OpKind::Memory, OpKind::Register) => (instruction.op1_register(), Intent::Write),
        _ => return Err(Stop::Unsupported),
    };
    if register.is_mm() {
        return move_mmx(environment, instruction, register, intent);
    }
    let index = vector_index(register).ok_or(Stop::Unsupported)?;
    if instruction.memory_size().size() != kind.bytes {
        return Err(Stop::Unsupported);
    }
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    if kind.alignment == Alignment::Natural {
        address::check_alignment(environment, operand, kind.bytes)?;
    }
    let place = address::resolve(environment, operand, kind.bytes, intent)?;
    let mut value = environment.vector_register(index).to_le_bytes();
    let part = kind.at..kind.at + kind.bytes;
    match intent {
        Intent::Write => address::store(environment, &place, &value[part]),
        Intent::Read => {
            if kind.others == Others::Zeroed {
                value = [0; 16];
            }
            address::load(environment, &place, &mut value[part])?;
            environment.set_vector_register(index, u128::from_le_bytes(value));
            Ok(())
        }
    }
}

/// MOVD, MOVQ and MOVNTQ between memory and an MMX register.
fn move_mmx<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    register: Register,
    intent: Intent,
) -> Result<(), Stop<E::Failure>> {
    let index = (register as usize - Register::MM0 as usize) as u8;
    let bytes = instruction.memory_size().size();
    if !matches!(bytes, 4 | 8) {
        return Err(Stop::Unsupported);
    }
    let cr0 = environment.control_registers().cr0;
    if cr0 & Cr0Flags::EMULATE_COPROCESSOR.bits() != 0 {
        return Err(Exception::INVALID_OPCODE.into());
    }
    check_x87(environment)?;
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let place = address::resolve(environment, operand, bytes, intent)?;
    let mut value = [0; 8];
    if intent == Intent::Write {
        let stored = environment.mmx_register(index);
        // Even a store makes the x87 registers MMX registers.
        environment.set_mmx_register(index, stored);
        value = stored.to_le_bytes();
        return address::store(environment, &place, &value[..bytes]);
    }
    address::load(environment, &place, &mut value[..bytes])?;
    environment.set_mmx_register(index, u64::from_le_bytes(value));
    Ok(())
}

/// #NM while CR0.TS or CR0.EM keeps x87 instructions away.
pub fn check_x87<P: Processor>(processor: &P) -> Result<(), Exception> {
    let away = Cr0Flags::TASK_SWITCHED | Cr0Flags::EMULATE_COPROCESSOR;
    if processor.control_registers().cr0 & away.bits() == 0 {
        Ok(())
    } else {
        Err(Exception::new(exception_vector::DEVICE_NOT_AVAILABLE))
    }
}
