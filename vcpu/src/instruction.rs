//! Instruction decoding for exits that do not say what the instruction was, by `iced-x86`.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};
use x86_64::registers::model_specific::EferFlags;
use x86_64::registers::rflags::RFlags;

use crate::address::Gva;
use crate::registers::{
    CodeWidth, ControlRegisters, Gpr, Registers, Segment, SegmentAttributes, SegmentRegister,
};

pub use iced_x86;

/// No instruction is longer, in bytes (SDM vol. 2A 2.3.11).
pub const MAX_LENGTH: usize = 15;

/// How wide code is under these registers (SDM vol. 3A 3.4.5, 5.2.1).
pub fn code_width(control: &ControlRegisters, rflags: u64, code_segment: &Segment) -> CodeWidth {
    let long_mode = control.efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0;
    let attributes = code_segment.attributes;
    if control.cr0 & 1 == 0 || rflags & RFlags::VIRTUAL_8086_MODE.bits() != 0 {
        CodeWidth::Bits16
    } else if long_mode && attributes.contains(SegmentAttributes::LONG) {
        CodeWidth::Bits64
    } else if attributes.contains(SegmentAttributes::DEFAULT_32) {
        CodeWidth::Bits32
    } else {
        CodeWidth::Bits16
    }
}

/// Builds the decoder's tables, which otherwise the first [`decode`] does: they come from the heap, with no
/// way to fail.
pub fn initialize() {
    const NOP: u8 = 0x90;
    let _ = decode(&[NOP], CodeWidth::Bits64, 0);
}

/// Decodes the instruction at the start of `bytes`, or `None` if they hold no whole valid one.
pub fn decode(bytes: &[u8], width: CodeWidth, rip: u64) -> Option<Instruction> {
    let mut decoder = Decoder::with_ip(width.bits(), bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (instruction.code() != Code::INVALID).then_some(instruction)
}

/// The general register that `register` is, or is a part of.
pub fn general_register(register: Register) -> Option<Gpr> {
    let full = register.full_register();
    let index = (full as usize).checked_sub(Register::RAX as usize)?;
    (index < 16).then(|| Gpr::from_encoding(index as u8))
}

/// The linear address of the instruction's memory operand.
///
/// `segments` gives a segment register's hidden part. Limits are not checked: the processor has
/// checked them before it exits, and linear wrapping at 4 GiB outside 64-bit mode is applied.
pub fn memory_operand(
    instruction: &Instruction,
    registers: &Registers,
    width: CodeWidth,
    segments: impl Fn(SegmentRegister) -> Segment,
) -> Option<Gva> {
    let operand = (0..instruction.op_count())
        .find(|&operand| instruction.op_kind(operand) == OpKind::Memory)?;
    let linear = instruction.virtual_address(operand, 0, |register, _, _| {
        Some(match register {
            Register::ES => segments(SegmentRegister::Es).base.as_u64(),
            Register::CS => segments(SegmentRegister::Cs).base.as_u64(),
            Register::SS => segments(SegmentRegister::Ss).base.as_u64(),
            Register::DS => segments(SegmentRegister::Ds).base.as_u64(),
            Register::FS => segments(SegmentRegister::Fs).base.as_u64(),
            Register::GS => segments(SegmentRegister::Gs).base.as_u64(),
            register => {
                let value = registers.get(general_register(register)?);
                match register.size() {
                    2 => value & 0xffff,
                    4 => value & 0xffff_ffff,
                    _ => value,
                }
            }
        })
    })?;
    Some(Gva::new(match width {
        CodeWidth::Bits64 => linear,
        CodeWidth::Bits32 | CodeWidth::Bits16 => linear & 0xffff_ffff,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(_: SegmentRegister) -> Segment {
        Segment::flat_data32(0x10)
    }

    #[test]
    fn invlpg_operand_in_each_width() {
        let mut registers = Registers::default();
        registers.set(Gpr::Rax, 0xffff_8000_0000_1000);
        // invlpg [rax] / [eax] share their encoding.
        let bytes = [0x0f, 0x01, 0x38];
        for (width, expected) in [
            (CodeWidth::Bits64, 0xffff_8000_0000_1000),
            (CodeWidth::Bits32, 0x0000_1000),
        ] {
            let instruction = decode(&bytes, width, 0).expect("valid");
            assert_eq!(
                memory_operand(&instruction, &registers, width, flat),
                Some(Gva::new(expected))
            );
        }
    }

    #[test]
    fn segment_bases_are_added() {
        let registers = Registers::default();
        // invlpg gs:[0x10] in 32-bit code.
        let instruction = decode(
            &[0x65, 0x0f, 0x01, 0x3d, 0x10, 0, 0, 0],
            CodeWidth::Bits32,
            0,
        )
        .expect("valid");
        let address = memory_operand(&instruction, &registers, CodeWidth::Bits32, |register| {
            assert_eq!(register, SegmentRegister::Gs);
            Segment {
                base: Gva::new(0xffff_fff8),
                ..Segment::flat_data32(0)
            }
        });
        assert_eq!(address, Some(Gva::new(8)), "linear addresses wrap at 4 GiB");
    }

    #[test]
    fn general_registers_of_every_size() {
        assert_eq!(general_register(Register::AL), Some(Gpr::Rax));
        assert_eq!(general_register(Register::SP), Some(Gpr::Rsp));
        assert_eq!(general_register(Register::R15D), Some(Gpr::R15));
        assert_eq!(general_register(Register::XMM0), None);
    }

    #[test]
    fn truncated_bytes_are_no_instruction() {
        assert_eq!(decode(&[0x0f], CodeWidth::Bits64, 0), None);
    }
}
