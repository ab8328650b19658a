//! The count of shadow pages over all VMs, and its limit.

use crate::lock::{AtomicUsize, Ordering};

/// Shared by the MMUs of one pool. A page is counted from before it exists until its frame is free.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicUsize,
    limit: AtomicUsize,
}

impl Budget {
    pub fn new(limit: usize) -> Self {
        Self {
            used: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
        }
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Release);
    }

    pub fn available(&self) -> usize {
        self.limit().saturating_sub(self.used())
    }

    /// Pages too many for `more` to fit.
    pub fn excess_with(&self, more: usize) -> usize {
        (self.used() + more).saturating_sub(self.limit())
    }

    /// Counts `pages` pages ahead, unless that would pass the limit.
    pub fn reserve(&self, pages: usize) -> bool {
        let limit = self.limit();
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                used.checked_add(pages).filter(|total| *total <= limit)
            })
            .is_ok()
    }

    pub fn release(&self, pages: usize) {
        let before = self.used.fetch_sub(pages, Ordering::AcqRel);
        debug_assert!(before >= pages, "the total count of shadow pages drifted");
    }
}
