//! Debug registers that the guest shares with a debugger.
//!
//! Protocol: without a debugger's breakpoints the guest's debug registers are the processor's and need no
//! exits. With them every MOV DR exits, the guest's registers are [`Kept`], and the processor has what
//! [`SharedBreakpoints`] makes of both. Its DR6 means nothing then: exits report their own conditions.

use umbra_vcpu::Vcpu;
use umbra_vcpu::debug::{
    DR6_BD, DR6_BS, DR6_HITS, DR7_GD, DebugRegisters, Debugging, ExitingExceptions,
    SharedBreakpoints,
};
use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::exit::Exit;
use x86_64::instructions::interrupts;

use super::{Pending, VmxVcpu};
use crate::bank;
use crate::check::Interruptibility;
use crate::controls::PrimaryControls;
use crate::fields;
use crate::instructions::CurrentVmcs;

/// The guest's debug registers, while the processor's are shared.
#[derive(Debug)]
pub(super) struct Kept {
    registers: DebugRegisters,
    dr6: u64,
    shared: SharedBreakpoints,
}

impl Kept {
    /// DR0 to DR3, DR6 or DR7.
    pub(super) const fn get(&self, number: u8) -> u64 {
        match number {
            6 => self.dr6,
            7 => self.registers.dr7,
            _ => self.registers.addresses[(number & 3) as usize],
        }
    }

    /// Sets DR0 to DR3, DR6 or DR7 to a value with the right fixed bits.
    pub(super) const fn set(&mut self, number: u8, value: u64) {
        match number {
            6 => self.dr6 = value,
            7 => self.registers.dr7 = value,
            _ => self.registers.addresses[(number & 3) as usize] = value,
        }
    }
}

impl VmxVcpu {
    /// Takes over what a debugger wants.
    pub(super) fn change_debugging(&mut self, debugging: &Debugging) {
        let mut control = self.control;
        self.refresh(&mut control);
        self.control = control;
        // The exceptions that exit are written with the control registers.
        self.pending.insert(Pending::CONTROL);
        self.debugging = *debugging;
        if debugging.exceptions == ExitingExceptions::All {
            // A debugger steps: with RFLAGS.TF a shadow would need a pending trap (SDM vol. 3C 27.3.1.5).
            self.interruptibility
                .remove(Interruptibility::STI | Interruptibility::MOV_SS);
        }
        let shares = debugging.has_breakpoints();
        self.primary.set(PrimaryControls::MOV_DR_EXITING, shares);
        let kept = self.kept.take().unwrap_or_else(|| {
            let registers = DebugRegisters {
                addresses: [0, 1, 2, 3].map(|number| self.debug_register(number)),
                dr7: self.debug_register(7),
            };
            Kept {
                registers,
                dr6: self.debug_register(6),
                shared: SharedBreakpoints::new(&registers, debugging),
            }
        });
        if shares {
            self.kept = Some(kept);
            self.share_breakpoints();
        } else {
            self.load_breakpoints(&kept.registers);
            self.set_debug_register(6, kept.dr6);
        }
    }

    /// Gives the processor the breakpoints of both.
    pub(super) fn share_breakpoints(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.shared = SharedBreakpoints::new(&kept.registers, &self.debugging);
            let hardware = kept.shared.hardware;
            self.load_breakpoints(&hardware);
        }
    }

    fn load_breakpoints(&self, registers: &DebugRegisters) {
        interrupts::without_interrupts(|| {
            for (number, &address) in (0..).zip(&registers.addresses) {
                self.core
                    .bank
                    .set_debug_register(&self.bank, number, address);
            }
        });
        self.with_vmcs(|vmcs| vmcs.write(fields::GUEST_DR7, registers.dr7));
    }

    /// What a #DB means that no INT1 has raised. DR6 and DR7 change as by its delivery (SDM vol. 3C 28.1,
    /// vol. 3B 18.2.3 and 18.2.4).
    pub(super) fn debug_exception(&mut self, vmcs: &CurrentVmcs, qualification: u64) -> Exit {
        let exception = Exception::new(vector::DEBUG);
        let Some(kept) = &mut self.kept else {
            bank::report_debug_conditions(qualification);
            let dr7 = vmcs.read(fields::GUEST_DR7);
            vmcs.write(fields::GUEST_DR7, dr7 & !DR7_GD);
            return Exit::Exception(exception);
        };
        let hits = kept.shared.split(qualification);
        let conditions = qualification & !DR6_HITS | hits.guest;
        let is_guests = conditions & (DR6_HITS | DR6_BD | DR6_BS) != 0;
        if is_guests || hits.debugger == 0 {
            kept.dr6 = bank::with_debug_conditions(kept.dr6, conditions);
        }
        if hits.debugger == 0 {
            return Exit::Exception(exception);
        }
        Exit::Breakpoint {
            hits: hits.debugger,
            exception: is_guests.then_some(exception),
        }
    }
}
