//! Carries out instructions in a processor's place: those that touch device memory, string I/O, and
//! whatever a guest executes in a state that the hardware cannot enter, as real mode is for VMX without
//! "unrestricted guest".
//!
//! [`emulate`] works on an [`Environment`] and knows nothing of its kind. An instruction either
//! happens as a whole or, when it stops, not at all; a repeated string instruction happens element
//! by element, a bounded number for each call, with rCX, rSI and rDI brought up to date after each,
//! so that interrupts and faults come between two elements as they do on a processor (SDM vol. 2B,
//! "REP").
//!
//! LOCK needs nothing more than any other instruction: memory that another processor shares must be
//! locked by the caller meanwhile. Data breakpoints are not looked at, and alignment checks (#AC) not
//! made.
//!
//! The instruction's result must be exact or there must be none: what is not known here is
//! [`Stop::Unsupported`].
#![no_std]
#![deny(unsafe_code)]

mod address;
mod alu;
mod environment;
mod execute;
mod far;
mod flags;
mod legacy;
mod mode;
mod operand;
mod segment;
mod size;
mod stack;
mod string;
mod system;
mod task;
mod vector;

pub use environment::{Environment, Intent, Memory, Ports, Processor, Stop, TableRegister};
pub use far::enter_real_mode_handler;
pub use string::BATCH;
pub use task::{TaskSwitch, switch_task};

use umbra_vcpu::event::Event;
use umbra_vcpu::exit::Exit;
use umbra_vcpu::instruction::iced_x86::Instruction;

/// How far an instruction has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is done, and the processor goes on at this instruction pointer.
    Done {
        /// The value for RIP.
        next_rip: u64,
    },
    /// Elements of a repeated string instruction are done, and more are left: it must run again.
    Repeating,
    /// It is the run loop's: nothing of it has happened, and all of its checks that come before an
    /// exit have passed.
    Exits {
        /// The exit that a processor would have made.
        exit: Exit,
        /// Where the instruction ends.
        next_rip: u64,
    },
    /// It delivers this event; nothing of that has happened.
    Delivers(Event),
}

/// Carries out `instruction`, which was decoded at the environment's RIP for its code width.
///
/// RIP stays where it is; whoever calls moves it, and raises the exception or the single-step trap.
///
/// # Errors
/// [`Stop`]: nothing of the instruction, or of the current element, has happened then.
pub fn emulate<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    execute::execute(environment, instruction)
}
