//! All MMUs of the host together: the total limit, and the shrinker.
//!
//! The shrinker runs from the low-memory callback, perhaps while one of these very locks is held by
//! its caller. So it only try-locks, counts what it had to skip, and never allocates.

use crate::budget::Budget;
use crate::config::{MINIMUM_PAGES, MmuConfig, REFILL_PAGES};
use crate::host::Host;
use crate::lock::{AtomicUsize, Mutex, Ordering};
use crate::mmu::Mmu;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

/// What a call of the shrinker got.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shrunk {
    /// Frames given back to the host: shadow pages and cached frames.
    pub freed: usize,
    /// MMUs that were busy.
    pub skipped: usize,
}

/// What the pool and its MMUs share.
pub(crate) struct Members<H: Host> {
    mmus: Mutex<Vec<Weak<Mmu<H>>>>,
    /// Where the next scan begins.
    rotation: AtomicUsize,
}

impl<H: Host> Members<H> {
    /// Reclaims pages for `asking`, which needs `needed` and is refused them by the common limit: from
    /// every VM in proportion to what it holds above its floor, then from `asking`, then from whoever
    /// has any. Whether they fit now. No lock may be held.
    pub fn relieve(&self, asking: &Mmu<H>, needed: usize) -> bool {
        let mmus = self.mmus.lock();
        let rotation = self.next_rotation(&mmus);
        let excess = |more| asking.budget.excess_with(more);
        // Above their floors VMs give enough for a while, below no more than they must.
        let refill = needed.max(REFILL_PAGES);
        let shares = Shares {
            wanted: excess(refill),
            above: rotation.mmus().map(|mmu| above_floor(mmu.used())).sum(),
        };
        for mmu in rotation.mmus() {
            mmu.locked(|core| {
                let share = shares.of(core.state.used).min(excess(refill));
                core.recycle(share)
            });
        }
        asking.locked(|core| core.recycle(excess(needed)));
        for mmu in rotation.mmus() {
            mmu.locked(|core| core.recycle(excess(needed)));
        }
        excess(needed) == 0
    }

    /// Each time another MMU is the first.
    fn next_rotation<'a>(&self, mmus: &'a [Weak<Mmu<H>>]) -> Rotation<'a, H> {
        let start = self.rotation.fetch_add(1, Ordering::Relaxed);
        let (last, first) = mmus.split_at(start % mmus.len().max(1));
        Rotation { first, last }
    }
}

/// The MMUs in the order in which they are asked.
struct Rotation<'a, H: Host> {
    first: &'a [Weak<Mmu<H>>],
    last: &'a [Weak<Mmu<H>>],
}

impl<H: Host> Rotation<'_, H> {
    fn mmus(&self) -> impl Iterator<Item = Arc<Mmu<H>>> {
        self.first.iter().chain(self.last).filter_map(Weak::upgrade)
    }
}

/// What a VM that holds `used` pages can give without going below its floor.
const fn above_floor(used: usize) -> usize {
    used.saturating_sub(MINIMUM_PAGES)
}

/// How much each VM gives: in proportion to what it holds above its floor.
#[derive(Clone, Copy)]
struct Shares {
    wanted: usize,
    /// What all of them together hold above their floors.
    above: usize,
}

impl Shares {
    fn of(self, used: usize) -> usize {
        let above = above_floor(used);
        (self.wanted * above).div_ceil(self.above.max(1)).min(above)
    }
}

/// The MMUs that share a total limit.
pub struct MmuPool<H: Host> {
    budget: Arc<Budget>,
    members: Arc<Members<H>>,
}

impl<H: Host> MmuPool<H> {
    /// A pool with a limit on all its VMs' shadow pages together.
    pub fn new(total_limit: usize) -> Self {
        Self {
            budget: Arc::new(Budget::new(total_limit)),
            members: Arc::new(Members {
                mmus: Mutex::new(Vec::new()),
                rotation: AtomicUsize::new(0),
            }),
        }
    }

    /// A VM's MMU that counts against the pool's limit.
    pub fn create(&self, host: H, config: MmuConfig) -> Arc<Mmu<H>> {
        let mmu = Arc::new(Mmu::with_budget(
            host,
            config,
            self.budget.clone(),
            Some(Arc::downgrade(&self.members)),
        ));
        // An allocation may call for the scan, which needs this lock.
        let mut larger = Vec::new();
        loop {
            let mut members = self.members.mmus.lock();
            if members.capacity() < larger.capacity() {
                larger.append(&mut members);
                core::mem::swap(&mut larger, &mut members);
            }
            members.retain(|member| member.strong_count() > 0);
            if members.len() < members.capacity() {
                members.push(Arc::downgrade(&mmu));
                return mmu;
            }
            let wanted = 2 * members.len() + 4;
            drop(members);
            larger.reserve_exact(wanted);
        }
    }

    /// Shadow pages of all VMs together, exact.
    pub fn count(&self) -> usize {
        self.budget.used()
    }

    /// Shadow pages that all VMs together may hold.
    pub fn limit(&self) -> usize {
        self.budget.limit()
    }

    /// Changes the total limit. What exceeds it is recycled when a VM needs pages, from all VMs in
    /// proportion to what they hold above their floors before anybody goes below.
    pub fn set_limit(&self, pages: usize) {
        self.budget.set_limit(pages);
    }

    /// Gives `wanted` frames back to the host if it can: caches first, then from every VM in
    /// proportion to what it holds above its floor, then whatever there is.
    pub fn scan(&self, wanted: usize) -> Shrunk {
        let Some(members) = self.members.mmus.try_lock() else {
            return Shrunk {
                freed: 0,
                skipped: 1,
            };
        };
        let mut shrunk = Shrunk::default();
        if wanted == 0 {
            return shrunk;
        }
        let rotation = self.members.next_rotation(&members);
        for mmu in rotation.mmus() {
            let freed = mmu.try_locked(|core| {
                core.state.counters.shrink_calls += 1;
                let freed = if shrunk.freed < wanted {
                    core.release_caches()
                } else {
                    0
                };
                core.state.counters.shrink_freed += freed as u64;
                freed
            });
            match freed {
                Some(freed) => shrunk.freed += freed,
                None => shrunk.skipped += 1,
            }
        }
        let used = |mmu: Arc<Mmu<H>>| mmu.try_locked(|core| core.state.used);
        let shares = Shares {
            wanted: wanted.saturating_sub(shrunk.freed),
            above: rotation.mmus().filter_map(used).map(above_floor).sum(),
        };
        for mmu in rotation.mmus() {
            let left = wanted.saturating_sub(shrunk.freed);
            shrunk.freed += mmu
                .try_locked(|core| core.shrink(shares.of(core.state.used).min(left)))
                .unwrap_or(0);
        }
        for mmu in rotation.mmus() {
            let left = wanted.saturating_sub(shrunk.freed);
            shrunk.freed += mmu.try_locked(|core| core.shrink(left)).unwrap_or(0);
        }
        shrunk
    }
}
