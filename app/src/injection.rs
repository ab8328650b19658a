//! What tests inject into a guest's run: requests that fail, and shrinks at awkward moments.
//!
//! It is part of every image, so that what is tested is what is used. Nobody pays for it: the heap looks
//! at a counter for large requests only, and none of the moments comes with every exit.

use core::sync::atomic::{AtomicU64, Ordering};

use umbra_report::options::{FailAllocation, ShrinkAt, ShrinkPoint};

use crate::pressure;

/// Has the run with this number of a guest fail at its next allocation: each run at a later one than the
/// run before.
pub fn arm(fail: FailAllocation, run: u64) {
    let (first, count) = match fail {
        FailAllocation::One(first) => (first, 1),
        FailAllocation::From(first) => (first, usize::MAX),
    };
    let served = (first - 1).saturating_add(run - 1);
    hermit::mm::fail_requests(usize::try_from(served).unwrap_or(usize::MAX), count);
}

/// Lets no more requests fail.
pub fn disarm() {
    hermit::mm::fail_requests(0, 0);
}

/// The shrinks that one guest's run causes.
pub struct Shrinks {
    at: Option<ShrinkAt>,
    /// How often the moment has come.
    moments: AtomicU64,
}

impl Shrinks {
    /// Shrinks at the moments that the option names.
    pub const fn new(at: Option<ShrinkAt>) -> Self {
        Self {
            at,
            moments: AtomicU64::new(0),
        }
    }

    /// Shrinks every guest's MMU, if this is a moment for it.
    pub fn pass(&self, point: ShrinkPoint) {
        let Some(at) = self.at.filter(|at| at.point == point) else {
            return;
        };
        let moment = self.moments.fetch_add(1, Ordering::Relaxed) + 1;
        if moment.is_multiple_of(at.every) {
            pressure::shrink(pressure::MINIMUM_SCAN);
        }
    }
}
