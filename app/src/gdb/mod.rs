//! A debugger at the second serial port: GDB's remote protocol, by the `gdbstub` crate.
//!
//! Protocol: the scheduler calls [`Debugger::poll`] between turns. While the debugger has stopped the
//! guest it gets no turns ([`Debugged::is_stopped`]). The run loop shows each exit to [`before_exit`] and
//! [`after_exit`] before and after it is handled, and instructions that it carries out itself to
//! [`before_emulation`].
//!
//! A session begins with GDB's first question, whatever an earlier one has left behind. It stops the guest
//! and fixes the [`Layout`] of the registers.
//!
//! What a program under the debugger could notice: INT3 in the place of code that it reads. Interrupts wait
//! while it is stepped.

mod breakpoints;
mod registers;
mod step;
mod target;

use alloc::rc::Rc;
use core::cell::RefCell;
use core::convert::Infallible;
use core::num::NonZeroUsize;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use umbra_report::ExitCode;
use umbra_report::options::Debug;
use umbra_vcpu::debug::ExitingExceptions;
use umbra_vcpu::event::vector;
use umbra_vcpu::exit::Exit;

use self::breakpoints::{Placed, Stop};
use self::registers::Layout;
use self::step::{Step, Stepped};
use crate::guest::{End, Guest, Halted};
use crate::platform;
use crate::second_serial::{PERIOD, SecondSerial};

/// The guest's processor, as GDB numbers threads.
const PROCESSOR: Tid = NonZeroUsize::MIN;

type StopReason = MultiThreadStopReason<u64>;

/// What the debugger has done to a guest.
#[derive(Debug)]
pub struct Debugged {
    mode: Mode,
    /// How it goes on when it does.
    resumption: Resumption,
    /// What the debugger has to be told.
    stop: Option<StopReason>,
    placed: Placed,
    /// The step that the next exit ends.
    step: Option<Step>,
    /// Where that instruction is.
    stepped_from: u64,
    /// Whether the processor carries out a trap instruction of the guest's own.
    own_trap: bool,
    /// The widest code that the guest's image has.
    image: Layout,
    layout: Layout,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Stopped,
    Running,
    Stepping,
}

/// How GDB lets a guest go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resumption {
    Continue,
    Step,
}

/// How wide the code in a guest's image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageWidth {
    /// 32 bits or less, or nobody knows.
    Narrow,
    /// 64 bits, even if it is entered in a narrower mode.
    Wide,
}

impl Debugged {
    /// A guest that waits for the debugger, or does not.
    pub fn new(start: Debug, width: ImageWidth) -> Self {
        let image = match width {
            ImageWidth::Narrow => Layout::Bits32,
            ImageWidth::Wide => Layout::Bits64,
        };
        Self {
            mode: match start {
                Debug::Wait => Mode::Stopped,
                Debug::Attach => Mode::Running,
            },
            resumption: Resumption::Continue,
            stop: None,
            placed: Placed::default(),
            step: None,
            stepped_from: 0,
            own_trap: false,
            image,
            layout: image,
        }
    }

    /// Whether the guest must not run.
    pub fn is_stopped(&self) -> bool {
        self.mode == Mode::Stopped
    }

    /// Whether the guest executes one instruction, undisturbed by interrupts.
    pub fn is_stepping(&self) -> bool {
        self.mode == Mode::Stepping
    }
}

/// What is left to do with an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All: it has nothing to do with the debugger.
    Guests,
    /// Nothing: the guest goes on.
    Handled,
    /// Nothing: the guest has stopped.
    Stopped,
}

/// Looks at an exit before it is handled.
///
/// # Errors
/// [`End`] if the guest dies of an exception of its own.
pub fn before_exit(guest: &mut Guest, exit: &Exit) -> Result<Verdict, End> {
    let step = guest
        .debugged
        .as_mut()
        .and_then(|debugged| debugged.step.take());
    let stepped = step.map_or(Stepped::No, |step| step.end(guest, exit));
    if finish_own_trap(guest) {
        return after_own_trap(guest, exit);
    }
    match *exit {
        Exit::Breakpoint { hits, exception } => {
            let is_guests = match step {
                Some(_) => stepped == Stepped::DoneWithException,
                None => exception.is_some(),
            };
            if let Some(exception) = exception.filter(|_| is_guests) {
                guest.raise(exception)?;
            }
            let hit = guest
                .debugged
                .as_ref()
                .and_then(|debugged| debugged.placed.hardware_hit(hits));
            stop(guest, hit.map_or(DONE, reason));
            Ok(Verdict::Stopped)
        }
        Exit::Exception(exception) if exception.vector == vector::DEBUG => {
            if stepped == Stepped::No {
                return Ok(Verdict::Guests);
            }
            if stepped == Stepped::DoneWithException {
                guest.raise(exception)?;
            }
            stop(guest, DONE);
            Ok(Verdict::Stopped)
        }
        Exit::Exception(exception) if exception.vector == vector::BREAKPOINT => {
            if breakpoints::software_hit(guest) {
                stop(guest, reason(Stop::Software));
                return Ok(Verdict::Stopped);
            }
            Ok(carry_out_own(guest, exception.vector))
        }
        Exit::Exception(exception) if exception.vector == vector::OVERFLOW => {
            Ok(carry_out_own(guest, exception.vector))
        }
        _ => Ok(Verdict::Guests),
    }
}

/// Lets the processor carry out the guest's own INT3 or INTO, and come back at its handler.
fn carry_out_own(guest: &mut Guest, vector: u8) -> Verdict {
    let landing = step::handler(guest, vector);
    if let Some(debugged) = &mut guest.debugged {
        debugged.own_trap = true;
        let debugging = debugged
            .placed
            .debugging(ExitingExceptions::AllButTraps, landing);
        guest.vcpu.set_debugging(&debugging);
    }
    Verdict::Handled
}

/// Whether the exit is the first one since [`carry_out_own`]: all breakpoints work again.
fn finish_own_trap(guest: &mut Guest) -> bool {
    let debugged = guest.debugged.as_mut();
    let was_own = debugged.is_some_and(|debugged| core::mem::take(&mut debugged.own_trap));
    if was_own {
        apply(guest, ExitingExceptions::None);
    }
    was_own
}

/// What such an exit means.
fn after_own_trap(guest: &mut Guest, exit: &Exit) -> Result<Verdict, End> {
    let Exit::Breakpoint { hits, exception } = *exit else {
        return Ok(Verdict::Guests);
    };
    if let Some(exception) = exception {
        guest.raise(exception)?;
    }
    let debugged = guest.debugged.as_ref();
    let hit = debugged.and_then(|debugged| debugged.placed.hardware_hit(hits));
    if hit.is_none() && !is_stepping(guest) {
        return Ok(Verdict::Handled);
    }
    stop(guest, hit.map_or(DONE, reason));
    Ok(Verdict::Stopped)
}

/// Whether the guest has stopped because its one instruction was carried out in its place, an event was
/// delivered before another exit, or a breakpoint is in the way of the next instruction.
pub fn after_exit(guest: &mut Guest) -> bool {
    let Some(debugged) = &guest.debugged else {
        return false;
    };
    if debugged.is_stopped() {
        return true;
    }
    let has_moved =
        guest.vcpu.registers().rip != debugged.stepped_from || guest.halted != Halted::No;
    if !is_stepping(guest) {
        return false;
    }
    if has_moved {
        stop(guest, DONE);
    } else {
        step_on(guest);
    }
    has_moved
}

/// Whether the guest must stop before the instruction at its instruction pointer, which is not left to the
/// processor.
pub fn before_emulation(guest: &mut Guest) -> bool {
    if is_stepping(guest) {
        return false;
    }
    let Some(hit) = breakpoints::stop_at(guest) else {
        return false;
    };
    stop(guest, reason(hit));
    true
}

/// The step is over, and nothing else has happened.
const DONE: StopReason = StopReason::SignalWithThread {
    tid: PROCESSOR,
    signal: Signal::SIGTRAP,
};

const fn reason(stop: Stop) -> StopReason {
    match stop {
        Stop::Software => StopReason::SwBreak(PROCESSOR),
        Stop::Hardware => StopReason::HwBreak(PROCESSOR),
        Stop::Watch(kind, addr) => StopReason::Watch {
            tid: PROCESSOR,
            kind,
            addr,
        },
    }
}

/// Stops the guest, and has the debugger told why.
fn stop(guest: &mut Guest, reason: StopReason) {
    halt(guest);
    if let Some(debugged) = &mut guest.debugged {
        debugged.stop = Some(reason);
    }
}

/// Stops the guest.
fn halt(guest: &mut Guest) {
    let step = guest.debugged.as_mut().and_then(|debugged| {
        debugged.mode = Mode::Stopped;
        debugged.stop = None;
        debugged.own_trap = false;
        debugged.step.take()
    });
    if let Some(step) = step {
        // It has not been entered since.
        let _ = step.end(guest, &Exit::HostInterrupt);
    }
    apply(guest, ExitingExceptions::None);
}

fn is_stepping(guest: &Guest) -> bool {
    guest.debugged.as_ref().is_some_and(Debugged::is_stepping)
}

/// Gives the processor the breakpoints.
fn apply(guest: &mut Guest, exceptions: ExitingExceptions) {
    if let Some(debugged) = &guest.debugged {
        let debugging = debugged.placed.debugging(exceptions, None);
        guest.vcpu.set_debugging(&debugging);
    }
}

/// Prepares the next entry if the guest is stepped.
fn step_on(guest: &mut Guest) {
    if is_stepping(guest) {
        let step = step::begin(guest);
        let rip = guest.vcpu.registers().rip;
        if let Some(debugged) = &mut guest.debugged {
            debugged.step = Some(step);
            debugged.stepped_from = rip;
        }
    }
}

fn layout(guest: &Guest) -> Layout {
    guest
        .debugged
        .as_ref()
        .map_or(Layout::Bits64, |debugged| debugged.layout)
}

fn set_resumption(guest: &mut Guest, resumption: Resumption) {
    if let Some(debugged) = &mut guest.debugged {
        debugged.resumption = resumption;
    }
}

/// Lets the guest go on as GDB has said.
fn resume(guest: &mut Guest) {
    apply(guest, ExitingExceptions::None);
    if let Some(debugged) = &mut guest.debugged {
        debugged.stop = None;
        debugged.mode = match debugged.resumption {
            Resumption::Continue => Mode::Running,
            Resumption::Step => Mode::Stepping,
        };
    }
    step_on(guest);
}

/// Lets the guest go on as if there had never been a debugger.
fn release(guest: &mut Guest) {
    halt(guest);
    breakpoints::remove_all(guest);
    apply(guest, ExitingExceptions::None);
    if let Some(debugged) = &mut guest.debugged {
        debugged.mode = Mode::Running;
    }
}

/// The port, shared with the stub.
#[derive(Clone)]
struct Wire(Rc<RefCell<SecondSerial>>);

impl Connection for Wire {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        self.0.borrow_mut().send(&[byte]);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        self.0.borrow_mut().pump();
        Ok(())
    }
}

type Machine = GdbStubStateMachine<'static, Guest, Wire>;

/// The stub, which talks to the debugger.
pub struct Debugger {
    wire: Wire,
    /// `None` only while it changes its state, and after an error, until the next session.
    machine: Option<Machine>,
    /// How much of [`GREETING`] has just been received.
    greeted: usize,
}

/// How each session of GDB's begins.
const GREETING: &[u8] = b"$qSupported:";

/// What the debugger wants of the guest as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing.
    None,
    /// It shall end.
    Kill,
}

/// How a step of the stub went.
enum Progress {
    Byte,
    Nothing,
    Killed,
}

impl Debugger {
    /// A stub at this port, for this guest.
    pub fn new(port: SecondSerial, guest: &mut Guest) -> Self {
        let wire = Wire(Rc::new(RefCell::new(port)));
        Self {
            machine: new_machine(&wire, guest),
            wire,
            greeted: 0,
        }
    }

    /// Talks to the debugger as long as it has something to say.
    pub fn poll(&mut self, guest: &mut Guest) -> Wish {
        let patience = platform::ticks_in_microseconds(PERIOD);
        let mut last = platform::timestamp();
        loop {
            self.wire.0.borrow_mut().pump();
            match self.advance(guest) {
                Progress::Byte => last = platform::timestamp(),
                Progress::Killed => return Wish::Kill,
                // The rest of a packet comes soon.
                Progress::Nothing if guest.debugged.as_ref().is_some_and(Debugged::is_stopped) => {
                    if platform::timestamp().wrapping_sub(last) >= patience {
                        return Wish::None;
                    }
                }
                Progress::Nothing => return Wish::None,
            }
        }
    }

    /// Tells the debugger that the guest has ended.
    pub fn ended(&mut self, guest: &mut Guest, code: ExitCode) {
        let reason = StopReason::Exited(code.as_u8());
        self.machine = match self.machine.take() {
            Some(GdbStubStateMachine::Running(running)) => running.report_stop(guest, reason).ok(),
            other => other,
        };
        self.wire.0.borrow_mut().drain();
    }

    /// One step of the stub. An error ends the session.
    fn advance(&mut self, guest: &mut Guest) -> Progress {
        let (machine, progress) = match self.machine.take() {
            Some(GdbStubStateMachine::CtrlCInterrupt(interrupt)) => {
                halt(guest);
                let reason = StopReason::SignalWithThread {
                    tid: PROCESSOR,
                    signal: Signal::SIGINT,
                };
                let next = interrupt.interrupt_handled(guest, Some(reason));
                (next.ok(), Progress::Byte)
            }
            Some(GdbStubStateMachine::Disconnected(gone)) => {
                let progress = match gone.get_reason() {
                    DisconnectReason::Kill => Progress::Killed,
                    _ => Progress::Byte,
                };
                release(guest);
                (Some(gone.return_to_idle()), progress)
            }
            Some(GdbStubStateMachine::Running(running)) if has_stop(guest) => {
                let stop = guest
                    .debugged
                    .as_mut()
                    .and_then(|debugged| debugged.stop.take());
                let next = running.report_stop(guest, stop.unwrap_or(DONE));
                (next.ok(), Progress::Byte)
            }
            machine => {
                let byte = self.wire.0.borrow_mut().receive();
                match byte {
                    Some(byte) => (self.receive(machine, guest, byte), Progress::Byte),
                    None => (machine, Progress::Nothing),
                }
            }
        };
        self.machine = machine;
        progress
    }

    /// Hands a byte to the stub.
    fn receive(
        &mut self,
        machine: Option<Machine>,
        guest: &mut Guest,
        byte: u8,
    ) -> Option<Machine> {
        self.greeted = match byte {
            _ if GREETING.get(self.greeted) == Some(&byte) => self.greeted + 1,
            _ if GREETING[0] == byte => 1,
            _ => 0,
        };
        if self.greeted == GREETING.len() {
            return self.begin_session(guest);
        }
        match machine? {
            GdbStubStateMachine::Idle(idle) => {
                halt(guest);
                idle.incoming_data(guest, byte).ok()
            }
            GdbStubStateMachine::Running(running) => running.incoming_data(guest, byte).ok(),
            other => Some(other),
        }
    }

    /// A new session, whose greeting has been received.
    fn begin_session(&mut self, guest: &mut Guest) -> Option<Machine> {
        self.greeted = 0;
        halt(guest);
        breakpoints::remove_all(guest);
        let is_long = guest.vcpu.control_registers().efer & step::LMA != 0;
        if let Some(debugged) = &mut guest.debugged {
            debugged.layout = if is_long {
                Layout::Bits64
            } else {
                debugged.image
            };
        }
        let mut machine = new_machine(&self.wire, guest);
        for &byte in GREETING {
            machine = match machine? {
                GdbStubStateMachine::Idle(idle) => idle.incoming_data(guest, byte).ok(),
                other => Some(other),
            };
        }
        machine
    }
}

fn new_machine(wire: &Wire, guest: &mut Guest) -> Option<Machine> {
    let stub = GdbStub::builder(wire.clone()).build().ok()?;
    stub.run_state_machine(guest).ok()
}

fn has_stop(guest: &Guest) -> bool {
    let debugged = guest.debugged.as_ref();
    debugged.is_some_and(|debugged| debugged.stop.is_some())
}
