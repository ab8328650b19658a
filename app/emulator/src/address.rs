//! From an operand's segment and offset to linear addresses, with segmentation's checks.
//!
//! Outside 64-bit mode: type (not in real and virtual-8086 mode), null selector and limit (SDM vol. 3A 5.3 to 5.5). In 64-bit mode: the
//! canonical form (SDM vol. 1 3.3.7.1).

use umbra_vcpu::address::{Gpa, Gva, PAGE_SIZE};
use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::instruction::general_register;
use umbra_vcpu::instruction::iced_x86::{Instruction, OpKind, Register};
use umbra_vcpu::registers::{CodeWidth, Gpr, Segment, SegmentAttributes, SegmentRegister};
use x86_64::registers::control::Cr4Flags;

use crate::environment::{Environment, Intent, Processor, Stop};
use crate::mode::{Mode, mode};

/// A segment and an offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// The segment, with overrides applied.
    pub segment: SegmentRegister,
    /// The offset, cut to the address size.
    pub offset: u64,
}

/// Memory of an operand that may be accessed: one part for each page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    first: Gpa,
    /// The bytes in the first page.
    split: usize,
    second: Gpa,
    length: usize,
}

/// The instruction's explicit memory operand.
pub fn memory_operand<P: Processor>(processor: &P, instruction: &Instruction) -> Option<Operand> {
    let index =
        (0..instruction.op_count()).find(|&index| instruction.op_kind(index) == OpKind::Memory)?;
    let registers = processor.registers();
    let offset = instruction.virtual_address(index, 0, |register, _, _| {
        if register.is_segment_register() {
            // Bases are added later.
            return Some(0);
        }
        let value = registers.get(general_register(register)?);
        Some(value & low_mask(register.size()))
    })?;
    Some(Operand {
        segment: segment(processor.code_width(), instruction)?,
        offset,
    })
}

/// The segment of the explicit memory operand.
fn segment(width: CodeWidth, instruction: &Instruction) -> Option<SegmentRegister> {
    let named = segment_register(instruction.memory_segment())?;
    if width != CodeWidth::Bits64 || matches!(named, SegmentRegister::Fs | SegmentRegister::Gs) {
        return Some(named);
    }
    // Other prefixes mean nothing there: what counts for the exception is the base register.
    let stack = matches!(
        instruction.memory_base().full_register(),
        Register::RSP | Register::RBP
    );
    Some(if stack {
        SegmentRegister::Ss
    } else {
        SegmentRegister::Ds
    })
}

/// The segment register that the decoder names.
pub const fn segment_register(register: Register) -> Option<SegmentRegister> {
    Some(match register {
        Register::ES => SegmentRegister::Es,
        Register::CS => SegmentRegister::Cs,
        Register::SS => SegmentRegister::Ss,
        Register::DS => SegmentRegister::Ds,
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        _ => return None,
    })
}

/// How wide the stack pointer is.
pub fn stack_width<P: Processor>(processor: &P) -> CodeWidth {
    if processor.code_width() == CodeWidth::Bits64 {
        CodeWidth::Bits64
    } else if processor
        .segment(SegmentRegister::Ss)
        .attributes
        .contains(SegmentAttributes::DEFAULT_32)
    {
        CodeWidth::Bits32
    } else {
        CodeWidth::Bits16
    }
}

/// A value of all ones in the given width.
pub const fn width_mask(width: CodeWidth) -> u64 {
    match width {
        CodeWidth::Bits16 => 0xffff,
        CodeWidth::Bits32 => 0xffff_ffff,
        CodeWidth::Bits64 => u64::MAX,
    }
}

const fn low_mask(bytes: usize) -> u64 {
    match bytes {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The part of a register that has the width.
pub fn part<P: Processor>(processor: &P, register: Gpr, width: CodeWidth) -> u64 {
    processor.registers().get(register) & width_mask(width)
}

/// Sets the part of a register that has the width. A 32-bit result clears the upper half, as any
/// 32-bit operation does.
pub fn set_part<P: Processor>(processor: &mut P, register: Gpr, width: CodeWidth, value: u64) {
    let old = processor.registers().get(register);
    let kept = if width == CodeWidth::Bits16 {
        old & !0xffff
    } else {
        0
    };
    let value = kept | value & width_mask(width);
    processor.registers_mut().set(register, value);
}

/// Whether an address has the form that the processor's paging mode wants.
pub fn is_canonical<P: Processor>(processor: &P, address: u64) -> bool {
    let five_levels = processor.control_registers().cr4 & Cr4Flags::L5_PAGING.bits() != 0;
    let unused = if five_levels { 64 - 57 } else { 64 - 48 };
    (address << unused).cast_signed() >> unused == address.cast_signed()
}

/// Checks an access and translates it: nothing is left that could fault.
///
/// # Errors
/// [`Stop::Exception`] with what the guest must see.
pub fn resolve<E: Environment>(
    environment: &mut E,
    operand: Operand,
    length: usize,
    intent: Intent,
) -> Result<Place, Stop<E::Failure>> {
    let linear = linear(environment, operand, length, intent)?;
    let first = environment.translate(linear, intent)?;
    let split = ((PAGE_SIZE - linear.page_offset()) as usize).min(length);
    let second = if split < length {
        let rest = linear.wrapping_add(split as u64);
        let rest = wrap(environment.code_width(), rest);
        environment.translate(rest, intent)?
    } else {
        first
    };
    Ok(Place {
        first,
        split,
        second,
        length,
    })
}

/// #GP(0) for an operand that is not aligned to `bytes`, a power of two.
///
/// # Errors
/// The exception.
pub fn check_alignment<E: Environment>(
    environment: &E,
    operand: Operand,
    bytes: usize,
) -> Result<(), Exception> {
    let linear = linear(environment, operand, bytes, Intent::Read)?;
    if linear.as_u64() % bytes as u64 == 0 {
        Ok(())
    } else {
        Err(Exception::GENERAL_PROTECTION)
    }
}

/// Reads a place into `bytes`, which are as many as it has.
pub fn load<E: Environment>(
    environment: &mut E,
    place: &Place,
    bytes: &mut [u8],
) -> Result<(), Stop<E::Failure>> {
    debug_assert_eq!(bytes.len(), place.length);
    let (first, second) = bytes.split_at_mut(place.split);
    environment.read(place.first, first)?;
    if !second.is_empty() {
        environment.read(place.second, second)?;
    }
    Ok(())
}

/// Writes `bytes`, which are as many as the place has.
pub fn store<E: Environment>(
    environment: &mut E,
    place: &Place,
    bytes: &[u8],
) -> Result<(), Stop<E::Failure>> {
    debug_assert_eq!(bytes.len(), place.length);
    let (first, second) = bytes.split_at(place.split);
    environment.write(place.first, first)?;
    if !second.is_empty() {
        environment.write(place.second, second)?;
    }
    Ok(())
}

/// The linear address of the first byte, once all of `length` bytes pass segmentation's checks.
fn linear<E: Environment>(
    environment: &E,
    operand: Operand,
    length: usize,
    intent: Intent,
) -> Result<Gva, Exception> {
    let segment = environment.segment(operand.segment);
    let last_byte = length as u64 - 1;
    let width = environment.code_width();
    if width == CodeWidth::Bits64 {
        let base = match operand.segment {
            SegmentRegister::Fs | SegmentRegister::Gs => segment.base.as_u64(),
            _ => 0,
        };
        let first = base.wrapping_add(operand.offset);
        let last = first.wrapping_add(last_byte);
        return if is_canonical(environment, first) && is_canonical(environment, last) {
            Ok(Gva::new(first))
        } else {
            Err(fault_of(operand.segment))
        };
    }
    let checks_type = mode(environment) == Mode::Protected;
    let allowed = if checks_type {
        allows(&segment, intent)
    } else {
        !segment.attributes.contains(SegmentAttributes::UNUSABLE)
    };
    if allowed && is_within(&segment, operand.offset, last_byte) {
        let linear = segment.base.wrapping_add(operand.offset);
        Ok(wrap(width, linear))
    } else {
        Err(fault_of(operand.segment))
    }
}

/// The linear address of an operand that is not accessed.
pub fn unchecked_linear<P: Processor>(processor: &P, operand: Operand) -> Gva {
    let width = processor.code_width();
    let flat = width == CodeWidth::Bits64
        && !matches!(operand.segment, SegmentRegister::Fs | SegmentRegister::Gs);
    let base = if flat {
        Gva::new(0)
    } else {
        processor.segment(operand.segment).base
    };
    wrap(width, base.wrapping_add(operand.offset))
}

/// #SS(0) for the stack segment, #GP(0) for others.
const fn fault_of(segment: SegmentRegister) -> Exception {
    match segment {
        SegmentRegister::Ss => Exception::with_error_code(vector::STACK_FAULT, 0),
        _ => Exception::GENERAL_PROTECTION,
    }
}

fn allows(segment: &Segment, intent: Intent) -> bool {
    let attributes = segment.attributes;
    if attributes.contains(SegmentAttributes::UNUSABLE) {
        return false;
    }
    let read_write = attributes.contains(SegmentAttributes::READ_WRITE);
    let is_code = attributes.contains(SegmentAttributes::CODE);
    match intent {
        Intent::Read => !is_code || read_write,
        Intent::Write => !is_code && read_write,
    }
}

/// Whether the bytes from `offset` to `offset + last_byte` lie within the limit.
fn is_within(segment: &Segment, offset: u64, last_byte: u64) -> bool {
    let limit = u64::from(segment.limit);
    let last = offset + last_byte;
    let attributes = segment.attributes;
    let expands_down = !attributes.contains(SegmentAttributes::CODE)
        && attributes.contains(SegmentAttributes::EXPAND_DOWN_OR_CONFORMING);
    if expands_down {
        let top = if attributes.contains(SegmentAttributes::DEFAULT_32) {
            0xffff_ffff
        } else {
            0xffff
        };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}

/// Linear addresses have 32 bits outside 64-bit mode.
const fn wrap(width: CodeWidth, address: Gva) -> Gva {
    match width {
        CodeWidth::Bits64 => address,
        CodeWidth::Bits16 | CodeWidth::Bits32 => Gva::new(address.as_u64() & 0xffff_ffff),
    }
}
