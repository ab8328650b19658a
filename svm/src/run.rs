//! From `run` to the guest and back: injection, flushes, shared registers, and what an exit left
//! half done.
//!
//! Protocol: the caller has interrupts off. The host takes those that ended the guest's run once the
//! exit has been stored.

use core::arch::asm;

use umbra_vcpu::address::{Gva, Hpa};
use umbra_vcpu::debug::{DR6_BS, DR6_HITS, DR7_RESET};
use umbra_vcpu::event::{Event, Window, vector};
use umbra_vcpu::exit::{Exit, ExitRecord};
use umbra_vcpu::registers::Gpr;
use umbra_vcpu::{CodeReader, EntryFailure, Vcpu};
use x86_64::registers::rflags::RFlags;

use crate::capability::Instructions;
use crate::check::{GuestState, check};
use crate::core_state::{Core, Recycled, read_xcr0, write_xcr0};
use crate::debug;
use crate::decode::{CONTRIBUTORY, exit_code};
use crate::entry;
use crate::exits::Outcome;
use crate::injection::{self, Interrupted};
use crate::vcpu::{PendingFlush, Step, StepReason, SvmVcpu, flush_guest};
use crate::vmcb::{Intercepts3, InterruptControl, TlbControl};

const TRAP: u64 = RFlags::TRAP_FLAG.bits();
/// More of the host's stack than the way into the guest uses, in bytes.
const STACK_MARGIN: u64 = 4096;

/// What an exit has to do with a step.
enum Stepped {
    /// It is an exit like any other.
    No,
    /// It ended the step, and the guest knows nothing of it.
    Done,
}

impl SvmVcpu {
    /// Runs the guest until the caller must see an exit.
    #[inline]
    pub(crate) fn run_until_exit(
        &mut self,
        code: &mut dyn CodeReader,
        stop: &mut ExitRecord,
    ) -> Result<(), EntryFailure> {
        if !self.usual_events || self.unchecked {
            return self.run_in_any_case(code, stop);
        }
        self.next_rip = None;
        self.enter();
        stop.rip = self.registers.rip;
        let exit = self.vmcb().control.exit_code & 0xffff_ffff;
        if self.vmcb().save.cr3 == self.paging.root.as_u64()
            && self.decode_plain(exit, code, &mut stop.exit).is_some()
        {
            return Ok(());
        }
        match self.conclude(exit, code)? {
            Some(exit) => {
                stop.rip = self.registers.rip;
                stop.exit = exit;
                Ok(())
            }
            None => self.run_in_any_case(code, stop),
        }
    }

    /// The same where events wait for the guest or its state must be checked.
    #[inline(never)]
    fn run_in_any_case(
        &mut self,
        code: &mut dyn CodeReader,
        stop: &mut ExitRecord,
    ) -> Result<(), EntryFailure> {
        loop {
            self.next_rip = None;
            let usual_events = self.usual_events;
            if !usual_events {
                self.prepare_events();
            }
            if self.unchecked {
                self.check_entry()?;
            }
            self.enter();
            stop.rip = self.registers.rip;
            let exit = self.vmcb().control.exit_code & 0xffff_ffff;
            // An instruction that exits has come after the delivery of whatever was injected.
            if (usual_events || self.step.is_none())
                && self.vmcb().save.cr3 == self.paging.root.as_u64()
                && self.decode_plain(exit, code, &mut stop.exit).is_some()
            {
                self.injected = None;
                return Ok(());
            }
            if let Some(exit) = self.conclude(exit, code)? {
                stop.rip = self.registers.rip;
                stop.exit = exit;
                return Ok(());
            }
        }
    }

    /// Does what belongs to the driver after an exit, and decodes it; `None` if the guest goes on.
    #[inline(never)]
    fn conclude(
        &mut self,
        exit: u64,
        code: &mut dyn CodeReader,
    ) -> Result<Option<Exit>, EntryFailure> {
        match exit {
            exit_code::INTR | exit_code::NMI | exit_code::INIT => take_host_interrupts(),
            code if code == exit_code::EXCEPTION_0 + u64::from(vector::MACHINE_CHECK) => {
                raise_machine_check();
            }
            exit_code::INVALID => {
                self.take_back_injection();
                self.unchecked = true;
                return Err(self.refusal());
            }
            _ => {}
        }
        if let Some(escape) = self.foreign_tables() {
            return Ok(Some(escape));
        }
        self.complete_events(exit);
        match self.complete_step(exit) {
            Stepped::No => {}
            Stepped::Done => {
                let window = self.nmi_can_be_taken();
                return Ok(window.then_some(Exit::NmiWindow));
            }
        }
        Ok(match self.decode_exit(exit, code) {
            Outcome::Exit(exit) => Some(exit),
            Outcome::Resume => None,
        })
    }

    /// Some emulators carry out task switches despite the intercept, and load CR3 from the guest's
    /// task-state segment. Such a guest ran on tables of its own choice and must not go on.
    fn foreign_tables(&mut self) -> Option<Exit> {
        let root = self.paging.root.as_u64();
        let cr3 = self.vmcb().save.cr3;
        if cr3 == root {
            return None;
        }
        self.vmcb_mut().save.cr3 = root;
        self.step = None;
        self.injected = None;
        Some(Exit::Unknown {
            reason: exit_code::TASK_SWITCH,
            information: cr3,
        })
    }

    #[inline(never)]
    fn check_entry(&mut self) -> Result<(), EntryFailure> {
        if let Err(failure) = self.check() {
            self.take_back_injection();
            return Err(failure);
        }
        self.unchecked = false;
        Ok(())
    }

    fn check(&self) -> Result<(), EntryFailure> {
        let state = GuestState {
            // The identifier is chosen on entry, from those that exist.
            asid: 1,
            ..GuestState::of(self.vmcb(), self.paging)
        };
        check(&state, self.core.capabilities())
    }

    /// Why the processor refused the entry.
    #[cold]
    fn refusal(&self) -> EntryFailure {
        let state = GuestState::of(self.vmcb(), self.paging);
        check(&state, self.core.capabilities())
            .err()
            .unwrap_or(EntryFailure {
                field: "EXITCODE",
                rule: "VMEXIT_INVALID, though every rule of APM vol. 2 15.5.1 holds",
                value: self.vmcb().control.exit_code,
            })
    }

    /// Writes the event of this entry, and asks for the windows that others wait for.
    #[inline(never)]
    fn prepare_events(&mut self) {
        self.usual_events = self.events.is_empty()
            && self.step.is_none()
            && !self.nmi_masked
            && !self.window_requested;
        let windows = self.windows();
        let event = self.events.next_event(windows);
        self.injected = event;
        let mut exceptions = self.intercepted_exceptions();
        if let Some(event) = event {
            if let Event::Exception(exception) = event {
                if let Some(address) = exception.address {
                    self.vmcb_mut().save.cr2 = address.as_u64();
                }
                // The processor pushes RF with the fault of an instruction breakpoint, so that the
                // handler's IRET does not hit it again; an injected event pushes RFLAGS as it is.
                if exception.vector == vector::DEBUG
                    && self
                        .debug
                        .guest()
                        .hits_instruction(self.dr6(), self.registers.rip)
                {
                    self.registers.rflags |= RFlags::RESUME_FLAG.bits();
                }
                // Emulators forget that an injected exception is being delivered, so that a second
                // one would not become a double fault: it exits and is combined here.
                if CONTRIBUTORY & (1 << (exception.vector & 31)) != 0
                    || matches!(exception.vector, vector::DOUBLE_FAULT | vector::PAGE_FAULT)
                {
                    exceptions |= CONTRIBUTORY;
                }
            }
            let length = u64::from(injection::instruction_length(event));
            self.registers.rip = self.registers.rip.wrapping_add(length);
            let next_rip = self.registers.rip;
            let control = &mut self.vmcb_mut().control;
            control.event_injection = injection::encode(event);
            control.next_rip = next_rip;
            control.interrupt_shadow = 0;
            if event == Event::Nmi {
                self.nmi_masked = true;
            }
        }
        if self.events.needs_nmi_window() && !self.nmi_masked && windows.nmi == Window::Closed {
            self.begin_step(StepReason::InterruptShadow);
        }
        if self.step.is_some() {
            exceptions |= CONTRIBUTORY;
        }
        let wants_window = self.window_requested || self.events.needs_interrupt_window();
        let catches_return = self.nmi_masked && self.step.is_none();
        let control = &mut self.vmcb_mut().control;
        control.intercept_exceptions = exceptions;
        control.intercepts3.set(Intercepts3::IRET, catches_return);
        control.intercepts3.set(Intercepts3::VINTR, wants_window);
        control.interrupt_control.set(
            InterruptControl::V_IRQ | InterruptControl::V_IGN_TPR | InterruptControl::V_INTR_PRIO,
            wants_window,
        );
    }

    /// Nothing ran: the event waits on.
    fn take_back_injection(&mut self) {
        self.vmcb_mut().control.event_injection = 0;
        if let Some(event) = self.injected.take() {
            self.put_back(event);
        }
    }

    fn put_back(&mut self, event: Event) {
        let length = u64::from(injection::instruction_length(event));
        self.registers.rip = self.registers.rip.wrapping_sub(length);
        if event == Event::Nmi {
            self.nmi_masked = false;
        }
        self.changing_events().restore(event);
    }

    /// Puts back the event whose delivery the exit interrupted.
    fn complete_events(&mut self, exit: u64) {
        let injected = self.injected.take();
        let control = &self.vmcb().control;
        let cr2 = Gva::new(self.vmcb().save.cr2);
        // A task switch has taken the event that caused it.
        if exit == exit_code::TASK_SWITCH {
            return;
        }
        match injection::decode(control.exit_interrupt_info, cr2) {
            None => {}
            Some(Interrupted::Event(Event::Exception(_))) if is_software(injected) => {
                self.put_back_injected(injected);
            }
            Some(Interrupted::Event(event)) => self.put_back(event),
            Some(Interrupted::Instruction) => self.put_back_injected(injected),
        }
    }

    /// An instruction of the guest's own raises its event again; one that was injected does not.
    fn put_back_injected(&mut self, injected: Option<Event>) {
        if let Some(event) = injected
            && is_software(injected)
        {
            self.put_back(event);
        }
    }

    /// Lets the guest carry out one instruction.
    pub(crate) fn begin_step(&mut self, reason: StepReason) {
        if self.step.is_some() {
            return;
        }
        self.usual_events = false;
        self.step = Some(Step {
            reason,
            rip: self.registers.rip,
            guest_traps: self.registers.rflags & TRAP != 0,
            dr6: self.vmcb().save.dr6,
        });
        self.registers.rflags |= TRAP;
        self.vmcb_mut().save.dr6 &= !DR6_BS;
    }

    /// Ends a step.
    fn complete_step(&mut self, exit: u64) -> Stepped {
        let Some(step) = self.step.take() else {
            return Stepped::No;
        };
        let dr6 = self.vmcb().save.dr6;
        let trapped =
            exit == exit_code::EXCEPTION_0 + u64::from(vector::DEBUG) && dr6 & DR6_BS != 0;
        if step.reason == StepReason::StoreMachineStatus {
            self.vmcb_mut().control.intercept_cr_reads |= 1;
        }
        // IRET has loaded the guest's own flags; any other instruction left ours.
        let has_own_flags = trapped && step.reason == StepReason::NmiReturn;
        if !step.guest_traps && !has_own_flags {
            self.registers.rflags &= !TRAP;
        }
        if step.reason == StepReason::NmiReturn {
            self.nmi_masked = !trapped && self.registers.rip == step.rip;
        }
        if !trapped {
            self.vmcb_mut().save.dr6 |= step.dr6 & DR6_BS;
            return Stepped::No;
        }
        if step.guest_traps {
            // The trap is the guest's own as well; its exit is decoded as any other.
            return Stepped::No;
        }
        self.vmcb_mut().save.dr6 = (dr6 & !DR6_BS) | (step.dr6 & DR6_BS);
        if dr6 & DR6_HITS == step.dr6 & DR6_HITS {
            Stepped::Done
        } else {
            // A breakpoint was hit by the same instruction: that one is the guest's.
            Stepped::No
        }
    }

    fn nmi_can_be_taken(&self) -> bool {
        self.events.needs_nmi_window() && self.windows().nmi == Window::Open
    }

    /// One VMRUN.
    #[allow(clippy::inline_always, reason = "the way of every exit")]
    #[inline(always)]
    fn enter(&mut self) {
        let core = core::ptr::from_ref::<Core>(&self.core);
        // SAFETY: the vCPU holds a reference count of the core as long as it lives.
        let core = unsafe { &*core };
        let dr7 = self.prepare_shared(core);
        self.store_registers();
        let (vmcb, host) = (self.vmcb_address(), core.host_state.physical_address());
        let registers = &raw mut self.registers;
        match dr7 {
            // SAFETY: the core is enabled and interrupts are off; the VMCB's intercepts and
            // permission maps keep the guest away from the host, and its CR3 is the shadow root.
            None => unsafe { entry::enter(registers, vmcb, host) },
            // SAFETY: as above; `prepare_shared` has loaded DR0 to DR3 and left out breakpoints
            // that could hit the host.
            Some(dr7) => unsafe { entry::enter_with_breakpoints(registers, vmcb, host, dr7) },
        }
        self.load_registers();
        self.restore_shared(core);
    }

    /// Gives the core's shared registers to this guest; returns DR7 if it has breakpoints.
    fn prepare_shared(&mut self, core: &Core) -> Option<u64> {
        if self.reload || !core.is_current(self.extended_state) {
            self.load_shared(core);
        }
        if self.uses_xsave
            && let Some(host) = core.host_xcr0
            && self.control.xcr0 != host
        {
            // SAFETY: the host has OSXSAVE set; this is a subset of its XCR0.
            unsafe { write_xcr0(self.control.xcr0 & host | 1) };
        }
        if self.debug.hardware().is_armed() {
            return self.prepare_breakpoints();
        }
        self.vmcb_mut().save.dr7 = DR7_RESET;
        None
    }

    #[inline(never)]
    fn load_shared(&mut self, core: &Core) {
        let mut shared = core.shared.lock();
        let capabilities = core.capabilities();
        let mut tlb = TlbControl::DoNothing;
        if !shared.is_current(self.asid) {
            self.flush = PendingFlush::All;
        }
        match self.flush {
            PendingFlush::Nothing => {}
            PendingFlush::Pages { pages, count } => {
                for page in &pages[..usize::from(count)] {
                    // SAFETY: SVM is enabled in ring 0; only translations are dropped.
                    unsafe { invalidate_page(*page, self.asid.number) };
                }
            }
            PendingFlush::All
                if shared.is_current(self.asid) && flush_guest(capabilities).is_some() =>
            {
                tlb = TlbControl::FlushGuest;
            }
            PendingFlush::All => {
                let (asid, recycled) = shared.allocate_asid();
                self.asid = asid;
                if recycled == Recycled::Yes {
                    tlb = TlbControl::FlushAll;
                }
            }
        }
        self.flush = PendingFlush::Nothing;
        // SAFETY: ring 0 with interrupts off on this core; the state is released before it is
        // freed.
        unsafe { shared.acquire_extended_state(self.extended_state) };
        if capabilities.instructions.contains(Instructions::RDTSCP) {
            // SAFETY: the processor has RDTSCP, and the value was checked when it was set.
            unsafe { shared.load_tsc_aux(self.tsc_aux) };
        }
        drop(shared);
        let asid = self.asid.number;
        let control = &mut self.vmcb_mut().control;
        control.asid = asid;
        control.tlb_control = tlb as u32;
        // A flush happens once: the next entry takes it back.
        self.reload = tlb != TlbControl::DoNothing;
        core.set_current(self.extended_state);
    }

    #[cold]
    #[inline(never)]
    fn prepare_breakpoints(&mut self) -> Option<u64> {
        let marker = 0_u8;
        let stack = (&raw const marker) as u64;
        let code = entry::enter_with_breakpoints as *const () as u64;
        let hardware = *self.debug.hardware();
        let dr7 = debug::hardware_dr7(
            &hardware,
            &[
                (
                    Gva::new(stack.saturating_sub(STACK_MARGIN)),
                    Gva::new(stack.saturating_add(STACK_MARGIN)),
                ),
                (Gva::new(code), Gva::new(code + entry::CODE_SIZE)),
            ],
        );
        self.vmcb_mut().save.dr7 = dr7;
        if dr7 == DR7_RESET {
            return None;
        }
        // SAFETY: ring 0, and the host uses no breakpoints.
        unsafe { debug::load_addresses(&hardware) };
        Some(dr7)
    }

    /// Gives XCR0 back to the host.
    #[inline]
    fn restore_shared(&mut self, core: &Core) {
        if self.uses_xsave {
            self.restore_xcr0(core);
        }
    }

    #[inline(never)]
    fn restore_xcr0(&mut self, core: &Core) {
        let Some(host) = core.host_xcr0 else {
            return;
        };
        // Some emulators do not know the XSETBV intercept: what the guest wrote is its XCR0.
        let now = read_xcr0();
        if now != self.control.xcr0 & host | 1 {
            self.control.xcr0 = now;
        }
        if now != host {
            // SAFETY: the host has OSXSAVE set, and this was the register's value before.
            unsafe { write_xcr0(host) };
        }
    }

    fn store_registers(&mut self) {
        let Self { registers, .. } = *self;
        let save = &mut self.vmcb_mut().save;
        save.rax = registers.get(Gpr::Rax);
        save.rsp = registers.get(Gpr::Rsp);
        save.rip = registers.rip;
        save.rflags = registers.rflags | 2;
    }

    fn load_registers(&mut self) {
        let save = &self.vmcb().save;
        let (rax, rsp, rip, rflags) = (save.rax, save.rsp, save.rip, save.rflags);
        self.registers.set(Gpr::Rax, rax);
        self.registers.set(Gpr::Rsp, rsp);
        self.registers.rip = rip;
        self.registers.rflags = rflags;
    }

    /// The next instruction's address if the processor gives it.
    pub(crate) fn saved_next_rip(&self) -> Option<u64> {
        if !self.saves_next_rip {
            return None;
        }
        let next = self.vmcb().control.next_rip;
        (next != 0).then_some(next)
    }
}

const fn is_software(event: Option<Event>) -> bool {
    matches!(
        event,
        Some(
            Event::SoftwareInterrupt { .. }
                | Event::SoftwareException { .. }
                | Event::PrivilegedSoftwareException { .. }
        )
    )
}

/// Lets the host take what made the guest exit. Interrupts are off again afterwards.
fn take_host_interrupts() {
    // SAFETY: the host's handlers expect to be called anywhere interrupts are on. The NOP is the
    // instruction that STI still shadows.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Gives a machine check that the guest ran into to the host's handler.
fn raise_machine_check() {
    // SAFETY: the host's handler for vector 18 is there for exactly this event.
    unsafe { asm!("int 18") };
}

/// Drops the translation of one page of one guest.
///
/// # Safety
/// Ring 0 with EFER.SVME set.
unsafe fn invalidate_page(page: Gva, asid: u32) {
    // SAFETY: the caller's promise; INVLPGA has no other effect.
    unsafe {
        asm!("invlpga rax, ecx", in("rax") page.as_u64(), in("ecx") asid,
            options(nostack, preserves_flags));
    }
}

const _: () = assert!(
    size_of::<Hpa>() == 8,
    "the entry code takes it in a register"
);
