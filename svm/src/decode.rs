//! What an exit's instruction was, from its bytes: SVM without decode assists names the reason for
//! an exit but neither the operands nor the length (APM vol. 2 15.7.1).

use umbra_vcpu::address::Gva;
use umbra_vcpu::event::vector;
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic, OpKind, Register};
use umbra_vcpu::instruction::{self, decode, general_register};
use umbra_vcpu::registers::{CodeWidth, Gpr, Registers};

/// Exit codes (APM vol. 2 appendix C).
pub mod exit_code {
    #![allow(missing_docs, reason = "the manual's names")]
    pub const CR0_READ: u64 = 0x00;
    pub const CR15_READ: u64 = 0x0f;
    pub const CR0_WRITE: u64 = 0x10;
    pub const CR15_WRITE: u64 = 0x1f;
    pub const DR0_READ: u64 = 0x20;
    pub const DR15_WRITE: u64 = 0x3f;
    pub const EXCEPTION_1: u64 = 0x41;
    pub const EXCEPTION_0: u64 = 0x40;
    pub const EXCEPTION_31: u64 = 0x5f;
    pub const INTR: u64 = 0x60;
    pub const NMI: u64 = 0x61;
    pub const INIT: u64 = 0x63;
    pub const VINTR: u64 = 0x64;
    pub const RDPMC: u64 = 0x6f;
    pub const CPUID: u64 = 0x72;
    pub const RSM: u64 = 0x73;
    pub const IRET: u64 = 0x74;
    pub const INTN: u64 = 0x75;
    pub const INVD: u64 = 0x76;
    pub const PAUSE: u64 = 0x77;
    pub const HLT: u64 = 0x78;
    pub const INVLPG: u64 = 0x79;
    pub const INVLPGA: u64 = 0x7a;
    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const TASK_SWITCH: u64 = 0x7d;
    pub const SHUTDOWN: u64 = 0x7f;
    pub const VMRUN: u64 = 0x80;
    pub const VMMCALL: u64 = 0x81;
    pub const VMLOAD: u64 = 0x82;
    pub const SKINIT: u64 = 0x86;
    pub const ICEBP: u64 = 0x88;
    pub const WBINVD: u64 = 0x89;
    pub const MONITOR: u64 = 0x8a;
    pub const MWAIT: u64 = 0x8b;
    pub const XSETBV: u64 = 0x8d;
    pub const RDPRU: u64 = 0x8e;
    pub const INVLPGB: u64 = 0xa0;
    pub const INVPCID: u64 = 0xa2;
    pub const TLBSYNC: u64 = 0xa4;
    pub const INVALID: u64 = 0xffff_ffff;
}

/// An instruction without operands to decode: its usual encoding, and its mnemonics otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    encoding: &'static [u8],
    mnemonics: &'static [Mnemonic],
}

/// RDMSR.
pub const RDMSR: Plain = plain(&[0x0f, 0x32], &[Mnemonic::Rdmsr]);
/// WRMSR.
pub const WRMSR: Plain = plain(&[0x0f, 0x30], &[Mnemonic::Wrmsr]);
/// CPUID.
pub const CPUID: Plain = plain(&[0x0f, 0xa2], &[Mnemonic::Cpuid]);
/// VMMCALL.
pub const VMMCALL: Plain = plain(&[0x0f, 0x01, 0xd9], &[Mnemonic::Vmmcall]);

const fn plain(encoding: &'static [u8], mnemonics: &'static [Mnemonic]) -> Plain {
    Plain {
        encoding,
        mnemonics,
    }
}

impl Plain {
    /// The instruction that exits with `code`, if it is one of these. `information` is EXITINFO1.
    pub const fn of_exit(code: u64, information: u64) -> Option<Self> {
        Some(match code {
            exit_code::CPUID => CPUID,
            exit_code::MSR if information & 1 == 0 => RDMSR,
            exit_code::MSR => WRMSR,
            exit_code::HLT => plain(&[0xf4], &[Mnemonic::Hlt]),
            exit_code::PAUSE => plain(&[0xf3, 0x90], &[Mnemonic::Pause]),
            exit_code::VMMCALL => VMMCALL,
            exit_code::RDPMC => plain(&[0x0f, 0x33], &[Mnemonic::Rdpmc]),
            exit_code::INVD => plain(&[0x0f, 0x08], &[Mnemonic::Invd]),
            exit_code::WBINVD => plain(&[0x0f, 0x09], &[Mnemonic::Wbinvd, Mnemonic::Wbnoinvd]),
            exit_code::MONITOR => plain(&[0x0f, 0x01, 0xc8], &[Mnemonic::Monitor]),
            exit_code::MWAIT => plain(&[0x0f, 0x01, 0xc9], &[Mnemonic::Mwait]),
            exit_code::XSETBV => plain(&[0x0f, 0x01, 0xd1], &[Mnemonic::Xsetbv]),
            exit_code::ICEBP => plain(&[0xf1], &[Mnemonic::Int1]),
            _ => return None,
        })
    }

    /// Whether `code` starts with the usual encoding; compared in place, for this is on the way of
    /// every CPUID and HLT.
    #[inline]
    const fn is_usual(&self, code: &[u8]) -> bool {
        match (self.encoding, code) {
            (&[first], &[byte, ..]) => byte == first,
            (&[first, second], &[byte, next, ..]) => byte == first && next == second,
            (&[first, second, third], &[byte, next, last, ..]) => {
                byte == first && next == second && last == third
            }
            _ => false,
        }
    }

    /// The length in bytes if `code`, the first of eight bytes lowest, begins with the usual encoding.
    #[inline]
    pub fn usual_length(&self, code: u64) -> Option<u64> {
        self.is_usual(&code.to_le_bytes())
            .then_some(self.encoding.len() as u64)
    }

    /// The length in bytes of this instruction at the start of `code`, or `None` if another one
    /// stands there.
    pub fn length(&self, code: &[u8], width: CodeWidth) -> Option<u8> {
        if self.is_usual(code) {
            return Some(self.encoding.len() as u8);
        }
        let instruction = decode(code, width, 0)?;
        self.mnemonics
            .contains(&instruction.mnemonic())
            .then_some(instruction.len() as u8)
    }
}

/// An access to a control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlAccess {
    /// To a general register.
    Read(Gpr),
    /// Of this value.
    Write(u64),
    /// SMSW of the low half of CR0 only, which the hardware's CR0 has like the guest's.
    StoreLowHalf,
    /// LMSW from memory at this address.
    LoadLowHalf(Gva),
}

/// What MOV CR, CLTS, LMSW or SMSW does. `cr0` is the guest's.
pub fn control_access(
    instruction: &Instruction,
    registers: &Registers,
    cr0: u64,
    width: CodeWidth,
    memory: impl FnOnce() -> Option<Gva>,
) -> Option<ControlAccess> {
    let operand_register = |operand| {
        (instruction.op_kind(operand) == OpKind::Register).then(|| instruction.op_register(operand))
    };
    match instruction.mnemonic() {
        Mnemonic::Clts => Some(ControlAccess::Write(cr0 & !CR0_TS)),
        Mnemonic::Lmsw => match operand_register(0) {
            Some(register) => {
                let source = registers.get(general_register(register)?);
                Some(ControlAccess::Write(load_machine_status(cr0, source)))
            }
            None => memory().map(ControlAccess::LoadLowHalf),
        },
        Mnemonic::Smsw => match operand_register(0) {
            Some(register) if register.size() > 2 => {
                general_register(register).map(ControlAccess::Read)
            }
            _ => Some(ControlAccess::StoreLowHalf),
        },
        Mnemonic::Mov => {
            let (target, source) = (operand_register(0)?, operand_register(1)?);
            if target.is_cr() {
                let value = registers.get(general_register(source)?);
                Some(ControlAccess::Write(match width {
                    CodeWidth::Bits64 => value,
                    CodeWidth::Bits32 | CodeWidth::Bits16 => value & 0xffff_ffff,
                }))
            } else if source.is_cr() {
                general_register(target).map(ControlAccess::Read)
            } else {
                None
            }
        }
        _ => None,
    }
}

const CR0_PE: u64 = 1 << 0;
const CR0_TS: u64 = 1 << 3;

/// CR0 after LMSW: PE, MP, EM and TS are loaded, but PE cannot be cleared (APM vol. 3, LMSW).
pub const fn load_machine_status(cr0: u64, source: u64) -> u64 {
    (cr0 & !0xe) | (source & 0xf) | (cr0 & CR0_PE)
}

/// The general register and the number of the debug register of MOV DR.
pub fn debug_access(instruction: &Instruction) -> Option<(Gpr, Register)> {
    if instruction.mnemonic() != Mnemonic::Mov {
        return None;
    }
    let (target, source) = (instruction.op0_register(), instruction.op1_register());
    if target.is_dr() {
        Some((general_register(source)?, target))
    } else if source.is_dr() {
        Some((general_register(target)?, source))
    } else {
        None
    }
}

/// The prefix REX and the byte after it, from the low bytes of 64-bit `code`; without a prefix it is 0.
const fn split_rex(code: u64) -> (u8, u64, u64) {
    if code & 0xf0 == 0x40 {
        (code as u8, code >> 8, 1)
    } else {
        (0, code, 0)
    }
}

/// The general register that `field` and a bit of REX stand for.
const fn extended_register(field: u8, extension: u8) -> Gpr {
    Gpr::from_encoding(field & 7 | (extension & 1) << 3)
}

/// The general register and the length of MOV to or from a control register without prefixes but
/// REX, in 64-bit code whose first eight bytes `code` holds, the first lowest.
pub fn move_control(code: u64, is_write: bool) -> Option<(Gpr, u64)> {
    let (rex, code, prefix) = split_rex(code);
    let opcode = if is_write { 0x220f } else { 0x200f };
    // The two bits that tell memory from registers elsewhere do not count here.
    (code & 0xffff == opcode).then(|| (extended_register((code >> 16) as u8, rex), prefix + 3))
}

/// The base register, the displacement and the length of INVLPG without segment prefix, index
/// and absolute address. `code` as for [`move_control`].
pub fn invalidate_page(code: u64) -> Option<(Gpr, i64, u64)> {
    let (rex, code, prefix) = split_rex(code);
    let operand = (code >> 16) as u8;
    let (mode, base) = (operand >> 6, operand & 7);
    // A base of 4 means an index, and of 5 without displacement an address relative to RIP.
    if code & 0xffff != 0x010f || operand >> 3 & 7 != 7 || base == 4 || (mode == 0 && base == 5) {
        return None;
    }
    let (displacement, length) = match mode {
        0 => (0, 3),
        1 => (i64::from(((code >> 24) as u8).cast_signed()), 4),
        2 => (i64::from(((code >> 24) as u32).cast_signed()), 7),
        _ => return None,
    };
    Some((extended_register(base, rex), displacement, prefix + length))
}

/// The segment, the index register's width and the repetition of INS or OUTS.
pub fn string_operand(instruction: &Instruction) -> Option<(Register, CodeWidth)> {
    let (operand, segment) = match instruction.mnemonic() {
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => (0, Register::ES),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => (1, instruction.memory_segment()),
        _ => return None,
    };
    let width = match instruction.op_kind(operand) {
        OpKind::MemoryESDI | OpKind::MemorySegSI => CodeWidth::Bits16,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => CodeWidth::Bits32,
        OpKind::MemoryESRDI | OpKind::MemorySegRSI => CodeWidth::Bits64,
        _ => return None,
    };
    Some((segment, width))
}

/// Vectors whose delivery fails into a double fault when another of them, or a page fault, is
/// being delivered (APM vol. 2 table 8-3).
pub const CONTRIBUTORY: u32 = 1 << vector::DIVIDE_ERROR
    | 1 << vector::INVALID_TSS
    | 1 << vector::SEGMENT_NOT_PRESENT
    | 1 << vector::STACK_FAULT
    | 1 << vector::GENERAL_PROTECTION;

/// The longest instruction, in bytes.
pub const MAX_LENGTH: usize = instruction::MAX_LENGTH;

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use umbra_vcpu::registers::Segment;

    fn access(code: &[u8], width: CodeWidth, registers: &Registers) -> Option<ControlAccess> {
        let instruction = decode(code, width, 0)?;
        control_access(&instruction, registers, 0x8001_0031, width, || {
            Some(Gva::new(0x500))
        })
    }

    #[test]
    fn lengths_with_and_without_prefixes() {
        let cpuid = Plain::of_exit(exit_code::CPUID, 0).expect("plain");
        assert_eq!(
            cpuid.length(&[0x0f, 0xa2, 0x90], CodeWidth::Bits64),
            Some(2)
        );
        assert_eq!(
            cpuid.length(&[0x66, 0x0f, 0xa2], CodeWidth::Bits32),
            Some(3)
        );
        assert_eq!(
            cpuid.length(&[0x48, 0x0f, 0xa2], CodeWidth::Bits64),
            Some(3)
        );
        assert_eq!(cpuid.length(&[0x0f], CodeWidth::Bits64), None);
        assert_eq!(cpuid.length(&[0x90], CodeWidth::Bits64), None);
        let read = Plain::of_exit(exit_code::MSR, 0).expect("plain");
        let write = Plain::of_exit(exit_code::MSR, 1).expect("plain");
        assert_eq!(read.length(&[0x0f, 0x32], CodeWidth::Bits32), Some(2));
        assert_eq!(write.length(&[0x0f, 0x32], CodeWidth::Bits32), None);
    }

    #[test]
    fn every_plain_encoding_is_what_its_mnemonic_says() {
        for code in 0..=0xff {
            for information in 0..=1 {
                let Some(plain) = Plain::of_exit(code, information) else {
                    continue;
                };
                let instruction =
                    decode(plain.encoding, CodeWidth::Bits64, 0).expect("an instruction");
                assert!(
                    plain.mnemonics.contains(&instruction.mnemonic()),
                    "{code:#x}"
                );
                assert_eq!(instruction.len(), plain.encoding.len());
            }
        }
    }

    #[test]
    fn control_register_moves() {
        let mut registers = Registers::default();
        registers.set(Gpr::Rax, 0x1_8000_0011);
        registers.set(Gpr::R9, 7);
        let wide = CodeWidth::Bits64;
        assert_eq!(
            access(&[0x0f, 0x22, 0xc0], wide, &registers),
            Some(ControlAccess::Write(0x1_8000_0011)),
            "mov cr0, rax"
        );
        assert_eq!(
            access(&[0x0f, 0x22, 0xc0], CodeWidth::Bits32, &registers),
            Some(ControlAccess::Write(0x8000_0011)),
            "mov cr0, eax"
        );
        assert_eq!(
            access(&[0x41, 0x0f, 0x22, 0xd9], wide, &registers),
            Some(ControlAccess::Write(7)),
            "mov cr3, r9"
        );
        assert_eq!(
            access(&[0x0f, 0x20, 0xe2], wide, &registers),
            Some(ControlAccess::Read(Gpr::Rdx)),
            "mov rdx, cr4"
        );
    }

    #[test]
    fn machine_status_word() {
        let mut registers = Registers::default();
        registers.set(Gpr::Rax, 0xfff2);
        let code = CodeWidth::Bits32;
        assert_eq!(
            access(&[0x0f, 0x01, 0xf0], code, &registers),
            Some(ControlAccess::Write(0x8001_0033)),
            "lmsw ax: PE stays, MP is set, the rest is ignored"
        );
        assert_eq!(
            access(&[0x0f, 0x01, 0x30], code, &registers),
            Some(ControlAccess::LoadLowHalf(Gva::new(0x500))),
            "lmsw [eax]"
        );
        assert_eq!(
            access(&[0x0f, 0x01, 0xe1], code, &registers),
            Some(ControlAccess::Read(Gpr::Rcx)),
            "smsw ecx"
        );
        assert_eq!(
            access(&[0x66, 0x0f, 0x01, 0xe1], code, &registers),
            Some(ControlAccess::StoreLowHalf),
            "smsw cx"
        );
        assert_eq!(
            access(&[0x0f, 0x06], code, &registers),
            Some(ControlAccess::Write(0x8001_0031)),
            "clts with TS clear"
        );
        assert_eq!(access(&[0x90], code, &registers), None);
    }

    #[test]
    fn string_operands() {
        let operand = |code: &[u8], width| string_operand(&decode(code, width, 0)?);
        assert_eq!(
            operand(&[0xf3, 0x6e], CodeWidth::Bits32),
            Some((Register::DS, CodeWidth::Bits32)),
            "rep outsb"
        );
        assert_eq!(
            operand(&[0x65, 0x67, 0x6f], CodeWidth::Bits64),
            Some((Register::GS, CodeWidth::Bits32)),
            "outsd gs:[esi]"
        );
        assert_eq!(
            operand(&[0x26, 0x6c], CodeWidth::Bits16),
            Some((Register::ES, CodeWidth::Bits16)),
            "insb"
        );
        assert_eq!(operand(&[0xee], CodeWidth::Bits32), None);
    }

    proptest! {
        #[test]
        fn what_is_decoded_at_a_glance_is_what_the_decoder_says(
            rex in prop::option::of(0x40..0x50_u8),
            second in prop::sample::select(vec![0x01_u8, 0x20, 0x22]),
            rest: [u8; 8],
            values: [u64; 16],
        ) {
            let mut code: Vec<u8> = rex.into_iter().collect();
            code.extend([0x0f, second]);
            code.extend(rest);
            let word = u64::from_le_bytes(code[..8].try_into().unwrap());
            let instruction = decode(&code, CodeWidth::Bits64, 0);
            for is_write in [false, true] {
                let Some((register, length)) = move_control(word, is_write) else { continue };
                // Of registers that do not exist the decoder knows nothing, and nothing exits.
                let Some(instruction) = &instruction else { continue };
                let general = instruction.op_register(u32::from(is_write));
                prop_assert_eq!(general_register(general), Some(register));
                prop_assert_eq!(instruction.len() as u64, length);
            }
            if let Some((base, displacement, length)) = invalidate_page(word) {
                let instruction = instruction.unwrap();
                prop_assert_eq!(instruction.mnemonic(), Mnemonic::Invlpg);
                prop_assert_eq!(instruction.len() as u64, length);
                let mut registers = Registers::default();
                for (register, value) in Gpr::ALL.into_iter().zip(values) {
                    registers.set(register, value);
                }
                let width = CodeWidth::Bits64;
                let flat = |_| Segment::flat_data32(0);
                let address = instruction::memory_operand(&instruction, &registers, width, flat);
                let expected = registers.get(base).wrapping_add_signed(displacement);
                prop_assert_eq!(address, Some(Gva::new(expected)));
            }
        }

        #[test]
        fn arbitrary_code_never_panics(code: Vec<u8>, exit in 0_u64..0x100, information: u64) {
            let registers = Registers::default();
            for width in [CodeWidth::Bits16, CodeWidth::Bits32, CodeWidth::Bits64] {
                if let Some(plain) = Plain::of_exit(exit, information) {
                    let length = plain.length(&code, width);
                    prop_assert!(length.is_none_or(|length| usize::from(length) <= code.len()));
                }
                if let Some(instruction) = decode(&code, width, 0) {
                    let _ = control_access(&instruction, &registers, 0, width, || None);
                    let _ = debug_access(&instruction);
                    let _ = string_operand(&instruction);
                }
            }
        }
    }
}
