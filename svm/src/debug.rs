//! A guest's debug registers in the processor.
//!
//! Every MOV DR exits and is carried out by the driver. The processor's own DR0 to DR3 are loaded only
//! for entries with a breakpoint enabled; DR6 and DR7 are in the VMCB. While a debugger has
//! breakpoints, the VMCB's B0 to B3 are those of the last exit, and the guest's are kept apart.

use core::arch::asm;

use umbra_vcpu::address::Gva;
use umbra_vcpu::debug::{
    DR6_BS, DR6_HITS, DR7_GD, DR7_RESET, DebugRegisters, Debugging, ExitingExceptions,
    SharedBreakpoints,
};
use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::exit::Exit;
use x86_64::registers::rflags::RFlags;

use crate::vcpu::SvmVcpu;
use crate::vmcb::Intercepts3;

/// Debug registers as the guest has them, and as the processor gets them.
pub struct Debug {
    /// The guest's DR0 to DR3 and DR7.
    guest: DebugRegisters,
    /// B0 to B3 of the guest's DR6, while a debugger has breakpoints.
    guest_hits: u64,
    debugging: Debugging,
    shared: SharedBreakpoints,
}

impl Debug {
    /// After reset, without a debugger.
    pub fn new() -> Self {
        let guest = DebugRegisters::RESET;
        Self {
            guest,
            guest_hits: 0,
            debugging: Debugging::default(),
            shared: SharedBreakpoints::new(&guest, &Debugging::default()),
        }
    }

    /// What the processor's DR0 to DR3 and DR7 must hold.
    pub const fn hardware(&self) -> &DebugRegisters {
        &self.shared.hardware
    }

    /// The guest's DR0 to DR3 and DR7.
    pub const fn guest(&self) -> &DebugRegisters {
        &self.guest
    }

    /// The exceptions that exit for the debugger.
    pub const fn exceptions(&self) -> ExitingExceptions {
        self.debugging.exceptions
    }
}

impl SvmVcpu {
    /// The guest's DR6.
    pub(crate) fn dr6(&self) -> u64 {
        let dr6 = self.vmcb().save.dr6;
        if self.debug.debugging.has_breakpoints() {
            dr6 & !DR6_HITS | self.debug.guest_hits
        } else {
            dr6
        }
    }

    /// Sets the guest's DR6, with its fixed bits.
    pub(crate) fn set_dr6(&mut self, value: u64) {
        let mut value = value;
        if self.debug.debugging.has_breakpoints() {
            self.debug.guest_hits = value & DR6_HITS;
            value &= !DR6_HITS;
        }
        self.vmcb_mut().save.dr6 = value;
    }

    /// Lets `change` change the guest's DR0 to DR3 and DR7.
    pub(crate) fn change_debug_registers<T>(
        &mut self,
        change: impl FnOnce(&mut DebugRegisters) -> T,
    ) -> T {
        let debug = &mut self.debug;
        let result = change(&mut debug.guest);
        debug.shared = SharedBreakpoints::new(&debug.guest, &debug.debugging);
        result
    }

    /// Takes over what a debugger wants.
    pub(crate) fn change_debugging(&mut self, debugging: &Debugging) {
        let dr6 = self.dr6();
        self.debug.debugging = *debugging;
        self.change_debug_registers(|_| ());
        self.set_dr6(dr6);
        // Some emulators take INT3 for an INT n.
        self.vmcb_mut()
            .control
            .intercepts3
            .set(Intercepts3::INTN, debugging.exceptions.include_int3());
        self.usual_events = false;
    }

    /// What an intercepted #DB is to the caller.
    pub(crate) fn debug_exception(&mut self) -> Exit {
        let exception = Exception::new(vector::DEBUG);
        if !self.debug.debugging.has_breakpoints() {
            return Exit::Exception(exception);
        }
        let dr6 = self.vmcb().save.dr6;
        let hits = self.debug.shared.split(dr6);
        self.vmcb_mut().save.dr6 &= !DR6_HITS;
        if hits.guest != 0 {
            self.debug.guest_hits = hits.guest;
        }
        if hits.debugger == 0 {
            return Exit::Exception(exception);
        }
        let steps = self.registers.rflags & RFlags::TRAP_FLAG.bits() != 0;
        let is_guests = hits.guest != 0 || dr6 & DR6_BS != 0 && steps;
        Exit::Breakpoint {
            hits: hits.debugger,
            exception: is_guests.then_some(exception),
        }
    }
}

/// The longest range that a breakpoint covers, in bytes.
const LONGEST: u64 = 8;

/// DR7 for the hardware: without GD, and without breakpoints that would hit the host's code or
/// stack in `forbidden` between the loading of DR7 and VMRUN.
pub fn hardware_dr7(registers: &DebugRegisters, forbidden: &[(Gva, Gva)]) -> u64 {
    let mut allowed = *registers;
    allowed.dr7 &= !DR7_GD;
    for (index, &address) in registers.addresses.iter().enumerate() {
        let first = address & !(LONGEST - 1);
        let hits = forbidden.iter().any(|(start, end)| {
            first < end.as_u64() && start.as_u64() < first.saturating_add(LONGEST)
        });
        if hits {
            allowed.disable(index);
        }
    }
    if allowed.is_armed() {
        allowed.dr7
    } else {
        DR7_RESET
    }
}

/// Loads DR0 to DR3.
///
/// # Safety
/// Ring 0, with no breakpoint of the host enabled.
pub unsafe fn load_addresses(registers: &DebugRegisters) {
    let [first, second, third, fourth] = registers.addresses;
    // SAFETY: without an enabled breakpoint these registers have no effect.
    unsafe {
        asm!(
            "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
            in(reg) first, in(reg) second, in(reg) third, in(reg) fourth,
            options(nomem, nostack, preserves_flags)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_on_the_host_are_left_out() {
        let mut registers = DebugRegisters::RESET;
        registers.addresses = [0x1000, 0x2ffe, 0x4000, 0x5000];
        registers.dr7 = DR7_RESET | DR7_GD | 0b0101_0101;
        let host = [
            (Gva::new(0x3000 - 4), Gva::new(0x3100)),
            (Gva::new(0x5000), Gva::new(0x5001)),
        ];
        assert_eq!(hardware_dr7(&registers, &host), DR7_RESET | 0b0001_0001);
        registers.dr7 = DR7_RESET | 0b0100;
        assert_eq!(hardware_dr7(&registers, &host), DR7_RESET);
    }
}
