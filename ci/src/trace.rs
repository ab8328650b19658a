//! Traces as Chrome's trace viewer and Perfetto read them: the JSON object of the "Trace Event Format",
//! with a process for each run of a guest and a thread for each of its processors.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use umbra_inspect::trace::{MARKER, TraceLine};

/// The whole file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Trace {
    /// In any order.
    pub trace_events: Vec<Event>,
    /// The unit that viewers show; the numbers are microseconds in any case.
    display_time_unit: TimeUnit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TimeUnit {
    Ms,
    Ns,
}

/// An event, by its phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ph", deny_unknown_fields)]
pub enum Event {
    /// Something that lasts: "complete".
    #[serde(rename = "X")]
    Complete {
        /// What kind of event it is.
        name: String,
        /// `exits`, `mmu` or `devices`.
        cat: String,
        /// When it began, in microseconds.
        ts: f64,
        /// How long it lasted, in microseconds.
        dur: f64,
        /// The run of a guest.
        pid: u32,
        /// The guest's processor.
        tid: u32,
        /// What else there is to say.
        args: Detail,
    },
    /// Something that has no duration: "instant".
    #[serde(rename = "i")]
    Instant {
        /// What kind of event it is.
        name: String,
        /// `exits`, `mmu` or `devices`.
        cat: String,
        /// When it was, in microseconds.
        ts: f64,
        /// How far it reaches.
        s: Scope,
        /// The run of a guest.
        pid: u32,
        /// The guest's processor.
        tid: u32,
        /// What else there is to say.
        args: Detail,
    },
    /// The name of a process or thread.
    #[serde(rename = "M")]
    Metadata {
        /// Whose name it is.
        name: Named,
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
        /// The name.
        args: Name,
    },
}

/// How far an instant event reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// It concerns its thread only.
    #[serde(rename = "t")]
    Thread,
}

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detail {
    /// In words.
    detail: String,
}

/// What has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Named {
    /// A process.
    ProcessName,
    /// A thread.
    ThreadName,
}

/// A name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Name {
    name: String,
}

impl Trace {
    /// The trace that a console's text has.
    ///
    /// # Errors
    /// When it has none, or a line of it is damaged.
    pub fn of_console(text: &str) -> Result<Self> {
        let mut tracks = BTreeMap::new();
        let mut trace_events = Vec::new();
        let mut lost = 0;
        for json in text.lines().filter_map(|line| line.strip_prefix(MARKER)) {
            let line: TraceLine = serde_json::from_str(json)
                .with_context(|| format!("a line of the trace is damaged: {json}"))?;
            let next = tracks.len() as u32 + 1;
            let track: &mut Track =
                tracks
                    .entry((line.guest.clone(), line.run))
                    .or_insert_with(|| {
                        trace_events.push(run_name(next, &line));
                        Track {
                            pid: next,
                            processors: BTreeSet::new(),
                        }
                    });
            let (pid, tid) = (track.pid, line.vcpu.into());
            if track.processors.insert(line.vcpu) {
                lost += line.lost;
                trace_events.push(processor_name(pid, line.vcpu));
            }
            trace_events.extend(line.events.into_iter().map(|event| {
                let (name, cat) = (event.name.into_owned(), event.category.into_owned());
                let (ts, args) = (
                    microseconds(event.start),
                    Detail {
                        detail: event.detail,
                    },
                );
                match event.duration {
                    Some(duration) => Event::Complete {
                        name,
                        cat,
                        ts,
                        dur: microseconds(duration),
                        pid,
                        tid,
                        args,
                    },
                    None => Event::Instant {
                        name,
                        cat,
                        ts,
                        s: Scope::Thread,
                        pid,
                        tid,
                        args,
                    },
                }
            }));
        }
        if tracks.is_empty() {
            bail!("the console has no trace");
        }
        if lost > 0 {
            eprintln!("the trace has only the last events: {lost} earlier ones were not kept");
        }
        Ok(Self {
            trace_events,
            display_time_unit: TimeUnit::Ns,
        })
    }

    /// The file's content.
    ///
    /// # Errors
    /// Never, as all of it can be JSON.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    /// Reads a file's content as a viewer does, and checks what the format asks for besides: each event is
    /// on a track that has a name, and what lasts is nested on its track.
    ///
    /// # Errors
    /// What is wrong.
    pub fn load(json: &str) -> Result<Self> {
        let trace: Self = serde_json::from_str(json)?;
        let mut named = BTreeMap::new();
        let mut ends: BTreeMap<(u32, u32), Vec<(f64, f64)>> = BTreeMap::new();
        for event in &trace.trace_events {
            match event {
                Event::Metadata {
                    name, pid, args, ..
                } => {
                    if *name == Named::ProcessName {
                        named.insert(*pid, args.name.clone());
                    }
                }
                Event::Instant { pid, name, .. } if !named.contains_key(pid) => {
                    bail!("`{name}` is on track {pid}, which has no name");
                }
                Event::Instant { .. } => {}
                Event::Complete {
                    name,
                    ts,
                    dur,
                    pid,
                    tid,
                    ..
                } => {
                    if !named.contains_key(pid) {
                        bail!("`{name}` is on track {pid}, which has no name");
                    }
                    ends.entry((*pid, *tid)).or_default().push((*ts, ts + dur));
                }
            }
        }
        for ((pid, _), mut spans) in ends {
            spans.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
            // Nanoseconds were rounded before they became microseconds.
            let overlap = spans
                .windows(2)
                .find(|pair| pair[1].0 + 0.002 < pair[0].1 && pair[1].1 > pair[0].1 + 0.002);
            if let Some(pair) = overlap {
                bail!("events of {} overlap: {pair:?}", named[&pid]);
            }
        }
        Ok(trace)
    }

    /// Whether it has an event of this name.
    pub fn has(&self, wanted: &str) -> bool {
        self.trace_events.iter().any(|event| match event {
            Event::Complete { name, .. } | Event::Instant { name, .. } => name == wanted,
            Event::Metadata { .. } => false,
        })
    }
}

/// A run of a guest, and which of its processors have a name.
struct Track {
    pid: u32,
    processors: BTreeSet<u8>,
}

/// The name of a run.
fn run_name(pid: u32, line: &TraceLine) -> Event {
    let name = match line.run {
        1 => line.guest.clone(),
        run => format!("{}, run {run}", line.guest),
    };
    Event::Metadata {
        name: Named::ProcessName,
        pid,
        tid: 0,
        args: Name { name },
    }
}

/// The name of the track of a processor.
fn processor_name(pid: u32, vcpu: u8) -> Event {
    Event::Metadata {
        name: Named::ThreadName,
        pid,
        tid: vcpu.into(),
        args: Name {
            name: format!("processor {vcpu}"),
        },
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "exact for the first three months after the start"
)]
fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "hello\n\
        UMBRA-TRACE {\"guest\":\"a\",\"run\":1,\"lost\":0,\"events\":[\
        {\"t\":1500,\"d\":250,\"c\":\"exits\",\"n\":\"CPUID\",\"a\":\"CPUID at 0x1\"},\
        {\"t\":1600,\"c\":\"devices\",\"n\":\"port write\",\"a\":\"port 0x3f8\"}]}\n\
        UMBRA-TRACE {\"guest\":\"b\",\"run\":2,\"lost\":0,\"events\":[]}\n";

    #[test]
    fn a_trace_is_what_viewers_read() {
        let trace = Trace::of_console(CONSOLE).unwrap();
        let json = trace.json().unwrap();
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        let events = value["traceEvents"].as_array().unwrap();
        assert_eq!(events[0]["ph"], "M");
        assert_eq!(events[0]["args"]["name"], "a");
        assert_eq!(events[2]["ph"], "X");
        assert_eq!(
            (&events[2]["ts"], &events[2]["dur"]),
            (&1.5.into(), &0.25.into())
        );
        assert_eq!(
            (&events[3]["ph"], &events[3]["s"]),
            (&"i".into(), &"t".into())
        );
        assert_eq!(events[4]["args"]["name"], "b, run 2");
        assert_eq!(value["displayTimeUnit"], "ns");
        let loaded = Trace::load(&json).unwrap();
        assert_eq!(loaded.trace_events, trace.trace_events);
        assert!(loaded.has("CPUID") && loaded.has("port write") && !loaded.has("HLT"));
    }

    #[test]
    fn damage_is_found() {
        assert!(Trace::of_console("hello\n").is_err());
        assert!(Trace::of_console("UMBRA-TRACE {\n").is_err());
        let json = Trace::of_console(CONSOLE).unwrap().json().unwrap();
        assert!(Trace::load(&json.replace("\"dur\":0.25,", "")).is_err());
        assert!(Trace::load(&json.replace("process_name", "thread_name")).is_err());
        let overlapping = CONSOLE.replace("1600,", "1600,\"d\":400,");
        let json = Trace::of_console(&overlapping).unwrap().json().unwrap();
        assert!(
            Trace::load(&json)
                .unwrap_err()
                .to_string()
                .contains("overlap")
        );
    }
}
