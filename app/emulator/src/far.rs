//! Far transfers: JMP, CALL and RET to other segments, INT and IRET.
//!
//! Calls to inner levels, which change the stack, and returns of 64-bit mode are not known here:
//! processors carry those out themselves wherever Umbra runs guests in protected mode.

use umbra_vcpu::event::{Event, Exception, vector};
use umbra_vcpu::exit::{Exit, TaskSwitchSource};
use umbra_vcpu::instruction::iced_x86::{Instruction, MemorySize, Mnemonic, OpKind};
use umbra_vcpu::registers::{CodeWidth, Gpr, Segment, SegmentAttributes, SegmentRegister};
use x86_64::registers::rflags::RFlags;

use crate::Progress;
use crate::address::{self, Operand, is_canonical, memory_operand, set_part, stack_width};
use crate::environment::{Environment, Intent, Stop, TableRegister};
use crate::flags::{self, Loader};
use crate::mode::{self, Mode, is_long_mode, level, mode};
use crate::operand::read_memory;
use crate::segment::{self, Arrival};
use crate::size::Size;
use crate::stack;

const NESTED_TASK: u64 = RFlags::NESTED_TASK.bits();
const VIRTUAL_8086: u64 = RFlags::VIRTUAL_8086_MODE.bits();

/// A selector and an offset in its segment.
#[derive(Clone, Copy)]
struct Pointer {
    selector: u16,
    offset: u64,
}

/// Whether JMP or CALL loads CS.
pub fn is_far(instruction: &Instruction) -> bool {
    match instruction.op0_kind() {
        OpKind::FarBranch16 | OpKind::FarBranch32 => true,
        OpKind::Memory => matches!(
            instruction.memory_size(),
            MemorySize::SegPtr16 | MemorySize::SegPtr32 | MemorySize::SegPtr64
        ),
        _ => false,
    }
}

/// The size of the offset in the instruction's far pointer.
fn pointer_size<F>(instruction: &Instruction) -> Result<Size, Stop<F>> {
    match instruction.op0_kind() {
        OpKind::FarBranch16 => Ok(Size::Word),
        OpKind::FarBranch32 => Ok(Size::DoubleWord),
        _ => memory_pointer_size(instruction),
    }
}

/// The size of the offset in a far pointer in memory.
pub fn memory_pointer_size<F>(instruction: &Instruction) -> Result<Size, Stop<F>> {
    match instruction.memory_size() {
        MemorySize::SegPtr16 => Ok(Size::Word),
        MemorySize::SegPtr32 => Ok(Size::DoubleWord),
        MemorySize::SegPtr64 => Ok(Size::QuadWord),
        _ => Err(Stop::Unsupported),
    }
}

fn pointer<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Pointer, Stop<E::Failure>> {
    match instruction.op0_kind() {
        OpKind::FarBranch16 => Ok(Pointer {
            selector: instruction.far_branch_selector(),
            offset: instruction.far_branch16().into(),
        }),
        OpKind::FarBranch32 => Ok(Pointer {
            selector: instruction.far_branch_selector(),
            offset: instruction.far_branch32().into(),
        }),
        _ => {
            let (selector, offset) = memory_pointer(environment, instruction)?;
            Ok(Pointer { selector, offset })
        }
    }
}

/// The selector and the offset of a far pointer in memory.
pub fn memory_pointer<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(u16, u64), Stop<E::Failure>> {
    let size = memory_pointer_size(instruction)?.bytes();
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let place = address::resolve(environment, operand, size + 2, Intent::Read)?;
    let mut bytes = [0; 10];
    address::load(environment, &place, &mut bytes[..size + 2])?;
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    Ok((selector, u64::from_le_bytes(offset)))
}

/// #GP(0) if code in `segment` cannot go on at `offset`.
fn check_target<E: Environment>(
    environment: &E,
    segment: &Segment,
    offset: u64,
) -> Result<(), Exception> {
    let long = is_long_mode(environment) && segment.attributes.contains(SegmentAttributes::LONG);
    let is_valid = if long {
        is_canonical(environment, offset)
    } else {
        offset <= u64::from(segment.limit)
    };
    if is_valid {
        Ok(())
    } else {
        Err(Exception::GENERAL_PROTECTION)
    }
}

/// Where a far JMP or CALL leads.
enum Target {
    Code(Segment, u64),
    /// To a task; the instruction is the run loop's.
    Task(u16),
}

fn target<E: Environment>(
    environment: &mut E,
    pointer: Pointer,
) -> Result<Target, Stop<E::Failure>> {
    const CALL_GATE_16: u32 = 4;
    const TASK_GATE: u32 = 5;
    const CALL_GATE_32: u32 = 12;
    let Pointer { selector, offset } = pointer;
    if mode(environment) != Mode::Protected {
        let code = segment::real_segment(environment, SegmentRegister::Cs, selector);
        return Ok(Target::Code(code, offset));
    }
    if segment::is_null(selector) {
        return Err(Exception::GENERAL_PROTECTION.into());
    }
    let found = segment::descriptor(environment, selector, vector::GENERAL_PROTECTION)?;
    if found.is_code_or_data() {
        let code = segment::load_code(environment, selector, Arrival::Direct)?;
        return Ok(Target::Code(code, offset));
    }
    let requested = (selector & 3) as u8;
    let refused = segment::protection_fault(selector);
    if found.privilege_level() < level(environment).max(requested) {
        return Err(refused.into());
    }
    let long = is_long_mode(environment);
    let is_call_gate = found.kind() == CALL_GATE_32 || found.kind() == CALL_GATE_16 && !long;
    let is_task = matches!(found.kind(), 1 | 9 | TASK_GATE) && !long;
    if !is_call_gate && !is_task {
        return Err(refused.into());
    }
    if !found.is_present() {
        let absent = vector::SEGMENT_NOT_PRESENT;
        return Err(segment::selector_fault(absent, selector).into());
    }
    let gate = found.gate();
    match found.kind() {
        TASK_GATE => return Ok(Target::Task(gate.selector)),
        1 | 9 => return Ok(Target::Task(selector)),
        _ => {}
    }
    let code = segment::load_code(environment, gate.selector, Arrival::Gate)?;
    if (code.selector & 3) as u8 != level(environment) {
        return Err(Stop::Unsupported);
    }
    let offset = if found.kind() == CALL_GATE_16 {
        gate.offset & 0xffff
    } else {
        gate.offset
    };
    Ok(Target::Code(code, offset))
}

/// Far JMP.
pub fn jump<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let pointer = pointer(environment, instruction)?;
    match target(environment, pointer)? {
        Target::Code(code, next_rip) => {
            check_target(environment, &code, next_rip)?;
            environment.set_segment(SegmentRegister::Cs, code);
            Ok(Progress::Done { next_rip })
        }
        Target::Task(selector) => Ok(task_switch(selector, TaskSwitchSource::Jump, instruction)),
    }
}

fn task_switch(selector: u16, source: TaskSwitchSource, instruction: &Instruction) -> Progress {
    Progress::Exits {
        exit: Exit::TaskSwitch {
            selector,
            source,
            error_code: None,
            resume_rip: instruction.next_ip(),
        },
        next_rip: instruction.next_ip(),
    }
}

/// Far CALL.
pub fn call<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let size = pointer_size(instruction)?;
    let pointer = pointer(environment, instruction)?;
    match target(environment, pointer)? {
        Target::Code(code, next_rip) => {
            check_target(environment, &code, next_rip)?;
            let old = environment.segment(SegmentRegister::Cs).selector;
            stack::push_all(environment, size, &[old.into(), instruction.next_ip()])?;
            environment.set_segment(SegmentRegister::Cs, code);
            Ok(Progress::Done { next_rip })
        }
        Target::Task(selector) => Ok(task_switch(selector, TaskSwitchSource::Call, instruction)),
    }
}

/// Elements on the stack from its top.
fn peek<E: Environment, const N: usize>(
    environment: &mut E,
    size: Size,
    skipped: i64,
) -> Result<[u64; N], Stop<E::Failure>> {
    let mut values = [0; N];
    let mut distance = size.distance() * skipped;
    for value in &mut values {
        let operand = stack::operand_at(environment, distance);
        distance += size.distance();
        let place = address::resolve(environment, operand, size.bytes(), Intent::Read)?;
        *value = read_memory(environment, &place, size)?;
    }
    Ok(values)
}

/// Far RET.
pub fn far_return<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let extra = if instruction.op_count() == 0 {
        0
    } else {
        i64::from(instruction.immediate16())
    };
    let released = i64::from(instruction.stack_pointer_increment());
    let size = usize::try_from((released - extra) / 2)
        .ok()
        .and_then(Size::from_bytes)
        .ok_or(Stop::Unsupported)?;
    let [next_rip, selector] = peek(environment, size, 0)?;
    let selector = selector as u16;
    if mode(environment) != Mode::Protected {
        let code = segment::real_segment(environment, SegmentRegister::Cs, selector);
        check_target(environment, &code, next_rip)?;
        environment.set_segment(SegmentRegister::Cs, code);
        stack::move_top(environment, released);
        return Ok(Progress::Done { next_rip });
    }
    let code = segment::load_code(environment, selector, Arrival::Return)?;
    check_target(environment, &code, next_rip)?;
    if (selector & 3) as u8 == level(environment) {
        environment.set_segment(SegmentRegister::Cs, code);
        stack::move_top(environment, released);
        return Ok(Progress::Done { next_rip });
    }
    if is_long_mode(environment) {
        return Err(Stop::Unsupported);
    }
    // The outer level's stack pointer stands above the parameters that the return releases.
    if extra % size.distance() != 0 {
        return Err(Stop::Unsupported);
    }
    let [new_top, stack] = peek(environment, size, 2 + extra / size.distance())?;
    enter_outer_level(environment, code, stack as u16, new_top, size)?;
    stack::move_top(environment, extra);
    Ok(Progress::Done { next_rip })
}

/// Loads CS and SS of an outer level, its stack pointer, and takes away the data segments that it
/// may not have (SDM vol. 3A 5.8.6).
fn enter_outer_level<E: Environment>(
    environment: &mut E,
    code: Segment,
    stack: u16,
    top: u64,
    size: Size,
) -> Result<(), Stop<E::Failure>> {
    let outer = (code.selector & 3) as u8;
    let fault = vector::GENERAL_PROTECTION;
    let stack = segment::load_at_level(environment, SegmentRegister::Ss, stack, outer, fault)?;
    environment.set_segment(SegmentRegister::Cs, code);
    environment.set_segment(SegmentRegister::Ss, stack);
    let width = stack_width(environment);
    set_part(environment, Gpr::Rsp, width, top & size.mask());
    for register in [
        SegmentRegister::Es,
        SegmentRegister::Ds,
        SegmentRegister::Fs,
        SegmentRegister::Gs,
    ] {
        let held = environment.segment(register);
        let conforming = held
            .attributes
            .contains(SegmentAttributes::CODE | SegmentAttributes::EXPAND_DOWN_OR_CONFORMING);
        if !conforming && held.privilege_level() < outer {
            environment.set_segment(register, segment::null(0));
        }
    }
    Ok(())
}

/// INT n, INT3, INTO and INT1.
pub fn interrupt<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let next_rip = instruction.next_ip();
    let instruction_length = instruction.len() as u8;
    let event = match instruction.mnemonic() {
        Mnemonic::Int3 => Event::SoftwareException {
            vector: vector::BREAKPOINT,
            instruction_length,
        },
        Mnemonic::Into => {
            if environment.registers().rflags & RFlags::OVERFLOW_FLAG.bits() == 0 {
                return Ok(Progress::Done { next_rip });
            }
            Event::SoftwareException {
                vector: vector::OVERFLOW,
                instruction_length,
            }
        }
        Mnemonic::Int1 => Event::PrivilegedSoftwareException { instruction_length },
        _ => {
            mode::require_io_level_in_virtual_8086(environment)?;
            Event::SoftwareInterrupt {
                vector: instruction.immediate8(),
                instruction_length,
            }
        }
    };
    Ok(Progress::Delivers(event))
}

/// Enters the handler of `vector` in real mode, which will return to `return_rip`, and says where it
/// begins (SDM vol. 3A 21.1.4).
///
/// # Errors
/// [`Stop::Exception`] if the vector has no entry, or the stack no room.
pub fn enter_real_mode_handler<E: Environment>(
    environment: &mut E,
    vector: u8,
    return_rip: u64,
) -> Result<u64, Stop<E::Failure>> {
    let table = environment.table(TableRegister::Interrupt);
    let offset = 4 * u16::from(vector);
    if offset + 3 > table.limit {
        return Err(Exception::GENERAL_PROTECTION.into());
    }
    let mut entry = [0; 4];
    let address = table.base.wrapping_add(offset.into());
    segment::read_system(environment, address, &mut entry)?;
    let next_rip = u64::from(u16::from_le_bytes([entry[0], entry[1]]));
    let selector = u16::from_le_bytes([entry[2], entry[3]]);
    let code = segment::real_segment(environment, SegmentRegister::Cs, selector);
    check_target(environment, &code, next_rip)?;
    let rflags = environment.registers().rflags;
    let old = environment.segment(SegmentRegister::Cs).selector;
    stack::push_all(environment, Size::Word, &[rflags, old.into(), return_rip])?;
    environment.set_segment(SegmentRegister::Cs, code);
    let cleared =
        RFlags::INTERRUPT_FLAG | RFlags::TRAP_FLAG | RFlags::RESUME_FLAG | RFlags::ALIGNMENT_CHECK;
    environment.registers_mut().rflags &= !cleared.bits();
    Ok(next_rip)
}

/// IRET in each operand size but 64 bits.
pub fn interrupt_return<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let size = match instruction.mnemonic() {
        Mnemonic::Iret => Size::Word,
        Mnemonic::Iretd => Size::DoubleWord,
        _ => return Err(Stop::Unsupported),
    };
    if environment.code_width() == CodeWidth::Bits64 {
        return Err(Stop::Unsupported);
    }
    mode::require_io_level_in_virtual_8086(environment)?;
    let in_protected_mode = mode(environment) == Mode::Protected;
    if in_protected_mode && environment.registers().rflags & NESTED_TASK != 0 {
        if is_long_mode(environment) {
            return Err(Exception::GENERAL_PROTECTION.into());
        }
        let link = previous_task(environment)?;
        return Ok(task_switch(
            link,
            TaskSwitchSource::InterruptReturn,
            instruction,
        ));
    }
    let [next_rip, selector, new_flags] = peek(environment, size, 0)?;
    let selector = selector as u16;
    if !in_protected_mode {
        let code = segment::real_segment(environment, SegmentRegister::Cs, selector);
        check_target(environment, &code, next_rip)?;
        environment.set_segment(SegmentRegister::Cs, code);
        stack::move_top(environment, 3 * size.distance());
        flags::load(environment, new_flags, size, Loader::InterruptReturn);
        environment.unblock_nmis();
        return Ok(Progress::Done { next_rip });
    }
    if size == Size::DoubleWord && new_flags & VIRTUAL_8086 != 0 && level(environment) == 0 {
        if is_long_mode(environment) {
            return Err(Stop::Unsupported);
        }
        return return_to_virtual_8086(environment, next_rip, selector, new_flags);
    }
    let code = segment::load_code(environment, selector, Arrival::Return)?;
    check_target(environment, &code, next_rip)?;
    if (selector & 3) as u8 == level(environment) {
        environment.set_segment(SegmentRegister::Cs, code);
        stack::move_top(environment, 3 * size.distance());
        flags::load(environment, new_flags, size, Loader::InterruptReturn);
    } else {
        if is_long_mode(environment) {
            return Err(Stop::Unsupported);
        }
        let [top, stack] = peek(environment, size, 3)?;
        // The flags are loaded with the rights of the old level.
        let old_flags = environment.registers().rflags;
        let loaded = flags::loaded(environment, new_flags, size, Loader::InterruptReturn);
        environment.registers_mut().rflags = old_flags;
        enter_outer_level(environment, code, stack as u16, top, size)?;
        environment.registers_mut().rflags = loaded;
    }
    environment.unblock_nmis();
    Ok(Progress::Done { next_rip })
}

/// The back link of the current task.
fn previous_task<E: Environment>(environment: &mut E) -> Result<u16, Stop<E::Failure>> {
    let task = environment.segment(SegmentRegister::Tr);
    let mut link = [0; 2];
    segment::read_system(environment, task.base, &mut link)?;
    Ok(u16::from_le_bytes(link))
}

fn return_to_virtual_8086<E: Environment>(
    environment: &mut E,
    next_rip: u64,
    code: u16,
    new_flags: u64,
) -> Result<Progress, Stop<E::Failure>> {
    let [top, stack, es, ds, fs, gs] = peek(environment, Size::DoubleWord, 3)?;
    if next_rip > 0xffff {
        return Err(Exception::GENERAL_PROTECTION.into());
    }
    for (register, selector) in [
        (SegmentRegister::Cs, code),
        (SegmentRegister::Ss, stack as u16),
        (SegmentRegister::Es, es as u16),
        (SegmentRegister::Ds, ds as u16),
        (SegmentRegister::Fs, fs as u16),
        (SegmentRegister::Gs, gs as u16),
    ] {
        environment.set_segment(register, segment::virtual_8086_segment(selector));
    }
    let registers = environment.registers_mut();
    registers.rflags = new_flags & flags::DEFINED | flags::FIXED;
    registers.set(Gpr::Rsp, top & 0xffff_ffff);
    environment.unblock_nmis();
    Ok(Progress::Done { next_rip })
}

/// LDS, LES, LFS, LGS and LSS.
pub fn load_pointer<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    register: SegmentRegister,
) -> Result<(), Stop<E::Failure>> {
    let size = Size::from_bytes(instruction.op0_register().size()).ok_or(Stop::Unsupported)?;
    let operand: Operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let length = size.bytes() + 2;
    let place = address::resolve(environment, operand, length, Intent::Read)?;
    let mut bytes = [0; 10];
    address::load(environment, &place, &mut bytes[..length])?;
    let selector = u16::from_le_bytes([bytes[length - 2], bytes[length - 1]]);
    let mut offset = [0; 8];
    offset[..size.bytes()].copy_from_slice(&bytes[..size.bytes()]);
    let loaded = segment::load(environment, register, selector)?;
    environment.set_segment(register, loaded);
    let offset = u64::from_le_bytes(offset);
    crate::operand::set_register(environment, instruction.op0_register(), offset);
    Ok(())
}
