//! Several guests on one processor: each runs its turn, in the order of their names on the command
//! line, until its time slice ends, another guest's timer is due, or it waits for an interrupt.
//!
//! A guest that ends is dropped with all that it held, then reported, then started again if its
//! options say so; the others go on. The processor sleeps only when every guest waits. The monitor
//! is looked at between turns.

use alloc::format;
use alloc::vec::Vec;

use umbra_inspect::trace::{self, Trace};
use umbra_report::options::TraceFormat;
use umbra_report::{ExitCode, Outcome, Report};

use crate::alarm::Alarm;
use crate::gdb::{Debugged, Debugger, Wish};
use crate::guest::{End, Turn};
use crate::launch::Launcher;
use crate::monitor::Monitor;
use crate::second_serial::{self, SecondSerial};
use crate::vm::Vm;
use crate::{advice, platform, post_mortem, pressure, timestamp};

/// A guest's time slice in microseconds.
const TIME_SLICE: u64 = 10_000;

/// Events of the trace that are printed when a guest has failed.
const TRACE_SHOWN: usize = 64;

/// The guests that run.
pub struct Schedule<'a> {
    launcher: &'a Launcher<'a>,
    running: Vec<Running>,
    monitor: Monitor,
    /// The debugger, and the place in the options of the guest that it debugs.
    debugger: Option<(usize, Debugger)>,
    exit_code: ExitCode,
}

/// A guest in one of its runs.
pub struct Running {
    /// The guest.
    pub guest: Vm,
    /// Its place in the options.
    index: usize,
    /// Which of its runs this is, from 1.
    pub run: u64,
    /// Bytes that were allocated when it began.
    heap_at_start: u64,
    order: Order,
}

/// What the monitor has told a guest to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    /// It waits since the host's time-stamp counter had this value.
    Pause(u64),
    Stop,
}

impl Running {
    /// Lets it wait. Its devices' time goes on, its time limit does not.
    pub fn pause(&mut self) {
        if self.order == Order::Run {
            self.order = Order::Pause(platform::timestamp());
        }
    }

    /// Lets it go on.
    pub fn resume(&mut self) {
        if let Order::Pause(since) = self.order {
            let ticks = platform::timestamp().saturating_sub(since);
            self.guest.shared().extend_deadline(ticks);
            self.order = Order::Run;
        }
    }

    /// Ends it in its next turn.
    pub fn stop(&mut self) {
        self.order = Order::Stop;
    }

    /// Whether it waits for [`Running::resume`].
    pub const fn is_paused(&self) -> bool {
        matches!(self.order, Order::Pause(_))
    }

    /// Whether it is about to end.
    pub const fn is_stopped(&self) -> bool {
        matches!(self.order, Order::Stop)
    }

    fn is_debugged_and_stopped(&self) -> bool {
        self.guest.debugged().is_some_and(Debugged::is_stopped)
    }

    fn turn(&mut self, alarm: &mut Alarm, until: u64) -> Turn {
        match self.order {
            Order::Run if self.is_debugged_and_stopped() => Turn::Waiting,
            Order::Run => self.guest.turn(alarm, until),
            Order::Pause(_) => Turn::Waiting,
            Order::Stop => Turn::Ended(End::new(Outcome::Stopped, "ended by the monitor")),
        }
    }

    /// When it must be looked at, as the host's time-stamp counter counts.
    fn next_deadline(&self) -> Option<u64> {
        match self.order {
            Order::Run if self.is_debugged_and_stopped() => None,
            Order::Run => self.guest.next_deadline(),
            Order::Pause(_) => None,
            Order::Stop => Some(0),
        }
    }
}

impl<'a> Schedule<'a> {
    /// Starts every guest.
    pub fn start(launcher: &'a Launcher<'a>) -> Self {
        let mut schedule = Self {
            launcher,
            // Starting guests anew while others run must need no memory for this.
            running: Vec::with_capacity(launcher.guests()),
            monitor: Monitor::new(None),
            debugger: None,
            exit_code: ExitCode::Success,
        };
        for index in 0..launcher.guests() {
            if let Some(running) = schedule.launch(index, 1) {
                schedule.running.push(running);
            }
        }
        schedule.share_port();
        schedule
    }

    /// Gives the second serial port to the debugger of the first guest that wants one, or else to the
    /// monitor.
    fn share_port(&mut self) {
        let port = SecondSerial::find();
        let debugged = self
            .running
            .iter()
            .position(|running| running.guest.debugged().is_some());
        for running in self
            .running
            .iter_mut()
            .skip(debugged.map_or(0, |place| place + 1))
        {
            running.guest.current_mut().debugged = None;
        }
        match (debugged, port) {
            (None, port) => self.monitor = Monitor::new(port),
            (Some(place), Some(port)) => {
                let Running { guest, index, .. } = &mut self.running[place];
                self.debugger = Some((*index, Debugger::new(port, guest.current_mut())));
                let name = guest.name();
                hermit::println!("umbra: GDB can debug {name} at the second serial port");
            }
            (Some(place), None) => {
                self.running[place].guest.current_mut().debugged = None;
                hermit::println!(
                    "umbra: no debugger, because the machine has no second serial port"
                );
            }
        }
    }

    /// Lets the debugger talk to its guest.
    fn poll_debugger(&mut self) {
        if let Some((index, debugger)) = &mut self.debugger
            && let Some(running) = self.running.iter_mut().find(|other| other.index == *index)
            && debugger.poll(running.guest.current_mut()) == Wish::Kill
        {
            running.stop();
        }
    }

    /// Runs all guests to their ends, and returns the exit code of the first that failed.
    pub fn run(mut self) -> ExitCode {
        platform::hold_interrupts();
        let mut alarm = Alarm::default();
        while !self.running.is_empty() {
            let mut everyone_waits = true;
            let mut place = 0;
            self.monitor.poll(&mut self.running);
            self.poll_debugger();
            while place < self.running.len() {
                let until = self.end_of_turn(place);
                alarm.went_off();
                let running = &mut self.running[place];
                match running.turn(&mut alarm, until) {
                    Turn::Over => everyone_waits = false,
                    Turn::Waiting => {}
                    Turn::Ended(end) => {
                        everyone_waits = false;
                        let Running {
                            mut guest,
                            index,
                            run,
                            heap_at_start,
                            ..
                        } = self.running.remove(place);
                        self.launcher.ended(index);
                        if let Some((debugged, debugger)) = &mut self.debugger
                            && *debugged == index
                        {
                            debugger.ended(guest.current_mut(), end.outcome.exit_code());
                        }
                        let post_mortem = post_mortem::page(guest.name(), guest.current(), &end);
                        let (traces, format) = (guest.take_traces(), guest.trace_format());
                        let report = advice::complete(guest.finish(end));
                        for (number, trace) in (0..).zip(&traces) {
                            self.print_trace(number, trace, format, &report, run);
                        }
                        if let Some(page) = post_mortem {
                            self.monitor.make_way(&page);
                        }
                        if let Some(next) = self.ended(report, index, run, heap_at_start) {
                            self.running.insert(place, next);
                        }
                        continue;
                    }
                }
                place += 1;
            }
            if everyone_waits {
                let deadlines = self.running.iter();
                let deadlines = deadlines.filter_map(Running::next_deadline);
                alarm.sleep_until(deadlines.chain(self.next_look()).min());
            }
        }
        self.monitor.end();
        platform::release_interrupts();
        self.exit_code
    }

    /// Reports a run that has ended, and starts the next one of the same guest, if there is one.
    fn ended(
        &mut self,
        report: Report,
        index: usize,
        run: u64,
        heap_at_start: u64,
    ) -> Option<Running> {
        let again = self.launcher.runs_again(index, run, report.outcome);
        self.report(report, run, heap_at_start);
        if again {
            self.launch(index, run + 1)
        } else {
            None
        }
    }

    /// Starts a run, or one of those after it.
    fn launch(&mut self, index: usize, mut run: u64) -> Option<Running> {
        loop {
            let heap_at_start = pressure::heap_allocated();
            let report = match self.launcher.prepare(index, run) {
                Ok(mut guest) => {
                    if run > 1 {
                        // The debugger has been told that its guest has ended.
                        guest.current_mut().debugged = None;
                    }
                    return Some(Running {
                        guest,
                        index,
                        run,
                        heap_at_start,
                        order: Order::Run,
                    });
                }
                Err(report) => report,
            };
            let again = self.launcher.runs_again(index, run, report.outcome);
            self.monitor
                .make_way(&format!("umbra: {}\n", report.message));
            self.report(report, run, heap_at_start);
            if !again {
                return None;
            }
            run += 1;
        }
    }

    fn report(&mut self, report: Report, run: u64, heap_at_start: u64) {
        let report = Report {
            run,
            heap_allocated_at_start: heap_at_start,
            heap: pressure::heap_counters(),
            ..report
        };
        self.monitor.make_way(&format!("{}\n", report.line()));
        if self.exit_code == ExitCode::Success {
            self.exit_code = report.exit_code;
        }
    }

    fn print_trace(&self, vcpu: u8, trace: &Trace, format: TraceFormat, report: &Report, run: u64) {
        let nanoseconds = timestamp::nanoseconds_in_ticks;
        match format {
            TraceFormat::Text if report.exit_code == ExitCode::Success => {}
            TraceFormat::Text => {
                if report.vcpus > 1 {
                    self.monitor.make_way(&format!("processor {vcpu}, "));
                }
                self.monitor.make_way(&trace.text(TRACE_SHOWN, nanoseconds));
            }
            TraceFormat::Json => {
                for line in trace.lines(&report.guest, run, vcpu, nanoseconds) {
                    self.monitor.make_way(&format!("{}{line}\n", trace::MARKER));
                }
            }
        }
    }

    /// The host's time-stamp counter at which the turn of the guest in this place ends at the latest.
    fn end_of_turn(&self, place: usize) -> u64 {
        let others = self.running.iter().enumerate();
        let waiting =
            others.filter(|(other, running)| *other != place && running.guest.is_waiting());
        let deadlines = waiting.filter_map(|(_, running)| running.next_deadline());
        let slice = platform::ticks_in_microseconds(TIME_SLICE);
        deadlines
            .chain(self.next_look())
            .fold(platform::timestamp().saturating_add(slice), u64::min)
    }

    /// When the second serial port must be looked at again, as the host's time-stamp counter counts.
    fn next_look(&self) -> Option<u64> {
        let period = platform::ticks_in_microseconds(second_serial::PERIOD);
        let has_port = self.monitor.has_port() || self.debugger.is_some();
        has_port.then(|| platform::timestamp().saturating_add(period))
    }
}
