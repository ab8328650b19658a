//! The BIOS that real-mode code finds: interrupt vectors, BIOS data area, and the services that boot
//! sectors and kernels' setup code call.
//!
//! Protocol: [`Firmware::memory`] is written into the guest's memory before it starts. Each vector
//! leads to a stub of its own that writes to [`PORT`] and returns from the interrupt. The run loop
//! asks [`vector_at`] whether such a write came from a stub in real mode, and if so calls
//! [`Firmware::call`], which does the service on the caller's registers and on the flags that the stub
//! will pop.
//!
//! There is no keyboard and one screen, which is the console. The only disk is the image that the guest
//! was loaded from, read-only.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod disk;
mod memory;
mod services;

use alloc::vec::Vec;

use umbra_vcpu::address::Gpa;
use umbra_vcpu::registers::{Gpr, Registers, Segment, SegmentRegister};

pub use disk::{DISK_NUMBER, SECTOR_SIZE};
pub use memory::{MemoryRange, Piece};

/// The port that the stubs write to.
pub const PORT: u16 = 0xb9;

/// The machine that a service works on.
pub trait Platform {
    /// The caller's registers.
    fn registers(&self) -> &Registers;

    /// The caller's registers, to be changed.
    fn registers_mut(&mut self) -> &mut Registers;

    /// A segment register.
    fn segment(&self, register: SegmentRegister) -> Segment;

    /// Reads memory; where none is, all ones.
    fn read(&self, at: Gpa, bytes: &mut [u8]);

    /// Writes memory; where none is, nothing happens.
    fn write(&mut self, at: Gpa, bytes: &[u8]);

    /// Shows a character.
    fn print(&mut self, byte: u8);

    /// Writes to a port, as the firmware's own code does.
    fn write_port(&mut self, port: u16, value: u8);
}

/// The firmware of one guest.
#[derive(Clone, Debug)]
pub struct Firmware {
    memory_map: Vec<MemoryRange>,
    disk: Option<&'static [u8]>,
}

impl Firmware {
    /// Firmware for a machine with this memory, and with a disk if there is one.
    pub const fn new(memory_map: Vec<MemoryRange>, disk: Option<&'static [u8]>) -> Self {
        Self { memory_map, disk }
    }

    /// What the firmware leaves in the guest's memory.
    pub fn memory(&self) -> [Piece; 3] {
        memory::pieces(self.disk.is_some())
    }

    /// Carries out the service of `vector`.
    pub fn call<P: Platform>(&self, platform: &mut P, vector: u8) {
        services::call(self, platform, vector);
    }
}

/// The vector whose stub is at a linear address, if one is.
pub const fn vector_at(address: u64) -> Option<u8> {
    memory::vector_at(address)
}

/// The caller of a service.
struct Caller<'a, P> {
    platform: &'a mut P,
}

impl<P: Platform> Caller<'_, P> {
    fn word(&self, register: Gpr) -> u16 {
        self.platform.registers().get(register) as u16
    }

    fn low(&self, register: Gpr) -> u8 {
        self.word(register).to_le_bytes()[0]
    }

    fn high(&self, register: Gpr) -> u8 {
        self.word(register).to_le_bytes()[1]
    }

    fn double(&self, register: Gpr) -> u32 {
        self.platform.registers().get(register) as u32
    }

    fn set_word(&mut self, register: Gpr, value: u16) {
        let old = self.platform.registers().get(register);
        let new = old & !0xffff | u64::from(value);
        self.platform.registers_mut().set(register, new);
    }

    fn set_high(&mut self, register: Gpr, value: u8) {
        let low = self.low(register);
        self.set_word(register, u16::from_le_bytes([low, value]));
    }

    fn set_low(&mut self, register: Gpr, value: u8) {
        let high = self.high(register);
        self.set_word(register, u16::from_le_bytes([value, high]));
    }

    fn set_double(&mut self, register: Gpr, value: u32) {
        self.platform.registers_mut().set_u32(register, value);
    }

    /// The physical address of `offset` in a segment.
    fn address(&self, register: SegmentRegister, offset: u16) -> Gpa {
        let base = self.platform.segment(register).base.as_u64();
        Gpa::new(base + u64::from(offset))
    }

    /// Sets or clears flags in the image that the stub's IRET will load: above IP and CS.
    fn change_flags(&mut self, mask: u16, value: u16) {
        let top = self.word(Gpr::Rsp).wrapping_add(4);
        let at = self.address(SegmentRegister::Ss, top);
        let mut flags = [0; 2];
        self.platform.read(at, &mut flags);
        let flags = u16::from_le_bytes(flags) & !mask | value & mask;
        self.platform.write(at, &flags.to_le_bytes());
    }

    /// Sets CF, by which most services report.
    fn report(&mut self, result: Service) {
        const CARRY: u16 = 1 << 0;
        let carry = match result {
            Service::Done => 0,
            Service::Failed => CARRY,
        };
        self.change_flags(CARRY, carry);
    }
}

/// How a service ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Done,
    Failed,
}
