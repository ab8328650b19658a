//! The interrupt that brings the run loop back when its time has come: a device's timer, the end of
//! a guest's turn, or the watchdog.
//!
//! Protocol: host interrupts are off while guests run, so that an alarm which goes off between its
//! setting and the entry still waits there and ends the guest's turn at once. The alarm may go off
//! early, for a deadline that has been put off meanwhile; whoever has been interrupted calls
//! [`Alarm::went_off`], and the alarm is set again.

use umbra_vcpu::{TimeSlice, Vcpu};

use crate::platform;

/// The shortest time until an alarm, in microseconds: below it a guest that asks for a fast timer
/// would hardly run itself.
const SHORTEST: u64 = 20;
/// The longest time that the host sleeps, in microseconds.
const LONGEST_SLEEP: u64 = 1_000_000;

/// The next time at which the loop is interrupted.
#[derive(Debug, Default)]
pub struct Alarm {
    /// The value of the host's time-stamp counter, if an alarm is set.
    due: Option<u64>,
}

impl Alarm {
    /// Sees to it that the guest is interrupted when the host's time-stamp counter reaches
    /// `deadline`.
    pub fn limit_turn(&mut self, vcpu: &mut dyn Vcpu, deadline: u64) {
        if self.due.is_some_and(|due| due <= deadline) {
            return;
        }
        let now = platform::timestamp();
        let shortest = platform::ticks_in_microseconds(SHORTEST);
        let ticks = deadline.saturating_sub(now).max(shortest);
        self.due = Some(deadline);
        match vcpu.set_time_slice(Some(ticks)) {
            TimeSlice::Hardware => {}
            TimeSlice::HostTimer => platform::interrupt_after(ticks),
        }
    }

    /// The alarm has gone off, or is another guest's.
    pub fn went_off(&mut self) {
        self.due = None;
    }

    /// Lets the host sleep until an interrupt, at the latest when the host's time-stamp counter
    /// reaches `deadline`.
    pub fn sleep_until(&mut self, deadline: Option<u64>) {
        let now = platform::timestamp();
        let longest = platform::ticks_in_microseconds(LONGEST_SLEEP);
        let ticks = deadline.map_or(longest, |due| due.saturating_sub(now).min(longest));
        self.due = None;
        if ticks != 0 {
            platform::interrupt_after(ticks);
            platform::wait_for_interrupt();
        }
    }
}
