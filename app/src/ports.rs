//! IN, OUT, INS and OUTS.

use alloc::format;

use umbra_inspect::trace::Event;
use umbra_machine::Machine;
use umbra_vcpu::exit::{IoAccess, IoDirection, IoOperand};
use umbra_vcpu::registers::Gpr;

use crate::guest::{End, Guest};
use crate::{bios, emulation, uhyve};

/// Carries out the instruction that the guest stopped at.
pub fn access(guest: &mut Guest, access: IoAccess) -> Result<(), End> {
    let is_devices = access.operand == IoOperand::Accumulator
        && guest.uhyve.is_none()
        && access.port != umbra_firmware::PORT;
    if !is_devices {
        return special_access(guest, access);
    }
    if Machine::tells_time(access.port, access.width) {
        guest.advance_time();
    }
    accumulator(guest, access);
    guest.vcpu.skip_instruction();
    flush_page(guest);
    Ok(())
}

/// The same where it takes more than a device and a register.
#[inline(never)]
fn special_access(guest: &mut Guest, access: IoAccess) -> Result<(), End> {
    if let Some(result) = uhyve::access(guest, access) {
        return result;
    }
    if Machine::tells_time(access.port, access.width) {
        guest.advance_time();
    }
    let result = match access.operand {
        IoOperand::Accumulator => {
            if bios::call(guest, access) == bios::Access::Device {
                accumulator(guest, access);
            }
            guest.vcpu.skip_instruction();
            Ok(())
        }
        IoOperand::String { .. } => emulation::run(guest, || {
            format!("a string instruction uses port {:#x}", access.port)
        }),
    };
    flush_page(guest);
    result
}

/// Does what the guest has asked of the test device: nothing that it can see, but its memory is mapped
/// anew.
#[inline]
fn flush_page(guest: &mut Guest) {
    if guest.machine.take_page_flush().is_some() {
        guest.paging.mmu().zap_all();
    }
}

#[inline]
fn accumulator(guest: &mut Guest, access: IoAccess) {
    let mask = u64::from(access.width.mask());
    let rax = guest.vcpu.registers().get(Gpr::Rax);
    let record = |guest: &mut Guest, value: u64| {
        guest.record(|| Event::Port {
            port: access.port,
            width: access.width,
            direction: access.direction,
            value: value as u32,
        });
    };
    match access.direction {
        IoDirection::Out => {
            guest
                .machine
                .write_port(access.port, access.width, (rax & mask) as u32);
            record(guest, rax & mask);
        }
        IoDirection::In => {
            let value = u64::from(guest.machine.read_port(access.port, access.width)) & mask;
            record(guest, value);
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
