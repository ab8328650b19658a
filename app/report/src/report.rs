//! The report of one guest: a documented schema, written as one line and read back.

use alloc::borrow::Cow;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::exit_code::{ExitCode, Outcome};

/// What a report line begins with.
pub const MARKER: &str = "UMBRA-REPORT ";

/// How one guest ran and ended. Serialized as one flat JSON object, whose keys are these fields'
/// names and those of [`MmuCounters`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The guest's name (`--guest`).
    pub guest: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The exit code that stands for the outcome, as a number.
    pub exit_code: ExitCode,
    /// The value that the guest wrote to its `isa-debug-exit` port, if it did.
    pub guest_status: Option<u32>,
    /// Why it ended so, in one line for a human.
    pub message: String,
    /// The driver that ran the guest; none if it never ran.
    pub driver: Option<Driver>,
    /// Instructions that the guest retired, where the platform counts them.
    pub instructions: Option<u64>,
    /// The host's time-stamp counter when the guest was first entered. It counts from power-on, so
    /// this is how long booting took.
    pub first_entry_tsc: u64,
    /// Time from the guest's first entry to its last exit in ticks of the host's time-stamp counter.
    pub tsc_ticks: u64,
    /// The same time in nanoseconds, where the counter's frequency is known.
    pub nanoseconds: Option<u64>,
    /// Number of exits by reason (`cpuid`, `io`, `page_fault`, …).
    pub exits: BTreeMap<Cow<'static, str>, u64>,
    /// How many processors the guest had.
    #[serde(default = "one")]
    pub vcpus: u64,
    /// Number of exits of each of them.
    #[serde(default)]
    pub vcpu_exits: Vec<u64>,
    /// How often one of them had to wait because another one used the guest's devices or its MMU.
    #[serde(default)]
    pub lock_waits: u64,
    /// The shadow MMU's counters, flattened into the report's own object.
    #[serde(flatten)]
    pub mmu: MmuCounters,
    /// What was missing, if no MMU page was available.
    pub exhausted: Option<Exhausted>,
    /// How often it faulted before, during and after its shadow pages were taken to serve others;
    /// none if they weren't, or if it ran for a few turns only.
    #[serde(default)]
    pub fault_rates: Option<FaultRates>,
    /// Which of the guest's runs this was, from 1.
    #[serde(default = "one")]
    pub run: u64,
    /// Bytes of the image's heap that were allocated when this run began.
    #[serde(default)]
    pub heap_allocated_at_start: u64,
    /// The image's heap when all that the guest held was given back, flattened as well.
    #[serde(flatten)]
    pub heap: HeapCounters,
    /// Accesses to ports that no device answers.
    pub unknown_ports: u64,
    /// Accesses to MSRs that the guest's processor does not have.
    pub unknown_msrs: u64,
}

/// The driver that ran a guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// AMD SVM.
    Svm,
    /// Intel VMX.
    Vmx,
}

/// The shadow MMU's counters, under KVM's names where KVM has them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct MmuCounters {
    /// Page faults that exited to Umbra.
    pub pf_taken: u64,
    /// Page faults that Umbra fixed by filling a shadow page-table entry.
    pub pf_fixed: u64,
    /// Page faults that the guest caused by its own page tables, and got injected.
    pub pf_guest: u64,
    /// Shadow pages that had to be created.
    pub mmu_cache_miss: u64,
    /// Shadow pages that were zapped to make room for others.
    pub mmu_recycled: u64,
    /// Shadow pages that were zapped for any reason.
    pub mmu_shadow_zapped: u64,
    /// Writes to write-protected guest page tables.
    pub mmu_pte_write: u64,
    /// Shadow pages that were zapped because their guest page table was written too often.
    pub mmu_flooded: u64,
    /// Shadow pages that became unsync.
    pub mmu_unsync: u64,
    /// Calls that asked the MMU to shrink.
    pub shrink_calls: u64,
    /// Pages that shrinking freed.
    pub shrink_freed: u64,
    /// TLB flushes of the guest's translations.
    pub tlb_flush: u64,
    /// Shadow pages in use when the guest ended.
    pub mmu_pages_used: u64,
    /// The limit on shadow pages when the guest ended.
    pub mmu_pages_limit: u64,
    /// How often the limit was raised because the guest needed more pages at once
    /// (`--on-exhausted raise`).
    #[serde(default)]
    pub mmu_limit_raised: u64,
}

const fn one() -> u64 {
    1
}

/// The image's heap, from which shadow pages, guests' memory and the kernel's own allocations come.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct HeapCounters {
    /// Bytes that are free.
    pub heap_free: u64,
    /// Bytes that are allocated, as they were asked for. The rest is lost between allocations.
    pub heap_allocated: u64,
    /// Allocations that were not freed yet.
    pub heap_allocations: u64,
    /// The fewest bytes that ever were free.
    pub heap_low_water: u64,
    /// A request that would leave fewer bytes free calls the low-memory callback ahead of time.
    pub heap_watermark: u64,
    /// Calls of the low-memory callback.
    pub heap_low_memory_calls: u64,
    /// Bytes that are left for allocations of less than a page: larger ones fail ahead of them.
    pub heap_reserve: u64,
    /// Allocations that failed.
    pub heap_failed: u64,
    /// Shadow pages of all guests that still run.
    pub mmu_pages_all: u64,
    /// MMUs that the low-memory callback passed over because they were locked.
    pub shrink_skipped: u64,
}

/// Why no MMU page was available, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Exhausted {
    /// Pages that the fault needed.
    pub needed: u64,
    /// Pages in use.
    pub used: u64,
    /// The guest's limit.
    pub limit: u64,
    /// Pages in use that cannot be zapped.
    pub pinned: u64,
}

/// Page faults per second of the guest's own running time, which is cut into periods of 20 milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FaultRates {
    /// In the periods before shadow pages were first taken; none if that was in the first one. The
    /// median of the last five.
    pub before: Option<u64>,
    /// In that with the most faults among the periods in which shadow pages were taken.
    pub during: u64,
    /// In the periods since shadow pages were last taken; none if that was in the last one. The median
    /// of the last five.
    pub after: Option<u64>,
}

impl Report {
    /// A report with the outcome's exit code and all counters at zero.
    pub fn new(guest: impl Into<String>, outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            guest: guest.into(),
            outcome,
            exit_code: outcome.exit_code(),
            guest_status: None,
            message: message.into(),
            driver: None,
            instructions: None,
            first_entry_tsc: 0,
            tsc_ticks: 0,
            nanoseconds: None,
            exits: BTreeMap::new(),
            vcpus: 1,
            vcpu_exits: Vec::new(),
            lock_waits: 0,
            mmu: MmuCounters::default(),
            exhausted: None,
            fault_rates: None,
            run: 1,
            heap_allocated_at_start: 0,
            heap: HeapCounters::default(),
            unknown_ports: 0,
            unknown_msrs: 0,
        }
    }

    /// The report as one console line, without the line feed: [`MARKER`] and the JSON object.
    /// It must be printed at the start of a line.
    pub fn line(&self) -> String {
        match serde_json::to_string(self) {
            Ok(json) => format!("{MARKER}{json}"),
            // JSON refuses maps whose keys aren't strings, which this type doesn't have.
            Err(error) => unreachable!("the report is not JSON: {error}"),
        }
    }

    /// The last report of a console's text. Only lines that begin with [`MARKER`] count, and the
    /// last is Umbra's own: it prints it when the guest can no longer print.
    ///
    /// # Errors
    /// [`ReportError`] if there is no such line or if it is not a report.
    pub fn from_console(console: &str) -> Result<Self, ReportError> {
        Self::all_from_console(console)
            .last()
            .unwrap_or(Err(ReportError::Missing))
    }

    /// Every report line of a console's text, in order.
    pub fn all_from_console(console: &str) -> impl Iterator<Item = Result<Self, ReportError>> {
        console
            .split(['\n', '\r'])
            .filter_map(|line| line.strip_prefix(MARKER))
            .map(|json| Self::from_json(json.trim_end()))
    }

    fn from_json(json: &str) -> Result<Self, ReportError> {
        let report: Self = serde_json::from_str(json).map_err(|error| ReportError::Malformed {
            reason: error.to_string(),
        })?;
        let expected = report.outcome.exit_code();
        if report.exit_code == expected {
            Ok(report)
        } else {
            let reason = format!(
                "the exit code is {} but the outcome {:?} stands for {expected}",
                report.exit_code, report.outcome
            );
            Err(ReportError::Malformed { reason })
        }
    }
}

/// Why a console's text has no usable report.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReportError {
    /// No line begins with [`MARKER`].
    Missing,
    /// A line begins with it, but what follows is no report.
    Malformed {
        /// What is wrong with it.
        reason: String,
    },
}

impl fmt::Display for ReportError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(formatter, "no {MARKER}line on the console"),
            Self::Malformed { reason } => write!(formatter, "malformed {MARKER}line: {reason}"),
        }
    }
}

impl core::error::Error for ReportError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Report {
        let mut report = Report::new("hello", Outcome::NoMmuPages, "no MMU page available");
        report.driver = Some(Driver::Svm);
        report.tsc_ticks = u64::MAX;
        report.nanoseconds = Some(12);
        report.exits = BTreeMap::from([("cpuid".into(), 2), ("io".into(), 1)]);
        report.mmu.mmu_pages_limit = 64;
        report.fault_rates = Some(FaultRates {
            before: Some(8),
            during: 9,
            after: None,
        });
        report.exhausted = Some(Exhausted {
            needed: 4,
            used: 64,
            limit: 64,
            pinned: 62,
        });
        report
    }

    #[test]
    fn keys_are_the_documented_ones() {
        let json = example().line();
        let object: serde_json::Value =
            serde_json::from_str(json.strip_prefix(MARKER).unwrap()).unwrap();
        for key in [
            "guest",
            "outcome",
            "exit_code",
            "guest_status",
            "message",
            "driver",
            "instructions",
            "first_entry_tsc",
            "tsc_ticks",
            "nanoseconds",
            "exits",
            "vcpus",
            "vcpu_exits",
            "lock_waits",
            "pf_taken",
            "pf_fixed",
            "pf_guest",
            "mmu_cache_miss",
            "mmu_recycled",
            "mmu_shadow_zapped",
            "mmu_pte_write",
            "mmu_flooded",
            "mmu_unsync",
            "shrink_calls",
            "shrink_freed",
            "tlb_flush",
            "mmu_pages_used",
            "mmu_pages_limit",
            "mmu_limit_raised",
            "exhausted",
            "fault_rates",
            "run",
            "heap_free",
            "heap_allocated",
            "heap_allocated_at_start",
            "heap_allocations",
            "mmu_pages_all",
            "heap_low_water",
            "heap_watermark",
            "heap_low_memory_calls",
            "heap_reserve",
            "heap_failed",
            "shrink_skipped",
            "unknown_ports",
            "unknown_msrs",
        ] {
            assert!(object.get(key).is_some(), "{key} is missing in {json}");
        }
        assert_eq!(object.as_object().unwrap().len(), 45);
        assert_eq!(object["outcome"], "no-mmu-pages");
        assert_eq!(object["exit_code"], 4);
        assert_eq!(object["driver"], "svm");
        assert_eq!(object["exits"]["cpuid"], 2);
        assert_eq!(object["exhausted"]["pinned"], 62);
        assert_eq!(object["fault_rates"]["before"], 8);
    }

    #[test]
    fn the_last_line_counts() {
        let mut forged = example();
        forged.outcome = Outcome::Succeeded;
        forged.exit_code = ExitCode::Success;
        let console = format!(
            "Umbra\r\n{}\r\n text {}\r\n{}\r\nexit status 4\r\n",
            forged.line(),
            forged.line(),
            example().line()
        );
        assert_eq!(Report::from_console(&console), Ok(example()));
        assert_eq!(Report::all_from_console(&console).count(), 2);
    }

    #[test]
    fn missing_and_malformed_lines_are_errors() {
        assert_eq!(Report::from_console("hello\n"), Err(ReportError::Missing));
        for console in [
            "UMBRA-REPORT {\"guest\":1}\n",
            "UMBRA-REPORT ",
            "UMBRA-REPORT nonsense",
        ] {
            let error = Report::from_console(console).unwrap_err();
            assert!(
                matches!(error, ReportError::Malformed { .. }),
                "{console}: {error}"
            );
        }
        let line = example().line();
        let error = Report::from_console(&line[..line.len() - 1]).unwrap_err();
        assert!(matches!(error, ReportError::Malformed { .. }));
    }

    #[test]
    fn an_exit_code_that_contradicts_the_outcome_is_an_error() {
        let line = example()
            .line()
            .replace("\"exit_code\":4", "\"exit_code\":0");
        let error = Report::from_console(&line).unwrap_err().to_string();
        assert!(error.contains("0 (guest succeeded)"), "{error}");
    }

    proptest! {
        #[test]
        fn every_text_survives_the_console(guest in ".*", message in "(?s).*", ticks: u64) {
            let mut report = Report::new(guest, Outcome::Failed, message);
            report.tsc_ticks = ticks;
            report.guest_status = Some(u32::MAX);
            let line = report.line();
            prop_assert!(!line.contains(['\n', '\r']));
            prop_assert_eq!(Report::from_console(&format!("x\r\n{line}\r\n")), Ok(report));
        }

        #[test]
        fn no_console_text_panics(console in "(?s).*") {
            let _ = Report::from_console(&console);
            let marked = format!("{MARKER}{console}");
            prop_assert!(Report::from_console(&marked).is_err());
        }
    }
}
