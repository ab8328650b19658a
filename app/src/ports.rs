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
    if guest.machine.take_page_flush().is_some() {
        // Nothing the guest can see: it asks that its memory be mapped anew.
        guest.paging.mmu().zap_all();
    }
    result
}

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
