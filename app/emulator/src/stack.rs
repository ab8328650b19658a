//! PUSH, POP, ENTER, LEAVE, near CALL, JMP and RET, and the stack for whoever else needs it.

use umbra_vcpu::event::Exception;
use umbra_vcpu::instruction::iced_x86::{Code, Instruction, OpKind};
use umbra_vcpu::registers::{CodeWidth, Gpr, SegmentRegister};

use crate::Progress;
use crate::address::{self, Operand, Place, is_canonical, part, set_part, stack_width};
use crate::environment::{Environment, Intent, Stop};
use crate::operand::{self, locate, read, read_memory, write};
use crate::size::Size;

/// The size of what a push or pop moves.
pub fn element<F>(instruction: &Instruction) -> Result<Size, Stop<F>> {
    let bytes = instruction.stack_pointer_increment().unsigned_abs() as usize;
    Size::from_bytes(bytes).ok_or(Stop::Unsupported)
}

/// The stack at `distance` bytes from its top.
pub fn operand_at<E: Environment>(environment: &E, distance: i64) -> Operand {
    let width = stack_width(environment);
    let top = environment.registers().get(Gpr::Rsp);
    Operand {
        segment: SegmentRegister::Ss,
        offset: top.wrapping_add_signed(distance) & address::width_mask(width),
    }
}

/// Moves the stack pointer.
pub fn move_top<E: Environment>(environment: &mut E, distance: i64) {
    let width = stack_width(environment);
    let top = part(environment, Gpr::Rsp, width);
    set_part(
        environment,
        Gpr::Rsp,
        width,
        top.wrapping_add_signed(distance),
    );
}

/// The place below the stack's top for one more element.
fn place_to_push<E: Environment>(
    environment: &mut E,
    size: Size,
) -> Result<Place, Stop<E::Failure>> {
    let operand = operand_at(environment, -size.distance());
    address::resolve(environment, operand, size.bytes(), Intent::Write)
}

fn finish_push<E: Environment>(
    environment: &mut E,
    place: &Place,
    size: Size,
    value: u64,
) -> Result<(), Stop<E::Failure>> {
    let bytes = value.to_le_bytes();
    address::store(environment, place, &bytes[..size.bytes()])?;
    move_top(environment, -size.distance());
    Ok(())
}

/// PUSH of a general register, an immediate or memory.
pub fn push<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = element(instruction)?;
    let source = locate(environment, instruction, 0, size, Intent::Read)?;
    let place = place_to_push(environment, size)?;
    let value = read(environment, &source, size)?;
    finish_push(environment, &place, size, value)
}

/// POP to a general register or memory.
pub fn pop<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = element(instruction)?;
    let source = operand_at(environment, 0);
    let source = address::resolve(environment, source, size.bytes(), Intent::Read)?;
    // An operand relative to the stack pointer sees it as the pop leaves it.
    let old_top = environment.registers().get(Gpr::Rsp);
    move_top(environment, size.distance());
    let result = locate(environment, instruction, 0, size, Intent::Write).and_then(|target| {
        let value = read_memory(environment, &source, size)?;
        write(environment, &target, size, value)
    });
    if result.is_err() {
        environment.registers_mut().set(Gpr::Rsp, old_top);
    }
    result
}

/// Pushes values, the first one first. All of them happen or none.
pub fn push_all<E: Environment>(
    environment: &mut E,
    size: Size,
    values: &[u64],
) -> Result<(), Stop<E::Failure>> {
    const MOST: usize = 8 * 8;
    let length = size.bytes() * values.len();
    let distance = values.iter().map(|_| size.distance()).sum::<i64>();
    let operand = operand_at(environment, -distance);
    let place = address::resolve(environment, operand, length, Intent::Write)?;
    let mut bytes = [0; MOST];
    for (value, slot) in values.iter().rev().zip(bytes.chunks_mut(size.bytes())) {
        slot.copy_from_slice(&value.to_le_bytes()[..size.bytes()]);
    }
    address::store(environment, &place, &bytes[..length])?;
    move_top(environment, -distance);
    Ok(())
}

/// The element at the stack's top.
pub fn peek_value<E: Environment>(
    environment: &mut E,
    size: Size,
) -> Result<u64, Stop<E::Failure>> {
    let operand = operand_at(environment, 0);
    let place = address::resolve(environment, operand, size.bytes(), Intent::Read)?;
    read_memory(environment, &place, size)
}

/// Pops the element at the stack's top.
pub fn pop_value<E: Environment>(environment: &mut E, size: Size) -> Result<u64, Stop<E::Failure>> {
    let value = peek_value(environment, size)?;
    move_top(environment, size.distance());
    Ok(value)
}

/// PUSHA pushes the eight registers in the order of their encoding, the stack pointer as it was.
pub fn push_general<E: Environment>(
    environment: &mut E,
    size: Size,
) -> Result<(), Stop<E::Failure>> {
    let registers = environment.registers();
    let values: [u64; 8] = core::array::from_fn(|index| registers.get(Gpr::ALL[index]));
    push_all(environment, size, &values)
}

/// POPA pops what PUSHA pushed, but for the stack pointer.
pub fn pop_general<E: Environment>(
    environment: &mut E,
    size: Size,
) -> Result<(), Stop<E::Failure>> {
    let length = 8 * size.bytes();
    let operand = operand_at(environment, 0);
    let place = address::resolve(environment, operand, length, Intent::Read)?;
    let mut bytes = [0; 8 * 4];
    address::load(environment, &place, &mut bytes[..length])?;
    for (register, slot) in Gpr::ALL[..8].iter().rev().zip(bytes.chunks(size.bytes())) {
        if *register == Gpr::Rsp {
            continue;
        }
        let mut value = [0; 8];
        value[..slot.len()].copy_from_slice(slot);
        set_general(environment, *register, size, u64::from_le_bytes(value));
    }
    move_top(environment, 8 * size.distance());
    Ok(())
}

/// Sets the part of a register that an operand of this size has.
fn set_general<E: Environment>(environment: &mut E, register: Gpr, size: Size, value: u64) {
    let width = match size {
        Size::QuadWord => CodeWidth::Bits64,
        Size::DoubleWord => CodeWidth::Bits32,
        Size::Word | Size::Byte => CodeWidth::Bits16,
    };
    set_part(environment, register, width, value);
}

/// ENTER with the nesting level 0, which is all that compilers make of it.
pub fn enter<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    if !instruction.immediate8_2nd().is_multiple_of(32) {
        return Err(Stop::Unsupported);
    }
    let released = i64::from(instruction.immediate16());
    let pushed = i64::from(instruction.stack_pointer_increment()).abs() - released;
    let size = usize::try_from(pushed).ok().and_then(Size::from_bytes);
    let size = size.ok_or(Stop::Unsupported)?;
    // The last byte of the new frame must be writable, too.
    let frame = operand_at(environment, -size.distance() - released);
    address::resolve(environment, frame, 1, Intent::Write)?;
    let old = environment.registers().get(Gpr::Rbp);
    push_all(environment, size, &[old])?;
    let top = environment.registers().get(Gpr::Rsp);
    set_general(environment, Gpr::Rbp, size, top);
    move_top(environment, -released);
    Ok(())
}

/// LEAVE.
pub fn leave<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = match instruction.code() {
        Code::Leavew => Size::Word,
        Code::Leaved => Size::DoubleWord,
        _ => Size::QuadWord,
    };
    let width = stack_width(environment);
    let old_top = environment.registers().get(Gpr::Rsp);
    let frame = part(environment, Gpr::Rbp, width);
    set_part(environment, Gpr::Rsp, width, frame);
    match pop_value(environment, size) {
        Ok(value) => {
            set_general(environment, Gpr::Rbp, size, value);
            Ok(())
        }
        Err(stop) => {
            environment.registers_mut().set(Gpr::Rsp, old_top);
            Err(stop)
        }
    }
}

/// A conditional near jump.
pub fn jump_if<E: Environment>(
    environment: &E,
    instruction: &Instruction,
    taken: bool,
) -> Result<Progress, Stop<E::Failure>> {
    let next_rip = if taken {
        checked_target(environment, instruction.near_branch_target())?
    } else {
        instruction.next_ip()
    };
    Ok(Progress::Done { next_rip })
}

/// The size of the instruction pointer that a near transfer loads.
fn branch_size<F>(instruction: &Instruction, distance: i32) -> Result<Size, Stop<F>> {
    match instruction.op0_kind() {
        OpKind::NearBranch16 => Ok(Size::Word),
        OpKind::NearBranch32 => Ok(Size::DoubleWord),
        OpKind::NearBranch64 => Ok(Size::QuadWord),
        OpKind::Memory | OpKind::Register if distance == 0 => {
            operand::size(instruction, 0).ok_or(Stop::Unsupported)
        }
        _ => Size::from_bytes(distance.unsigned_abs() as usize).ok_or(Stop::Unsupported),
    }
}

/// Where a near transfer goes, after the checks of a new instruction pointer.
fn checked_target<E: Environment>(environment: &E, target: u64) -> Result<u64, Stop<E::Failure>> {
    let is_valid = match environment.code_width() {
        CodeWidth::Bits64 => is_canonical(environment, target),
        CodeWidth::Bits32 | CodeWidth::Bits16 => {
            target <= u64::from(environment.segment(SegmentRegister::Cs).limit)
        }
    };
    if is_valid {
        Ok(target)
    } else {
        Err(Exception::GENERAL_PROTECTION.into())
    }
}

/// The target of CALL or JMP.
fn branch_target<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    size: Size,
) -> Result<u64, Stop<E::Failure>> {
    let target = match instruction.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            instruction.near_branch_target()
        }
        // A far transfer loads a segment register.
        OpKind::Memory if instruction.memory_size().size() != size.bytes() => {
            return Err(Stop::Unsupported);
        }
        OpKind::Memory | OpKind::Register => {
            let source = locate(environment, instruction, 0, size, Intent::Read)?;
            read(environment, &source, size)?
        }
        _ => return Err(Stop::Unsupported),
    };
    Ok(target)
}

/// Near CALL.
pub fn call<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let size = branch_size(instruction, instruction.stack_pointer_increment())?;
    let place = place_to_push(environment, size)?;
    let target = branch_target(environment, instruction, size)?;
    let next_rip = checked_target(environment, target)?;
    finish_push(environment, &place, size, instruction.next_ip())?;
    Ok(Progress::Done { next_rip })
}

/// Near JMP.
pub fn jump<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let size = branch_size(instruction, 0)?;
    let target = branch_target(environment, instruction, size)?;
    let next_rip = checked_target(environment, target)?;
    Ok(Progress::Done { next_rip })
}

/// Near RET.
pub fn near_return<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let released = i64::from(instruction.stack_pointer_increment());
    let extra = if instruction.op_count() == 0 {
        0
    } else {
        i64::from(instruction.immediate16())
    };
    let size = usize::try_from(released - extra)
        .ok()
        .and_then(Size::from_bytes)
        .ok_or(Stop::Unsupported)?;
    let operand = operand_at(environment, 0);
    let place = address::resolve(environment, operand, size.bytes(), Intent::Read)?;
    let target = read_memory(environment, &place, size)?;
    let next_rip = checked_target(environment, target)?;
    move_top(environment, released);
    Ok(Progress::Done { next_rip })
}
