//! One round through the guest: entry, exit, and what the driver does between.
//!
//! Protocol: the caller has interrupts off, and the host takes those that ended the guest's run before
//! the round is over. Meanwhile this vCPU's VMCS is current. An event leaves the queue only for an
//! entry; a refused entry and an interrupted delivery put it back.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;

use umbra_vcpu::address::Gva;
use umbra_vcpu::event::{Event, Exception, vector};
use umbra_vcpu::exit::{Exit, ExitRecord};
use umbra_vcpu::instruction::{self, MAX_LENGTH};
use umbra_vcpu::registers::{CodeWidth, ControlRegisters, Gpr, Registers, SegmentRegister};
use umbra_vcpu::{CodeReader, EntryFailure, PrivilegeLevel, ShadowMode, Vcpu};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::rflags::RFlags;

use super::{
    EferSide, LONGEST_RUN, Pending, SINGLE_STEP, TIMER_ENTRIES, VmxVcpu, intercepted_exceptions,
    merge, read_segment, read_table, write_efer_entry,
};
use crate::capabilities::Capabilities;
use crate::check::{self, GuestState, Interruptibility, Rules};
use crate::controls::{EntryControls, ExitControls, PrimaryControls};
use crate::entry::{self, EntryKind};
use crate::event::{Injection, is_fault};
use crate::exit::{self, GuestView, RawExit, reason};
use crate::instructions::{self, CurrentVmcs, Invvpid};
use crate::paging::{self, HardwareControl};
use crate::real_mode::RealMode;
use crate::{fields, host};

impl VmxVcpu {
    /// One round. Interrupts are off.
    pub(super) fn run_uninterrupted(
        &mut self,
        code: &mut dyn CodeReader,
        stop: &mut ExitRecord,
    ) -> Result<(), EntryFailure> {
        let vmcs = self.current();
        self.instruction_end = None;
        let is_usual = self.pending.is_empty()
            && self.real_mode.is_none()
            && self.events.is_empty()
            && self.written.primary == self.primary.bits();
        let mut event = None;
        if !is_usual {
            match self.prepare(&vmcs)? {
                Prepared::Enterable(injected) => event = injected,
                Prepared::NotEnterable(exit) => {
                    stop.exit = exit;
                    stop.rip = self.registers.rip;
                    return Ok(());
                }
            }
        }
        self.write_changed_fields(&vmcs);
        self.hardware.set(None);
        let entered = self.enter(&vmcs);
        let reason = vmcs.read_certain(fields::EXIT_REASON);
        if !entered || exit::is_entry_failure(reason) {
            let raw = entered.then(|| RawExit::read(&vmcs, reason));
            return Err(self.entry_refused(&vmcs, event, raw));
        }
        self.launch = EntryKind::Resume;
        self.read_back(&vmcs);
        stop.rip = self.registers.rip;
        let qualification = || vmcs.read_certain(fields::EXIT_QUALIFICATION);
        if let Some(exit) = exit::decode_quickly(reason, &self.registers, qualification) {
            if exit::is_before_instruction(reason) {
                let length = vmcs.read_certain(fields::EXIT_INSTRUCTION_LENGTH);
                self.instruction_end = Some(stop.rip.wrapping_add(length.into()));
                stop.exit = exit;
            } else {
                stop.exit = self.note(exit);
            }
            return Ok(());
        }
        let raw = RawExit::read(&vmcs, reason);
        self.account_for_interrupted_event(&raw);
        stop.exit = self.conclude(&vmcs, &raw, code);
        stop.rip = self.registers.rip;
        Ok(())
    }

    /// Does what an entry needs besides the registers, which is nothing most of the time.
    #[inline(never)]
    fn prepare(&mut self, vmcs: &CurrentVmcs) -> Result<Prepared, EntryFailure> {
        self.write_control_registers(vmcs)?;
        if self.real_mode.is_some() || self.pending.contains(Pending::CHECK) {
            if !self.is_enterable() {
                return Ok(Prepared::NotEnterable(self.not_enterable(vmcs)));
            }
            self.write_real_mode(vmcs);
        }
        if self.pending.contains(Pending::CHECK) {
            check::check(&self.guest_state(vmcs), &self.rules())?;
            self.pending.remove(Pending::CHECK);
        }
        let event = self.inject(vmcs);
        if self.pending.contains(Pending::FLUSH) {
            self.pending.remove(Pending::FLUSH);
            if let Some(vpid) = self.vpid {
                // SAFETY: identifiers are given out only with this type of INVVPID.
                let flushed = unsafe { instructions::invvpid(vpid, Invvpid::SingleContext) };
                assert!(flushed.is_ok(), "INVVPID of a vCPU's own identifier failed");
            }
        }
        Ok(Prepared::Enterable(event))
    }

    /// Derives the hardware's control registers and writes those that changed.
    fn write_control_registers(&mut self, vmcs: &CurrentVmcs) -> Result<(), EntryFailure> {
        if !self.pending.contains(Pending::CONTROL) {
            return Ok(());
        }
        let paging = self.paging.ok_or(EntryFailure {
            field: "CR3",
            rule: "the guest has no shadow root yet",
            value: 0,
        })?;
        let capabilities = &self.core.capabilities;
        let long = paging::is_long_mode(&self.control);
        if long == (paging.mode == ShadowMode::Pae) {
            return Err(EntryFailure {
                field: "IA32_EFER",
                rule: "the shadow tables must have four or five levels exactly if the guest is in \
                       long mode",
                value: self.control.efer,
            });
        }
        let old = self.written.control;
        let new =
            HardwareControl::derive(&self.control, paging, capabilities.cr0, capabilities.cr4);
        // The guest changes the bits that it owns without an exit.
        let (cr0, cr4) = self.hardware.get().unzip();
        if cr0 != Some(new.cr0) {
            vmcs.write(fields::GUEST_CR0, new.cr0);
        }
        if cr4 != Some(new.cr4) {
            vmcs.write(fields::GUEST_CR4, new.cr4);
        }
        if old.cr0_shadow != new.cr0_shadow {
            vmcs.write(fields::CR0_READ_SHADOW, new.cr0_shadow);
        }
        if old.cr4_shadow != new.cr4_shadow {
            vmcs.write(fields::CR4_READ_SHADOW, new.cr4_shadow);
        }
        self.hardware.set(Some((new.cr0, new.cr4)));
        let exceptions = if self.real_mode.is_some() {
            u32::MAX
        } else {
            intercepted_exceptions(new.cr4_shadow) | self.debugging.exceptions.bitmap()
        };
        write_if_changed(self.written.exceptions, exceptions, |value| {
            vmcs.write(fields::EXCEPTION_BITMAP, value);
        });
        self.written.exceptions = exceptions;
        if old.efer != new.efer {
            match &self.efer_area {
                None => vmcs.write(fields::GUEST_EFER, new.efer),
                Some(area) => write_efer_entry(area, EferSide::Guest, new.efer),
            }
            let mut entry = capabilities.entry;
            entry.set(EntryControls::IA32E_MODE_GUEST, long);
            let entry = entry.bits();
            write_if_changed(self.written.entry, entry, |value| {
                vmcs.write(fields::ENTRY_CONTROLS, value);
            });
            self.written.entry = entry;
        }
        // CR0 has no other bits that a rule combines with anything.
        let combined = (old.cr0 ^ new.cr0) & Cr0Flags::PROTECTED_MODE_ENABLE.bits();
        if combined != 0 || old.efer != new.efer || new.cr4 & !self.written.checked_cr4 != 0 {
            self.pending.insert(Pending::CHECK);
            self.written.checked_cr4 |= new.cr4;
        }
        if (old.cr4 ^ new.cr4) & !paging::CR4_GUEST_OWNED != 0 || old.efer != new.efer {
            self.pending.insert(Pending::FLUSH);
        }
        self.written.control = new;
        self.pending.remove(Pending::CONTROL);
        Ok(())
    }

    /// Takes the next event from the queue into the VMCS and asks for the windows that the rest
    /// waits for.
    fn inject(&mut self, vmcs: &CurrentVmcs) -> Option<Event> {
        let base = self.primary.bits();
        if self.events.is_empty()
            && !self.pending.contains(Pending::WINDOW)
            && self.written.primary == base
        {
            return None;
        }
        let windows = self.windows();
        let event = self.events.next_event(windows);
        if let Some(event) = &event {
            self.write_injection(vmcs, event);
            // The delivery ends a shadow; left set, it could contradict the pending single step.
            self.interruptibility
                .remove(Interruptibility::STI | Interruptibility::MOV_SS);
        }
        let mut primary = self.primary;
        // An STI shadow hides NMIs, too, but only the interrupt window waits for its end.
        let nmi = self.events.needs_nmi_window();
        let sti = self.interruptibility.contains(Interruptibility::STI);
        primary.set(PrimaryControls::NMI_WINDOW_EXITING, nmi && !sti);
        primary.set(
            PrimaryControls::INTERRUPT_WINDOW_EXITING,
            self.pending.contains(Pending::WINDOW)
                || self.events.needs_interrupt_window()
                || (nmi && sti),
        );
        let primary = primary.bits();
        if self.written.primary != primary {
            vmcs.write(fields::PRIMARY_CONTROLS, primary);
            self.written.primary = primary;
        }
        event
    }

    fn write_injection(&mut self, vmcs: &CurrentVmcs, event: &Event) {
        let injection = Injection::new(event);
        vmcs.write(
            fields::ENTRY_INTERRUPTION_INFORMATION,
            injection.information,
        );
        if let Some(error_code) = injection.error_code {
            vmcs.write(fields::ENTRY_EXCEPTION_ERROR_CODE, error_code);
        }
        if let Some(length) = injection.instruction_length {
            vmcs.write(fields::ENTRY_INSTRUCTION_LENGTH, length);
        }
        if let Event::Exception(exception) = event {
            if let Some(address) = exception.address {
                self.control.cr2 = address;
            }
            if is_fault(exception.vector) {
                self.registers.rflags |= RFlags::RESUME_FLAG.bits();
            }
        }
    }

    fn write_changed_fields(&mut self, vmcs: &CurrentVmcs) {
        let rsp = self.registers.get(Gpr::Rsp);
        let rflags = self.hardware_flags();
        let interruptibility = self.interruptibility.bits();
        let written = &mut self.written;
        write_if_changed(written.rip, self.registers.rip, |value| {
            vmcs.write(fields::GUEST_RIP, value);
        });
        write_if_changed(written.rsp, rsp, |value| {
            vmcs.write(fields::GUEST_RSP, value);
        });
        write_if_changed(written.rflags, rflags, |value| {
            vmcs.write(fields::GUEST_RFLAGS, value);
        });
        if written.interruptibility != interruptibility {
            vmcs.write(fields::GUEST_INTERRUPTIBILITY, interruptibility);
        }
        written.rip = self.registers.rip;
        written.rsp = rsp;
        written.rflags = rflags;
        written.interruptibility = interruptibility;
        match self.timer_entries.checked_sub(1) {
            Some(left) => self.timer_entries = left,
            None => self.write_time_slice(vmcs),
        }
    }

    /// RFLAGS for the VMCS.
    fn hardware_flags(&self) -> u64 {
        let rflags = self.registers.rflags;
        if self.real_mode.is_some() {
            RealMode::hardware_flags(rflags)
        } else {
            rflags
        }
    }

    /// What the caller sees instead of an entry: the guest's own single-step trap if one is due.
    fn not_enterable(&mut self, vmcs: &CurrentVmcs) -> Exit {
        let pending = vmcs.read(fields::GUEST_PENDING_DEBUG_EXCEPTIONS);
        if pending & SINGLE_STEP == 0 || self.is_event_due() {
            return Exit::NotEnterable;
        }
        vmcs.write(
            fields::GUEST_PENDING_DEBUG_EXCEPTIONS,
            pending & !SINGLE_STEP,
        );
        let dr6 = self.debug_register(6);
        self.set_debug_register(6, dr6 | SINGLE_STEP);
        Exit::Exception(Exception::new(vector::DEBUG))
    }

    /// Winds up the preemption timer. Without a time slice, it only sees to it that the host gets
    /// its interrupts (see [`LONGEST_RUN`]).
    #[inline(never)]
    fn write_time_slice(&mut self, vmcs: &CurrentVmcs) {
        let Some(shift) = self.core.capabilities.preemption_timer_shift else {
            return;
        };
        let ticks = self.deadline.map_or(LONGEST_RUN, |deadline| {
            // SAFETY: every processor with VMX has the counter.
            let left = deadline.saturating_sub(unsafe { _rdtsc() });
            left.min(LONGEST_RUN)
        });
        vmcs.write(fields::PREEMPTION_TIMER_VALUE, (ticks >> shift) as u32);
        let exit = self.core.capabilities.exit;
        if exit.contains(ExitControls::SAVE_PREEMPTION_TIMER) {
            self.timer_entries = TIMER_ENTRIES;
        }
    }

    /// Enters the guest and comes back. Returns whether the processor took the instruction.
    fn enter(&mut self, vmcs: &CurrentVmcs) -> bool {
        if !self.core.is_entered(self.vmcs.physical_address()) {
            self.take_processor(vmcs);
        }
        // Without CR4.OSXSAVE the guest can neither read XCR0 nor use what it controls.
        let xcr0 = if self.control.cr4 & Cr4Flags::OSXSAVE.bits() == 0 {
            None
        } else {
            self.core.foreign_xcr0(self.control.xcr0)
        };
        if let Some(pair) = xcr0 {
            // SAFETY: the host has OSXSAVE set if there is a pair; the run loop checked the value.
            unsafe { host::write_xcr0(pair.guest) };
        }
        let cr2 = self.control.cr2.as_u64();
        let (status, cr2_after): (u64, u64);
        if read_cr2() != cr2 {
            // SAFETY: CR2 means nothing to the host outside its own page-fault handler, and
            // interrupts are off.
            unsafe { asm!("mov cr2, {}", in(reg) cr2, options(nomem, nostack, preserves_flags)) };
        }
        // SAFETY: 1. interrupts are off and the VMCS is this vCPU's, with host state of this core.
        // 2. The registers and the cache are fields of `self`. 3. The shadow tables are the
        // caller's promise of `set_shadow_paging`; the pass-through registers are in the bank.
        unsafe {
            status = entry::enter(&raw mut self.registers, self.launch, &raw mut self.host_rsp);
        }
        cr2_after = read_cr2();
        self.control.cr2 = Gva::new(cr2_after);
        if let Some(pair) = xcr0 {
            // SAFETY: the host's own value.
            unsafe { host::write_xcr0(pair.host) };
        }
        status == entry::ENTRY_DONE
    }

    /// Takes over what the processor holds of another guest, or of nobody.
    #[inline(never)]
    fn take_processor(&mut self, vmcs: &CurrentVmcs) {
        // SAFETY: the state is leaked memory of this vCPU, released and freed by its drop.
        unsafe { self.core.acquire_extended_state(self.extended) };
        self.core.bank.acquire(&self.bank);
        // A vCPU stays in its task, and the host changes this base only with the task.
        let base = host::fs_base();
        if self.written.host_fs_base != base {
            vmcs.write(fields::HOST_FS_BASE, base);
            self.written.host_fs_base = base;
        }
        self.core.set_entered(self.vmcs.physical_address());
    }

    /// Copies out what every exit changes.
    fn read_back(&mut self, vmcs: &CurrentVmcs) {
        let old_flags = self.registers.rflags;
        self.registers.rip = vmcs.read_certain(fields::GUEST_RIP);
        self.registers.rflags = vmcs.read_certain(fields::GUEST_RFLAGS);
        let rsp = vmcs.read_certain(fields::GUEST_RSP);
        self.registers.set(Gpr::Rsp, rsp);
        let interruptibility = vmcs.read_certain(fields::GUEST_INTERRUPTIBILITY);
        self.interruptibility = Interruptibility::from_bits_retain(interruptibility);
        self.written.rip = self.registers.rip;
        self.written.rflags = self.registers.rflags;
        self.written.rsp = rsp;
        self.written.interruptibility = interruptibility;
        if self.real_mode.is_some() {
            self.registers.rflags = RealMode::guest_flags(self.registers.rflags, old_flags);
            self.read_real_mode(vmcs);
        }
    }

    /// Puts back an event whose delivery the exit cut short, and keeps NMI blocking right
    /// (SDM vol. 3C 28.2.4, 28.2.3).
    fn account_for_interrupted_event(&mut self, raw: &RawExit) {
        let vectoring = raw.interrupted();
        if let Some(event) = vectoring.event(self.control.cr2) {
            if vectoring.is_nmi() {
                self.interruptibility.remove(Interruptibility::NMI);
            }
            self.events.restore(event);
        } else if raw.interruption.unblocked_nmis() {
            self.interruptibility.insert(Interruptibility::NMI);
        }
    }

    /// Decodes the exit and does what belongs to the driver.
    fn conclude(&mut self, vmcs: &CurrentVmcs, raw: &RawExit, code: &mut dyn CodeReader) -> Exit {
        let exit = exit::decode(
            raw,
            &self.registers,
            &mut View {
                control: &self.control,
                registers: &self.registers,
                capabilities: &self.core.capabilities,
                vmcs,
                code,
            },
        );
        match exit {
            // NMIs stay blocked after the exit until an IRET; the handler's does that.
            // SAFETY: the host's table has a handler for non-maskable interrupts.
            Exit::HostNmi => unsafe { asm!("int 2") },
            Exit::Exception(exception) => match exception.vector {
                // SAFETY: the host's table has a handler for machine checks.
                vector::MACHINE_CHECK => unsafe { asm!("int 18") },
                // INT1 is a trap: its handler returns past it, and it leaves DR6 alone.
                vector::DEBUG if raw.interruption.is_int1() => {
                    let length = u64::from(raw.interruption.instruction_length);
                    self.registers.rip = self.registers.rip.wrapping_add(length);
                }
                vector::DEBUG => return self.debug_exception(vmcs, raw.qualification),
                // The debugger wants to know where it is.
                vector::BREAKPOINT if self.debugging.exceptions.include_int3() => {}
                _ if self.real_mode.is_some() => return self.real_mode_exception(raw, exception),
                _ => {}
            },
            _ => {}
        }
        exit
    }

    /// What an exception in virtual-8086 mode means to a guest in real mode: nothing by itself if real
    /// mode may carry out the instruction, and otherwise an exception for its own handler.
    fn real_mode_exception(&mut self, raw: &RawExit, exception: Exception) -> Exit {
        match exception.vector {
            vector::GENERAL_PROTECTION | vector::STACK_FAULT => return Exit::NotEnterable,
            _ if raw.interruption.is_software_trap() => {
                let length = u64::from(raw.interruption.instruction_length);
                self.registers.rip = self.registers.rip.wrapping_add(length);
            }
            _ => {}
        }
        Exit::Exception(exception)
    }

    /// Takes back the request that the exit has answered.
    #[inline]
    fn note(&mut self, exit: Exit) -> Exit {
        match exit {
            // SAFETY: the host's tables are in place again; it takes its interrupt here.
            Exit::HostInterrupt => unsafe { asm!("sti", "nop", "cli") },
            Exit::InterruptWindow => self.pending.remove(Pending::WINDOW),
            Exit::TimeSliceEnd => {
                self.timer_entries = 0;
                // SAFETY: every processor with VMX has the counter.
                let now = unsafe { _rdtsc() };
                if self.deadline.is_none_or(|deadline| now < deadline) {
                    return Exit::HostInterrupt;
                }
                self.deadline = None;
            }
            _ => {}
        }
        exit
    }

    /// Finds out why the processor refused, and puts the event back.
    #[cold]
    fn entry_refused(
        &mut self,
        vmcs: &CurrentVmcs,
        event: Option<Event>,
        raw: Option<RawExit>,
    ) -> EntryFailure {
        let state = self.guest_state(vmcs);
        vmcs.write(fields::ENTRY_INTERRUPTION_INFORMATION, 0);
        if let Some(event) = event {
            self.events.restore(event);
        }
        self.pending.insert(Pending::CHECK);
        if let Err(failure) = check::check(&state, &self.rules()) {
            return failure;
        }
        match raw {
            None => check::describe_instruction_error(vmcs.read(fields::INSTRUCTION_ERROR)),
            Some(raw) => {
                if raw.basic_reason() == reason::MACHINE_CHECK_DURING_ENTRY {
                    // SAFETY: as in `conclude`.
                    unsafe { asm!("int 18") };
                }
                check::describe_entry_failure(raw.basic_reason(), raw.qualification)
            }
        }
    }

    pub(super) fn rules(&self) -> Rules {
        Rules {
            cr0: self.core.capabilities.cr0,
            cr4: self.core.capabilities.cr4,
            physical_bits: self.core.physical_bits,
            linear_bits: self.core.linear_bits,
        }
    }

    /// What the checker looks at, as the VMCS is about to hold it.
    pub(super) fn guest_state(&self, vmcs: &CurrentVmcs) -> GuestState {
        GuestState {
            entry: EntryControls::from_bits_retain(self.written.entry),
            cr0: vmcs.read(fields::GUEST_CR0),
            cr3: vmcs.read(fields::GUEST_CR3),
            cr4: vmcs.read(fields::GUEST_CR4),
            efer: self.written.control.efer,
            dr7: vmcs.read(fields::GUEST_DR7),
            debugctl: vmcs.read(fields::GUEST_DEBUGCTL),
            sysenter_esp: vmcs.read(fields::GUEST_SYSENTER_ESP),
            sysenter_eip: vmcs.read(fields::GUEST_SYSENTER_EIP),
            segments: SegmentRegister::ALL.map(|register| read_segment(vmcs, register)),
            gdtr: read_table(vmcs, fields::GUEST_GDTR_BASE, fields::GUEST_GDTR_LIMIT),
            idtr: read_table(vmcs, fields::GUEST_IDTR_BASE, fields::GUEST_IDTR_LIMIT),
            rip: self.registers.rip,
            rflags: self.hardware_flags(),
            activity: vmcs.read(fields::GUEST_ACTIVITY_STATE),
            interruptibility: self.interruptibility,
            pending_debug: vmcs.read(fields::GUEST_PENDING_DEBUG_EXCEPTIONS),
            injection: vmcs.read(fields::ENTRY_INTERRUPTION_INFORMATION),
        }
    }
}

/// What [`VmxVcpu::prepare`] has found.
enum Prepared {
    /// The guest can be entered, and this event is delivered to it then.
    Enterable(Option<Event>),
    /// It cannot, and the caller sees this instead.
    NotEnterable(Exit),
}

#[inline]
fn write_if_changed<T: Copy + PartialEq>(old: T, new: T, write: impl FnOnce(T)) {
    if old != new {
        write(new);
    }
}

fn read_cr2() -> u64 {
    let value: u64;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// What [`exit::decode`] may ask of the guest.
struct View<'a> {
    control: &'a ControlRegisters,
    registers: &'a Registers,
    capabilities: &'a Capabilities,
    vmcs: &'a CurrentVmcs,
    code: &'a mut dyn CodeReader,
}

impl GuestView for View<'_> {
    fn cr0(&self) -> u64 {
        let hardware = self.vmcs.read(fields::GUEST_CR0);
        merge(self.control.cr0, hardware, paging::CR0_GUEST_OWNED)
    }

    fn code_width(&self) -> CodeWidth {
        instruction::code_width(
            self.control,
            self.registers.rflags,
            &read_segment(self.vmcs, SegmentRegister::Cs),
        )
    }

    fn segment_base(&self, register: SegmentRegister) -> u64 {
        self.vmcs.read(fields::guest_segment(register).base)
    }

    fn io_address_width(&mut self, information: u32) -> CodeWidth {
        const ADDRESS_SIZE_PREFIX: u8 = 0x67;
        if self.capabilities.string_io_information {
            return exit::string_address_width(information);
        }
        let width = self.code_width();
        let base = match width {
            CodeWidth::Bits64 => 0,
            _ => self.segment_base(SegmentRegister::Cs),
        };
        let address = Gva::new(base.wrapping_add(self.registers.rip));
        let level = read_segment(self.vmcs, SegmentRegister::Ss).privilege_level();
        let mut bytes = [0; MAX_LENGTH];
        let length = self.code.read_code(
            self.control,
            PrivilegeLevel::from_bits(level),
            address,
            &mut bytes,
        );
        // INS and OUTS have one-byte opcodes, 0x6c to 0x6f; all before them are prefixes.
        let prefixed = bytes[..length]
            .iter()
            .take_while(|byte| !(0x6c..=0x6f).contains(*byte))
            .any(|&byte| byte == ADDRESS_SIZE_PREFIX);
        match (width, prefixed) {
            (CodeWidth::Bits16 | CodeWidth::Bits64, true) | (CodeWidth::Bits32, false) => {
                CodeWidth::Bits32
            }
            (CodeWidth::Bits16, false) | (CodeWidth::Bits32, true) => CodeWidth::Bits16,
            (CodeWidth::Bits64, false) => CodeWidth::Bits64,
        }
    }
}
