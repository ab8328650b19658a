//! One instruction of the guest's, behind its back.
//!
//! Protocol: [`begin`] before the entry that shall carry the instruction out, [`Step::end`] after the exit,
//! before anything else looks at the guest. Between, all exceptions exit.
//!
//! A step is RFLAGS.TF where the instruction neither shows nor replaces the flag. An instruction or event
//! that goes to a place known beforehand gets a breakpoint there instead: handlers of interrupts and
//! exceptions, SYSCALL and its like. So the guest finds TF and DR6.BS as it left them, and handlers are
//! stepped into.

use umbra_inspect::{GuestView, ProcessorState, handler_address};
use umbra_vcpu::Vcpu;
use umbra_vcpu::address::Gva;
use umbra_vcpu::debug::{DR6_BD, DR6_BS, DR6_HITS, ExitingExceptions};
use umbra_vcpu::event::{Event, vector};
use umbra_vcpu::exit::Exit;
use umbra_vcpu::instruction::iced_x86::{Code, Instruction, Mnemonic};
use umbra_vcpu::instruction::{self, MAX_LENGTH};
use umbra_vcpu::registers::{CodeWidth, Gpr};
use x86_64::registers::rflags::RFlags;

use super::breakpoints::physical;
use crate::guest::Guest;

const TRAP: u64 = RFlags::TRAP_FLAG.bits();
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSENTER_EIP: u32 = 0x176;

/// A step that has begun.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    way: Way,
    /// Whether the guest itself traps after the instruction.
    own_trap: bool,
    /// The guest's DR6.
    dr6: u64,
}

/// How the step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The processor traps; what the instruction does with RFLAGS.TF.
    Trap(FlagUse),
    /// A breakpoint where it goes to, if that is known.
    Landing(Option<Gva>),
}

/// What an instruction does with RFLAGS.TF besides obeying it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FlagUse {
    Nothing,
    /// PUSHF: it shows it.
    Pushes,
    /// POPF and IRET: it replaces it.
    Loads,
}

/// What an exit means to the step that it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// The instruction is done, and the exit says nothing else.
    Done,
    /// The instruction is done, and the guest's own #DB is due as well.
    DoneWithException,
    /// It is an exit like any other.
    No,
}

/// Prepares the next entry.
pub fn begin(guest: &mut Guest) -> Step {
    let mut events = *guest.vcpu.events();
    let due = events.next_event(guest.vcpu.windows());
    let way = match due {
        Some(event) => Way::Landing(handler(guest, event_vector(event))),
        None => way_of_instruction(guest),
    };
    let own_trap = guest.vcpu.registers().rflags & TRAP != 0;
    let dr6 = guest.vcpu.debug_register(6);
    guest
        .vcpu
        .set_debug_register(6, dr6 & !(DR6_HITS | DR6_BD | DR6_BS));
    let landing = match way {
        Way::Landing(landing) => landing,
        Way::Trap(_) => {
            guest.vcpu.registers_mut().rflags |= TRAP;
            None
        }
    };
    if let Some(debugged) = &guest.debugged {
        let debugging = debugged.placed.debugging(ExitingExceptions::All, landing);
        guest.vcpu.set_debugging(&debugging);
    }
    Step { way, own_trap, dr6 }
}

impl Step {
    /// Leaves the guest as if nobody had stepped it, and tells what the exit means.
    pub fn end(self, guest: &mut Guest, exit: &Exit) -> Stepped {
        let is_debug = match exit {
            Exit::Exception(exception) => exception.vector == vector::DEBUG,
            Exit::Breakpoint { .. } => true,
            _ => false,
        };
        let conditions = DR6_HITS | DR6_BD | DR6_BS;
        let dr6 = guest.vcpu.debug_register(6);
        let mut news = if is_debug { dr6 & conditions } else { 0 };
        let trapped = news & DR6_BS != 0;
        if let Way::Trap(flag_use) = self.way {
            self.restore_trap_flag(guest, flag_use, trapped);
            if !self.own_trap {
                news &= !DR6_BS;
            }
        }
        let kept = if news & DR6_HITS == 0 {
            self.dr6
        } else {
            self.dr6 & !DR6_HITS
        };
        guest
            .vcpu
            .set_debug_register(6, dr6 & !conditions | kept & conditions | news);
        let landed =
            matches!(self.way, Way::Landing(Some(_))) && matches!(exit, Exit::Breakpoint { .. });
        match (trapped || landed, news) {
            (false, _) => Stepped::No,
            (true, 0) => Stepped::Done,
            (true, _) => Stepped::DoneWithException,
        }
    }

    fn restore_trap_flag(self, guest: &mut Guest, flag_use: FlagUse, trapped: bool) {
        let rflags = &mut guest.vcpu.registers_mut().rflags;
        match flag_use {
            FlagUse::Loads if trapped => return,
            _ if self.own_trap => *rflags |= TRAP,
            _ => *rflags &= !TRAP,
        }
        if flag_use == FlagUse::Pushes && trapped && !self.own_trap {
            // TF is the lowest bit of the second byte.
            let stack = ProcessorState::of(&*guest.vcpu).stack_address();
            if let Some(at) = physical(guest, stack.wrapping_add(1)) {
                let mut byte = [0];
                guest.paging.read_ram(at, &mut byte);
                // The guest has just written there.
                let _ = guest.paging.write_ram(at, &[byte[0] & !1]);
            }
        }
    }
}

/// How the instruction at the instruction pointer is stepped.
fn way_of_instruction(guest: &Guest) -> Way {
    let Some(instruction) = next_instruction(guest) else {
        return Way::Trap(FlagUse::Nothing);
    };
    match instruction.mnemonic() {
        Mnemonic::Int => Way::Landing(handler(guest, instruction.immediate8())),
        Mnemonic::Int3 => Way::Landing(handler(guest, vector::BREAKPOINT)),
        Mnemonic::Into if guest.vcpu.registers().rflags & RFlags::OVERFLOW_FLAG.bits() != 0 => {
            Way::Landing(handler(guest, vector::OVERFLOW))
        }
        Mnemonic::Syscall | Mnemonic::Sysenter => {
            Way::Landing(system_call(&*guest.vcpu, instruction.mnemonic()))
        }
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            let target = guest.vcpu.registers().get(Gpr::Rcx);
            let is_wide = instruction.code() == Code::Sysretq;
            let mask = if is_wide { u64::MAX } else { 0xffff_ffff };
            Way::Landing(Some(Gva::new(target & mask)))
        }
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => Way::Trap(FlagUse::Pushes),
        Mnemonic::Popf
        | Mnemonic::Popfd
        | Mnemonic::Popfq
        | Mnemonic::Iret
        | Mnemonic::Iretd
        | Mnemonic::Iretq => Way::Trap(FlagUse::Loads),
        _ => Way::Trap(FlagUse::Nothing),
    }
}

/// The instruction at the instruction pointer, if it is in memory.
fn next_instruction(guest: &Guest) -> Option<Instruction> {
    let mut bytes = [0; MAX_LENGTH];
    let address = ProcessorState::of(&*guest.vcpu).code_address();
    let count = guest.paging.read(address, &mut bytes);
    let rip = guest.vcpu.registers().rip;
    instruction::decode(&bytes[..count], guest.vcpu.code_width(), rip)
}

/// Where the handler of `vector` begins, if it can be reached.
pub fn handler(guest: &Guest, vector: u8) -> Option<Gva> {
    let view: &dyn GuestView = &guest.paging;
    handler_address(&ProcessorState::of(&*guest.vcpu), view, vector)
}

/// Where SYSCALL or SYSENTER goes to (SDM vol. 3A 5.8.7, 5.8.8; APM vol. 2 6.1).
fn system_call(vcpu: &dyn Vcpu, mnemonic: Mnemonic) -> Option<Gva> {
    let is_long = vcpu.control_registers().efer & LMA != 0;
    let register = match (mnemonic, is_long) {
        (Mnemonic::Sysenter, _) => SYSENTER_EIP,
        (_, true) if vcpu.code_width() == CodeWidth::Bits64 => LSTAR,
        (_, true) => CSTAR,
        (_, false) => STAR,
    };
    let target = vcpu.hardware_msr(register)?;
    Some(Gva::new(if is_long {
        target
    } else {
        target & 0xffff_ffff
    }))
}

/// EFER.LMA.
pub const LMA: u64 = 1 << 10;

const fn event_vector(event: Event) -> u8 {
    match event {
        Event::Exception(exception) => exception.vector,
        Event::SoftwareInterrupt { vector, .. }
        | Event::SoftwareException { vector, .. }
        | Event::ExternalInterrupt { vector } => vector,
        Event::PrivilegedSoftwareException { .. } => vector::DEBUG,
        Event::Nmi => vector::NMI,
    }
}
