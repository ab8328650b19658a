//! Breakpoints and watchpoints: INT3 in the guest's code, and the processor's debug registers.
//!
//! Protocol: what is set here takes effect with [`apply`], before the guest goes on. An INT3 exits
//! wherever it is executed, at every privilege level and in every mode; the run loop shows the exit to
//! [`software_hit`]. What is no breakpoint of the debugger's is the guest's own INT3.

use alloc::vec::Vec;

use gdbstub::target::TargetResult;
use gdbstub::target::ext::breakpoints::{
    Breakpoints, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use umbra_inspect::{GuestView, ProcessorState};
use umbra_mmu::GuestEnd;
use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::debug::{
    Breakpoint, BreakpointKind, BreakpointLength, Debugging, ExitingExceptions,
};

use crate::guest::Guest;

const INT3: u8 = 0xcc;

/// Everything at which the debugger wants the guest to stop.
#[derive(Debug, Default)]
pub struct Placed {
    bytes: Vec<CodeByte>,
    registers: [Option<Watched>; 4],
}

/// An INT3 in the guest's code.
#[derive(Clone, Copy, Debug)]
struct CodeByte {
    address: Gva,
    /// Where it was when it was set.
    at: Gpa,
    /// What was there.
    original: u8,
}

/// One of the processor's breakpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watched {
    breakpoint: Breakpoint,
    wish: Wish,
}

/// What GDB has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// A software breakpoint, where no code is yet.
    Software,
    Hardware,
    /// A watchpoint: its address, its length and its kind.
    Watch(u64, u64, WatchKind),
}

/// Which of GDB's stops a breakpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A software breakpoint.
    Software,
    /// A hardware breakpoint.
    Hardware,
    /// A watchpoint of this kind at this address.
    Watch(WatchKind, u64),
}

impl Placed {
    /// What the processor must do for the breakpoints, and for a step that ends at `landing`.
    pub fn debugging(&self, exceptions: ExitingExceptions, landing: Option<Gva>) -> Debugging {
        let mut breakpoints = self.registers.map(|watched| Some(watched?.breakpoint));
        if let Some(address) = landing {
            // With four breakpoints of its own, the last one makes room: only a delivery happens meanwhile.
            let free = breakpoints.iter().position(Option::is_none);
            breakpoints[free.unwrap_or(LAST)] = Some(Breakpoint {
                address,
                kind: BreakpointKind::Execute,
            });
        }
        let exceptions = match exceptions {
            ExitingExceptions::None if !self.bytes.is_empty() => ExitingExceptions::Int3,
            other => other,
        };
        Debugging {
            breakpoints,
            exceptions,
        }
    }

    /// Which stop the processor's breakpoints in `hits` are; `None` if they are none of GDB's.
    pub fn hardware_hit(&self, hits: u8) -> Option<Stop> {
        let hit = |(index, watched): (usize, &Option<Watched>)| {
            (*watched).filter(|_| hits >> index & 1 != 0)
        };
        let watched = self.registers.iter().enumerate().find_map(hit)?;
        Some(match watched.wish {
            Wish::Software => Stop::Software,
            Wish::Hardware => Stop::Hardware,
            Wish::Watch(address, _, kind) => Stop::Watch(kind, address),
        })
    }

    /// Puts a breakpoint into a register; `None` if there is none free.
    fn place(&mut self, breakpoint: Breakpoint, wish: Wish) -> Option<()> {
        let free = self.registers.iter_mut().find(|slot| slot.is_none())?;
        *free = Some(Watched { breakpoint, wish });
        Some(())
    }

    /// Takes all breakpoints of this wish out of the registers; `None` if there was none.
    fn displace(&mut self, wish: Wish, at: Option<u64>) -> Option<()> {
        let mut found = None;
        for slot in &mut self.registers {
            let matches = slot.is_some_and(|watched| {
                watched.wish == wish
                    && at.is_none_or(|at| watched.breakpoint.address.as_u64() == at)
            });
            if matches {
                *slot = None;
                found = Some(());
            }
        }
        found
    }
}

const LAST: usize = 3;

/// Whether INT3 at the instruction pointer is the debugger's: by its linear address or, where the same code
/// is mapped twice, by its place in memory.
pub fn software_hit(guest: &Guest) -> bool {
    let Some(debugged) = &guest.debugged else {
        return false;
    };
    let address = ProcessorState::of(&*guest.vcpu).code_address();
    let place = physical(guest, address);
    debugged
        .placed
        .bytes
        .iter()
        .any(|byte| byte.address == address || Some(byte.at) == place)
}

/// Whether a breakpoint is at the instruction pointer, for an instruction that is not left to the processor.
pub fn stop_at(guest: &Guest) -> Option<Stop> {
    let debugged = guest.debugged.as_ref()?;
    let address = ProcessorState::of(&*guest.vcpu).code_address();
    let is_here = |watched: &Watched| {
        let breakpoint = watched.breakpoint;
        breakpoint.kind == BreakpointKind::Execute && breakpoint.address == address
    };
    let mut registers = debugged.placed.registers.iter().enumerate();
    let here = registers.find(|(_, slot)| slot.as_ref().is_some_and(is_here));
    if let Some((index, _)) = here {
        return debugged.placed.hardware_hit(1 << index);
    }
    software_hit(guest).then_some(Stop::Software)
}

/// Takes all breakpoints out of the guest.
pub fn remove_all(guest: &mut Guest) {
    let Some(debugged) = &mut guest.debugged else {
        return;
    };
    let placed = core::mem::take(&mut debugged.placed);
    for byte in placed.bytes {
        restore(guest, &byte);
    }
}

/// Puts back what was in the place of an INT3, if the guest has not written something else there meanwhile.
fn restore(guest: &Guest, byte: &CodeByte) -> bool {
    let mut now = [0];
    guest.paging.read_ram(byte.at, &mut now);
    now != [INT3] || guest.paging.write_ram(byte.at, &[byte.original]).is_ok()
}

/// Where an address is in the guest's RAM.
pub fn physical(guest: &Guest, address: Gva) -> Option<Gpa> {
    match guest.paging.inspect(address).guest_end {
        GuestEnd::Page { gpa, .. } | GuestEnd::Unpaged { gpa } => {
            guest.paging.is_ram(gpa, 1).then_some(gpa)
        }
        _ => None,
    }
}

impl Breakpoints for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let place = physical(self, Gva::new(address));
        let mut original = [0];
        if let Some(at) = place {
            self.paging.read_ram(at, &mut original);
        }
        let Some(debugged) = &mut self.debugged else {
            return Ok(false);
        };
        let placed = &mut debugged.placed;
        let Some(at) = place else {
            // The code comes later, or its mapping does.
            return Ok(placed.place(execute(address), Wish::Software).is_some());
        };
        if placed.bytes.try_reserve(1).is_err() || self.paging.write_ram(at, &[INT3]).is_err() {
            return Ok(false);
        }
        placed.bytes.push(CodeByte {
            address: Gva::new(address),
            at,
            original: original[0],
        });
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let Some(debugged) = &mut self.debugged else {
            return Ok(false);
        };
        let placed = &mut debugged.placed;
        let mut bytes = placed.bytes.iter();
        let Some(index) = bytes.position(|byte| byte.address.as_u64() == address) else {
            return Ok(placed.displace(Wish::Software, Some(address)).is_some());
        };
        let byte = placed.bytes.remove(index);
        Ok(restore(self, &byte))
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let Some(debugged) = &mut self.debugged else {
            return Ok(false);
        };
        let placed = debugged.placed.place(execute(address), Wish::Hardware);
        Ok(placed.is_some())
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let Some(debugged) = &mut self.debugged else {
            return Ok(false);
        };
        let displaced = debugged.placed.displace(Wish::Hardware, Some(address));
        Ok(displaced.is_some())
    }
}

impl HwWatchpoint for Guest {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let Some(debugged) = &mut self.debugged else {
            return Ok(false);
        };
        let before = debugged.placed.registers;
        let wish = Wish::Watch(address, length, kind);
        let mut done = 0;
        while done < length {
            let part = Gva::new(address.wrapping_add(done));
            let size = BreakpointLength::longest(part, length - done);
            let breakpoint = Breakpoint {
                address: part,
                kind: match kind {
                    WatchKind::Write => BreakpointKind::Write(size),
                    // No processor stops for reads alone; GDB leaves out the hits that changed the value.
                    WatchKind::Read | WatchKind::ReadWrite => BreakpointKind::Access(size),
                },
            };
            if debugged.placed.place(breakpoint, wish).is_none() {
                debugged.placed.registers = before;
                return Ok(false);
            }
            done += size.bytes();
        }
        Ok(true)
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let Some(debugged) = &mut self.debugged else {
            return Ok(false);
        };
        let wish = Wish::Watch(address, length, kind);
        Ok(debugged.placed.displace(wish, None).is_some())
    }
}

const fn execute(address: u64) -> Breakpoint {
    Breakpoint {
        address: Gva::new(address),
        kind: BreakpointKind::Execute,
    }
}
