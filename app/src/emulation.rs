//! Instructions that are carried out in the guest's place, by `umbra-emulator`.

use alloc::format;
use alloc::string::String;

use umbra_emulator::{Intent, Memory, Ports, Processor, Progress, Stop};
use umbra_mmu::AccessKind;
use umbra_report::Outcome;
use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::event::Exception;
use umbra_vcpu::exit::IoWidth;
use umbra_vcpu::instruction::{self, MAX_LENGTH};
use umbra_vcpu::registers::{CodeWidth, ControlRegisters, Registers, Segment, SegmentRegister};
use umbra_vcpu::{CodeReader, VcpuExt};
use x86_64::registers::rflags::RFlags;

use crate::guest::{End, Guest};

/// Carries out the instruction that the guest stopped at, or some elements of it. `why` says, for
/// the report, what brought it here.
///
/// # Errors
/// [`End`] if the instruction is not known, or the host has no memory for what it writes.
pub fn run(guest: &mut Guest, why: impl FnOnce() -> String) -> Result<(), End> {
    let mut bytes = [0; MAX_LENGTH];
    let available = fetch(guest, &mut bytes);
    let bytes = &bytes[..available];
    let rip = guest.vcpu.registers().rip;
    let decoded = instruction::decode(bytes, guest.vcpu.code_width(), rip);
    let Some(decoded) = decoded else {
        return undecodable(guest, bytes, why);
    };
    match umbra_emulator::emulate(guest, &decoded) {
        Ok(Progress::Done { next_rip }) => {
            guest.vcpu.finish_instruction(next_rip);
            Ok(())
        }
        Ok(Progress::Repeating) => {
            // Each element traps if the guest steps.
            if guest.vcpu.registers().rflags & RFlags::TRAP_FLAG.bits() != 0 {
                guest.vcpu.finish_instruction(rip);
            }
            Ok(())
        }
        Err(Stop::Exception(exception)) => guest.raise(exception),
        Err(Stop::Unsupported) => Err(unknown(guest, &bytes[..decoded.len()], why)),
        Err(Stop::Failed(end)) => Err(end),
    }
}

/// The instruction's bytes, as far as the guest may fetch them now.
pub fn fetch(guest: &mut Guest, bytes: &mut [u8; MAX_LENGTH]) -> usize {
    let control = guest.vcpu.control_registers();
    let level = guest.vcpu.privilege_level();
    let address = code_address(guest, 0);
    guest.paging.read_code(&control, level, address, bytes)
}

/// The linear address of the instruction's byte `offset`.
fn code_address(guest: &Guest, offset: usize) -> Gva {
    let rip = guest.vcpu.registers().rip.wrapping_add(offset as u64);
    match guest.vcpu.code_width() {
        CodeWidth::Bits64 => Gva::new(rip),
        CodeWidth::Bits32 | CodeWidth::Bits16 => {
            let base = guest.vcpu.segment(SegmentRegister::Cs).base;
            Gva::new(base.wrapping_add(rip).as_u64() & 0xffff_ffff)
        }
    }
}

/// Bytes that are no whole instruction: either the page that holds the rest has gone since the
/// processor fetched from it, and the guest faults as if it fetched now, or they have changed.
fn undecodable(guest: &mut Guest, bytes: &[u8], why: impl FnOnce() -> String) -> Result<(), End> {
    if bytes.len() < MAX_LENGTH {
        let missing = code_address(guest, bytes.len());
        let translated = guest
            .paging
            .translate(&*guest.vcpu, missing, AccessKind::Execute);
        if let Err(fault) = translated {
            return guest.raise(Exception::page_fault(fault.gva, fault.error));
        }
    }
    Err(unknown(guest, bytes, why))
}

fn unknown(guest: &Guest, bytes: &[u8], why: impl FnOnce() -> String) -> End {
    guest.unsupported(format!(
        "{}: the instruction with the bytes {bytes:02x?} is not supported there",
        why()
    ))
}

impl Processor for Guest {
    fn registers(&self) -> &Registers {
        self.vcpu.registers()
    }

    fn registers_mut(&mut self) -> &mut Registers {
        self.vcpu.registers_mut()
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        self.vcpu.segment(register)
    }

    fn control_registers(&self) -> ControlRegisters {
        self.vcpu.control_registers()
    }

    fn code_width(&self) -> CodeWidth {
        self.vcpu.code_width()
    }

    fn vector_register(&mut self, index: u8) -> u128 {
        self.vcpu.extended_state_mut().xmm(index)
    }

    fn set_vector_register(&mut self, index: u8, value: u128) {
        self.vcpu.extended_state_mut().set_xmm(index, value);
    }
}

impl Memory for Guest {
    type Failure = End;

    fn translate(&mut self, address: Gva, intent: Intent) -> Result<Gpa, Stop<End>> {
        let kind = match intent {
            Intent::Read => AccessKind::Read,
            Intent::Write => AccessKind::Write,
        };
        self.paging
            .translate(&*self.vcpu, address, kind)
            .map_err(|fault| Exception::page_fault(fault.gva, fault.error).into())
    }

    fn read(&mut self, address: Gpa, bytes: &mut [u8]) -> Result<(), Stop<End>> {
        if self.paging.is_ram(address, bytes.len()) {
            self.paging.read_ram(address, bytes);
        } else {
            // Where no device answers, reads give all ones.
            let _ = self.machine.read_mmio(address, bytes);
        }
        Ok(())
    }

    fn write(&mut self, address: Gpa, bytes: &[u8]) -> Result<(), Stop<End>> {
        if self.paging.is_ram(address, bytes.len()) {
            let written = self.paging.write_ram(address, bytes);
            return written.map_err(|cause| {
                let message = format!("an emulated instruction writes: {cause}");
                Stop::Failed(End::new(Outcome::HostOutOfMemory, message))
            });
        }
        // Where no device answers, writes vanish.
        let _ = self.machine.write_mmio(address, bytes);
        Ok(())
    }
}

impl Ports for Guest {
    fn read_port(&mut self, port: u16, width: IoWidth) -> u32 {
        self.machine.read_port(port, width)
    }

    fn write_port(&mut self, port: u16, width: IoWidth, value: u32) {
        self.machine.write_port(port, width, value);
    }
}
