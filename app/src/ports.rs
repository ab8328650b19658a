//! IN, OUT, INS and OUTS.
//!
//! A repeated string instruction is carried out in batches of [`BATCH`] elements, with rSI, rDI and
//! rCX brought up to date after each element, so that interrupts and page faults come between two
//! elements as they do on a processor (SDM vol. 2B, "REP").

use umbra_mmu::AccessKind;
use umbra_vcpu::address::Gva;
use umbra_vcpu::event::Exception;
use umbra_vcpu::exit::{IoAccess, IoDirection, IoOperand, Repeat};
use umbra_vcpu::registers::{CodeWidth, Gpr};
use x86_64::registers::rflags::RFlags;

use crate::guest::{End, Guest};
use crate::paging::MemoryError;

/// Elements of a string instruction between two looks at interrupts.
const BATCH: u64 = 256;

/// Carries out the instruction that the guest stopped at.
pub fn access(guest: &mut Guest, access: IoAccess) -> Result<(), End> {
    match access.operand {
        IoOperand::Accumulator => {
            accumulator(guest, access);
            guest.vcpu.skip_instruction();
            Ok(())
        }
        IoOperand::String {
            address,
            repeat,
            address_width,
        } => string(guest, access, address, repeat, address_width),
    }
}

fn accumulator(guest: &mut Guest, access: IoAccess) {
    let mask = u64::from(access.width.mask());
    let rax = guest.vcpu.registers().get(Gpr::Rax);
    match access.direction {
        IoDirection::Out => {
            guest
                .machine
                .write_port(access.port, access.width, (rax & mask) as u32);
        }
        IoDirection::In => {
            let value = u64::from(guest.machine.read_port(access.port, access.width)) & mask;
            // A 32-bit result clears the upper half, a narrower one keeps the rest.
            let kept = if access.width.bytes() == 4 {
                0
            } else {
                rax & !mask
            };
            guest.vcpu.registers_mut().set(Gpr::Rax, kept | value);
        }
    }
}

fn string(
    guest: &mut Guest,
    access: IoAccess,
    first: Gva,
    repeat: Repeat,
    address_width: CodeWidth,
) -> Result<(), End> {
    let bytes = usize::from(access.width.bytes());
    let backwards = guest.vcpu.registers().rflags & RFlags::DIRECTION_FLAG.bits() != 0;
    let step = if backwards {
        (bytes as u64).wrapping_neg()
    } else {
        bytes as u64
    };
    let index = match access.direction {
        IoDirection::In => Gpr::Rdi,
        IoDirection::Out => Gpr::Rsi,
    };

    let mut address = first;
    for _ in 0..BATCH {
        if repeat == Repeat::Count && part(guest, Gpr::Rcx, address_width) == 0 {
            guest.vcpu.skip_instruction();
            return Ok(());
        }
        let mut value = [0; 4];
        let moved = match access.direction {
            IoDirection::Out => guest
                .paging
                .read(&*guest.vcpu, address, &mut value[..bytes])
                .map(|()| {
                    let value = u32::from_le_bytes(value);
                    guest.machine.write_port(access.port, access.width, value);
                }),
            // The destination is checked first: what a device has given cannot be asked for twice.
            IoDirection::In => guest
                .paging
                .translate(&*guest.vcpu, address, AccessKind::Write)
                .and_then(|_| {
                    let last = address.wrapping_add(bytes as u64 - 1);
                    guest
                        .paging
                        .translate(&*guest.vcpu, last, AccessKind::Write)
                })
                .and_then(|_| {
                    let value = guest.machine.read_port(access.port, access.width);
                    guest
                        .paging
                        .write(&*guest.vcpu, address, &value.to_le_bytes()[..bytes])
                }),
        };
        if let Err(error) = moved {
            return memory_error(guest, &error);
        }
        advance(guest, index, step, address_width);
        address = wrap(address.wrapping_add(step), address_width);
        match repeat {
            Repeat::Once => {
                guest.vcpu.skip_instruction();
                return Ok(());
            }
            Repeat::Count => advance(guest, Gpr::Rcx, u64::MAX, address_width),
        }
    }
    Ok(())
}

/// What a failed access to guest memory means for the guest.
fn memory_error(guest: &mut Guest, error: &MemoryError) -> Result<(), End> {
    match error {
        MemoryError::Fault(fault) => guest.raise(Exception::page_fault(fault.gva, fault.error)),
        MemoryError::Unwritable(cause) => Err(guest.unsupported(alloc::format!(
            "a string instruction moves between a port and guest memory: {cause}"
        ))),
    }
}

/// The part of a register that has the address width.
fn part(guest: &Guest, register: Gpr, width: CodeWidth) -> u64 {
    guest.vcpu.registers().get(register) & mask(width)
}

/// Adds to the part of a register that has the address width. A 32-bit result clears the upper
/// half, as any 32-bit operation does.
fn advance(guest: &mut Guest, register: Gpr, by: u64, width: CodeWidth) {
    let value = guest.vcpu.registers().get(register);
    let sum = value.wrapping_add(by) & mask(width);
    let kept = if width == CodeWidth::Bits16 {
        value & !mask(width)
    } else {
        0
    };
    guest.vcpu.registers_mut().set(register, kept | sum);
}

const fn mask(width: CodeWidth) -> u64 {
    match width {
        CodeWidth::Bits16 => 0xffff,
        CodeWidth::Bits32 => 0xffff_ffff,
        CodeWidth::Bits64 => u64::MAX,
    }
}

const fn wrap(address: Gva, width: CodeWidth) -> Gva {
    match width {
        CodeWidth::Bits64 => address,
        CodeWidth::Bits16 | CodeWidth::Bits32 => Gva::new(address.as_u64() & 0xffff_ffff),
    }
}
