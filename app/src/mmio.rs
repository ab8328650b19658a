//! Accesses to guest-physical memory behind which there is no RAM.
//!
//! The instruction is fetched, decoded by `iced-x86` and carried out here: loads and stores of a
//! general register or an immediate, with or without extension. Anything else ends the guest
//! with the instruction's bytes in the report rather than with a wrong result.

use alloc::format;

use umbra_mmu::AccessKind;
use umbra_vcpu::address::{Gpa, Gva, PAGE_SIZE};
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic, OpKind, Register};
use umbra_vcpu::instruction::{self, MAX_LENGTH};
use umbra_vcpu::registers::{CodeWidth, SegmentRegister};
use umbra_vcpu::{CodeReader, VcpuExt};

use crate::guest::{End, Guest};

/// Carries out the access at `gva`, which is `gpa`, by the guest's current instruction.
pub fn access(guest: &mut Guest, gva: Gva, gpa: Gpa, kind: AccessKind) -> Result<(), End> {
    if kind == AccessKind::Execute {
        return Err(guest.unsupported(format!(
            "the guest executes at {gva}, guest-physical {gpa}, where it has no memory"
        )));
    }
    let width = guest.vcpu.code_width();
    let mut bytes = [0; MAX_LENGTH];
    let available = fetch(guest, &mut bytes);
    let rip = guest.vcpu.registers().rip;
    let decoded = instruction::decode(&bytes[..available], width, rip);
    let Some(access) = decoded
        .as_ref()
        .filter(|instruction| is_whole_operand(guest, instruction, width, gva))
        .and_then(|instruction| plan(guest, instruction))
    else {
        return Err(guest.unsupported(format!(
            "instruction bytes {:02x?} access {gva}, guest-physical {gpa}, where there is no \
             memory; only plain moves are supported there",
            &bytes[..available]
        )));
    };
    carry_out(guest, gpa, access);
    guest.vcpu.skip_instruction();
    Ok(())
}

/// Whether `gva` is where the instruction's memory operand begins, and all of it lies in that page:
/// otherwise part of it may be RAM.
fn is_whole_operand(guest: &Guest, instruction: &Instruction, width: CodeWidth, gva: Gva) -> bool {
    let registers = guest.vcpu.registers();
    let operand = instruction::memory_operand(instruction, registers, width, |register| {
        guest.vcpu.segment(register)
    });
    let size = instruction.memory_size().size() as u64;
    operand == Some(gva) && gva.page_offset() + size <= PAGE_SIZE
}

/// A move between a register or an immediate and device memory.
#[derive(Clone, Copy)]
enum Move {
    /// `size` bytes of `value` to memory.
    Store { value: u64, size: usize },
    /// `size` bytes from memory, extended to the size of the register.
    Load {
        target: Register,
        size: usize,
        extension: Extension,
    },
}

#[derive(Clone, Copy)]
enum Extension {
    Zero,
    Sign,
}

fn fetch(guest: &mut Guest, bytes: &mut [u8; MAX_LENGTH]) -> usize {
    let control = guest.vcpu.control_registers();
    let level = guest.vcpu.privilege_level();
    let rip = guest.vcpu.registers().rip;
    let address = match guest.vcpu.code_width() {
        CodeWidth::Bits64 => Gva::new(rip),
        _ => {
            let base = guest.vcpu.segment(SegmentRegister::Cs).base;
            Gva::new(base.wrapping_add(rip).as_u64() & 0xffff_ffff)
        }
    };
    guest.paging.read_code(&control, level, address, bytes)
}

fn plan(guest: &Guest, instruction: &Instruction) -> Option<Move> {
    let size = instruction.memory_size().size();
    match (
        instruction.mnemonic(),
        instruction.op0_kind(),
        instruction.op1_kind(),
    ) {
        (Mnemonic::Mov, OpKind::Memory, OpKind::Register) => {
            let value = register_value(guest, instruction.op1_register())?;
            Some(Move::Store { value, size })
        }
        (Mnemonic::Mov, OpKind::Memory, _) => Some(Move::Store {
            value: instruction.try_immediate(1).ok()?,
            size,
        }),
        (Mnemonic::Mov | Mnemonic::Movzx, OpKind::Register, OpKind::Memory) => {
            load(instruction.op0_register(), size, Extension::Zero)
        }
        (Mnemonic::Movsx | Mnemonic::Movsxd, OpKind::Register, OpKind::Memory) => {
            load(instruction.op0_register(), size, Extension::Sign)
        }
        _ => None,
    }
}

fn load(target: Register, size: usize, extension: Extension) -> Option<Move> {
    instruction::general_register(target)?;
    Some(Move::Load {
        target,
        size,
        extension,
    })
}

fn carry_out(guest: &mut Guest, gpa: Gpa, access: Move) {
    match access {
        Move::Store { value, size } => {
            // Where no device answers, writes vanish.
            let _ = guest.machine.write_mmio(gpa, &value.to_le_bytes()[..size]);
        }
        Move::Load {
            target,
            size,
            extension,
        } => {
            let mut bytes = [0; 8];
            // Where no device answers, reads give all ones.
            let _ = guest.machine.read_mmio(gpa, &mut bytes[..size]);
            let value = u64::from_le_bytes(bytes);
            let unused = 64 - 8 * size as u32;
            let value = match extension {
                Extension::Zero => value,
                Extension::Sign => ((value << unused).cast_signed() >> unused).cast_unsigned(),
            };
            set_register(guest, target, value);
        }
    }
}

/// The value of a general register of any size; `None` for any other register.
fn register_value(guest: &Guest, register: Register) -> Option<u64> {
    let value = guest
        .vcpu
        .registers()
        .get(instruction::general_register(register)?);
    Some(if is_high_byte(register) {
        value >> 8
    } else {
        value
    })
}

/// Sets a general register of any size as an instruction with that operand does.
fn set_register(guest: &mut Guest, register: Register, value: u64) {
    let Some(full) = instruction::general_register(register) else {
        return;
    };
    let old = guest.vcpu.registers().get(full);
    let new = match register.size() {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => old & !0xffff | value & 0xffff,
        _ if is_high_byte(register) => old & !0xff00 | (value & 0xff) << 8,
        _ => old & !0xff | value & 0xff,
    };
    guest.vcpu.registers_mut().set(full, new);
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
}
