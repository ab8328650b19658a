//! Several guests on one processor: each runs its turn, in the order of their names on the command
//! line, until its time slice ends, another guest's timer is due, or it waits for an interrupt.
//!
//! A guest that ends is dropped with all that it held, then reported, then started again if its
//! options say so; the others go on. The processor sleeps only when every guest waits. The
//! terminal's input is for the first guest.

use alloc::vec::Vec;

use umbra_report::{ExitCode, Report};

use crate::alarm::Alarm;
use crate::guest::{Guest, Halted, Turn};
use crate::launch::Launcher;
use crate::{platform, post_mortem, pressure};

/// A guest's time slice in microseconds.
const TIME_SLICE: u64 = 10_000;

/// The guests that run.
pub struct Schedule<'a> {
    launcher: &'a Launcher<'a>,
    running: Vec<Running>,
    exit_code: ExitCode,
}

/// A guest in one of its runs.
struct Running {
    guest: Guest,
    /// Its place in the options.
    index: usize,
    /// Which of its runs this is, from 1.
    run: u64,
}

impl<'a> Schedule<'a> {
    /// Starts every guest.
    pub fn start(launcher: &'a Launcher<'a>) -> Self {
        let mut schedule = Self {
            launcher,
            running: Vec::new(),
            exit_code: ExitCode::Success,
        };
        for index in 0..launcher.guests() {
            if let Some(running) = schedule.launch(index, 1) {
                schedule.running.push(running);
            }
        }
        schedule
    }

    /// Runs all guests to their ends, and returns the exit code of the first that failed.
    pub fn run(mut self) -> ExitCode {
        platform::hold_interrupts();
        let mut alarm = Alarm::default();
        while !self.running.is_empty() {
            let mut everyone_waits = true;
            let mut place = 0;
            self.deliver_input();
            while place < self.running.len() {
                let until = self.end_of_turn(place);
                alarm.went_off();
                let running = &mut self.running[place];
                match running.guest.turn(&mut alarm, until) {
                    Turn::Over => everyone_waits = false,
                    Turn::Waiting => {}
                    Turn::Ended(end) => {
                        everyone_waits = false;
                        let Running { guest, index, run } = self.running.remove(place);
                        let post_mortem = post_mortem::page(&guest, &end);
                        let report = guest.finish(end);
                        if let Some(page) = post_mortem {
                            platform::write_console(page.as_bytes());
                        }
                        if let Some(next) = self.ended(report, index, run) {
                            self.running.insert(place, next);
                        }
                        continue;
                    }
                }
                place += 1;
            }
            if everyone_waits {
                let deadlines = self.running.iter();
                let deadlines = deadlines.filter_map(|running| running.guest.next_deadline());
                alarm.sleep_until(deadlines.min());
            }
        }
        platform::release_interrupts();
        self.exit_code
    }

    /// Reports a run that has ended, and starts the next one of the same guest, if there is one.
    fn ended(&mut self, report: Report, index: usize, run: u64) -> Option<Running> {
        let is_last = run >= self.launcher.runs(index) || report.exit_code != ExitCode::Success;
        self.report(report, run);
        if is_last {
            None
        } else {
            self.launch(index, run + 1)
        }
    }

    fn launch(&mut self, index: usize, run: u64) -> Option<Running> {
        match self.launcher.prepare(index) {
            Ok(guest) => Some(Running { guest, index, run }),
            Err(report) => {
                hermit::println!("umbra: {}", report.message);
                self.report(report, run);
                None
            }
        }
    }

    fn report(&mut self, report: Report, run: u64) {
        let report = Report {
            run,
            heap: pressure::heap_counters(),
            ..report
        };
        hermit::println!("{}", report.line());
        if self.exit_code == ExitCode::Success {
            self.exit_code = report.exit_code;
        }
    }

    /// The host's time-stamp counter at which the turn of the guest in this place ends at the latest.
    fn end_of_turn(&self, place: usize) -> u64 {
        let others = self.running.iter().enumerate();
        let waiting = others
            .filter(|(other, running)| *other != place && running.guest.halted == Halted::Yes);
        let deadlines = waiting.filter_map(|(_, running)| running.guest.next_deadline());
        let slice = platform::ticks_in_microseconds(TIME_SLICE);
        deadlines.fold(platform::timestamp().saturating_add(slice), u64::min)
    }

    /// Hands over what was typed.
    fn deliver_input(&mut self) {
        while let Some(byte) = platform::read_console() {
            if let Some(running) = self.running.first_mut() {
                running.guest.machine.receive(byte);
            }
        }
    }
}
