//! One page on a guest that has died.

use alloc::vec::Vec;
use core::fmt;

use umbra_vcpu::event::vector;
use umbra_vcpu::instruction::iced_x86::FastFormatter;
use x86_64::registers::rflags::RFlags;

use crate::delivery::delivery;
use crate::exits::ExitLog;
use crate::verdict::{Next, Verdict, name, next_instruction};
use crate::walk::WalkText;
use crate::{GuestView, ProcessorState};

/// How a guest died, as far as the search for causes depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// A fault while a double fault was being delivered.
    TripleFault,
    /// HLT with interrupts off.
    Halted,
    /// It was stopped by Umbra, whose message says why.
    Stopped,
}

/// What is known of a guest that has died. Its text is the page.
pub struct PostMortem<'a> {
    /// The guest's name.
    pub guest: &'a str,
    /// Why it ended, in one line.
    pub message: &'a str,
    /// How it died.
    pub death: Death,
    /// Its processor.
    pub state: &'a ProcessorState,
    /// Its memory.
    pub view: &'a dyn GuestView,
    /// Its last exits.
    pub exits: &'a ExitLog,
}

impl fmt::Display for PostMortem<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let next = Next::of(self.state, self.view);
        writeln!(f, "post-mortem of {}: {}", self.guest, self.message)?;
        writeln!(f, "last exits, the last one last:")?;
        write!(f, "{}", self.exits)?;
        writeln!(f, "registers:")?;
        write!(f, "{}", self.state)?;
        writeln!(f, "page walks:")?;
        let walks = [
            ("rip", Some(self.state.code_address())),
            ("rsp", Some(self.state.stack_address())),
            ("cr2", Some(self.state.control.cr2)),
            ("memory operand", next.operand(self.state)),
        ];
        for (what, address) in walks {
            let Some(address) = address else { continue };
            let inspection = self.view.inspect(address);
            writeln!(f, "  {what} {:#018x}", inspection.gva)?;
            write!(f, "{}", WalkText(&inspection))?;
        }
        instruction(f, &next)?;
        writeln!(f, "why:")?;
        self.reasons(f, &next)
    }
}

impl PostMortem<'_> {
    /// What must have happened by the architecture's rules.
    fn reasons(&self, f: &mut fmt::Formatter<'_>, next: &Next) -> fmt::Result {
        let verdicts = next_instruction(self.state, self.view, next);
        for Verdict { vector, reason } in &verdicts {
            writeln!(f, "  {}: {reason}", name(*vector))?;
        }
        match self.death {
            Death::TripleFault => {
                let mut vectors: Vec<u8> = verdicts.iter().map(|verdict| verdict.vector).collect();
                if vectors.is_empty() {
                    writeln!(
                        f,
                        "  by itself the instruction at rip need not fault: an interrupt or a \
                         trap may have been on its way"
                    )?;
                    vectors.extend([
                        vector::INVALID_OPCODE,
                        vector::GENERAL_PROTECTION,
                        vector::PAGE_FAULT,
                    ]);
                }
                vectors.push(vector::DOUBLE_FAULT);
                vectors.dedup();
                for vector in vectors {
                    writeln!(f, "  {}", delivery(self.state, self.view, vector))?;
                }
                writeln!(
                    f,
                    "  a fault during the delivery of #DF shuts the processor down \
                     (SDM vol. 3A 6.15, \"Interrupt 8\")"
                )
            }
            Death::Halted => writeln!(
                f,
                "  HLT with RFLAGS.IF {}: only an NMI, SMI, INIT or reset ends it \
                 (SDM vol. 2A, \"HLT\")",
                u8::from(self.state.registers.rflags & RFlags::INTERRUPT_FLAG.bits() != 0)
            ),
            Death::Stopped if verdicts.is_empty() => writeln!(
                f,
                "  nothing in the guest's tables makes the instruction at rip fault"
            ),
            Death::Stopped => Ok(()),
        }
    }
}

/// The instruction at RIP, in bytes and in words.
fn instruction(f: &mut fmt::Formatter<'_>, next: &Next) -> fmt::Result {
    write!(f, "instruction:")?;
    let length = next.decoded.map_or(next.available, |decoded| decoded.len());
    for byte in &next.bytes[..length] {
        write!(f, " {byte:02x}")?;
    }
    match &next.decoded {
        Some(decoded) => {
            let mut text = alloc::string::String::new();
            FastFormatter::new().format(decoded, &mut text);
            writeln!(f, "  {text}")
        }
        None if next.available == 0 => writeln!(f, " cannot be read"),
        None => writeln!(f, "  no instruction"),
    }
}
