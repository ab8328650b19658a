//! A debugger at the second serial port: GDB's remote protocol, by the `gdbstub` crate.
//!
//! Protocol: the scheduler calls [`Debugger::poll`] between turns. While the debugger has stopped the
//! guest it gets no turns ([`Debugged::is_stopped`]). A step is RFLAGS.TF. A breakpoint is one byte that
//! exits: HLT in pages of the supervisor's, INT1 in those of the user's, where HLT faults (QEMU's software
//! emulation does not know INT1). The run loop shows each exit to [`before_exit`] and [`after_exit`]
//! before and after it is handled.
//!
//! What a program under the debugger could notice: single-step traps of its own are swallowed, and PUSHF
//! shows TF while it is stepped. Interrupts wait while it is stepped.

use alloc::vec::Vec;
use core::convert::Infallible;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, SingleThreadStopReason};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::singlethread::{
    SingleThreadBase, SingleThreadResume, SingleThreadResumeOps, SingleThreadSingleStep,
    SingleThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use umbra_inspect::{GuestView, ProcessorState};
use umbra_mmu::{GuestEnd, Permission};
use umbra_report::ExitCode;
use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::event::vector;
use umbra_vcpu::exit::Exit;
use umbra_vcpu::registers::{Gpr, SegmentRegister};
use x86_64::registers::rflags::RFlags;

use crate::guest::{Guest, Halted};
use crate::platform;
use crate::second_serial::{PERIOD, SecondSerial};

/// INT1, also called ICEBP: a trap, which exits with RIP past it.
const INT1: u8 = 0xf1;
/// HLT, which exits with RIP at it.
const HLT: u8 = 0xf4;
/// The general registers in GDB's order.
const GDB_ORDER: [Gpr; 16] = [
    Gpr::Rax,
    Gpr::Rbx,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rsi,
    Gpr::Rdi,
    Gpr::Rbp,
    Gpr::Rsp,
    Gpr::R8,
    Gpr::R9,
    Gpr::R10,
    Gpr::R11,
    Gpr::R12,
    Gpr::R13,
    Gpr::R14,
    Gpr::R15,
];

/// What the debugger has done to a guest.
#[derive(Debug)]
pub struct Debugged {
    mode: Mode,
    /// What it has to be told.
    stop: Option<SingleThreadStopReason<u64>>,
    breakpoints: Vec<SoftwareBreakpoint>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Stopped,
    Running,
    Stepping,
}

#[derive(Clone, Copy, Debug)]
struct SoftwareBreakpoint {
    address: Gva,
    /// Where it was when it was set.
    at: Gpa,
    /// What is there.
    instruction: u8,
    /// What was there.
    original: u8,
}

impl Debugged {
    /// A guest that waits for the debugger, or does not.
    pub const fn new(start: umbra_report::options::Debug) -> Self {
        Self {
            mode: match start {
                umbra_report::options::Debug::Wait => Mode::Stopped,
                umbra_report::options::Debug::Attach => Mode::Running,
            },
            stop: None,
            breakpoints: Vec::new(),
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

    fn stop(&mut self, reason: SingleThreadStopReason<u64>) {
        self.mode = Mode::Stopped;
        self.stop = Some(reason);
    }
}

/// Whether an exit is the debugger's: the guest has stopped then. `rip` is where it has exited.
pub fn before_exit(guest: &mut Guest, exit: &Exit) -> bool {
    let rip = guest.vcpu.registers().rip;
    // INT1 is a trap, HLT is not.
    let breakpoint = match exit {
        Exit::Exception(exception) if exception.vector == vector::DEBUG => {
            Some((INT1, rip.wrapping_sub(1)))
        }
        Exit::Halt => Some((HLT, rip)),
        _ => None,
    };
    let Some(debugged) = &mut guest.debugged else {
        return false;
    };
    if let Some((instruction, at)) = breakpoint {
        let address = ProcessorState::of(&*guest.vcpu).linear(SegmentRegister::Cs, at);
        let hit = |breakpoint: &SoftwareBreakpoint| {
            breakpoint.address == address && breakpoint.instruction == instruction
        };
        if debugged.breakpoints.iter().any(hit) {
            debugged.stop(SingleThreadStopReason::SwBreak(()));
            stop_at(guest, at);
            return true;
        }
    }
    let is_debug = breakpoint.is_some_and(|(instruction, _)| instruction == INT1);
    match (is_debug, debugged.is_stepping()) {
        (true, true) => {
            debugged.stop(SingleThreadStopReason::DoneStep);
            stop_at(guest, rip);
            true
        }
        // A handler has returned to code that was stepped before.
        (true, false) if guest.vcpu.registers().rflags & RFlags::TRAP_FLAG.bits() != 0 => {
            set_trap(guest, Trap::Off);
            true
        }
        // What is carried out in the guest's place must not trap in the guest.
        (false, true) => {
            set_trap(guest, Trap::Off);
            false
        }
        (_, false) => false,
    }
}

/// Whether the guest has stopped because its one instruction, at `rip`, was carried out in its place.
pub fn after_exit(guest: &mut Guest, rip: u64) -> bool {
    let has_moved = guest.vcpu.registers().rip != rip || guest.halted == Halted::Yes;
    let Some(debugged) = guest
        .debugged
        .as_mut()
        .filter(|debugged| debugged.is_stepping())
    else {
        return false;
    };
    if has_moved {
        debugged.stop(SingleThreadStopReason::DoneStep);
    } else {
        set_trap(guest, Trap::On);
    }
    has_moved
}

/// Leaves the guest at an instruction boundary at `rip`, without trap flag and interrupt shadow.
fn stop_at(guest: &mut Guest, rip: u64) {
    set_trap(guest, Trap::Off);
    guest.vcpu.finish_instruction(rip);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trap {
    On,
    Off,
}

fn set_trap(guest: &mut Guest, trap: Trap) {
    let rflags = &mut guest.vcpu.registers_mut().rflags;
    match trap {
        Trap::On => *rflags |= RFlags::TRAP_FLAG.bits(),
        Trap::Off => *rflags &= !RFlags::TRAP_FLAG.bits(),
    }
}

/// The stub, which talks to the debugger.
pub struct Debugger {
    /// `None` only while it changes its state, and after an error of the connection.
    machine: Option<GdbStubStateMachine<'static, Guest, SecondSerial>>,
}

/// What the debugger wants of the guest as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing.
    None,
    /// It shall end.
    Kill,
}

impl Debugger {
    /// A stub at this port, for this guest.
    pub fn new(port: SecondSerial, guest: &mut Guest) -> Self {
        let stub = GdbStub::builder(port).build().ok();
        Self {
            machine: stub.and_then(|stub| stub.run_state_machine(guest).ok()),
        }
    }

    /// Talks to the debugger as long as it has something to say.
    pub fn poll(&mut self, guest: &mut Guest) -> Wish {
        let patience = platform::ticks_in_microseconds(PERIOD);
        let mut last = platform::timestamp();
        while let Some(machine) = self.machine.take() {
            let (next, progress) = advance(machine, guest);
            self.machine = next;
            match progress {
                Progress::Byte => last = platform::timestamp(),
                Progress::Killed => return Wish::Kill,
                // The rest of a packet comes soon.
                Progress::Nothing if is_stopped(guest) => {
                    if platform::timestamp().wrapping_sub(last) >= patience {
                        break;
                    }
                }
                Progress::Nothing => break,
            }
        }
        Wish::None
    }

    /// Tells the debugger that the guest has ended.
    pub fn ended(&mut self, guest: &mut Guest, code: ExitCode) {
        let reason = SingleThreadStopReason::Exited(code.as_u8());
        self.machine = match self.machine.take() {
            Some(GdbStubStateMachine::Running(running)) => running.report_stop(guest, reason).ok(),
            other => other,
        };
        self.drain();
    }

    fn drain(&mut self) {
        match &mut self.machine {
            Some(GdbStubStateMachine::Idle(idle)) => idle.borrow_conn().drain(),
            Some(GdbStubStateMachine::Disconnected(gone)) => gone.borrow_conn().drain(),
            Some(GdbStubStateMachine::Running(running)) => running.borrow_conn().drain(),
            Some(GdbStubStateMachine::CtrlCInterrupt(_)) | None => {}
        }
    }
}

fn is_stopped(guest: &Guest) -> bool {
    guest.debugged.as_ref().is_some_and(Debugged::is_stopped)
}

/// How a step of the stub went.
enum Progress {
    Byte,
    Nothing,
    Killed,
}

type Machine = GdbStubStateMachine<'static, Guest, SecondSerial>;

/// One step of the stub. An error of the connection ends it.
fn advance(machine: Machine, guest: &mut Guest) -> (Option<Machine>, Progress) {
    match machine {
        GdbStubStateMachine::Idle(mut idle) => {
            idle.borrow_conn().pump();
            let Some(byte) = idle.borrow_conn().receive() else {
                return (Some(idle.into()), Progress::Nothing);
            };
            if let Some(debugged) = &mut guest.debugged {
                debugged.mode = Mode::Stopped;
            }
            (idle.incoming_data(guest, byte).ok(), Progress::Byte)
        }
        GdbStubStateMachine::Running(mut running) => {
            running.borrow_conn().pump();
            let stop = guest
                .debugged
                .as_mut()
                .and_then(|debugged| debugged.stop.take());
            if let Some(reason) = stop {
                return (running.report_stop(guest, reason).ok(), Progress::Byte);
            }
            match running.borrow_conn().receive() {
                Some(byte) => (running.incoming_data(guest, byte).ok(), Progress::Byte),
                None => (Some(running.into()), Progress::Nothing),
            }
        }
        GdbStubStateMachine::CtrlCInterrupt(interrupt) => {
            set_trap(guest, Trap::Off);
            if let Some(debugged) = &mut guest.debugged {
                debugged.mode = Mode::Stopped;
                debugged.stop = None;
            }
            let reason = SingleThreadStopReason::Signal(Signal::SIGINT);
            let next = interrupt.interrupt_handled(guest, Some(reason));
            (next.ok(), Progress::Byte)
        }
        GdbStubStateMachine::Disconnected(gone) => {
            let progress = match gone.get_reason() {
                DisconnectReason::Kill => Progress::Killed,
                _ => Progress::Byte,
            };
            release(guest);
            (Some(gone.return_to_idle()), progress)
        }
    }
}

/// Lets the guest go on as if there had never been a debugger.
fn release(guest: &mut Guest) {
    let Some(debugged) = &mut guest.debugged else {
        return;
    };
    debugged.mode = Mode::Running;
    for breakpoint in core::mem::take(&mut debugged.breakpoints) {
        // It was RAM when the breakpoint was set, and is still.
        let _ = guest
            .paging
            .write_ram(breakpoint.at, &[breakpoint.original]);
    }
}

impl Connection for SecondSerial {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        self.send(&[byte]);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        self.pump();
        Ok(())
    }
}

/// GDB's answer to an address that is not mapped (EFAULT).
const FAULT: u8 = 14;

impl Target for Guest {
    type Arch = X86_64_SSE;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, Infallible> {
        BaseOps::SingleThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for Guest {
    fn read_registers(&mut self, registers: &mut X86_64CoreRegs) -> TargetResult<(), Self> {
        let own = *self.vcpu.registers();
        registers.regs = GDB_ORDER.map(|register| own.get(register));
        registers.rip = own.rip;
        registers.eflags = own.rflags as u32;
        let selector = |register| u32::from(self.vcpu.segment(register).selector);
        registers.segments.cs = selector(SegmentRegister::Cs);
        registers.segments.ss = selector(SegmentRegister::Ss);
        registers.segments.ds = selector(SegmentRegister::Ds);
        registers.segments.es = selector(SegmentRegister::Es);
        registers.segments.fs = selector(SegmentRegister::Fs);
        registers.segments.gs = selector(SegmentRegister::Gs);
        let state = self.vcpu.extended_state_mut();
        for (index, value) in (0..).zip(&mut registers.xmm) {
            *value = state.xmm(index);
        }
        Ok(())
    }

    fn write_registers(&mut self, registers: &X86_64CoreRegs) -> TargetResult<(), Self> {
        let own = self.vcpu.registers_mut();
        for (register, value) in GDB_ORDER.into_iter().zip(registers.regs) {
            own.set(register, value);
        }
        own.rip = registers.rip;
        // The debugger may change what programs can: arithmetic flags, direction, and AC and ID.
        let changeable = RFlags::CARRY_FLAG
            | RFlags::PARITY_FLAG
            | RFlags::AUXILIARY_CARRY_FLAG
            | RFlags::ZERO_FLAG
            | RFlags::SIGN_FLAG
            | RFlags::DIRECTION_FLAG
            | RFlags::OVERFLOW_FLAG
            | RFlags::ALIGNMENT_CHECK
            | RFlags::ID;
        let changeable = changeable.bits();
        own.rflags = own.rflags & !changeable | u64::from(registers.eflags) & changeable;
        let state = self.vcpu.extended_state_mut();
        for (index, value) in (0..).zip(registers.xmm) {
            state.set_xmm(index, value);
        }
        Ok(())
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        match self.paging.read(Gva::new(start), data) {
            0 if !data.is_empty() => Err(TargetError::Errno(FAULT)),
            length => Ok(length),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8]) -> TargetResult<(), Self> {
        for (offset, byte) in (0..).zip(data) {
            let at = physical(self, Gva::new(start).wrapping_add(offset))
                .ok_or(TargetError::Errno(FAULT))?;
            let written = self.paging.write_ram(at, &[*byte]);
            written.map_err(|_| TargetError::Errno(FAULT))?;
        }
        Ok(())
    }

    fn support_resume(&mut self) -> Option<SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadResume for Guest {
    fn resume(&mut self, _: Option<Signal>) -> Result<(), Infallible> {
        resume(self, Mode::Running);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadSingleStep for Guest {
    fn step(&mut self, _: Option<Signal>) -> Result<(), Infallible> {
        resume(self, Mode::Stepping);
        set_trap(self, Trap::On);
        Ok(())
    }
}

fn resume(guest: &mut Guest, mode: Mode) {
    if let Some(debugged) = &mut guest.debugged {
        debugged.mode = mode;
        debugged.stop = None;
    }
}

impl Breakpoints for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let address = Gva::new(address);
        let mut original = [0];
        let Some(at) = physical(self, address) else {
            return Ok(false);
        };
        let instruction = match self.paging.inspect(address).guest_end {
            GuestEnd::Page { permits, .. } if permits.user == Permission::Granted => INT1,
            _ => HLT,
        };
        self.paging.read_ram(at, &mut original);
        if self.paging.write_ram(at, &[instruction]).is_err() {
            return Ok(false);
        }
        if let Some(debugged) = &mut self.debugged {
            debugged.breakpoints.push(SoftwareBreakpoint {
                address,
                at,
                instruction,
                original: original[0],
            });
        }
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let Some(debugged) = &mut self.debugged else {
            return Ok(false);
        };
        let mut breakpoints = debugged.breakpoints.iter();
        let Some(place) = breakpoints.position(|other| other.address.as_u64() == address) else {
            return Ok(false);
        };
        let breakpoint = debugged.breakpoints.remove(place);
        let restored = self.paging.write_ram(breakpoint.at, &[breakpoint.original]);
        Ok(restored.is_ok())
    }
}

/// Where an address is in the guest's RAM.
fn physical(guest: &Guest, address: Gva) -> Option<Gpa> {
    match guest.paging.inspect(address).guest_end {
        GuestEnd::Page { gpa, .. } | GuestEnd::Unpaged { gpa } => {
            guest.paging.is_ram(gpa, 1).then_some(gpa)
        }
        _ => None,
    }
}
