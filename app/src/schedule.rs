//! Several guests on one processor: each runs its turn, in the order of their names on the command
//! line, until its time slice ends or it waits for an interrupt.
//!
//! A guest that ends is reported at once and dropped with all that it held, and the others go on. The
//! processor sleeps only when every guest waits.

use alloc::vec::Vec;

use umbra_report::{ExitCode, Report};

use crate::guest::{Guest, TICK_MICROSECONDS, Turn};
use crate::platform;

/// The guests that run.
pub struct Schedule {
    guests: Vec<Guest>,
    exit_code: ExitCode,
}

impl Schedule {
    /// No guest yet.
    pub const fn new() -> Self {
        Self {
            guests: Vec::new(),
            exit_code: ExitCode::Success,
        }
    }

    /// Lets one more guest run.
    pub fn add(&mut self, guest: Guest) {
        self.guests.push(guest);
    }

    /// Prints the report of a guest that has ended. The first failure's exit code is the image's.
    pub fn report(&mut self, report: &Report) {
        hermit::println!("{}", report.line());
        if self.exit_code == ExitCode::Success {
            self.exit_code = report.exit_code;
        }
    }

    /// Runs all guests to their ends.
    pub fn run(mut self) -> ExitCode {
        platform::interrupt_every(TICK_MICROSECONDS);
        while !self.guests.is_empty() {
            let mut everyone_waits = true;
            let mut index = 0;
            while let Some(guest) = self.guests.get_mut(index) {
                match guest.turn() {
                    Turn::Over => everyone_waits = false,
                    Turn::Waiting => {}
                    Turn::Ended(end) => {
                        everyone_waits = false;
                        let report = self.guests.remove(index).finish(end);
                        self.report(&report);
                        continue;
                    }
                }
                index += 1;
            }
            if everyone_waits {
                platform::wait_for_interrupt();
            }
        }
        self.exit_code
    }
}
