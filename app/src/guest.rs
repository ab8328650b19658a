//! A guest as one of its processors sees it, and the loop that runs this processor.
//!
//! Protocol of a turn: the machine's time goes on, then entry follows entry until the turn is over.
//! Host interrupts are off all the while, see `alarm`. Protocol of an entry: (1) hand over an interrupt
//! if one can be taken, (2) point the processor at the shadow root and drop the translations that the
//! MMU has asked to drop, (3) run until an exit, (4) handle the exit. Every exit is handled by one of the modules `paging`, `control`,
//! `ports` and `mmio`; each of them either changes the guest or raises an exception in it, and
//! whatever ends the guest comes back as an [`End`].

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use umbra_emulator::TaskSwitch;
use umbra_firmware::Firmware;
use umbra_inspect::ExitLog;
use umbra_inspect::trace::{Event, FaultResult, Trace};
use umbra_machine::processor::cpuid::CpuidPolicy;
use umbra_machine::{Attention, Shutdown, Startup, Timers};
use umbra_mmu::{MmuError, RootChange};
use umbra_report::{Exhausted, Outcome};
use umbra_vcpu::event::{Blocking, Exception, TripleFault, Window, vector};
use umbra_vcpu::exit::Exit;
use umbra_vcpu::{EntryFailure, Flush, Vcpu};

use crate::alarm::Alarm;
use crate::gdb::{self, Debugged, Verdict};
use crate::paging::Paging;
use crate::shared::SharedMachine;
use crate::shortage::Shortage;
use crate::uhyve::Uhyve;
use crate::{control, emulation, entry, mmio, platform, ports, protection_keys};

/// Why a guest ends.
#[derive(Debug)]
pub struct End {
    /// The kind of end.
    pub outcome: Outcome,
    /// One line for a human.
    pub message: String,
    /// What the guest wrote to its exit port.
    pub guest_status: Option<u32>,
    /// What was missing, if no shadow page was available.
    pub exhausted: Option<Exhausted>,
}

impl End {
    /// An end with no more to say than its message.
    pub fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            outcome,
            message: message.into(),
            guest_status: None,
            exhausted: None,
        }
    }
}

impl From<TripleFault> for End {
    fn from(_: TripleFault) -> Self {
        Self::new(
            Outcome::TripleFault,
            "a fault while a double fault was being delivered",
        )
    }
}

impl From<EntryFailure> for End {
    fn from(failure: EntryFailure) -> Self {
        Self::new(Outcome::EntryFailed, format!("{failure}"))
    }
}

impl From<MmuError> for End {
    fn from(error: MmuError) -> Self {
        match error {
            MmuError::OutOfMemory => Self::new(
                Outcome::HostOutOfMemory,
                "the image's heap has no frame left",
            ),
            MmuError::NoPageAvailable(shortage) => {
                let exhausted = Exhausted {
                    needed: shortage.needed as u64,
                    used: shortage.used as u64,
                    limit: shortage.limit as u64,
                    pinned: shortage.pinned as u64,
                };
                Self {
                    exhausted: Some(exhausted),
                    ..Self::new(Outcome::NoMmuPages, format!("{error}"))
                }
            }
        }
    }
}

/// How often a guest exited for each reason.
pub type ExitCounts = [u64; REASONS.len()];

/// A guest through one of its processors: what this processor has of its own, and the machine that it
/// shares with the others.
pub struct Guest {
    /// The processor.
    pub vcpu: Box<dyn Vcpu>,
    /// Its view of memory.
    pub paging: Paging,
    /// The guest's devices and the registers that software keeps.
    pub machine: SharedMachine,
    /// The hypervisor's services for a Hermit application, which has one processor.
    pub uhyve: Option<Uhyve>,
    /// What CPUID shows.
    pub cpuid: CpuidPolicy,
    /// What happens when more shadow pages are needed at once than there may be.
    pub shortage: Shortage,
    /// How often the processor exited, for each of the reasons.
    pub exits: ExitCounts,
    /// What it exited for last.
    pub exit_log: ExitLog,
    /// What a debugger does to the guest; with the processor whose turn it is or was last.
    pub debugged: Option<Debugged>,
    /// Whether somebody watches the processor's exits in this turn: a debugger, or the trace.
    pub watched: bool,
    /// What the processor did, if that is recorded.
    pub trace: Option<Box<Trace>>,
    /// Whether it waits for something.
    pub halted: Halted,
    /// The guest's BIOS, if it has one, which serves the processor that starts the guest.
    pub firmware: Option<Firmware>,
    /// What the instruction that is being carried out begins to block.
    pub blocking: Option<Blocking>,
}

/// Whether a processor waits for something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halted {
    /// It runs.
    No,
    /// It has executed HLT.
    Yes,
    /// The same with interrupts off: only an NMI or another processor's INIT wakes it.
    Deaf,
    /// It waits for another processor's start-up IPI.
    Reset,
}

/// How a processor's turn went.
#[derive(Debug)]
pub enum Turn {
    /// Its time slice is over, or it lets another one run.
    Over,
    /// It waits for an interrupt.
    Waiting,
    /// The guest has ended.
    Ended(End),
}

/// How far one entry has brought a processor.
enum Progress {
    /// It can go on at once.
    Continues,
    /// The debugger has stopped it, or it waits for another processor.
    Stopped,
    /// The host has been interrupted: time has passed.
    Interrupted,
}

impl Guest {
    /// Runs the processor until the host's time-stamp counter reaches `until`, it waits, or the guest
    /// ends.
    pub fn turn(&mut self, alarm: &mut Alarm, until: u64) -> Turn {
        self.advance_time();
        hermit::mm::with_fallible_requests(|| self.run(alarm, until))
    }

    fn run(&mut self, alarm: &mut Alarm, until: u64) -> Turn {
        self.watched = self.trace.is_some() || self.debugged.is_some();
        loop {
            if self.halted != Halted::No {
                match self.wake() {
                    Ok(Halted::No) => {}
                    Ok(_) => return Turn::Waiting,
                    Err(end) => return Turn::Ended(end),
                }
            }
            if self.machine.take_timers() == Timers::Touched {
                let deadline = self.next_deadline().map_or(until, |due| due.min(until));
                alarm.limit_turn(&mut *self.vcpu, deadline);
            }
            match self.step() {
                Ok(Progress::Continues) => {}
                Ok(Progress::Stopped) => return Turn::Over,
                Ok(Progress::Interrupted) => {
                    if self.interrupted(alarm) >= until || self.machine.has_kicks() {
                        return Turn::Over;
                    }
                }
                Err(end) => return Turn::Ended(end),
            }
        }
    }

    /// Enters the guest once and handles its exit.
    ///
    /// This is the way of every exit: what it does not need must wait behind one comparison.
    #[inline]
    fn step(&mut self) -> Result<Progress, End> {
        if self.machine.attention() == Attention::Wanted {
            self.attend()?;
            if self.halted != Halted::No {
                return Ok(Progress::Continues);
            }
        }
        let change = match self.paging.prepare_entry() {
            Ok(change) => change,
            Err(error) => {
                self.shortage.resolve(self.paging.mmu(), error)?;
                return Ok(Progress::Continues);
            }
        };
        let flush = self.paging.take_flush_request();
        if change == RootChange::Changed {
            let paging = self.paging.root();
            self.vcpu.set_shadow_paging(paging);
            self.vcpu.flush(Flush::All);
            self.record(|| Event::Root(paging.root));
        } else if flush {
            self.vcpu.flush(Flush::All);
            self.record(|| Event::Flush);
        }

        let record = self.exit_log.next_record();
        if let Err(failure) = self.vcpu.run(&mut self.paging, record) {
            self.exit_log.forget_next_record();
            return Err(failure.into());
        }
        let exit = record.exit;
        self.exits[reason(&exit)] += 1;
        let rip = record.rip;
        if self.watched {
            self.record(|| Event::Exit { rip, exit });
            if self.debugged.is_some() {
                match gdb::before_exit(self, &exit)? {
                    Verdict::Guests => {}
                    Verdict::Handled => return Ok(Progress::Continues),
                    Verdict::Stopped => return Ok(Progress::Stopped),
                }
            }
        }
        match exit {
            Exit::Cpuid => control::cpuid(self),
            Exit::Hypercall => control::hypercall(self)?,
            Exit::ReadMsr(index) => control::read_msr(self, index)?,
            Exit::WriteMsr { index, value } => control::write_msr(self, index, value)?,
            Exit::WriteControlRegister { register, value } => {
                control::write_control_register(self, register, value)?;
            }
            Exit::Io(access) => ports::access(self, access)?,
            _ => self.handle(&exit)?,
        }
        if self.watched && self.watch_after() {
            return Ok(Progress::Stopped);
        }
        match exit {
            Exit::HostInterrupt | Exit::TimeSliceEnd | Exit::NotEnterable => {
                self.check_deadline()?;
                Ok(Progress::Interrupted)
            }
            // It waits for another processor, or has sent it something.
            Exit::Pause => Ok(Progress::Stopped),
            Exit::WriteMsr { .. } | Exit::Io(_) | Exit::PageFault { .. } | Exit::Hypercall
                if self.machine.has_kicks() =>
            {
                Ok(Progress::Stopped)
            }
            _ => Ok(Progress::Continues),
        }
    }

    /// Shows who watches the guest that an exit has been handled. Whether the guest stops there.
    #[inline(never)]
    fn watch_after(&mut self) -> bool {
        if let Some(trace) = &mut self.trace {
            trace.exit_handled(platform::timestamp());
        }
        self.debugged.is_some() && gdb::after_exit(self)
    }

    /// Takes the host's interrupts, and lets the guest's time follow. Returns the host's time-stamp
    /// counter.
    #[cold]
    fn interrupted(&mut self, alarm: &mut Alarm) -> u64 {
        // Where the processor counts the turn, interrupts may wait that did not end it.
        platform::take_interrupts();
        alarm.went_off();
        self.advance_time();
        platform::timestamp()
    }

    /// Sees to what waits at the machine for this processor.
    #[inline(never)]
    fn attend(&mut self) -> Result<(), End> {
        if let Some(shutdown) = self.machine.take_shutdown() {
            return Err(end_of_machine(shutdown));
        }
        self.start_up();
        if !self.debugged.as_ref().is_some_and(Debugged::is_stepping) {
            self.offer_interrupt();
        }
        Ok(())
    }

    /// Lets INIT and start-up IPIs of other processors take effect.
    fn start_up(&mut self) {
        while let Some(startup) = self.machine.take_startup() {
            let vector = match startup {
                Startup::Init => {
                    self.halted = Halted::Reset;
                    0
                }
                Startup::Begin { vector } => {
                    self.halted = Halted::No;
                    vector
                }
            };
            let signature = control::signature(self);
            entry::start_up(&mut *self.vcpu, vector, signature);
            let control = self.vcpu.control_registers();
            if self.paging.load_registers(&control).is_err() {
                unreachable!("without paging there are no pointers to refuse");
            }
        }
    }

    /// Whether a processor that waits still does.
    fn wake(&mut self) -> Result<Halted, End> {
        self.check_deadline()?;
        self.start_up();
        if self.machine.take_nmi() {
            self.vcpu.events_mut().raise_nmi();
        }
        let wakes = match self.halted {
            Halted::No => true,
            Halted::Yes | Halted::Deaf => self.wakes(),
            Halted::Reset => false,
        };
        if wakes {
            self.halted = Halted::No;
        }
        Ok(self.halted)
    }

    /// Moves an interrupt from the machine's controllers to the processor, or has the processor
    /// say when it can take it.
    fn offer_interrupt(&mut self) {
        if self.machine.take_nmi() {
            self.vcpu.events_mut().raise_nmi();
        }
        if !self.machine.pending_interrupt() {
            return;
        }
        if self.vcpu.windows().interrupt == Window::Open && self.vcpu.events().accepts_interrupt() {
            if let Some(vector) = self.machine.acknowledge_interrupt() {
                self.vcpu.events_mut().raise_interrupt(vector);
                self.record(|| Event::Interrupt(vector));
            }
        }
        if self.machine.pending_interrupt() {
            self.vcpu.request_interrupt_window();
        }
    }

    /// The watchdog. The alarm is set for its time at the latest, so it is asked only after
    /// interrupts, even of a guest that never exits of itself.
    pub fn check_deadline(&self) -> Result<(), End> {
        let deadline = self.machine.shared().deadline();
        if deadline.is_some_and(|deadline| platform::timestamp() >= deadline) {
            let rip = self.vcpu.registers().rip;
            return Err(End::new(
                Outcome::Watchdog,
                format!("the guest ran out of its time limit, last at {rip:#x}"),
            ));
        }
        Ok(())
    }

    /// Lets the machine's time go on: before an access to a device, and at each of the host's ticks.
    pub fn advance_time(&mut self) {
        let now = self.machine.time_base().time_at(platform::timestamp());
        self.machine.advance(now);
    }

    /// The host's time-stamp counter when the machine or the watchdog must be looked at.
    pub fn next_deadline(&self) -> Option<u64> {
        let machine = self.machine.next_deadline();
        let machine = machine.map(|time| self.machine.time_base().counter_at(time));
        let deadline = self.machine.shared().deadline();
        machine.into_iter().chain(deadline).min()
    }

    /// Records an event, if that is wanted.
    #[inline]
    pub fn record(&mut self, event: impl FnOnce() -> Event) {
        if let Some(trace) = &mut self.trace {
            trace.record(platform::timestamp(), event());
        }
    }

    /// Raises an exception in the guest.
    pub fn raise(&mut self, exception: Exception) -> Result<(), End> {
        self.vcpu.events_mut().raise(exception)?;
        Ok(())
    }

    /// Handles an exit, or what an instruction that was not left to the processor means to the run loop.
    #[inline(never)]
    pub fn handle(&mut self, exit: &Exit) -> Result<(), End> {
        match *exit {
            Exit::PageFault {
                address,
                error_code,
            } => self.page_fault(address, error_code),
            // A machine check is the host's, and the driver has handed it over.
            Exit::Exception(exception) if exception.vector == vector::MACHINE_CHECK => Ok(()),
            Exit::Exception(exception) if exception.vector == vector::INVALID_OPCODE => {
                protection_keys::invalid_opcode(self)
            }
            Exit::Exception(exception) => self.raise(exception),
            // The debugger has seen it.
            Exit::Breakpoint { exception, .. } => exception.map_or(Ok(()), |own| self.raise(own)),
            // The loop sees to interrupts before each entry, and to the time after these exits.
            Exit::HostInterrupt
            | Exit::TimeSliceEnd
            | Exit::HostNmi
            | Exit::InterruptWindow
            | Exit::NmiWindow => Ok(()),
            Exit::Cpuid => {
                control::cpuid(self);
                Ok(())
            }
            Exit::ReadMsr(index) => control::read_msr(self, index),
            Exit::WriteMsr { index, value } => control::write_msr(self, index, value),
            Exit::ReadControlRegister { register, target } => {
                control::read_control_register(self, register, target)
            }
            Exit::WriteControlRegister { register, value } => {
                control::write_control_register(self, register, value)
            }
            Exit::MoveDebugRegister {
                number,
                general,
                direction,
            } => control::move_debug_register(self, number, general, direction),
            Exit::SetExtendedControlRegister { index, value } => {
                control::set_extended_control_register(self, index, value)
            }
            Exit::InvalidatePage(address) => {
                self.paging.invalidate_page(address);
                self.vcpu.flush(Flush::Page(address));
                self.vcpu.skip_instruction();
                Ok(())
            }
            Exit::Io(access) => ports::access(self, access),
            Exit::Halt => {
                self.halt();
                Ok(())
            }
            Exit::Pause | Exit::InvalidateCaches => {
                self.vcpu.skip_instruction();
                Ok(())
            }
            Exit::ReadTsc => control::read_tsc(self),
            Exit::Hypercall => control::hypercall(self),
            Exit::InvalidatePcid { .. }
            | Exit::Monitor
            | Exit::MonitorWait
            | Exit::VirtualizationInstruction => self.raise(Exception::INVALID_OPCODE),
            Exit::ReadPerformanceCounter => self.raise(Exception::GENERAL_PROTECTION),
            Exit::TaskSwitch {
                selector,
                source,
                error_code,
                resume_rip,
            } => emulation::switch_task(
                self,
                &TaskSwitch {
                    selector,
                    source,
                    error_code,
                    resume_rip,
                },
            ),
            Exit::NotEnterable => emulation::until_enterable(self),
            Exit::TripleFault => Err(End::new(
                Outcome::TripleFault,
                format!("the guest shut down at {:#x}", self.vcpu.registers().rip),
            )),
            Exit::Unknown {
                reason,
                information,
            } => Err(self.unsupported(format!(
                "the processor's exit reason {reason:#x} with information {information:#x}"
            ))),
        }
    }

    fn page_fault(
        &mut self,
        address: umbra_vcpu::address::Gva,
        error_code: x86_64::structures::idt::PageFaultErrorCode,
    ) -> Result<(), End> {
        use umbra_mmu::FaultOutcome;
        let outcome = match self.paging.handle_fault(&*self.vcpu, address, error_code) {
            Ok(outcome) => outcome,
            Err(error) => return Ok(self.shortage.resolve(self.paging.mmu(), error)?),
        };
        self.record(|| Event::PageFault {
            gva: address,
            error: error_code,
            result: match outcome {
                FaultOutcome::Fixed => FaultResult::Fixed,
                FaultOutcome::Inject(_) => FaultResult::Injected,
                FaultOutcome::Mmio { .. } => FaultResult::NoMemory,
            },
        });
        match outcome {
            FaultOutcome::Fixed => {
                let mmu = self.paging.mmu();
                Ok(self.shortage.fixed(mmu, self.vcpu.registers())?)
            }
            FaultOutcome::Inject(fault) => {
                self.raise(Exception::page_fault(fault.gva, fault.error))
            }
            FaultOutcome::Mmio { gpa, access, .. } => {
                if self.machine.tells_time_at(gpa) {
                    self.advance_time();
                }
                mmio::access(self, address, gpa, access)
            }
        }
    }

    /// HLT: waits until an interrupt is due.
    fn halt(&mut self) {
        self.vcpu.skip_instruction();
        self.advance_time();
        self.halted = match self.vcpu.windows().interrupt {
            Window::Closed if !self.wakes() => Halted::Deaf,
            _ => Halted::Yes,
        };
    }

    /// Whether something ends a halt.
    fn wakes(&self) -> bool {
        self.machine.pending_interrupt() && self.vcpu.windows().interrupt == Window::Open
            || self.vcpu.events().needs_nmi_window()
            || !self.vcpu.events().accepts_interrupt()
    }

    /// The end of a guest whose processors all wait for each other.
    pub fn never_wakes(&self) -> End {
        End::new(
            Outcome::Halted,
            format!(
                "the guest halted with interrupts off before {:#x}: nothing can wake it",
                self.vcpu.registers().rip
            ),
        )
    }

    /// The end for what Umbra does not do.
    pub fn unsupported(&self, what: impl AsRef<str>) -> End {
        let rip = self.vcpu.registers().rip;
        End::new(
            Outcome::Unsupported,
            format!("at {rip:#x}: {}", what.as_ref()),
        )
    }
}

fn end_of_machine(shutdown: Shutdown) -> End {
    match shutdown {
        Shutdown::DebugExit(0) => End {
            guest_status: Some(0),
            ..End::new(Outcome::Succeeded, "the guest wrote 0 to its exit port")
        },
        Shutdown::DebugExit(status) => End {
            guest_status: Some(status),
            ..End::new(
                Outcome::Failed,
                format!("the guest wrote {status} to its exit port"),
            )
        },
        Shutdown::PowerOff => End::new(Outcome::Succeeded, "the guest powered off"),
        Shutdown::Reset => End::new(Outcome::Reset, "the guest asked for a reset"),
    }
}

/// The names under which exits are counted.
pub const REASONS: [&str; 31] = [
    "page_fault",
    "exception",
    "host_interrupt",
    "host_nmi",
    "interrupt_window",
    "nmi_window",
    "cpuid",
    "halt",
    "pause",
    "hypercall",
    "io",
    "read_msr",
    "write_msr",
    "read_control_register",
    "write_control_register",
    "invalidate_page",
    "invalidate_pcid",
    "invalidate_caches",
    "read_tsc",
    "read_performance_counter",
    "monitor",
    "monitor_wait",
    "set_extended_control_register",
    "virtualization_instruction",
    "task_switch",
    "triple_fault",
    "time_slice_end",
    "unknown",
    "not_enterable",
    "breakpoint",
    "move_debug_register",
];

/// The place of an exit's reason in [`REASONS`].
const fn reason(exit: &Exit) -> usize {
    match exit {
        Exit::PageFault { .. } => 0,
        Exit::Exception(_) => 1,
        Exit::HostInterrupt => 2,
        Exit::HostNmi => 3,
        Exit::InterruptWindow => 4,
        Exit::NmiWindow => 5,
        Exit::Cpuid => 6,
        Exit::Halt => 7,
        Exit::Pause => 8,
        Exit::Hypercall => 9,
        Exit::Io(_) => 10,
        Exit::ReadMsr(_) => 11,
        Exit::WriteMsr { .. } => 12,
        Exit::ReadControlRegister { .. } => 13,
        Exit::WriteControlRegister { .. } => 14,
        Exit::InvalidatePage(_) => 15,
        Exit::InvalidatePcid { .. } => 16,
        Exit::InvalidateCaches => 17,
        Exit::ReadTsc => 18,
        Exit::ReadPerformanceCounter => 19,
        Exit::Monitor => 20,
        Exit::MonitorWait => 21,
        Exit::SetExtendedControlRegister { .. } => 22,
        Exit::VirtualizationInstruction => 23,
        Exit::TaskSwitch { .. } => 24,
        Exit::TripleFault => 25,
        Exit::TimeSliceEnd => 26,
        Exit::Unknown { .. } => 27,
        Exit::NotEnterable => 28,
        Exit::Breakpoint { .. } => 29,
        Exit::MoveDebugRegister { .. } => 30,
    }
}
