//! What each instruction does.

use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::instruction::iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};
use umbra_vcpu::registers::{CodeWidth, Gpr};
use x86_64::registers::rflags::RFlags;

use crate::Progress;
use crate::address::{self, Operand, memory_operand, width_mask};
use crate::alu::{
    self, Binary, BitCount, BitTest, DoubleShift, FlagChange, Shift, Signedness, Unary,
};
use crate::environment::{Environment, Intent, Stop};
use crate::operand::{self, Location, locate, read, register_value, set_register, write};
use crate::size::Size;
use crate::{far, flags, legacy, stack, string, system, vector as vectors};

/// How a loaded value fills a wider register.
#[derive(Clone, Copy)]
enum Extension {
    Zero,
    Sign,
}

/// Whether an operation's result goes to its first operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Result,
    Flags,
}

/// Carries out one instruction.
pub fn execute<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    use Mnemonic as M;
    let env = environment;
    let mnemonic = instruction.mnemonic();
    if let Some(progress) = system::execute(env, instruction)? {
        return Ok(progress);
    }
    match mnemonic {
        M::Mov | M::Movnti => mov(env, instruction)?,
        M::Movzx => extend(env, instruction, Extension::Zero)?,
        M::Movsx | M::Movsxd => extend(env, instruction, Extension::Sign)?,
        M::Movbe => swap_bytes(env, instruction)?,
        M::Add => binary(env, instruction, Binary::Add, Keep::Result)?,
        M::Adc => binary(env, instruction, Binary::AddWithCarry, Keep::Result)?,
        M::Sub => binary(env, instruction, Binary::Subtract, Keep::Result)?,
        M::Sbb => binary(env, instruction, Binary::SubtractWithBorrow, Keep::Result)?,
        M::And => binary(env, instruction, Binary::And, Keep::Result)?,
        M::Or => binary(env, instruction, Binary::Or, Keep::Result)?,
        M::Xor => binary(env, instruction, Binary::Xor, Keep::Result)?,
        M::Cmp => binary(env, instruction, Binary::Subtract, Keep::Flags)?,
        M::Test => binary(env, instruction, Binary::And, Keep::Flags)?,
        M::Inc => unary(env, instruction, Unary::Increment)?,
        M::Dec => unary(env, instruction, Unary::Decrement)?,
        M::Neg => unary(env, instruction, Unary::Negate)?,
        M::Not => unary(env, instruction, Unary::Not)?,
        M::Shl | M::Sal => shift(env, instruction, Shift::Left)?,
        M::Shr => shift(env, instruction, Shift::Right)?,
        M::Sar => shift(env, instruction, Shift::ArithmeticRight)?,
        M::Rol => shift(env, instruction, Shift::RotateLeft)?,
        M::Ror => shift(env, instruction, Shift::RotateRight)?,
        M::Rcl => shift(env, instruction, Shift::RotateLeftThroughCarry)?,
        M::Rcr => shift(env, instruction, Shift::RotateRightThroughCarry)?,
        M::Shld => double_shift(env, instruction, DoubleShift::Left)?,
        M::Shrd => double_shift(env, instruction, DoubleShift::Right)?,
        M::Bt => bit_test(env, instruction, BitTest::Keep)?,
        M::Bts => bit_test(env, instruction, BitTest::Set)?,
        M::Btr => bit_test(env, instruction, BitTest::Reset)?,
        M::Btc => bit_test(env, instruction, BitTest::Complement)?,
        M::Bsf => bit_count(env, instruction, BitCount::ScanForward)?,
        M::Bsr => bit_count(env, instruction, BitCount::ScanReverse)?,
        M::Popcnt => bit_count(env, instruction, BitCount::Ones)?,
        M::Xchg => exchange(env, instruction)?,
        M::Xadd => exchange_and_add(env, instruction)?,
        M::Cmpxchg => compare_exchange(env, instruction)?,
        M::Cmpxchg8b => compare_exchange_pair(env, instruction, Size::DoubleWord)?,
        M::Cmpxchg16b => compare_exchange_pair(env, instruction, Size::QuadWord)?,
        M::Mul => multiply(env, instruction, Signedness::Unsigned)?,
        M::Imul if instruction.op_count() == 1 => multiply(env, instruction, Signedness::Signed)?,
        M::Imul => multiply_short(env, instruction)?,
        M::Div => divide(env, instruction, Signedness::Unsigned)?,
        M::Idiv => divide(env, instruction, Signedness::Signed)?,
        M::Call if far::is_far(instruction) => return far::call(env, instruction),
        M::Jmp if far::is_far(instruction) => return far::jump(env, instruction),
        M::Retf => return far::far_return(env, instruction),
        M::Int | M::Int1 | M::Int3 | M::Into => return far::interrupt(env, instruction),
        M::Iret | M::Iretd | M::Iretq => return far::interrupt_return(env, instruction),
        M::Pushf | M::Pushfd | M::Pushfq => flags::push(env, instruction)?,
        M::Popf | M::Popfd | M::Popfq => flags::pop(env, instruction)?,
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std | M::Cli | M::Sti => {
            flags::change(env, mnemonic)?;
        }
        M::Pusha => stack::push_general(env, Size::Word)?,
        M::Pushad => stack::push_general(env, Size::DoubleWord)?,
        M::Popa => stack::pop_general(env, Size::Word)?,
        M::Popad => stack::pop_general(env, Size::DoubleWord)?,
        M::Enter => stack::enter(env, instruction)?,
        M::Leave => stack::leave(env, instruction)?,
        M::Lea => legacy::load_address(env, instruction)?,
        M::Xlatb => legacy::translate(env, instruction)?,
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => legacy::convert(env, mnemonic),
        M::Bswap => legacy::swap_bytes(env, instruction),
        M::Lahf => legacy::load_flags(env),
        M::Sahf => legacy::store_flags(env),
        M::Salc => legacy::set_al_from_carry(env),
        M::Aaa | M::Aas | M::Aam | M::Aad | M::Daa | M::Das => legacy::decimal(env, instruction)?,
        M::Bound => legacy::check_bounds(env, instruction)?,
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            return legacy::count_and_jump(env, instruction);
        }
        _ if instruction.is_jcc_short_or_near() => {
            let taken = holds(instruction, env.registers().rflags);
            return stack::jump_if(env, instruction, taken);
        }
        M::Nop | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw => {}
        M::Push => stack::push(env, instruction)?,
        M::Pop => stack::pop(env, instruction)?,
        M::Call => return stack::call(env, instruction),
        M::Ret => return stack::near_return(env, instruction),
        M::Jmp => return stack::jump(env, instruction),
        _ if string::is_string(instruction) => return string::execute(env, instruction),
        _ if is_conditional_move(mnemonic) => conditional_move(env, instruction)?,
        _ if is_conditional_set(mnemonic) => conditional_set(env, instruction)?,
        _ => vectors::execute(env, instruction)?,
    }
    Ok(Progress::Done {
        next_rip: instruction.next_ip(),
    })
}

fn known_size<F>(instruction: &Instruction, index: u32) -> Result<Size, Stop<F>> {
    operand::size(instruction, index).ok_or(Stop::Unsupported)
}

fn change_flags<E: Environment>(environment: &mut E, change: FlagChange) {
    let registers = environment.registers_mut();
    registers.rflags = change.apply(registers.rflags);
}

fn mov<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let source_register = instruction.op1_register();
    let is_selector =
        instruction.op1_kind() == OpKind::Register && source_register.is_segment_register();
    // A selector in memory has 16 bits, whatever the operand size; in a register it is extended.
    let size = if is_selector && instruction.op0_kind() == OpKind::Memory {
        Size::Word
    } else {
        known_size(instruction, 0)?
    };
    let (source, target) = if is_selector {
        let selector = operand::selector(environment, source_register).ok_or(Stop::Unsupported)?;
        let target = locate(environment, instruction, 0, size, Intent::Write)?;
        (Location::Immediate(selector), target)
    } else {
        let source = locate(environment, instruction, 1, size, Intent::Read)?;
        (
            source,
            locate(environment, instruction, 0, size, Intent::Write)?,
        )
    };
    let value = read(environment, &source, size)?;
    write(environment, &target, size, value)
}

fn extend<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    extension: Extension,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 1)?;
    let source = locate(environment, instruction, 1, size, Intent::Read)?;
    let value = read(environment, &source, size)?;
    let value = match extension {
        Extension::Zero => value,
        Extension::Sign => size.signed(value).cast_unsigned(),
    };
    set_register(environment, instruction.op0_register(), value);
    Ok(())
}

fn swap_bytes<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let source = locate(environment, instruction, 1, size, Intent::Read)?;
    let target = locate(environment, instruction, 0, size, Intent::Write)?;
    let value = read(environment, &source, size)?.swap_bytes() >> (64 - size.bits());
    write(environment, &target, size, value)
}

fn binary<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    operation: Binary,
    keep: Keep,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let intent = match keep {
        Keep::Result => Intent::Write,
        Keep::Flags => Intent::Read,
    };
    let target = locate(environment, instruction, 0, size, intent)?;
    let source = locate(environment, instruction, 1, size, Intent::Read)?;
    let left = read(environment, &target, size)?;
    let right = read(environment, &source, size)?;
    let rflags = environment.registers().rflags;
    let (result, flags) = operation.compute(size, left, right, rflags);
    if keep == Keep::Result {
        write(environment, &target, size, result)?;
    }
    change_flags(environment, flags);
    Ok(())
}

fn unary<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    operation: Unary,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let target = locate(environment, instruction, 0, size, Intent::Write)?;
    let value = read(environment, &target, size)?;
    let (result, flags) = operation.compute(size, value);
    write(environment, &target, size, result)?;
    change_flags(environment, flags);
    Ok(())
}

fn shift<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    operation: Shift,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let count = locate(environment, instruction, 1, Size::Byte, Intent::Read)?;
    let count = read(environment, &count, Size::Byte)?;
    let target = locate(environment, instruction, 0, size, Intent::Write)?;
    let value = read(environment, &target, size)?;
    let rflags = environment.registers().rflags;
    let (result, flags) = operation.compute(size, value, count, rflags);
    write(environment, &target, size, result)?;
    change_flags(environment, flags);
    Ok(())
}

fn double_shift<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    operation: DoubleShift,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let fill = register_value(environment, instruction.op1_register());
    let count = locate(environment, instruction, 2, Size::Byte, Intent::Read)?;
    let count = read(environment, &count, Size::Byte)?;
    // Asked before memory is read, which a device would notice.
    operation
        .compute(size, 0, fill, count)
        .ok_or(Stop::Unsupported)?;
    let target = locate(environment, instruction, 0, size, Intent::Write)?;
    let value = read(environment, &target, size)?;
    let (result, flags) = operation
        .compute(size, value, fill, count)
        .ok_or(Stop::Unsupported)?;
    write(environment, &target, size, result)?;
    change_flags(environment, flags);
    Ok(())
}

fn bit_test<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    operation: BitTest,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let index = locate(environment, instruction, 1, size, Intent::Read)?;
    let index_value = read(environment, &index, size)?;
    let intent = match operation {
        BitTest::Keep => Intent::Read,
        BitTest::Set | BitTest::Reset | BitTest::Complement => Intent::Write,
    };
    let target = match index {
        // A register's index reaches beyond the operand, in both directions.
        Location::Register(_) if instruction.op0_kind() == OpKind::Memory => {
            let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
            let operands = size.signed(index_value) >> size.bits().trailing_zeros();
            let distance = operands.wrapping_mul(size.distance());
            let operand = Operand {
                offset: operand.offset.wrapping_add_signed(distance)
                    & width_mask(operand_address_width(environment, instruction)),
                ..operand
            };
            let place = address::resolve(environment, operand, size.bytes(), intent)?;
            Location::Memory(place)
        }
        _ => locate(environment, instruction, 0, size, intent)?,
    };
    let value = read(environment, &target, size)?;
    let (result, flags) = operation.compute(size, value, index_value);
    if operation != BitTest::Keep {
        write(environment, &target, size, result)?;
    }
    change_flags(environment, flags);
    Ok(())
}

/// The address size of the explicit memory operand.
fn operand_address_width<E: Environment>(environment: &E, instruction: &Instruction) -> CodeWidth {
    let registers = [instruction.memory_base(), instruction.memory_index()];
    let size = registers
        .into_iter()
        .find(|&register| register != Register::None)
        .map_or(instruction.memory_displ_size() as usize, Register::size);
    match size {
        2 => CodeWidth::Bits16,
        4 => CodeWidth::Bits32,
        8 => CodeWidth::Bits64,
        _ => environment.code_width(),
    }
}

fn bit_count<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    operation: BitCount,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let source = locate(environment, instruction, 1, size, Intent::Read)?;
    let value = read(environment, &source, size)?;
    let (result, flags) = operation.compute(size, value);
    if let Some(result) = result {
        set_register(environment, instruction.op0_register(), result);
    }
    change_flags(environment, flags);
    Ok(())
}

fn exchange<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let first = locate(environment, instruction, 0, size, Intent::Write)?;
    let second = locate(environment, instruction, 1, size, Intent::Write)?;
    let (one, two) = (
        read(environment, &first, size)?,
        read(environment, &second, size)?,
    );
    write(environment, &first, size, two)?;
    write(environment, &second, size, one)
}

fn exchange_and_add<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let target = locate(environment, instruction, 0, size, Intent::Write)?;
    let register = instruction.op1_register();
    let old = read(environment, &target, size)?;
    let added = register_value(environment, register);
    let (sum, flags) = Binary::Add.compute(size, old, added, 0);
    set_register(environment, register, old);
    write(environment, &target, size, sum)?;
    change_flags(environment, flags);
    Ok(())
}

/// The accumulator of a size.
const fn accumulator(size: Size) -> Register {
    match size {
        Size::Byte => Register::AL,
        Size::Word => Register::AX,
        Size::DoubleWord => Register::EAX,
        Size::QuadWord => Register::RAX,
    }
}

fn compare_exchange<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let target = locate(environment, instruction, 0, size, Intent::Write)?;
    let old = read(environment, &target, size)?;
    let expected = register_value(environment, accumulator(size));
    let new = register_value(environment, instruction.op1_register());
    let (_, flags) = Binary::Subtract.compute(size, expected, old, 0);
    // A difference writes the old value back: the processor never reads with a lock and leaves it.
    if old == expected {
        write(environment, &target, size, new)?;
    } else {
        write(environment, &target, size, old)?;
        set_register(environment, accumulator(size), old);
    }
    change_flags(environment, flags);
    Ok(())
}

/// CMPXCHG8B and CMPXCHG16B; `half` is the size of each of the registers.
fn compare_exchange_pair<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    half: Size,
) -> Result<(), Stop<E::Failure>> {
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let bytes = 2 * half.bytes();
    if half == Size::QuadWord {
        address::check_alignment(environment, operand, bytes)?;
    }
    let place = address::resolve(environment, operand, bytes, Intent::Write)?;
    let mut buffer = [0; 16];
    address::load(environment, &place, &mut buffer[..bytes])?;
    let old = u128::from_le_bytes(buffer);
    let registers = environment.registers();
    let pair = |high: Gpr, low: Gpr| {
        let (high, low) = (
            registers.get(high) & half.mask(),
            registers.get(low) & half.mask(),
        );
        u128::from(high) << half.bits() | u128::from(low)
    };
    let expected = pair(Gpr::Rdx, Gpr::Rax);
    let new = pair(Gpr::Rcx, Gpr::Rbx);
    let written = if old == expected { new } else { old };
    address::store(environment, &place, &written.to_le_bytes()[..bytes])?;
    if old != expected {
        let registers = environment.registers_mut();
        registers.set(Gpr::Rax, old as u64 & half.mask());
        registers.set(Gpr::Rdx, (old >> half.bits()) as u64 & half.mask());
    }
    change_flags(
        environment,
        FlagChange::only(RFlags::ZERO_FLAG, old == expected),
    );
    Ok(())
}

/// Where MUL and DIV have the upper and the lower half of their wide operand.
const fn halves(size: Size) -> (Register, Register) {
    match size {
        Size::Byte => (Register::AH, Register::AL),
        Size::Word => (Register::DX, Register::AX),
        Size::DoubleWord => (Register::EDX, Register::EAX),
        Size::QuadWord => (Register::RDX, Register::RAX),
    }
}

fn multiply<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    signedness: Signedness,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let source = locate(environment, instruction, 0, size, Intent::Read)?;
    let right = read(environment, &source, size)?;
    let (high_register, low_register) = halves(size);
    let left = register_value(environment, low_register);
    let (low, high, flags) = alu::multiply(size, signedness, left, right);
    set_register(environment, low_register, low);
    set_register(environment, high_register, high);
    change_flags(environment, flags);
    Ok(())
}

/// IMUL with two or three operands.
fn multiply_short<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let target = instruction.op0_register();
    let source = locate(environment, instruction, 1, size, Intent::Read)?;
    let right = if instruction.op_count() == 3 {
        locate(environment, instruction, 2, size, Intent::Read)?
    } else {
        Location::Register(target)
    };
    let left = read(environment, &source, size)?;
    let right = read(environment, &right, size)?;
    let (low, _, flags) = alu::multiply(size, Signedness::Signed, left, right);
    set_register(environment, target, low);
    change_flags(environment, flags);
    Ok(())
}

fn divide<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
    signedness: Signedness,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let source = locate(environment, instruction, 0, size, Intent::Read)?;
    let divisor = read(environment, &source, size)?;
    let (high_register, low_register) = halves(size);
    let dividend = (
        register_value(environment, high_register),
        register_value(environment, low_register),
    );
    let (quotient, remainder) = alu::divide(size, signedness, dividend, divisor)
        .ok_or(Exception::new(vector::DIVIDE_ERROR))?;
    set_register(environment, low_register, quotient);
    set_register(environment, high_register, remainder);
    Ok(())
}

const fn is_conditional_move(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}

const fn is_conditional_set(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}

/// Whether the instruction's condition holds (SDM vol. 1 appendix B).
fn holds(instruction: &Instruction, rflags: u64) -> bool {
    use ConditionCode as C;
    let flags = RFlags::from_bits_retain(rflags);
    let carry = flags.contains(RFlags::CARRY_FLAG);
    let zero = flags.contains(RFlags::ZERO_FLAG);
    let sign = flags.contains(RFlags::SIGN_FLAG);
    let overflow = flags.contains(RFlags::OVERFLOW_FLAG);
    let parity = flags.contains(RFlags::PARITY_FLAG);
    match instruction.condition_code() {
        C::None => false,
        C::o => overflow,
        C::no => !overflow,
        C::b => carry,
        C::ae => !carry,
        C::e => zero,
        C::ne => !zero,
        C::be => carry || zero,
        C::a => !carry && !zero,
        C::s => sign,
        C::ns => !sign,
        C::p => parity,
        C::np => !parity,
        C::l => sign != overflow,
        C::ge => sign == overflow,
        C::le => zero || sign != overflow,
        C::g => !zero && sign == overflow,
    }
}

/// CMOVcc reads its source, and clears the upper half of a 32-bit target, whatever the condition.
fn conditional_move<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = known_size(instruction, 0)?;
    let source = locate(environment, instruction, 1, size, Intent::Read)?;
    let value = read(environment, &source, size)?;
    let target = instruction.op0_register();
    let value = if holds(instruction, environment.registers().rflags) {
        value
    } else {
        register_value(environment, target)
    };
    set_register(environment, target, value);
    Ok(())
}

fn conditional_set<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let target = locate(environment, instruction, 0, Size::Byte, Intent::Write)?;
    let holds = holds(instruction, environment.registers().rflags);
    write(environment, &target, Size::Byte, holds.into())
}
