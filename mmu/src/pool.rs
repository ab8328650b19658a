//! All MMUs of the host together: the total limit, and the shrinker.
//!
//! The shrinker runs from the low-memory callback, perhaps while one of these very locks is held by
//! its caller. So it only try-locks, counts what it had to skip, and never allocates.

use crate::budget::Budget;
use crate::config::{MINIMUM_PAGES, MmuConfig};
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
    /// Reclaims `wanted` pages from every VM but `asking`, for use under the common limit. Returns
    /// how many came free. No lock may be held.
    pub fn relieve(&self, asking: &Mmu<H>, wanted: usize) -> usize {
        let Some(mmus) = self.mmus.try_lock() else {
            return 0;
        };
        let count = mmus.len();
        let start = self.rotation.fetch_add(1, Ordering::Relaxed);
        let mut freed = 0;
        for step in 0..count {
            let Some(mmu) = mmus[(start + step) % count].upgrade() else {
                continue;
            };
            if freed < wanted && !core::ptr::eq(Arc::as_ptr(&mmu), asking) {
                freed += mmu
                    .try_locked(|core| core.recycle(wanted - freed))
                    .unwrap_or(0);
            }
        }
        freed
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

    /// Changes the total limit. What exceeds it is recycled as VMs need pages, theirs or others'.
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
        let count = members.len();
        if count == 0 || wanted == 0 {
            return shrunk;
        }
        let start = self.members.rotation.fetch_add(1, Ordering::Relaxed) % count;
        let in_rotation =
            || (0..count).filter_map(|step| members[(start + step) % count].upgrade());
        for mmu in in_rotation() {
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
        let spare: usize = in_rotation()
            .filter_map(|mmu| mmu.try_locked(|core| core.state.used.saturating_sub(MINIMUM_PAGES)))
            .sum();
        let missing = wanted.saturating_sub(shrunk.freed);
        for mmu in in_rotation() {
            let left = wanted.saturating_sub(shrunk.freed);
            shrunk.freed += mmu
                .try_locked(|core| {
                    let above = core.state.used.saturating_sub(MINIMUM_PAGES);
                    let share = (missing * above)
                        .div_ceil(spare.max(1))
                        .min(above)
                        .min(left);
                    core.shrink(share)
                })
                .unwrap_or(0);
        }
        for mmu in in_rotation() {
            let left = wanted.saturating_sub(shrunk.freed);
            shrunk.freed += mmu.try_locked(|core| core.shrink(left)).unwrap_or(0);
        }
        shrunk
    }
}
