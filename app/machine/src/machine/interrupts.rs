//! Time and interrupt lines.
//!
//! Each ISA line goes to the i8259 pair and to the I/O APIC at once, as on a PC: whoever is not
//! masked takes it. The pair's output reaches the processor through LINT0 of the local APIC or input 0
//! of the I/O APIC, and straight if the local APIC is disabled.

use super::processors::{Processor, Reception};
use super::{Attention, Machine, ProcessorNumber, ProcessorSet, Shutdown};
use crate::devices::local_apic::{Destination, Message, delivery};
use crate::devices::{Level, io_apic, pic, pit, power_management, rtc, serial, test_device};
use crate::processor::msr::ApicMode;
use crate::time::GuestTime;

impl Machine {
    /// Lets time pass up to `now`; an earlier time than the last is that of the last.
    pub fn advance(&mut self, now: GuestTime) {
        self.now = self.now.max(now);
        self.touch_timers();
        self.pit.advance(self.now);
        self.pit_output = self.pit.output();
        self.rtc.advance(self.now);
        self.power_management.advance(self.now);
        for processor in &mut self.processors {
            processor.local_apic.advance(self.now);
        }
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
        let local = self.processors.iter();
        let local = local.filter_map(|processor| processor.local_apic.next_deadline());
        [pit, rtc, power_management]
            .into_iter()
            .flatten()
            .chain(local)
            .min()
    }

    /// Whether an interrupt waits for the served processor.
    #[inline]
    pub fn pending_interrupt(&self) -> bool {
        self.processor().interrupt_pending
    }

    /// Hands the interrupt over: the vector that the guest takes now.
    pub fn acknowledge_interrupt(&mut self) -> Option<u8> {
        if self.processor().waits_for_startup() {
            return None;
        }
        let vector = if self.external_interrupt(self.processor()) {
            Some(self.pic.acknowledge())
        } else {
            self.processor_mut().local_apic.acknowledge()
        };
        self.update_controllers();
        vector
    }

    /// Whether a non-maskable interrupt came since the last call.
    pub fn take_nmi(&mut self) -> bool {
        let nmi = self.processor_mut().local_apic.take_nmi();
        if nmi {
            self.update_attention();
        }
        nmi
    }

    /// CR8 as the guest reads it: the local APIC's task priority.
    pub fn task_priority(&self) -> u64 {
        self.processor().local_apic.task_priority_class().into()
    }

    /// MOV to CR8; bits above the fourth were refused before.
    pub fn set_task_priority(&mut self, cr8: u64) {
        self.processor_mut()
            .local_apic
            .set_task_priority_class((cr8 & 0xf) as u8);
        self.update_attention();
    }

    /// Finds out anew whether anything waits for the run loop of the served processor, after what can
    /// have changed that for no other.
    pub(super) fn update_attention(&mut self) {
        self.update_attention_of(self.served);
    }

    /// Finds out anew for which processors anything waits. Whatever can change that for more than the
    /// served one ends here.
    pub(super) fn update_processors(&mut self) {
        for number in ProcessorNumber::first(self.processors()) {
            let before = self.processors[number.index()].attention;
            let after = self.update_attention_of(number);
            if number != self.served && (before, after) == (Attention::NotWanted, Attention::Wanted)
            {
                self.kicks.insert(number);
            }
        }
    }

    fn update_attention_of(&mut self, number: ProcessorNumber) -> Attention {
        let processor = &self.processors[number.index()];
        let waits = processor.waits_for_startup();
        let pending = !waits
            && (self.external_interrupt(processor) || processor.local_apic.pending().is_some());
        let nmi = !waits && processor.local_apic.has_nmi();
        let wanted = pending || nmi || processor.has_startup() || self.shutdown.is_some();
        let attention = if wanted {
            Attention::Wanted
        } else {
            Attention::NotWanted
        };
        let processor = &mut self.processors[number.index()];
        processor.interrupt_pending = pending;
        processor.attention = attention;
        attention
    }

    /// Carries the devices' outputs to the interrupt controllers, and theirs to the processors.
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
        self.update_processors();
    }

    /// Carries the interrupt controllers' outputs to the processors: all there is to do after an access
    /// to one of them, which changes no device's output.
    pub(super) fn update_controllers(&mut self) {
        self.deliver_tick();
        self.update_processors();
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
    /// Returns whether it did.
    #[inline]
    pub(super) fn deliver_tick(&mut self) -> bool {
        self.pit.has_rises() && self.deliver_rise()
    }

    fn deliver_rise(&mut self) -> bool {
        if self.is_tick_waiting() || !self.pit.take_rise() {
            return false;
        }
        if !self.is_unmasked(pit::IRQ) {
            self.pit.forget_rises();
        }
        self.set_line(pit::IRQ, Level::Low);
        self.set_line(pit::IRQ, Level::High);
        true
    }

    /// Whether no processor has yet taken the interval timer's last interrupt.
    fn is_tick_waiting(&self) -> bool {
        let at_pic = self.pic.is_unmasked(pit::IRQ)
            && self.is_pic_wired()
            && self.pic.is_requested(pit::IRQ);
        let vector = self.io_apic.vector(io_apic_input(pit::IRQ));
        let at_apic = |vector| {
            let mut processors = self.processors.iter();
            processors.any(|processor| processor.local_apic.is_requested(vector))
        };
        at_pic || vector.is_some_and(at_apic)
    }

    pub(super) fn send(&mut self, message: Option<Message>) {
        let Some(message) = message else {
            return;
        };
        for number in self.receivers(&message).iter() {
            let reception = self.processors[number.index()].receive(&message);
            if number == ProcessorNumber::BOOT && message.delivery == delivery::INIT {
                // It would begin at the reset vector.
                self.shutdown = self.shutdown.or(Some(Shutdown::Reset));
            }
            if reception == Reception::Urgent && number != self.served {
                self.kicks.insert(number);
            }
        }
    }

    /// Whom a message reaches. The served processor is the sender, if one is.
    fn receivers(&self, message: &Message) -> ProcessorSet {
        let is_receiver = |processor: &&Processor| match message.destination {
            Destination::All => true,
            Destination::Myself => processor.number == self.served,
            Destination::Others => processor.number != self.served,
            Destination::Physical(_) | Destination::Logical(_) => {
                processor.local_apic.is_addressed(message.destination)
            }
        };
        let receivers = self.processors.iter().filter(is_receiver);
        if message.delivery == delivery::LOWEST_PRIORITY {
            let least_busy = receivers
                .filter(|processor| processor.local_apic.accepts_interrupts())
                .min_by_key(|processor| processor.local_apic.processor_priority());
            return least_busy
                .map(|processor| processor.number)
                .into_iter()
                .collect();
        }
        receivers.map(|processor| processor.number).collect()
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

    /// Whether a line can interrupt a processor by either way.
    fn is_unmasked(&self, irq: u8) -> bool {
        self.pic.is_unmasked(irq) && self.is_pic_wired()
            || self.io_apic.is_unmasked(io_apic_input(irq))
    }

    /// Whether the i8259 pair's request reaches this processor.
    fn external_interrupt(&self, processor: &Processor) -> bool {
        self.pic.is_pending() && self.is_pic_wired_to(processor)
    }

    /// Whether the i8259 pair's output is connected to any processor.
    fn is_pic_wired(&self) -> bool {
        let mut processors = self.processors.iter();
        processors.any(|processor| self.is_pic_wired_to(processor))
    }

    /// Whether the i8259 pair's output is connected to this processor.
    fn is_pic_wired_to(&self, processor: &Processor) -> bool {
        let apic = &processor.local_apic;
        processor.msrs.apic_base().mode() == ApicMode::Disabled
            || apic.passes_ext_int()
            || (self.io_apic.external_interrupt()).is_some_and(|destination| {
                destination == Destination::All || apic.is_addressed(destination)
            })
    }
}

const fn io_apic_input(irq: u8) -> usize {
    match irq {
        pit::IRQ => io_apic::TIMER_INPUT as usize,
        _ => irq as usize,
    }
}
