//! What the monitor answers, as text and as JSON.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::Serialize;
use umbra_mmu::{Inspection, Level};
use umbra_report::{HeapCounters, MmuCounters};

use super::command::{COMMANDS, CommandError};
use crate::walk::{GuestEndText, ShadowEndText, WalkText};

/// An answer.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// The list of commands.
    Help {
        /// Each with its arguments.
        commands: Vec<String>,
    },
    /// The guests.
    Guests {
        /// In the order of their turns.
        guests: Vec<GuestStatus>,
    },
    /// What guests have done so far.
    Statistics {
        /// For each guest.
        statistics: Vec<GuestStatistics>,
        /// The heap of the image.
        #[serde(flatten)]
        heap: HeapCounters,
    },
    /// Shadow pages were given back.
    Shrunk {
        /// Frames that went.
        freed: u64,
        /// MMUs that were busy.
        skipped: u64,
        /// How far the time-stamp counter got meanwhile.
        ticks: u64,
    },
    /// A guest's limit was changed.
    Limit {
        /// The guest.
        guest: String,
        /// How many shadow pages it may have now.
        mmu_pages_limit: u64,
        /// How many it has.
        mmu_pages_used: u64,
    },
    /// Guests do something else now.
    Changed {
        /// Which.
        guests: Vec<String>,
        /// What they do.
        now: Run,
    },
    /// What guest and shadow say of an address.
    Walk(Box<WalkReply>),
    /// A text.
    Text {
        /// The guest that it is about.
        guest: String,
        /// Line by line.
        lines: Vec<String>,
    },
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Run {
    /// It takes its turns.
    Running,
    /// It waits for an interrupt.
    Waiting,
    /// The monitor lets it wait.
    Paused,
    /// It is about to end.
    Stopped,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// A guest in a list.
#[derive(Clone, Debug, Serialize)]
pub struct GuestStatus {
    /// Its name.
    pub guest: String,
    /// What it does.
    pub state: Run,
    /// Which of its runs this is, from 1.
    pub run: u64,
    /// Exits so far, for any reason.
    pub exits: u64,
    /// Shadow pages that it has.
    pub mmu_pages_used: u64,
    /// Shadow pages that it may have.
    pub mmu_pages_limit: u64,
}

/// What a guest has done so far, under the names that its report has.
#[derive(Clone, Debug, Serialize)]
pub struct GuestStatistics {
    /// Its name.
    pub guest: String,
    /// Which of its runs this is, from 1.
    pub run: u64,
    /// Time since its first entry.
    pub nanoseconds: Option<u64>,
    /// Number of exits by reason.
    pub exits: BTreeMap<Cow<'static, str>, u64>,
    /// The shadow MMU's counters.
    #[serde(flatten)]
    pub mmu: MmuCounters,
    /// Accesses to ports that no device answers.
    pub unknown_ports: u64,
    /// Accesses to MSRs that the guest's processor does not have.
    pub unknown_msrs: u64,
}

/// A walk of both tables.
#[derive(Clone, Debug)]
pub struct WalkReply {
    /// The guest's name.
    pub guest: String,
    /// What was found.
    pub inspection: Inspection,
}

impl Serialize for WalkReply {
    /// Numbers of 64 bits are texts: JSON's readers do not agree on large numbers.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Entry {
            level: u8,
            at: String,
            index: usize,
            value: String,
        }
        #[derive(Serialize)]
        struct Walk<'a> {
            guest: &'a str,
            address: String,
            guest_entries: Vec<Entry>,
            guest_end: String,
            shadow_entries: Vec<Entry>,
            shadow_end: String,
        }
        let inspection = &self.inspection;
        let from_the_root = || Level::ALL.iter().rev().map(|level| level.number());
        let guest = from_the_root().filter_map(|level| {
            inspection.guest[usize::from(level) - 1].map(|entry| Entry {
                level,
                at: format!("{:#x}", entry.at),
                index: entry.index,
                value: format!("{:#x}", entry.value),
            })
        });
        let shadow = from_the_root().filter_map(|level| {
            inspection.shadow[usize::from(level) - 1].map(|entry| Entry {
                level,
                at: format!("{:#x}", entry.table),
                index: entry.index,
                value: format!("{:#x}", entry.value),
            })
        });
        let walk = Walk {
            guest: &self.guest,
            address: format!("{:#x}", inspection.gva),
            guest_entries: guest.collect(),
            guest_end: GuestEndText(inspection.guest_end).to_string(),
            shadow_entries: shadow.collect(),
            shadow_end: ShadowEndText(inspection.shadow_end).to_string(),
        };
        walk.serialize(serializer)
    }
}

impl Reply {
    /// The list of commands.
    pub fn help() -> Self {
        let commands = COMMANDS.iter().map(|(name, arguments, meaning)| {
            let usage = format!("{name} {arguments}");
            format!("{usage:<20} {meaning}")
        });
        Self::Help {
            commands: commands.collect(),
        }
    }

    /// A text about a guest.
    pub fn text(guest: &str, text: &impl ToString) -> Self {
        Self::Text {
            guest: guest.to_string(),
            lines: text.to_string().lines().map(ToString::to_string).collect(),
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Help { commands: lines } | Self::Text { lines, .. } => {
                lines.iter().try_for_each(|line| writeln!(f, "{line}"))
            }
            Self::Guests { guests } => guests.iter().try_for_each(|guest| {
                writeln!(
                    f,
                    "{}: {}, run {}, {} exits, {} of {} shadow pages",
                    guest.guest,
                    guest.state,
                    guest.run,
                    guest.exits,
                    guest.mmu_pages_used,
                    guest.mmu_pages_limit
                )
            }),
            Self::Statistics { statistics, heap } => {
                for guest in statistics {
                    write!(f, "{guest}")?;
                }
                writeln!(
                    f,
                    "heap: {} bytes free, {} at the least, {} low-memory calls",
                    heap.heap_free, heap.heap_low_water, heap.heap_low_memory_calls
                )
            }
            Self::Shrunk {
                freed,
                skipped,
                ticks,
            } => writeln!(
                f,
                "{freed} frames given back in {ticks} ticks, {skipped} MMUs were busy"
            ),
            Self::Limit {
                guest,
                mmu_pages_limit,
                mmu_pages_used,
            } => writeln!(
                f,
                "{guest}: {mmu_pages_used} of {mmu_pages_limit} shadow pages"
            ),
            Self::Changed { guests, now } => guests
                .iter()
                .try_for_each(|guest| writeln!(f, "{guest}: {now}")),
            Self::Walk(walk) => {
                writeln!(f, "{} {:#018x}", walk.guest, walk.inspection.gva)?;
                write!(f, "{}", WalkText(&walk.inspection))
            }
        }
    }
}

impl fmt::Display for GuestStatistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = self.nanoseconds.unwrap_or(0) / 1_000_000;
        writeln!(f, "{}: run {}, {milliseconds} ms", self.guest, self.run)?;
        write!(f, "  exits:")?;
        for (reason, count) in &self.exits {
            write!(f, " {reason} {count}")?;
        }
        let mmu = &self.mmu;
        writeln!(
            f,
            "\n  shadow pages: {} of {}, {} recycled, {} zapped, {} unsync",
            mmu.mmu_pages_used,
            mmu.mmu_pages_limit,
            mmu.mmu_recycled,
            mmu.mmu_shadow_zapped,
            mmu.mmu_unsync
        )?;
        writeln!(
            f,
            "  faults: {} taken, {} fixed, {} the guest's; {} flushes; {} frames shrunk",
            mmu.pf_taken, mmu.pf_fixed, mmu.pf_guest, mmu.tlb_flush, mmu.shrink_freed
        )
    }
}

/// An answer as one line of JSON, with `"ok"` first, and `"error"` if it is false.
pub fn answer(reply: &Result<Reply, CommandError>) -> String {
    #[derive(Serialize)]
    struct Answer<'a> {
        ok: bool,
        #[serde(flatten)]
        reply: Option<&'a Reply>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    }
    let answer = Answer {
        ok: reply.is_ok(),
        reply: reply.as_ref().ok(),
        error: reply.as_ref().err().map(ToString::to_string),
    };
    match serde_json::to_string(&answer) {
        Ok(json) => json,
        // JSON refuses maps whose keys aren't strings, which no reply has.
        Err(error) => unreachable!("the reply is not JSON: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_mmu::{GuestEnd, GuestEntry, ShadowEnd};
    use umbra_vcpu::address::{Gpa, Gva};

    fn json(reply: Reply) -> serde_json::Value {
        let line = answer(&Ok(reply));
        assert!(!line.contains('\n'), "{line}");
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn errors_are_answers() {
        let line = answer(&Err(CommandError::NoGuest("b".into())));
        let error = "there is no guest \\\"b\\\"; list shows all";
        assert_eq!(line, format!("{{\"ok\":false,\"error\":\"{error}\"}}"));
    }

    #[test]
    fn replies_are_json_and_text() {
        let guests = Reply::Guests {
            guests: [GuestStatus {
                guest: "a".into(),
                state: Run::Paused,
                run: 1,
                exits: 7,
                mmu_pages_used: 5,
                mmu_pages_limit: 64,
            }]
            .into(),
        };
        assert_eq!(
            guests.to_string(),
            "a: paused, run 1, 7 exits, 5 of 64 shadow pages\n"
        );
        let value = json(guests);
        assert_eq!(value["ok"], true);
        assert_eq!(value["guests"][0]["state"], "paused");

        let guest = GuestStatistics {
            guest: "a".into(),
            run: 1,
            nanoseconds: None,
            exits: [("cpuid".into(), 3)].into(),
            mmu: MmuCounters::default(),
            unknown_ports: 0,
            unknown_msrs: 0,
        };
        let statistics = Reply::Statistics {
            statistics: [guest].into(),
            heap: HeapCounters::default(),
        };
        assert!(statistics.to_string().contains("exits: cpuid 3\n"));
        let value = json(statistics);
        assert_eq!(value["statistics"][0]["exits"]["cpuid"], 3);
        assert_eq!(value["heap_free"], 0);

        let help = Reply::help();
        assert_eq!(help.to_string().lines().count(), COMMANDS.len());
        let text = Reply::text("a", &"one\ntwo\n");
        assert_eq!(text.to_string(), "one\ntwo\n");
        assert_eq!(json(text)["lines"][1], "two");
    }

    #[test]
    fn a_walk_has_its_entries_from_the_root_down() {
        let mut guest = [None; 5];
        guest[3] = Some(GuestEntry {
            at: Gpa::new(0x1008),
            index: 1,
            value: 0xffff_ffff_ffff_f003,
        });
        guest[2] = Some(GuestEntry {
            at: Gpa::new(0x2000),
            index: 0,
            value: 0,
        });
        let walk = Reply::Walk(Box::new(WalkReply {
            guest: "a".into(),
            inspection: Inspection {
                gva: Gva::new(0x80_0000_0000),
                guest,
                guest_end: GuestEnd::NotPresent(Level::Three),
                shadow: [None; 5],
                shadow_end: ShadowEnd::Empty(Level::Four),
            },
        }));
        let text = walk.to_string();
        assert!(
            text.starts_with("a 0x0000008000000000\n    4 guest "),
            "{text}"
        );
        let value = json(walk);
        assert_eq!(value["guest_entries"][0]["value"], "0xfffffffffffff003");
        assert_eq!(value["guest_entries"][1]["level"], 3);
        assert_eq!(value["guest_end"], "the level-3 entry is not present");
        assert_eq!(
            value["shadow_entries"],
            serde_json::Value::Array(Vec::new())
        );
    }
}
