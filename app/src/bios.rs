//! The guest's BIOS: `umbra-firmware` on a guest's processor, memory and devices.

use umbra_firmware::{Firmware, MemoryRange, PORT, Platform};
use umbra_loader::MemoryMap;
use umbra_machine::Machine;
use umbra_vcpu::address::Gpa;
use umbra_vcpu::exit::{IoAccess, IoDirection, IoWidth};
use umbra_vcpu::registers::{Registers, Segment, SegmentRegister};
use x86_64::registers::control::Cr0Flags;

use crate::guest::Guest;
use crate::memory::{GuestHost, Unwritable};

/// Leaves memory and devices as a BIOS does before it starts an operating system.
///
/// # Errors
/// [`Unwritable`] if the host has no memory for it.
pub fn install(
    host: &GuestHost,
    machine: &mut Machine,
    memory_map: &MemoryMap,
    disk: Option<&'static [u8]>,
) -> Result<Firmware, Unwritable> {
    let ranges = memory_map.ranges().iter().map(|range| MemoryRange {
        start: range.start.as_u64(),
        length: range.length,
        kind: range.kind as u32,
    });
    let firmware = Firmware::new(ranges.collect(), disk);
    for piece in firmware.memory() {
        host.write(piece.at, &piece.bytes)?;
    }
    start_timer(machine);
    Ok(firmware)
}

/// The interval timer interrupts 18.2 times a second; the other lines stay masked.
fn start_timer(machine: &mut Machine) {
    const TIMER_AND_CASCADE: u32 = 0xfa;
    const RATE_GENERATOR: u32 = 0x34;
    for (port, value) in [
        (0x21, TIMER_AND_CASCADE),
        (0x43, RATE_GENERATOR),
        (0x40, 0),
        (0x40, 0),
    ] {
        machine.write_port(port, IoWidth::Byte, value);
    }
}

/// Whose an access to a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A service was asked for, and done.
    Service,
    /// A device's.
    Device,
}

/// Carries out a service if the guest asks for one by this access to a port.
pub fn call(guest: &mut Guest, access: IoAccess) -> Access {
    if access.port != PORT || access.direction != IoDirection::Out {
        return Access::Device;
    }
    let control = guest.vcpu.control_registers();
    if control.cr0 & Cr0Flags::PROTECTED_MODE_ENABLE.bits() != 0 {
        return Access::Device;
    }
    let base = guest.vcpu.segment(SegmentRegister::Cs).base;
    let address = base.wrapping_add(guest.vcpu.registers().rip).as_u64();
    let Some(vector) = umbra_firmware::vector_at(address) else {
        return Access::Device;
    };
    let Some(firmware) = guest.firmware.take() else {
        return Access::Device;
    };
    firmware.call(guest, vector);
    guest.firmware = Some(firmware);
    Access::Service
}

impl Platform for Guest {
    fn registers(&self) -> &Registers {
        self.vcpu.registers()
    }

    fn registers_mut(&mut self) -> &mut Registers {
        self.vcpu.registers_mut()
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        self.vcpu.segment(register)
    }

    fn read(&self, at: Gpa, bytes: &mut [u8]) {
        if self.paging.is_ram(at, bytes.len()) {
            self.paging.read_ram(at, bytes);
        } else {
            bytes.fill(0xff);
        }
    }

    fn write(&mut self, at: Gpa, bytes: &[u8]) {
        // A host without memory for it shows when the guest touches the page itself.
        if self.paging.is_ram(at, bytes.len()) {
            let _ = self.paging.write_ram(at, bytes);
        }
    }

    fn print(&mut self, byte: u8) {
        self.machine.print(byte);
    }

    fn write_port(&mut self, port: u16, value: u8) {
        self.machine.write_port(port, IoWidth::Byte, value.into());
    }
}
