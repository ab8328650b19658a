//! Instructions that are carried out in the guest's place, by `umbra-emulator`.

use alloc::format;
use alloc::string::String;

use umbra_emulator::{Intent, Memory, Ports, Processor, Progress, Stop, TableRegister, TaskSwitch};
use umbra_machine::processor::control;
use umbra_mmu::AccessKind;
use umbra_report::Outcome;
use umbra_vcpu::CodeReader;
use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::event::{Blocking, Event, Exception, vector};
use umbra_vcpu::exit::IoWidth;
use umbra_vcpu::instruction::{self, MAX_LENGTH};
use umbra_vcpu::registers::{
    CodeWidth, ControlRegisters, DescriptorTable, Registers, Segment, SegmentRegister,
};
use x86_64::registers::control::Cr0Flags;
use x86_64::registers::rflags::RFlags;

use crate::gdb;
use crate::guest::{End, Guest, Halted};

/// Carries out the instruction that the guest stopped at, or some elements of it. `why` says, for
/// the report, what brought it here.
///
/// # Errors
/// [`End`] if the instruction is not known, or the host has no memory for what it writes.
pub fn run(guest: &mut Guest, why: impl FnOnce() -> String) -> Result<(), End> {
    if guest.debugged.is_some() && gdb::before_emulation(guest) {
        return Ok(());
    }
    let mut bytes = [0; MAX_LENGTH];
    let available = fetch(guest, &mut bytes);
    let bytes = &bytes[..available];
    let rip = guest.vcpu.registers().rip;
    let decoded = instruction::decode(bytes, guest.vcpu.code_width(), rip);
    let Some(decoded) = decoded else {
        return undecodable(guest, bytes);
    };
    if exceeds_limit(guest, rip.wrapping_add(decoded.len() as u64)) {
        return guest.raise(Exception::GENERAL_PROTECTION);
    }
    guest.blocking = None;
    match umbra_emulator::emulate(guest, &decoded) {
        Ok(Progress::Done { next_rip }) => {
            guest.vcpu.finish_instruction(next_rip);
            if let Some(blocking) = guest.blocking.take() {
                guest.vcpu.block_interrupts(blocking);
            }
            Ok(())
        }
        Ok(Progress::Exits { exit, next_rip }) => {
            guest.vcpu.set_instruction_end(next_rip);
            guest.handle(&exit)
        }
        Ok(Progress::Delivers(event)) => {
            guest.vcpu.events_mut().restore(event);
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

/// The most instructions that are carried out before the run loop looks at the time again.
const BATCH: u32 = 64;

/// Carries out instructions and delivers events until the hardware can enter the guest's state.
///
/// # Errors
/// As [`run`].
pub fn until_enterable(guest: &mut Guest) -> Result<(), End> {
    for _ in 0..BATCH {
        let windows = guest.vcpu.windows();
        match guest.vcpu.events_mut().next_event(windows) {
            Some(event) => deliver(guest, event)?,
            None => run(guest, || {
                String::from("a state that the processor cannot enter")
            })?,
        }
        let steps = guest.vcpu.registers().rflags & RFlags::TRAP_FLAG.bits() != 0;
        let debugged = guest.debugged.as_ref();
        let is_debugged = debugged.is_some_and(|own| own.is_stepping() || own.is_stopped());
        if steps || is_debugged || guest.halted != Halted::No || guest.machine.is_shut_down() {
            break;
        }
        if guest.vcpu.is_enterable() {
            break;
        }
    }
    Ok(())
}

/// Delivers an event in real mode, as the processor would through the interrupt vector table.
fn deliver(guest: &mut Guest, event: Event) -> Result<(), End> {
    let (vector, length) = match event {
        Event::Exception(exception) => (exception.vector, 0),
        Event::SoftwareInterrupt {
            vector,
            instruction_length,
        }
        | Event::SoftwareException {
            vector,
            instruction_length,
        } => (vector, instruction_length),
        Event::PrivilegedSoftwareException { instruction_length } => {
            (vector::DEBUG, instruction_length)
        }
        Event::ExternalInterrupt { vector } => (vector, 0),
        Event::Nmi => (vector::NMI, 0),
    };
    let in_real_mode =
        guest.vcpu.control_registers().cr0 & Cr0Flags::PROTECTED_MODE_ENABLE.bits() == 0;
    if !in_real_mode {
        return Err(guest.unsupported(format!(
            "vector {vector} is due between real and protected mode, where the segment registers are \
             in no state that the processor can enter"
        )));
    }
    let return_rip = guest.vcpu.registers().rip.wrapping_add(length.into());
    match umbra_emulator::enter_real_mode_handler(guest, vector, return_rip) {
        Ok(handler) => {
            guest.vcpu.registers_mut().rip = handler;
            if event == Event::Nmi {
                guest.vcpu.block_interrupts(Blocking::Nmi);
            }
            Ok(())
        }
        Err(Stop::Exception(exception)) => {
            guest.vcpu.events_mut().restore(event);
            guest.raise(exception)
        }
        Err(Stop::Unsupported) => {
            Err(guest.unsupported(format!("vector {vector} cannot be delivered")))
        }
        Err(Stop::Failed(end)) => Err(end),
    }
}

/// Switches tasks.
///
/// # Errors
/// [`End`] if the host has no memory for what it writes.
pub fn switch_task(guest: &mut Guest, request: &TaskSwitch) -> Result<(), End> {
    match umbra_emulator::switch_task(guest, request) {
        Ok(entry) => {
            guest.vcpu.registers_mut().rip = entry.next_rip;
            entry.fault.map_or(Ok(()), |fault| guest.raise(fault))
        }
        Err(Stop::Exception(exception)) => guest.raise(exception),
        Err(Stop::Unsupported) => Err(guest.unsupported(format!("the task switch {request:x?}"))),
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

/// Bytes that are no whole instruction: either the page that holds the rest cannot be fetched, or no
/// processor knows them.
fn undecodable(guest: &mut Guest, bytes: &[u8]) -> Result<(), End> {
    if bytes.len() < MAX_LENGTH {
        let missing = code_address(guest, bytes.len());
        let translated = guest
            .paging
            .translate(&*guest.vcpu, missing, AccessKind::Execute);
        if let Err(fault) = translated {
            return guest.raise(Exception::page_fault(fault.gva, fault.error));
        }
    }
    guest.raise(Exception::INVALID_OPCODE)
}

/// Whether the instruction ends beyond the limit of the code segment.
fn exceeds_limit(guest: &Guest, next_rip: u64) -> bool {
    let limit = guest.vcpu.segment(SegmentRegister::Cs).limit;
    guest.vcpu.code_width() != CodeWidth::Bits64 && next_rip.wrapping_sub(1) > u64::from(limit)
}

fn unknown(guest: &Guest, bytes: &[u8], why: impl FnOnce() -> String) -> End {
    guest.unsupported(format!(
        "{}: the instruction with the bytes {bytes:02x?} is not supported there",
        why()
    ))
}

const fn access_kind(intent: Intent) -> AccessKind {
    match intent {
        Intent::Read => AccessKind::Read,
        Intent::Write => AccessKind::Write,
    }
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

    fn set_segment(&mut self, register: SegmentRegister, segment: Segment) {
        self.vcpu.set_segment(register, segment);
    }

    fn table(&self, register: TableRegister) -> DescriptorTable {
        match register {
            TableRegister::Global => self.vcpu.gdtr(),
            TableRegister::Interrupt => self.vcpu.idtr(),
        }
    }

    fn set_table(&mut self, register: TableRegister, table: DescriptorTable) {
        match register {
            TableRegister::Global => self.vcpu.set_gdtr(table),
            TableRegister::Interrupt => self.vcpu.set_idtr(table),
        }
    }

    fn block_interrupts(&mut self, blocking: Blocking) {
        // The end of the instruction would end it.
        self.blocking = Some(blocking);
    }

    fn debug_register(&mut self, number: u8) -> u64 {
        self.vcpu.debug_register(number)
    }

    fn set_debug_register(&mut self, number: u8, value: u64) {
        self.vcpu.set_debug_register(number, value);
    }

    fn unblock_nmis(&mut self) {
        self.vcpu.unblock_nmis();
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

    fn x87_words(&mut self) -> (u16, u16) {
        self.vcpu.extended_state_mut().x87_words()
    }

    fn reset_x87(&mut self) {
        self.vcpu.extended_state_mut().reset_x87();
    }

    fn mmx_register(&mut self, index: u8) -> u64 {
        self.vcpu.extended_state_mut().mmx(index)
    }

    fn set_mmx_register(&mut self, index: u8, value: u64) {
        self.vcpu.extended_state_mut().set_mmx(index, value);
    }
}

impl Memory for Guest {
    type Failure = End;

    fn translate(&mut self, address: Gva, intent: Intent) -> Result<Gpa, Stop<End>> {
        self.paging
            .translate(&*self.vcpu, address, access_kind(intent))
            .map_err(|fault| Exception::page_fault(fault.gva, fault.error).into())
    }

    fn translate_system(&mut self, address: Gva, intent: Intent) -> Result<Gpa, Stop<End>> {
        self.paging
            .translate_system(address, access_kind(intent))
            .map_err(|fault| Exception::page_fault(fault.gva, fault.error).into())
    }

    fn load_page_table(&mut self, cr3: u64) -> Result<(), Stop<End>> {
        let current = self.vcpu.control_registers();
        let (new, _) = control::write_cr3(&current, cr3, self.cpuid.features())?;
        if self.paging.load_registers(&new).is_err() {
            return Err(Exception::GENERAL_PROTECTION.into());
        }
        self.vcpu.set_control_registers(new);
        Ok(())
    }

    fn set_task_switched(&mut self) {
        let mut control = self.vcpu.control_registers();
        control.cr0 |= Cr0Flags::TASK_SWITCHED.bits();
        self.vcpu.set_control_registers(control);
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
