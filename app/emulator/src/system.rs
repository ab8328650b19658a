//! Instructions on the processor's own registers. What the run loop must decide comes back as the
//! exit that a processor would have made of it.

use umbra_vcpu::address::Gva;
use umbra_vcpu::event::{Blocking, Exception, vector};
use umbra_vcpu::exit::{ControlRegister, Exit, IoAccess, IoDirection, IoOperand, IoWidth};
use umbra_vcpu::instruction::general_register;
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic, OpKind, Register};
use umbra_vcpu::registers::{CodeWidth, DescriptorTable, Gpr, SegmentAttributes, SegmentRegister};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};

use crate::Progress;
use crate::address::{self, memory_operand, segment_register};
use crate::environment::{Environment, Intent, Stop, TableRegister};
use crate::far;
use crate::mode::{self, Mode, io_level, level, mode};
use crate::operand::{self, Location, locate, read, register_value, set_register, write};
use crate::segment;
use crate::size::Size;
use crate::stack;
use crate::vector as vector_rules;

/// Carries out a system instruction; `None` if it is none.
pub fn execute<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Option<Progress>, Stop<E::Failure>> {
    use Mnemonic as M;
    let env = environment;
    let exit = match instruction.mnemonic() {
        M::Mov if is_register(instruction, Register::is_cr) => move_control(env, instruction)?,
        M::Clts => {
            mode::require_supervisor(env)?;
            let cr0 = env.control_registers().cr0;
            Exit::WriteControlRegister {
                register: ControlRegister::Cr0,
                value: cr0 & !Cr0Flags::TASK_SWITCHED.bits(),
            }
        }
        M::Lmsw => load_machine_status(env, instruction)?,
        M::Hlt => supervisor(env, Exit::Halt)?,
        M::Invd | M::Wbinvd => supervisor(env, Exit::InvalidateCaches)?,
        M::Rdmsr => {
            let index = env.registers().get(Gpr::Rcx) as u32;
            supervisor(env, Exit::ReadMsr(index))?
        }
        M::Wrmsr => {
            let index = env.registers().get(Gpr::Rcx) as u32;
            let value = env.registers().edx_eax();
            supervisor(env, Exit::WriteMsr { index, value })?
        }
        M::Xsetbv => {
            let index = env.registers().get(Gpr::Rcx) as u32;
            let value = env.registers().edx_eax();
            supervisor(env, Exit::SetExtendedControlRegister { index, value })?
        }
        M::Invlpg => {
            mode::require_supervisor(env)?;
            let operand = memory_operand(env, instruction).ok_or(Stop::Unsupported)?;
            Exit::InvalidatePage(address::unchecked_linear(env, operand))
        }
        M::Cpuid => Exit::Cpuid,
        M::Pause => Exit::Pause,
        M::Rdtsc => {
            let disabled = env.control_registers().cr4 & Cr4Flags::TIMESTAMP_DISABLE.bits() != 0;
            if disabled {
                mode::require_supervisor(env)?;
            }
            Exit::ReadTsc
        }
        M::In | M::Out => port_access(env, instruction)?,
        _ => return in_place(env, instruction),
    };
    let next_rip = instruction.next_ip();
    Ok(Some(Progress::Exits { exit, next_rip }))
}

/// The instructions whose effect is the emulator's.
fn in_place<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Option<Progress>, Stop<E::Failure>> {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Mov if is_register(instruction, Register::is_segment_register) => {
            if !instruction.op0_register().is_segment_register() {
                return Ok(None);
            }
            let source = locate(environment, instruction, 1, Size::Word, Intent::Read)?;
            let selector = read(environment, &source, Size::Word)?;
            load_segment(environment, instruction.op0_register(), selector as u16)?;
        }
        M::Push if instruction.op0_register().is_segment_register() => {
            let size = stack::element(instruction)?;
            let register = instruction.op0_register();
            let selector = operand::selector(environment, register).ok_or(Stop::Unsupported)?;
            stack::push_all(environment, size, &[selector])?;
        }
        M::Pop if instruction.op0_register().is_segment_register() => {
            let size = stack::element(instruction)?;
            let value = stack::peek_value(environment, size)?;
            let register = instruction.op0_register();
            let named = segment_register(register).ok_or(Stop::Unsupported)?;
            let loaded = segment::load(environment, named, value as u16)?;
            // The width of the stack pointer is that of the stack that was popped from.
            stack::move_top(environment, size.distance());
            finish_load(environment, named, loaded);
        }
        M::Mov if is_register(instruction, Register::is_dr) => {
            move_debug(environment, instruction)?;
        }
        M::Fninit => {
            vector_rules::check_x87(environment)?;
            environment.reset_x87();
        }
        M::Fnstcw | M::Fnstsw => store_x87_word(environment, instruction)?,
        M::Lds => far::load_pointer(environment, instruction, SegmentRegister::Ds)?,
        M::Les => far::load_pointer(environment, instruction, SegmentRegister::Es)?,
        M::Lfs => far::load_pointer(environment, instruction, SegmentRegister::Fs)?,
        M::Lgs => far::load_pointer(environment, instruction, SegmentRegister::Gs)?,
        M::Lss => far::load_pointer(environment, instruction, SegmentRegister::Ss)?,
        M::Smsw => store_machine_status(environment, instruction)?,
        M::Lgdt => load_table(environment, instruction, TableRegister::Global)?,
        M::Lidt => load_table(environment, instruction, TableRegister::Interrupt)?,
        M::Sgdt => store_table(environment, instruction, TableRegister::Global)?,
        M::Sidt => store_table(environment, instruction, TableRegister::Interrupt)?,
        M::Sldt => store_selector(environment, instruction, SegmentRegister::Ldtr)?,
        M::Str => store_selector(environment, instruction, SegmentRegister::Tr)?,
        M::Lldt | M::Ltr => load_system_segment(environment, instruction)?,
        _ => return Ok(None),
    }
    Ok(Some(Progress::Done {
        next_rip: instruction.next_ip(),
    }))
}

fn is_register(instruction: &Instruction, kind: impl Fn(Register) -> bool) -> bool {
    [0, 1].into_iter().any(|index| {
        instruction.op_kind(index) == OpKind::Register && kind(instruction.op_register(index))
    })
}

fn supervisor<E: Environment>(environment: &E, exit: Exit) -> Result<Exit, Stop<E::Failure>> {
    mode::require_supervisor(environment)?;
    Ok(exit)
}

fn load_segment<E: Environment>(
    environment: &mut E,
    register: Register,
    selector: u16,
) -> Result<(), Stop<E::Failure>> {
    let register = segment_register(register).ok_or(Stop::Unsupported)?;
    if register == SegmentRegister::Cs {
        return Err(Exception::INVALID_OPCODE.into());
    }
    let loaded = segment::load(environment, register, selector)?;
    finish_load(environment, register, loaded);
    Ok(())
}

fn finish_load<E: Environment>(
    environment: &mut E,
    register: SegmentRegister,
    loaded: umbra_vcpu::registers::Segment,
) {
    environment.set_segment(register, loaded);
    if register == SegmentRegister::Ss {
        environment.block_interrupts(Blocking::MovSs);
    }
}

fn move_control<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Exit, Stop<E::Failure>> {
    let number = |register: Register| match register {
        Register::CR0 => Ok(ControlRegister::Cr0),
        Register::CR2 => Ok(ControlRegister::Cr2),
        Register::CR3 => Ok(ControlRegister::Cr3),
        Register::CR4 => Ok(ControlRegister::Cr4),
        Register::CR8 => Ok(ControlRegister::Cr8),
        _ => Err(Stop::Exception(Exception::INVALID_OPCODE)),
    };
    let (target, source) = (instruction.op0_register(), instruction.op1_register());
    if target.is_cr() {
        let register = number(target)?;
        mode::require_supervisor(environment)?;
        let value = register_value(environment, source);
        Ok(Exit::WriteControlRegister { register, value })
    } else {
        let register = number(source)?;
        mode::require_supervisor(environment)?;
        let target = general_register(target).ok_or(Stop::Unsupported)?;
        Ok(Exit::ReadControlRegister { register, target })
    }
}

/// MOV to and from a debug register (SDM vol. 3B 18.2).
fn move_debug<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    const GENERAL_DETECT: u64 = 1 << 13;
    mode::require_supervisor(environment)?;
    let (target, source) = (instruction.op0_register(), instruction.op1_register());
    let register = if target.is_dr() { target } else { source };
    let extensions = environment.control_registers().cr4 & Cr4Flags::DEBUGGING_EXTENSIONS.bits();
    let number = match register as u8 - Register::DR0 as u8 {
        4 | 5 if extensions != 0 => return Err(Exception::INVALID_OPCODE.into()),
        number @ (4 | 5) => number + 2,
        number @ 0..8 => number,
        _ => return Err(Exception::INVALID_OPCODE.into()),
    };
    let dr7 = environment.debug_register(7);
    if dr7 & GENERAL_DETECT != 0 {
        let dr6 = environment.debug_register(6);
        environment.set_debug_register(6, dr6 | GENERAL_DETECT);
        environment.set_debug_register(7, dr7 & !GENERAL_DETECT);
        return Err(Exception::new(vector::DEBUG).into());
    }
    if target.is_dr() {
        let value = register_value(environment, source);
        if number >= 6 && value >> 32 != 0 {
            return Err(Exception::GENERAL_PROTECTION.into());
        }
        environment.set_debug_register(number, value);
    } else {
        let value = environment.debug_register(number);
        set_register(environment, target, value);
    }
    Ok(())
}

/// LMSW sets PE but never clears it.
fn load_machine_status<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Exit, Stop<E::Failure>> {
    const LOADED: u64 = 0b1110;
    const SOURCE: u64 = 0b1111;
    mode::require_supervisor(environment)?;
    let source = locate(environment, instruction, 0, Size::Word, Intent::Read)?;
    let source = read(environment, &source, Size::Word)?;
    let cr0 = environment.control_registers().cr0;
    Ok(Exit::WriteControlRegister {
        register: ControlRegister::Cr0,
        value: cr0 & !LOADED | source & SOURCE,
    })
}

/// SMSW stores 16 bits to memory and as much of CR0 as fits into a register.
fn store_machine_status<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    mode::check_user_mode_prevention(environment)?;
    let cr0 = environment.control_registers().cr0;
    store_system(environment, instruction, cr0)
}

/// Stores a system register's value: 16 bits to memory, all to a register.
fn store_system<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    value: u64,
) -> Result<(), Stop<E::Failure>> {
    if instruction.op0_kind() == OpKind::Register {
        set_register(environment, instruction.op0_register(), value);
        return Ok(());
    }
    let target = locate(environment, instruction, 0, Size::Word, Intent::Write)?;
    write(environment, &target, Size::Word, value & 0xffff)
}

/// FNSTCW and FNSTSW.
fn store_x87_word<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    vector_rules::check_x87(environment)?;
    let target = locate(environment, instruction, 0, Size::Word, Intent::Write)?;
    let (control, status) = environment.x87_words();
    let value = if instruction.mnemonic() == Mnemonic::Fnstcw {
        control
    } else {
        status
    };
    write(environment, &target, Size::Word, value.into())
}

/// SLDT and STR.
fn store_selector<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    register: SegmentRegister,
) -> Result<(), Stop<E::Failure>> {
    mode::require_protected(environment)?;
    mode::check_user_mode_prevention(environment)?;
    let selector = environment.segment(register).selector;
    store_system(environment, instruction, selector.into())
}

fn load_system_segment<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    mode::require_protected(environment)?;
    mode::require_supervisor(environment)?;
    let source = locate(environment, instruction, 0, Size::Word, Intent::Read)?;
    let selector = read(environment, &source, Size::Word)? as u16;
    if instruction.mnemonic() == Mnemonic::Ltr {
        let task = segment::load_task(environment, selector)?;
        environment.set_segment(SegmentRegister::Tr, task);
    } else {
        let fault = vector::GENERAL_PROTECTION;
        let table = segment::load_local_table(environment, selector, fault)?;
        environment.set_segment(SegmentRegister::Ldtr, table);
    }
    Ok(())
}

/// The bytes of a table's limit and base in memory.
fn table_bytes<E: Environment>(environment: &E) -> usize {
    if environment.code_width() == CodeWidth::Bits64 {
        10
    } else {
        6
    }
}

fn load_table<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    register: TableRegister,
) -> Result<(), Stop<E::Failure>> {
    mode::require_supervisor(environment)?;
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let length = table_bytes(environment);
    let place = address::resolve(environment, operand, length, Intent::Read)?;
    let mut bytes = [0; 10];
    address::load(environment, &place, &mut bytes[..length])?;
    let mut base = [0; 8];
    base.copy_from_slice(&bytes[2..]);
    let mut base = u64::from_le_bytes(base);
    // With a 16-bit operand the base has 24 bits.
    if is_16_bit_table(instruction) {
        base &= 0xff_ffff;
    }
    if length == 10 && !address::is_canonical(environment, base) {
        return Err(Exception::GENERAL_PROTECTION.into());
    }
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let table = DescriptorTable {
        base: Gva::new(base),
        limit,
    };
    environment.set_table(register, table);
    Ok(())
}

fn is_16_bit_table(instruction: &Instruction) -> bool {
    use umbra_vcpu::instruction::iced_x86::Code as C;
    matches!(instruction.code(), C::Lgdt_m1632_16 | C::Lidt_m1632_16)
}

fn store_table<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    register: TableRegister,
) -> Result<(), Stop<E::Failure>> {
    mode::check_user_mode_prevention(environment)?;
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let length = table_bytes(environment);
    let place = address::resolve(environment, operand, length, Intent::Write)?;
    let table = environment.table(register);
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.as_u64().to_le_bytes());
    address::store(environment, &place, &bytes[..length])
}

fn port_access<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Exit, Stop<E::Failure>> {
    let (direction, port_index, value_index) = match instruction.mnemonic() {
        Mnemonic::In => (IoDirection::In, 1, 0),
        _ => (IoDirection::Out, 0, 1),
    };
    let width = match instruction.op_register(value_index).size() {
        1 => IoWidth::Byte,
        2 => IoWidth::Word,
        _ => IoWidth::DoubleWord,
    };
    let port = if instruction.op_kind(port_index) == OpKind::Register {
        register_value(environment, Register::DX) as u16
    } else {
        let port = locate(
            environment,
            instruction,
            port_index,
            Size::Byte,
            Intent::Read,
        )?;
        match port {
            Location::Immediate(port) => port as u16,
            _ => return Err(Stop::Unsupported),
        }
    };
    check_port(environment, port, width)?;
    Ok(Exit::Io(IoAccess {
        port,
        width,
        direction,
        operand: IoOperand::Accumulator,
    }))
}

/// #GP(0) if neither IOPL nor the task's permission map allows an access (SDM vol. 1 19.5.2).
pub fn check_port<E: Environment>(
    environment: &mut E,
    port: u16,
    width: IoWidth,
) -> Result<(), Stop<E::Failure>> {
    const MAP_BASE: u64 = 0x66;
    const AVAILABLE_32_BIT_TASK: u32 = 9;
    const BUSY: u32 = 2;
    let current = level(environment);
    let rflags = environment.registers().rflags;
    if mode(environment) != Mode::Virtual8086 && current <= io_level(rflags) {
        return Ok(());
    }
    let refused = || Stop::Exception(Exception::GENERAL_PROTECTION);
    let task = environment.segment(SegmentRegister::Tr);
    let kind = task.attributes.bits() & 0xf & !BUSY;
    let limit = u64::from(task.limit);
    if task.attributes.contains(SegmentAttributes::UNUSABLE)
        || kind != AVAILABLE_32_BIT_TASK
        || limit < MAP_BASE + 1
    {
        return Err(refused());
    }
    let mut map = [0; 2];
    segment::read_system(environment, task.base.wrapping_add(MAP_BASE), &mut map)?;
    let offset = u64::from(u16::from_le_bytes(map)) + u64::from(port / 8);
    // The processor reads two bytes, because a wide port may have its bits in both.
    if offset + 1 > limit {
        return Err(refused());
    }
    let mut bits = [0; 2];
    segment::read_system(environment, task.base.wrapping_add(offset), &mut bits)?;
    let ports = (1_u16 << width.bytes()) - 1;
    if u16::from_le_bytes(bits) >> (port % 8) & ports == 0 {
        Ok(())
    } else {
        Err(refused())
    }
}
