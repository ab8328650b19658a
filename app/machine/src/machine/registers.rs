//! Model-specific registers: those of the local APIC and its timer, and the policy's for all others.

use umbra_vcpu::event::Exception;

use super::Machine;
use crate::access_log::Sighting;
use crate::devices::local_apic::LocalApic;
use crate::processor::features::Features;
use crate::processor::msr::{ApicMode, MsrAccess, MsrContext, MsrEffect, index};
use crate::processor::paravirtual::Paravirtual;
use crate::time::GuestTime;

impl Machine {
    /// RDMSR.
    ///
    /// # Errors
    /// The exception that the guest gets instead.
    pub fn read_msr(&mut self, number: u32, context: &MsrContext<'_>) -> Result<u64, Exception> {
        let result = match number {
            index::TSC_DEADLINE if self.has_tsc_deadline() => {
                self.advance_to(context);
                Ok(self.processor().local_apic.tsc_deadline())
            }
            index::X2APIC_FIRST..=index::X2APIC_LAST if self.is_x2apic() => {
                let register = (number - index::X2APIC_FIRST) as u16;
                if LocalApic::tells_time(register) {
                    self.advance_to(context);
                }
                let value = self.processor_mut().local_apic.read_msr(register);
                self.update_attention();
                value.map_err(|_| MsrAccess::Refused)
            }
            _ if Paravirtual::has(number) => self.processor().paravirtual.read(number),
            _ => self.processor().msrs.read(number, context),
        };
        result.map_err(|error| self.msr_exception(number, error))
    }

    /// WRMSR.
    ///
    /// # Errors
    /// The exception that the guest gets instead.
    pub fn write_msr(
        &mut self,
        number: u32,
        value: u64,
        context: &MsrContext<'_>,
    ) -> Result<MsrEffect, Exception> {
        let result = match number {
            index::TSC_DEADLINE if self.has_tsc_deadline() => {
                self.advance_to(context);
                self.arm_deadline(value, context.host_counter);
                Ok(MsrEffect::None)
            }
            index::X2APIC_FIRST..=index::X2APIC_LAST if self.is_x2apic() => {
                let register = (number - index::X2APIC_FIRST) as u16;
                if LocalApic::tells_time(register) {
                    self.advance_to(context);
                }
                match self.processor_mut().local_apic.write_msr(register, value) {
                    Ok(effect) => {
                        self.apply(effect);
                        Ok(MsrEffect::None)
                    }
                    Err(_) => Err(MsrAccess::Refused),
                }
            }
            _ if Paravirtual::has(number) => {
                self.advance_to(context);
                self.processor_mut()
                    .paravirtual
                    .write(number, value)
                    .map(|()| MsrEffect::None)
            }
            _ => {
                self.advance_to(context);
                self.processor_mut().msrs.write(number, value, context)
            }
        };
        match result {
            Ok(MsrEffect::ApicMode(mode)) => self.processor_mut().local_apic.set_mode(mode),
            Ok(MsrEffect::TscOffset(_)) => {
                let processor = self.processor_mut();
                processor.paravirtual.counter_jumped();
                // The deadline is a value of the guest's counter, which has just jumped.
                let deadline = processor.local_apic.tsc_deadline();
                self.arm_deadline(deadline, context.host_counter);
            }
            _ => {}
        }
        self.update_controllers();
        result.map_err(|error| self.msr_exception(number, error))
    }

    /// Lets time pass up to the moment of an access that devices see. Every other write may change
    /// what the guest's clocks show, so it comes at its time, too.
    fn advance_to(&mut self, context: &MsrContext<'_>) {
        self.advance(self.time_base.time_at(context.host_counter));
    }

    fn has_tsc_deadline(&self) -> bool {
        self.msrs().features().has(Features::TSC_DEADLINE)
    }

    fn is_x2apic(&self) -> bool {
        self.msrs().apic_base().mode() == ApicMode::X2Apic
    }

    fn arm_deadline(&mut self, deadline: u64, host_counter: u64) {
        let time = self.deadline_time(deadline, host_counter);
        self.processor_mut()
            .local_apic
            .set_tsc_deadline(deadline, time);
    }

    /// When the guest's time-stamp counter reaches `deadline`.
    fn deadline_time(&self, deadline: u64, host_counter: u64) -> GuestTime {
        let guest_counter = host_counter.wrapping_add_signed(self.msrs().tsc_offset());
        let ticks = deadline.saturating_sub(guest_counter);
        if ticks == 0 {
            return self.now;
        }
        self.time_base
            .deadline_at(host_counter.saturating_add(ticks))
    }

    fn msr_exception(&mut self, number: u32, error: MsrAccess) -> Exception {
        if error == MsrAccess::Unknown && self.unknown_msrs.record(number) == Sighting::First {
            log::warn!(
                "the guest uses model-specific register {number:#x}, which it does not have"
            );
        }
        Exception::GENERAL_PROTECTION
    }
}
