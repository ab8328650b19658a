//! Carries out instructions that the processor stopped at: those that touch device memory, and
//! string I/O.
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
mod operand;
mod size;
mod stack;
mod string;
mod vector;

pub use environment::{Environment, Intent, Memory, Ports, Processor, Stop};
pub use string::BATCH;

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
