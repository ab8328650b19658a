//! One guest with all its processors.
//!
//! Protocol: the scheduler gives the guest turns, within which its processors run by turns on the
//! host's processor. One that waits for another, or sends it something, lets it run at once. The
//! machine goes from hand to hand: whoever's turn it is has it.

use alloc::sync::Arc;
use alloc::vec::Vec;

use umbra_inspect::trace::Trace;
use umbra_mmu::Mmu;
use umbra_report::options::TraceFormat;
use umbra_report::{MmuCounters, Report};
use umbra_vcpu::PauseExits;

use crate::alarm::Alarm;
use crate::gdb::Debugged;
use crate::guest::{End, Guest, Halted, REASONS, Turn};
use crate::memory::GuestHost;
use crate::rates::Rates;
use crate::shared::Shared;
use crate::{platform, timestamp};

/// How long one processor runs while another could, in microseconds.
const SLICE: u64 = 1_000;

/// A guest that is ready to run.
pub struct Vm {
    /// The guest as each of its processors sees it; never empty.
    processors: Vec<Guest>,
    /// Whose turn it was last.
    last: usize,
    shared: Arc<Shared>,
    /// What it has done so far.
    report: Report,
    /// How often it faults.
    rates: Rates,
    trace_format: TraceFormat,
    /// The time-stamp counter at its first turn.
    start: Option<u64>,
}

impl Vm {
    /// The guest with these processors, of which there is at least one.
    pub fn new(
        processors: Vec<Guest>,
        shared: Arc<Shared>,
        report: Report,
        trace_format: TraceFormat,
    ) -> Self {
        Self {
            processors,
            last: 0,
            shared,
            report,
            rates: Rates::default(),
            trace_format,
            start: None,
        }
    }

    /// The guest's name.
    pub fn name(&self) -> &str {
        &self.report.guest
    }

    /// How a trace of it is printed.
    pub const fn trace_format(&self) -> TraceFormat {
        self.trace_format
    }

    /// Its MMU.
    pub fn mmu(&self) -> &Mmu<GuestHost> {
        self.processors[0].paging.mmu()
    }

    /// What its processors share.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The guest as the processor sees it whose turn it was last.
    pub fn current(&self) -> &Guest {
        &self.processors[self.last]
    }

    /// The same, to be changed.
    pub fn current_mut(&mut self) -> &mut Guest {
        &mut self.processors[self.last]
    }

    /// The guest as each of its processors sees it.
    pub fn processors(&self) -> &[Guest] {
        &self.processors
    }

    /// What the processors did, if that is recorded, in the order of their numbers.
    pub fn take_traces(&mut self) -> Vec<Trace> {
        let processors = self.processors.iter_mut();
        let traces = processors.filter_map(|guest| guest.trace.take());
        traces.map(|trace| *trace).collect()
    }

    /// What a debugger does to it, if it has one.
    pub fn debugged(&self) -> Option<&Debugged> {
        self.current().debugged.as_ref()
    }

    /// Whether all its processors wait.
    pub fn is_waiting(&self) -> bool {
        self.processors
            .iter()
            .all(|guest| guest.halted != Halted::No)
    }

    /// How often its processors exited.
    pub fn exits(&self) -> u64 {
        self.processors.iter().map(exits).sum()
    }

    /// The host's time-stamp counter when it must be looked at.
    pub fn next_deadline(&self) -> Option<u64> {
        self.current().next_deadline()
    }

    /// Runs the guest until the host's time-stamp counter reaches `until`, it waits, or it ends.
    pub fn turn(&mut self, alarm: &mut Alarm, until: u64) -> Turn {
        let start = platform::timestamp();
        self.start.get_or_insert(start);
        let turn = if self.processors.len() == 1 {
            self.processors[0].turn(alarm, until)
        } else {
            self.run(alarm, until)
        };
        let ticks = platform::timestamp() - start;
        self.rates.turn(ticks, &self.mmu().statistics());
        self.current_mut().machine.flush_console();
        match turn {
            Turn::Waiting if self.never_wakes() => Turn::Ended(self.current().never_wakes()),
            turn => turn,
        }
    }

    /// Gives the processors turns.
    fn run(&mut self, alarm: &mut Alarm, until: u64) -> Turn {
        let slice = platform::ticks_in_microseconds(SLICE);
        // How many in a row had nothing to do.
        let mut waiting = 0;
        while waiting < self.processors.len() {
            let now = platform::timestamp();
            if now >= until {
                // Processors that only let each other run need no interrupt that would end their turns.
                let watched = self.current().check_deadline();
                return watched.map_or_else(Turn::Ended, |()| Turn::Over);
            }
            self.next();
            let others = self.processors.iter().enumerate();
            let mut others = others.filter(|(number, _)| *number != self.last);
            let is_alone = others.all(|(_, guest)| guest.halted != Halted::No);
            let (end, pause) = if is_alone {
                (until, PauseExits::Off)
            } else {
                (until.min(now.saturating_add(slice)), PauseExits::On)
            };
            let guest = &mut self.processors[self.last];
            guest.vcpu.set_pause_exits(pause);
            alarm.went_off();
            match guest.turn(alarm, end) {
                Turn::Over if guest.debugged.as_ref().is_some_and(Debugged::is_stopped) => {
                    return Turn::Over;
                }
                Turn::Over => waiting = 0,
                Turn::Waiting => waiting += 1,
                ended @ Turn::Ended(_) => return ended,
            }
            if guest.machine.take_kicks().is_empty() {
                continue;
            }
            waiting = 0;
        }
        Turn::Waiting
    }

    /// Makes it the next processor's turn, unless a debugger has the last one execute an instruction.
    fn next(&mut self) {
        if self.debugged().is_some_and(Debugged::is_stepping) {
            return;
        }
        let last = &mut self.processors[self.last];
        last.machine.release();
        let debugged = last.debugged.take();
        self.last = (self.last + 1) % self.processors.len();
        self.processors[self.last].debugged = debugged;
    }

    /// Whether every processor waits for what only another one can do.
    fn never_wakes(&self) -> bool {
        let mut processors = self.processors.iter();
        processors.all(|guest| matches!(guest.halted, Halted::Deaf | Halted::Reset))
    }

    /// What the guest has done so far; how it ended is open.
    pub fn report_so_far(&self) -> Report {
        let now = platform::timestamp();
        let start = self.start.unwrap_or(now);
        let ticks = now - start;
        let mut report = self.report.clone();
        let sum = |reason: usize| {
            let processors = self.processors.iter();
            processors.map(|guest| guest.exits[reason]).sum::<u64>()
        };
        let counted = REASONS.iter().enumerate();
        let counted = counted.map(|(reason, &name)| (name.into(), sum(reason)));
        report.exits = counted.filter(|(_, count)| *count != 0).collect();
        report.vcpus = self.processors.len() as u64;
        report.vcpu_exits = self.processors.iter().map(exits).collect();
        report.lock_waits = self.shared.waits();
        report.first_entry_tsc = start;
        report.tsc_ticks = ticks;
        report.nanoseconds = Some(timestamp::nanoseconds_in_ticks(ticks));
        let raised = self.processors.iter().map(|guest| guest.shortage.raised());
        report.mmu = MmuCounters {
            mmu_limit_raised: raised.sum(),
            ..counters(self.mmu())
        };
        report.fault_rates = self.rates.report();
        let machine = &self.current().machine;
        report.unknown_ports = machine.unknown_ports().total();
        report.unknown_msrs = machine.unknown_msrs().total();
        report
    }

    /// Completes the report of a guest that has ended, and gives back all that the guest held.
    pub fn finish(self, end: End) -> Report {
        Report {
            outcome: end.outcome,
            exit_code: end.outcome.exit_code(),
            message: end.message,
            guest_status: end.guest_status,
            exhausted: end.exhausted,
            ..self.report_so_far()
        }
    }
}

/// How often one processor exited.
fn exits(guest: &Guest) -> u64 {
    guest.exits.iter().sum()
}

fn counters(mmu: &Mmu<GuestHost>) -> MmuCounters {
    let statistics = mmu.statistics();
    MmuCounters {
        pf_taken: statistics.pf_taken,
        pf_fixed: statistics.pf_fixed,
        pf_guest: statistics.pf_guest,
        mmu_cache_miss: statistics.mmu_cache_miss,
        mmu_recycled: statistics.mmu_recycled,
        mmu_shadow_zapped: statistics.mmu_shadow_zapped,
        mmu_pte_write: statistics.mmu_pte_write,
        mmu_flooded: statistics.mmu_flooded,
        mmu_unsync: statistics.mmu_unsync,
        shrink_calls: statistics.shrink_calls,
        shrink_freed: statistics.shrink_freed,
        tlb_flush: statistics.tlb_flush,
        mmu_pages_used: statistics.mmu_pages_used,
        mmu_pages_limit: statistics.mmu_pages_limit,
        mmu_limit_raised: 0,
    }
}
