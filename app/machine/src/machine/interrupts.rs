//! Time and interrupt lines.
//!
//! Each ISA line goes to the i8259 pair and to the I/O APIC at once, as on a PC: whoever is not
//! masked takes it. The pair's output reaches the processor through LINT0 of the local APIC or input 0
//! of the I/O APIC, and straight if the local APIC is disabled.

use super::{Attention, Machine, Shutdown, Timers};
use crate::devices::{
    Level, io_apic, local_apic, pic, pit, power_management, rtc, serial, test_device,
};
use crate::processor::msr::ApicMode;
use crate::time::GuestTime;

impl Machine {
    /// Lets time pass up to `now`; an earlier time than the last is that of the last.
    pub fn advance(&mut self, now: GuestTime) {
        self.now = self.now.max(now);
        self.timers = Timers::Touched;
        self.pit.advance(self.now);
        self.pit_output = self.pit.output();
        self.rtc.advance(self.now);
        self.power_management.advance(self.now);
        self.local_apic.advance(self.now);
        self.update_lines();
    }

    /// When the machine must be advanced again though the guest does not touch it: the next time at
    /// which a device that is not masked may interrupt.
    pub fn next_deadline(&self) -> Option<GuestTime> {
        let pit = self
            .pit
            .next_deadline()
            .filter(|_| self.is_unmasked(pit::IRQ));
        let rtc = self
            .rtc
            .next_deadline()
            .filter(|_| self.is_unmasked(rtc::IRQ));
        let power_management = self
            .power_management
            .next_deadline()
            .filter(|_| self.is_unmasked(power_management::IRQ));
        let local = self.local_apic.next_deadline();
        [pit, rtc, power_management, local]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether an interrupt waits for the guest.
    pub const fn pending_interrupt(&self) -> bool {
        self.interrupt_pending
    }

    /// Hands the interrupt over: the vector that the guest takes now.
    pub fn acknowledge_interrupt(&mut self) -> Option<u8> {
        let vector = if self.external_interrupt() {
            Some(self.pic.acknowledge())
        } else {
            self.local_apic.acknowledge()
        };
        self.update_controllers();
        vector
    }

    /// Whether a non-maskable interrupt came since the last call.
    pub fn take_nmi(&mut self) -> bool {
        let nmi = self.local_apic.take_nmi();
        if nmi {
            self.update_attention();
        }
        nmi
    }

    /// CR8 as the guest reads it: the local APIC's task priority.
    pub const fn task_priority(&self) -> u64 {
        self.local_apic.task_priority_class() as u64
    }

    /// MOV to CR8; bits above the fourth were refused before.
    pub fn set_task_priority(&mut self, cr8: u64) {
        self.local_apic.set_task_priority_class((cr8 & 0xf) as u8);
        self.update_attention();
    }

    /// Finds out anew whether anything waits for the run loop. Whatever can change that ends here.
    pub(super) fn update_attention(&mut self) {
        self.interrupt_pending = self.external_interrupt() || self.local_apic.pending().is_some();
        let wanted = self.interrupt_pending || self.shutdown.is_some() || self.local_apic.has_nmi();
        self.attention = if wanted {
            Attention::Wanted
        } else {
            Attention::NotWanted
        };
    }

    /// Carries the devices' outputs to the interrupt controllers, and theirs to the processor.
    pub(super) fn update_lines(&mut self) {
        self.deliver_tick();
        for (irq, level) in [
            (pit::IRQ, self.pit_output),
            (serial::IRQ, self.serial.interrupt()),
            (rtc::IRQ, self.rtc.interrupt()),
            (power_management::IRQ, self.power_management.interrupt()),
        ] {
            let level = Level::high_if(level.is_high() || self.test_line(irq).is_high());
            // The controllers only look at changes: most accesses change no line.
            if (self.high_lines >> irq & 1 != 0) != level.is_high() {
                self.set_line(irq, level);
            }
        }
        self.update_test_lines();
        self.update_processor();
    }

    /// Carries the interrupt controllers' outputs to the processor: all there is to do after an access
    /// to one of them, which changes no device's output.
    pub(super) fn update_controllers(&mut self) {
        self.deliver_tick();
        self.update_processor();
    }

    fn update_processor(&mut self) {
        if self.local_apic.take_init() {
            // Nobody could start the only processor again.
            self.end(Some(Shutdown::Reset));
        }
        self.update_attention();
    }

    fn test_line(&self, irq: u8) -> Level {
        self.test_device
            .as_ref()
            .map_or(Level::Low, |device| device.line(irq))
    }

    /// The test device's lines that no other device shares. The pair has inputs for the first 16.
    fn update_test_lines(&mut self) {
        if self.test_device.is_none() {
            return;
        }
        for irq in 0..test_device::LINES as u8 {
            let level = self.test_line(irq);
            match irq {
                pit::IRQ | serial::IRQ | rtc::IRQ | power_management::IRQ | pic::CASCADE => {}
                0..pic::INPUTS => self.set_line(irq, level),
                _ => {
                    let message = self.io_apic.set_line(irq.into(), level);
                    self.send(message);
                }
            }
        }
    }

    /// Passes a rise of the interval timer's output on. Guests count time by these ticks, and a host
    /// that pauses lets several come due at once, so each waits until the last was taken.
    fn deliver_tick(&mut self) {
        if !self.pit.has_rises() || self.is_tick_waiting() || !self.pit.take_rise() {
            return;
        }
        if !self.is_unmasked(pit::IRQ) {
            self.pit.forget_rises();
        }
        self.set_line(pit::IRQ, Level::Low);
        self.set_line(pit::IRQ, Level::High);
    }

    /// Whether the processor has not yet taken the interval timer's last interrupt.
    fn is_tick_waiting(&self) -> bool {
        let at_pic = self.pic.is_unmasked(pit::IRQ)
            && self.is_pic_wired()
            && self.pic.is_requested(pit::IRQ);
        let vector = self.io_apic.vector(io_apic_input(pit::IRQ));
        at_pic || vector.is_some_and(|vector| self.local_apic.is_requested(vector))
    }

    pub(super) fn send(&mut self, message: Option<local_apic::Message>) {
        if let Some(message) = message {
            self.local_apic.receive(&message);
        }
    }

    fn set_line(&mut self, irq: u8, level: Level) {
        let bit = 1 << irq;
        self.high_lines = if level.is_high() {
            self.high_lines | bit
        } else {
            self.high_lines & !bit
        };
        self.pic.set_line(irq, level);
        let message = self.io_apic.set_line(io_apic_input(irq), level);
        self.send(message);
    }

    /// Whether a line can interrupt the processor by either way.
    fn is_unmasked(&self, irq: u8) -> bool {
        self.pic.is_unmasked(irq) && self.is_pic_wired()
            || self.io_apic.is_unmasked(io_apic_input(irq))
    }

    /// Whether the i8259 pair's request reaches the processor.
    fn external_interrupt(&self) -> bool {
        self.pic.is_pending() && self.is_pic_wired()
    }

    /// Whether the i8259 pair's output is connected to the processor.
    fn is_pic_wired(&self) -> bool {
        self.msrs.apic_base().mode() == ApicMode::Disabled
            || self.local_apic.passes_ext_int()
            || self.io_apic.passes_ext_int()
    }
}

const fn io_apic_input(irq: u8) -> usize {
    match irq {
        pit::IRQ => io_apic::TIMER_INPUT as usize,
        _ => irq as usize,
    }
}
