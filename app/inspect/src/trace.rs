//! What a guest did, event by event, in a ring of bounded size.
//!
//! Recording costs a few stores and a read of the time-stamp counter an event; text and JSON are made
//! when the guest has ended.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};
use umbra_report::options::Traced;
use umbra_vcpu::address::{Gpa, Gva, Hpa};
use umbra_vcpu::exit::{Exit, IoDirection, IoWidth};
use x86_64::structures::idt::PageFaultErrorCode;

use crate::exits::ExitText;

/// How many events are kept.
const KEPT: usize = 4096;
/// How many events one line of JSON has.
const EVENTS_A_LINE: usize = 32;

/// What a line of JSON begins with.
pub const MARKER: &str = "UMBRA-TRACE ";

/// Something that a guest or its MMU did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest stopped here, for this reason; the event lasts until Umbra has handled it.
    Exit {
        /// The guest's instruction pointer.
        rip: u64,
        /// Why it stopped.
        exit: Exit,
    },
    /// The MMU handled a page fault.
    PageFault {
        /// The linear address.
        gva: Gva,
        /// The hardware's error code.
        error: PageFaultErrorCode,
        /// What came of it.
        result: FaultResult,
    },
    /// The hardware got another shadow root.
    Root(Hpa),
    /// The guest's translations were dropped.
    Flush,
    /// A device's port was read or written.
    Port {
        /// The first port.
        port: u16,
        /// How wide the access was.
        width: IoWidth,
        /// Which way.
        direction: IoDirection,
        /// What was moved.
        value: u32,
    },
    /// Memory of a device was accessed.
    DeviceMemory(Gpa),
    /// An interrupt was handed to the guest.
    Interrupt(u8),
}

/// What came of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultResult {
    /// A shadow entry was filled or widened.
    Fixed,
    /// It was the guest's own.
    Injected,
    /// There is no memory, perhaps a device.
    NoMemory,
}

impl Event {
    const fn category(&self) -> (Traced, &'static str) {
        match self {
            Self::Exit { .. } => (Traced::EXITS, "exits"),
            Self::PageFault { .. } | Self::Root(_) | Self::Flush => (Traced::MMU, "mmu"),
            Self::Port { .. } | Self::DeviceMemory(_) | Self::Interrupt(_) => {
                (Traced::DEVICES, "devices")
            }
        }
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Exit { exit, .. } => exit_name(exit),
            Self::PageFault { result, .. } => match result {
                FaultResult::Fixed => "fault fixed",
                FaultResult::Injected => "fault injected",
                FaultResult::NoMemory => "fault without memory",
            },
            Self::Root(_) => "root",
            Self::Flush => "flush",
            Self::Port { direction, .. } => match direction {
                IoDirection::In => "port read",
                IoDirection::Out => "port write",
            },
            Self::DeviceMemory(_) => "device memory",
            Self::Interrupt(_) => "interrupt",
        }
    }
}

impl fmt::Display for Event {
    /// The details that the name leaves out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit { rip, exit } => write!(f, "{} at {rip:#x}", ExitText(exit)),
            Self::PageFault { gva, error, .. } => {
                write!(f, "{gva}, error code {:#x}", error.bits())
            }
            Self::Root(root) => write!(f, "{root}"),
            Self::Flush => Ok(()),
            Self::Port {
                port, width, value, ..
            } => write!(f, "port {port:#x}, {} bits: {value:#x}", 8 * width.bytes()),
            Self::DeviceMemory(gpa) => write!(f, "{gpa}"),
            Self::Interrupt(vector) => write!(f, "vector {vector:#x}"),
        }
    }
}

/// A name under which exits of a kind are gathered.
const fn exit_name(exit: &Exit) -> &'static str {
    match exit {
        Exit::PageFault { .. } => "page fault",
        Exit::Exception(_) => "exception",
        Exit::HostInterrupt => "host interrupt",
        Exit::HostNmi => "host NMI",
        Exit::InterruptWindow | Exit::NmiWindow => "window",
        Exit::Cpuid => "CPUID",
        Exit::Halt => "HLT",
        Exit::Pause => "PAUSE",
        Exit::Hypercall => "hypercall",
        Exit::Io(_) => "I/O",
        Exit::ReadMsr(_) => "RDMSR",
        Exit::WriteMsr { .. } => "WRMSR",
        Exit::ReadControlRegister { .. } | Exit::WriteControlRegister { .. } => "control register",
        Exit::MoveDebugRegister { .. } => "debug register",
        Exit::Breakpoint { .. } => "breakpoint",
        Exit::InvalidatePage(_) | Exit::InvalidatePcid { .. } => "invalidation",
        Exit::InvalidateCaches => "WBINVD",
        Exit::ReadTsc => "RDTSC",
        Exit::ReadPerformanceCounter => "RDPMC",
        Exit::Monitor | Exit::MonitorWait => "MONITOR",
        Exit::SetExtendedControlRegister { .. } => "XSETBV",
        Exit::VirtualizationInstruction => "virtualization",
        Exit::TaskSwitch { .. } => "task switch",
        Exit::TripleFault => "triple fault",
        Exit::TimeSliceEnd => "time slice",
        Exit::NotEnterable => "not enterable",
        Exit::Unknown { .. } => "unknown",
    }
}

#[derive(Clone, Copy, Debug)]
struct Record {
    /// In ticks of the host's time-stamp counter.
    start: u64,
    /// How long it took; 0 for what has no duration.
    ticks: u64,
    event: Event,
}

/// The last events of a guest.
#[derive(Clone, Debug)]
pub struct Trace {
    traced: Traced,
    records: Vec<Record>,
    /// How many were ever recorded.
    total: u64,
    /// Where the exit is that is being handled.
    open: Option<usize>,
}

impl Trace {
    /// An empty trace of these kinds of events.
    pub fn new(traced: Traced) -> Self {
        Self {
            traced,
            records: Vec::with_capacity(KEPT),
            total: 0,
            open: None,
        }
    }

    /// Records an event at `now`, in ticks of the host's time-stamp counter.
    #[inline]
    pub fn record(&mut self, now: u64, event: Event) {
        if !self.traced.contains(event.category().0) {
            return;
        }
        let record = Record {
            start: now,
            ticks: 0,
            event,
        };
        let place = self.total as usize % KEPT;
        if place < self.records.len() {
            self.records[place] = record;
        } else {
            self.records.push(record);
        }
        if matches!(event, Event::Exit { .. }) {
            self.open = Some(place);
        } else if self.open == Some(place) {
            // So many events in one exit that its own record is lost.
            self.open = None;
        }
        self.total += 1;
    }

    /// The last recorded exit has been handled at `now`.
    #[inline]
    pub fn exit_handled(&mut self, now: u64) {
        if let Some(place) = self.open.take() {
            let record = &mut self.records[place];
            record.ticks = now.saturating_sub(record.start);
        }
    }

    /// How many events are not kept any more.
    fn lost(&self) -> u64 {
        self.total - self.records.len() as u64
    }

    /// The records that are kept, oldest first.
    fn records(&self) -> impl DoubleEndedIterator<Item = &Record> {
        let oldest = self.total as usize % KEPT;
        let (newer, older) = if self.records.len() == KEPT {
            self.records.split_at(oldest)
        } else {
            (&self.records[..], &[][..])
        };
        older.iter().chain(newer)
    }

    /// The last `count` events in words, one a line, with times in nanoseconds since the first of them.
    pub fn text(&self, count: usize, nanoseconds: impl Fn(u64) -> u64) -> String {
        let skipped = self.records.len().saturating_sub(count);
        let begin = self.records().nth(skipped).map_or(0, |first| first.start);
        let mut text = format!(
            "trace: {} events, the last {} of them:\n",
            self.total,
            self.records.len() - skipped
        );
        for record in self.records().skip(skipped) {
            let at = nanoseconds(record.start - begin);
            let ((_, category), name) = (record.event.category(), record.event.name());
            let handled = match record.ticks {
                0 => String::new(),
                ticks => format!(", handled in {} ns", nanoseconds(ticks)),
            };
            let line = format!("  {at:>12} {category} {name}: {}{handled}\n", record.event);
            text.push_str(&line);
        }
        text
    }

    /// All events that are kept, as lines of JSON without [`MARKER`].
    pub fn lines(
        &self,
        guest: &str,
        run: u64,
        vcpu: u8,
        nanoseconds: impl Fn(u64) -> u64,
    ) -> impl Iterator<Item = String> {
        let lines = self.records.len().div_ceil(EVENTS_A_LINE).max(1);
        (0..lines).map(move |line| {
            let records = self.records().skip(line * EVENTS_A_LINE);
            let events = records.take(EVENTS_A_LINE).map(|record| TraceEvent {
                start: nanoseconds(record.start),
                duration: (record.ticks != 0).then(|| nanoseconds(record.ticks)),
                category: record.event.category().1.into(),
                name: record.event.name().into(),
                detail: record.event.to_string(),
            });
            let line = TraceLine {
                guest: guest.to_string(),
                run,
                vcpu,
                lost: self.lost(),
                events: events.collect(),
            };
            match serde_json::to_string(&line) {
                Ok(json) => json,
                // JSON refuses maps whose keys aren't strings, which a line doesn't have.
                Err(error) => unreachable!("the trace is not JSON: {error}"),
            }
        })
    }
}

/// Some of a guest's events, as one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceLine {
    /// The guest's name.
    pub guest: String,
    /// Which of its runs this is, from 1.
    pub run: u64,
    /// The processor whose events these are, from 0.
    #[serde(default)]
    pub vcpu: u8,
    /// How many events of the processor's trace are not kept any more.
    pub lost: u64,
    /// The events, oldest first.
    pub events: Vec<TraceEvent>,
}

/// An event in a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceEvent {
    /// When it began, in nanoseconds since the machine was switched on.
    #[serde(rename = "t")]
    pub start: u64,
    /// How long it took, in nanoseconds, if it has a duration.
    #[serde(rename = "d", default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<u64>,
    /// `exits`, `mmu` or `devices`.
    #[serde(rename = "c")]
    pub category: Cow<'static, str>,
    /// What kind of event it is.
    #[serde(rename = "n")]
    pub name: Cow<'static, str>,
    /// What else there is to say.
    #[serde(rename = "a")]
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(rip: u64) -> Event {
        Event::Exit {
            rip,
            exit: Exit::Cpuid,
        }
    }

    fn read(lines: impl Iterator<Item = String>) -> Vec<TraceLine> {
        lines
            .map(|line| serde_json::from_str(&line).unwrap())
            .collect()
    }

    #[test]
    fn exits_last_until_they_are_handled() {
        let mut trace = Trace::new(Traced::ALL);
        trace.record(1000, exit(7));
        trace.record(1010, Event::Interrupt(0x20));
        trace.exit_handled(1100);
        trace.exit_handled(9999);
        trace.record(1200, exit(8));
        let lines = read(trace.lines("a", 2, 0, |ticks| 2 * ticks));
        assert_eq!((lines.len(), lines[0].run, lines[0].lost), (1, 2, 0));
        let events = &lines[0].events;
        assert_eq!((events[0].start, events[0].duration), (2000, Some(200)));
        assert_eq!((events[1].start, events[1].duration), (2020, None));
        assert_eq!(events[2].duration, None, "it was never handled");
        assert_eq!(
            (&*events[0].name, &*events[1].detail),
            ("CPUID", "vector 0x20")
        );
        let text = trace.text(2, |ticks| ticks);
        assert_eq!(
            text,
            "trace: 3 events, the last 2 of them:\n             0 devices interrupt: vector \
             0x20\n           190 exits CPUID: CPUID at 0x8\n"
        );
    }

    #[test]
    fn only_what_is_asked_for_is_kept_and_only_the_last_of_it() {
        let mut trace = Trace::new(Traced::MMU);
        trace.record(1, exit(7));
        for time in 0..KEPT as u64 + 5 {
            trace.record(time, Event::Root(Hpa::new(time)));
        }
        let lines = read(trace.lines("a", 1, 0, |ticks| ticks));
        assert_eq!(lines.len(), KEPT / EVENTS_A_LINE);
        assert!(lines.iter().all(|line| line.lost == 5));
        let starts: Vec<_> = lines
            .iter()
            .flat_map(|line| line.events.iter().map(|event| event.start))
            .collect();
        assert!(starts.iter().copied().eq(5..KEPT as u64 + 5));
    }

    #[test]
    fn an_exit_whose_record_is_lost_gets_no_duration() {
        let mut trace = Trace::new(Traced::ALL);
        trace.record(0, exit(1));
        for _ in 0..KEPT {
            trace.record(1, Event::Flush);
        }
        trace.exit_handled(50);
        assert!(trace.records().all(|record| record.ticks == 0));
    }

    #[test]
    fn an_empty_trace_is_one_empty_line() {
        let lines = read(Trace::new(Traced::ALL).lines("a", 1, 0, |ticks| ticks));
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].events, []);
    }
}
