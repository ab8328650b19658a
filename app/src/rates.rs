//! How often a guest faults around a time of memory pressure.
//!
//! The guest's running time is cut into windows. Pressure is whatever takes its shadow pages for
//! others; the window in which that happens tells what it costs, the last ones without it before and
//! after tell whether the guest has got back what it needs.

use umbra_mmu::Statistics;
use umbra_report::FaultRates;

use crate::timestamp;

/// The length of a window in nanoseconds of running time: some turns.
const WINDOW: u64 = 20_000_000;

/// So many windows without pressure are looked at: one with something else in it does no harm then.
const CALM: usize = 5;

/// The faults of one guest. All rates are in faults per second.
#[derive(Default)]
pub struct Rates {
    /// Where the window began.
    start: Counts,
    /// The window's length so far, in ticks of the host's time-stamp counter.
    ticks: u64,
    /// The last windows without pressure, since there was any.
    calm: [u64; CALM],
    /// How many windows without pressure there were since.
    calm_windows: usize,
    before: Option<u64>,
    during: Option<u64>,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    faults: u64,
    shrunk: u64,
}

impl Rates {
    /// Takes note of a turn of so many ticks, and what the MMU counted until its end.
    pub fn turn(&mut self, ticks: u64, statistics: &Statistics) {
        self.ticks += ticks;
        let nanoseconds = timestamp::nanoseconds_in_ticks(self.ticks);
        if nanoseconds < WINDOW {
            return;
        }
        let end = Counts {
            faults: statistics.pf_taken,
            shrunk: statistics.shrink_freed,
        };
        let faults = u128::from(end.faults - self.start.faults);
        let rate = (faults * 1_000_000_000 / u128::from(nanoseconds)) as u64;
        if end.shrunk == self.start.shrunk {
            self.calm[self.calm_windows % CALM] = rate;
            self.calm_windows += 1;
        } else {
            if self.during.is_none() {
                self.before = self.calm_rate();
            }
            self.during = self.during.max(Some(rate));
            self.calm_windows = 0;
        }
        self.start = end;
        self.ticks = 0;
    }

    /// The rates, if there was pressure.
    pub fn report(&self) -> Option<FaultRates> {
        Some(FaultRates {
            during: self.during?,
            before: self.before,
            after: self.calm_rate(),
        })
    }

    /// The median of the last windows without pressure.
    fn calm_rate(&self) -> Option<u64> {
        let mut rates = self.calm;
        let rates = &mut rates[..self.calm_windows.min(CALM)];
        rates.sort_unstable();
        rates.get(rates.len() / 2).copied()
    }
}
