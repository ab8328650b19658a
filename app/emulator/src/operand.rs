//! Operands that are registers, immediates or memory.

use umbra_vcpu::instruction::general_register;
use umbra_vcpu::instruction::iced_x86::{Instruction, OpKind, Register};

use crate::address::{self, Place, memory_operand, segment_register};
use crate::environment::{Environment, Intent, Processor, Stop};
use crate::size::Size;

/// Where an integer operand is, after every check.
#[derive(Clone, Copy, Debug)]
pub enum Location {
    /// A general register, or a part of one.
    Register(Register),
    /// Memory.
    Memory(Place),
    /// The value itself.
    Immediate(u64),
}

/// The size of operand `index`.
pub fn size(instruction: &Instruction, index: u32) -> Option<Size> {
    match instruction.op_kind(index) {
        OpKind::Register => Size::from_bytes(instruction.op_register(index).size()),
        OpKind::Memory => Size::from_bytes(instruction.memory_size().size()),
        _ => None,
    }
}

/// Finds operand `index`, of size `size`, for an access with `intent`.
///
/// # Errors
/// [`Stop::Exception`] if its memory cannot be accessed, [`Stop::Unsupported`] if it is of another
/// kind.
pub fn locate<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    index: u32,
    size: Size,
    intent: Intent,
) -> Result<Location, Stop<E::Failure>> {
    match instruction.op_kind(index) {
        OpKind::Register => {
            let register = instruction.op_register(index);
            general_register(register).ok_or(Stop::Unsupported)?;
            Ok(Location::Register(register))
        }
        OpKind::Memory => {
            let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
            address::resolve(environment, operand, size.bytes(), intent).map(Location::Memory)
        }
        _ => {
            let value = instruction
                .try_immediate(index)
                .map_err(|_| Stop::Unsupported)?;
            Ok(Location::Immediate(value & size.mask()))
        }
    }
}

/// The value at a location.
///
/// # Errors
/// [`Stop::Failed`] only.
pub fn read<E: Environment>(
    environment: &mut E,
    location: &Location,
    size: Size,
) -> Result<u64, Stop<E::Failure>> {
    match location {
        Location::Register(register) => Ok(register_value(environment, *register)),
        Location::Memory(place) => read_memory(environment, place, size),
        Location::Immediate(value) => Ok(*value),
    }
}

/// Sets the value at a location, which is no immediate.
///
/// # Errors
/// [`Stop::Failed`] only.
pub fn write<E: Environment>(
    environment: &mut E,
    location: &Location,
    size: Size,
    value: u64,
) -> Result<(), Stop<E::Failure>> {
    match location {
        Location::Register(register) => {
            set_register(environment, *register, value);
            Ok(())
        }
        Location::Memory(place) => {
            address::store(environment, place, &value.to_le_bytes()[..size.bytes()])
        }
        Location::Immediate(_) => Err(Stop::Unsupported),
    }
}

/// The integer in a place.
///
/// # Errors
/// [`Stop::Failed`] only.
pub fn read_memory<E: Environment>(
    environment: &mut E,
    place: &Place,
    size: Size,
) -> Result<u64, Stop<E::Failure>> {
    let mut bytes = [0; 8];
    address::load(environment, place, &mut bytes[..size.bytes()])?;
    Ok(u64::from_le_bytes(bytes))
}

/// The value of a general register of any size; zero for any other register.
pub fn register_value<P: Processor>(processor: &P, register: Register) -> u64 {
    let Some(full) = general_register(register) else {
        return 0;
    };
    let value = processor.registers().get(full);
    match register.size() {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => value & 0xffff,
        _ if is_high_byte(register) => value >> 8 & 0xff,
        _ => value & 0xff,
    }
}

/// Sets a general register of any size as an instruction with that operand does.
pub fn set_register<P: Processor>(processor: &mut P, register: Register, value: u64) {
    let Some(full) = general_register(register) else {
        return;
    };
    let old = processor.registers().get(full);
    let new = match register.size() {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => old & !0xffff | value & 0xffff,
        _ if is_high_byte(register) => old & !0xff00 | (value & 0xff) << 8,
        _ => old & !0xff | value & 0xff,
    };
    processor.registers_mut().set(full, new);
}

/// The selector in a segment register.
pub fn selector<P: Processor>(processor: &P, register: Register) -> Option<u64> {
    let segment = processor.segment(segment_register(register)?);
    Some(segment.selector.into())
}

const fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
}
