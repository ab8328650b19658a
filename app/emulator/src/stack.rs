//! PUSH, POP, near CALL, JMP and RET, whose operand or whose stack is device memory.

use umbra_vcpu::event::Exception;
use umbra_vcpu::instruction::iced_x86::{Instruction, OpKind};
use umbra_vcpu::registers::{CodeWidth, Gpr, SegmentRegister};

use crate::Progress;
use crate::address::{self, Operand, Place, is_canonical, part, set_part, stack_width};
use crate::environment::{Environment, Intent, Stop};
use crate::operand::{self, locate, read, read_memory, write};
use crate::size::Size;

/// The size of what a push or pop moves.
fn element<F>(instruction: &Instruction) -> Result<Size, Stop<F>> {
    let bytes = instruction.stack_pointer_increment().unsigned_abs() as usize;
    Size::from_bytes(bytes).ok_or(Stop::Unsupported)
}

/// The stack at `distance` bytes from its top.
fn stack_operand<E: Environment>(environment: &E, distance: i64) -> Operand {
    let width = stack_width(environment);
    let top = environment.registers().get(Gpr::Rsp);
    Operand {
        segment: SegmentRegister::Ss,
        offset: top.wrapping_add_signed(distance) & address::width_mask(width),
    }
}

fn move_stack<E: Environment>(environment: &mut E, distance: i64) {
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
    let operand = stack_operand(environment, -size.distance());
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
    move_stack(environment, -size.distance());
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
    let source = stack_operand(environment, 0);
    let source = address::resolve(environment, source, size.bytes(), Intent::Read)?;
    // An operand relative to the stack pointer sees it as the pop leaves it.
    let old_top = environment.registers().get(Gpr::Rsp);
    move_stack(environment, size.distance());
    let result = locate(environment, instruction, 0, size, Intent::Write).and_then(|target| {
        let value = read_memory(environment, &source, size)?;
        write(environment, &target, size, value)
    });
    if result.is_err() {
        environment.registers_mut().set(Gpr::Rsp, old_top);
    }
    result
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
    let operand = stack_operand(environment, 0);
    let place = address::resolve(environment, operand, size.bytes(), Intent::Read)?;
    let target = read_memory(environment, &place, size)?;
    let next_rip = checked_target(environment, target)?;
    move_stack(environment, released);
    Ok(Progress::Done { next_rip })
}
