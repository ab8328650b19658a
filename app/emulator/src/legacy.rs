//! Integer instructions without a memory operand of their own, and those that only 16- and 32-bit
//! code has: conversions, decimal arithmetic, loops, conditional jumps.

use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic, Register};
use umbra_vcpu::registers::{CodeWidth, Gpr};
use x86_64::registers::rflags::RFlags;

use crate::Progress;
use crate::address::{self, Operand, memory_operand, part, set_part};
use crate::alu::FlagChange;
use crate::environment::{Environment, Intent, Stop};
use crate::operand::{self, read_memory, register_value, set_register};
use crate::size::Size;
use crate::stack;

/// LEA.
pub fn load_address<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let Operand { offset, .. } =
        memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    set_register(environment, instruction.op0_register(), offset);
    Ok(())
}

/// XLATB.
pub fn translate<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    // The decoder names AL as the index of the operand.
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let place = address::resolve(environment, operand, 1, Intent::Read)?;
    let value = read_memory(environment, &place, Size::Byte)?;
    set_register(environment, Register::AL, value);
    Ok(())
}

/// CBW, CWDE, CDQE, CWD, CDQ and CQO.
pub fn convert<E: Environment>(environment: &mut E, mnemonic: Mnemonic) {
    let (source, from, target) = match mnemonic {
        Mnemonic::Cbw => (Register::AL, Size::Byte, Register::AX),
        Mnemonic::Cwde => (Register::AX, Size::Word, Register::EAX),
        Mnemonic::Cdqe => (Register::EAX, Size::DoubleWord, Register::RAX),
        Mnemonic::Cwd => (Register::AX, Size::Word, Register::DX),
        Mnemonic::Cdq => (Register::EAX, Size::DoubleWord, Register::EDX),
        _ => (Register::RAX, Size::QuadWord, Register::RDX),
    };
    let value = from.signed(register_value(environment, source));
    let into_upper = matches!(mnemonic, Mnemonic::Cwd | Mnemonic::Cdq | Mnemonic::Cqo);
    let value = if into_upper { value >> 63 } else { value };
    set_register(environment, target, value.cast_unsigned());
}

/// BSWAP; with a 16-bit operand, whose result the manual leaves open, it becomes zero.
pub fn swap_bytes<E: Environment>(environment: &mut E, instruction: &Instruction) {
    let register = instruction.op0_register();
    let value = register_value(environment, register);
    let value = match register.size() {
        8 => value.swap_bytes(),
        4 => (value as u32).swap_bytes().into(),
        _ => 0,
    };
    set_register(environment, register, value);
}

const LAHF: u64 = 0xd5;

/// LAHF.
pub fn load_flags<E: Environment>(environment: &mut E) {
    let value = environment.registers().rflags & LAHF | 2;
    set_register(environment, Register::AH, value);
}

/// SAHF.
pub fn store_flags<E: Environment>(environment: &mut E) {
    let value = register_value(environment, Register::AH);
    let rflags = &mut environment.registers_mut().rflags;
    *rflags = *rflags & !LAHF | value & LAHF;
}

/// SALC, which no manual lists: AL becomes 0xff if CF is set, else 0.
pub fn set_al_from_carry<E: Environment>(environment: &mut E) {
    let carry = environment.registers().rflags & RFlags::CARRY_FLAG.bits() != 0;
    set_register(environment, Register::AL, if carry { 0xff } else { 0 });
}

fn apply<E: Environment>(environment: &mut E, flags: FlagChange) {
    let rflags = &mut environment.registers_mut().rflags;
    *rflags = flags.apply(*rflags);
}

/// AAA, AAS, AAM, AAD, DAA and DAS (SDM vol. 2A).
pub fn decimal<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let rflags = environment.registers().rflags;
    let carry = rflags & RFlags::CARRY_FLAG.bits() != 0;
    let auxiliary = rflags & RFlags::AUXILIARY_CARRY_FLAG.bits() != 0;
    let ax = register_value(environment, Register::AX) as u16;
    let [al, ah] = ax.to_le_bytes();
    let low_digit_overflows = al & 0xf > 9 || auxiliary;
    let (new, carries) = match instruction.mnemonic() {
        Mnemonic::Aaa => {
            let new = if low_digit_overflows {
                ax.wrapping_add(0x106)
            } else {
                ax
            };
            (
                new & 0xff0f,
                Some((low_digit_overflows, low_digit_overflows)),
            )
        }
        Mnemonic::Aas => {
            let new = if low_digit_overflows {
                ax.wrapping_sub(0x106)
            } else {
                ax
            };
            (
                new & 0xff0f,
                Some((low_digit_overflows, low_digit_overflows)),
            )
        }
        Mnemonic::Aam => {
            let base = instruction.immediate8();
            if base == 0 {
                return Err(Exception::new(vector::DIVIDE_ERROR).into());
            }
            (u16::from_le_bytes([al % base, al / base]), None)
        }
        Mnemonic::Aad => {
            let base = instruction.immediate8();
            (al.wrapping_add(ah.wrapping_mul(base)).into(), None)
        }
        mnemonic => {
            let high_digit_overflows = al > 0x99 || carry;
            let correction = if low_digit_overflows { 6 } else { 0 }
                + if high_digit_overflows { 0x60 } else { 0 };
            let (new, borrows) = if mnemonic == Mnemonic::Daa {
                (al.wrapping_add(correction), false)
            } else {
                // A borrow out of the low digit's correction carries, too.
                (al.wrapping_sub(correction), low_digit_overflows && al < 6)
            };
            let carries = (high_digit_overflows || borrows, low_digit_overflows);
            (u16::from_le_bytes([new, ah]), Some(carries))
        }
    };
    set_register(environment, Register::AX, new.into());
    apply(environment, FlagChange::of_byte(new as u8, carries));
    Ok(())
}

/// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ and JRCXZ.
pub fn count_and_jump<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let zero = environment.registers().rflags & RFlags::ZERO_FLAG.bits() != 0;
    let width = counter_width(instruction);
    let old = part(environment, Gpr::Rcx, width);
    let (new, taken) = match instruction.mnemonic() {
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => (old, old == 0),
        mnemonic => {
            let new = old.wrapping_sub(1) & address::width_mask(width);
            let goes_on = match mnemonic {
                Mnemonic::Loope => zero,
                Mnemonic::Loopne => !zero,
                _ => true,
            };
            (new, new != 0 && goes_on)
        }
    };
    let progress = stack::jump_if(environment, instruction, taken)?;
    if new != old {
        set_part(environment, Gpr::Rcx, width, new);
    }
    Ok(progress)
}

/// How wide the counter is: as wide as addresses are.
fn counter_width(instruction: &Instruction) -> CodeWidth {
    use umbra_vcpu::instruction::iced_x86::Code as C;
    match instruction.code() {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX
        | C::Jcxz_rel8_16
        | C::Jcxz_rel8_32 => CodeWidth::Bits16,
        C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64 => CodeWidth::Bits64,
        _ => CodeWidth::Bits32,
    }
}

/// BOUND.
pub fn check_bounds<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<(), Stop<E::Failure>> {
    let size = operand::size(instruction, 0).ok_or(Stop::Unsupported)?;
    let operand = memory_operand(environment, instruction).ok_or(Stop::Unsupported)?;
    let bytes = size.bytes();
    let place = address::resolve(environment, operand, 2 * bytes, Intent::Read)?;
    let mut bounds = [0; 8];
    address::load(environment, &place, &mut bounds[..2 * bytes])?;
    let bounds = u64::from_le_bytes(bounds);
    let index = size.signed(register_value(environment, instruction.op0_register()));
    let (lower, upper) = (size.signed(bounds), size.signed(bounds >> size.bits()));
    if index < lower || index > upper {
        return Err(Exception::new(vector::BOUND_RANGE).into());
    }
    Ok(())
}
