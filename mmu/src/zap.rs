//! Zapping: pages are prepared into a batch and the batch is committed once.
//!
//! Preparing takes a page out of every structure and clears its entries, so that nothing new can
//! reach it; a page that lost its last parent goes with it. Committing sends the one TLB flush and
//! only then frees the frames. A page that is a root in use is not freed: it becomes `Invalid`,
//! and the last to let go of it frees it.

#![allow(
    clippy::redundant_closure_for_method_calls,
    reason = "the methods' own lifetimes are not general enough"
)]

use crate::host::Host;
use crate::lock::Ordering;
use crate::mmu::Mmu;
use crate::page::{ActivePage, GROUP, PageId, PageState, ones};
use crate::state::{CACHED, Core};
use alloc::vec::Vec;
use umbra_vcpu::address::Gfn;

/// Zapped pages that still have their frames. The pages themselves are the list.
#[must_use = "zapped pages are freed by committing the batch"]
pub(crate) struct Batch {
    first: Option<PageId>,
    length: usize,
}

impl Batch {
    pub const fn new() -> Self {
        Self {
            first: None,
            length: 0,
        }
    }

    /// Pages that the commit will free.
    pub fn len(&self) -> usize {
        self.length
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        debug_assert!(
            self.first.is_none(),
            "a batch of zapped pages was dropped uncommitted"
        );
    }
}

impl<H: Host> Core<'_, H> {
    /// Zaps `page` and every page that only it pointed to. Returns how many left the active list.
    pub fn prepare_zap(&mut self, page: ActivePage, batch: &mut Batch) -> usize {
        let id = page.id();
        // Off the lists first: nothing below can find the page any more.
        let rooted = self.state.pages[id].root_count > 0;
        let state = if rooted {
            PageState::Invalid
        } else {
            PageState::Zapped
        };
        self.state.pages.retire(page, state);
        self.state.counters.mmu_shadow_zapped += 1;
        let mut zapped = 1;
        while let Some(parent) = self.state.nodes.first(self.state.pages[id].parents) {
            self.drop_entry(parent.page, parent.index);
        }
        for group in ones(self.state.pages[id].occupied) {
            if self.state.pages[id].used_entries == 0 {
                break;
            }
            for index in group * GROUP..(group + 1) * GROUP {
                if let Some(child) = self.drop_entry(id, index)
                    && self.is_orphan(child)
                    && let Some(child) = self.state.pages.active(child)
                {
                    zapped += self.prepare_zap(child, batch);
                }
            }
        }
        let shadow = &self.state.pages[id];
        if !shadow.role.is_direct() {
            let gfn = shadow.gfn;
            if let Some(slot) = self.state.slots.of(gfn) {
                slot.allow_large(gfn);
            }
        }
        if rooted {
            self.state.flush_pending = true;
            self.root_epoch.fetch_add(1, Ordering::Release);
        } else {
            self.add(id, batch);
        }
        zapped
    }

    /// Whether nothing leads to the page.
    pub fn is_orphan(&self, id: PageId) -> bool {
        let page = &self.state.pages[id];
        page.parents.is_empty() && page.root_count == 0
    }

    fn add(&mut self, id: PageId, batch: &mut Batch) {
        self.state.pages[id].next_in_batch = batch.first.replace(id);
        batch.length += 1;
    }

    /// Flushes once and frees what was prepared.
    pub fn commit(&mut self, mut batch: Batch) {
        let mut at = batch.first.take();
        if at.is_none() {
            return;
        }
        self.state.flush_pending = true;
        self.flush();
        let mut freed = 0;
        while let Some(id) = at {
            let page = self.state.pages.release(id);
            at = page.next_in_batch;
            freed += 1;
            // Every entry was cleared, so the frame is as good as a new one.
            give(&mut self.state.caches.frames, page.frame, |frame| {
                self.host.free(frame);
            });
            if let Some(translations) = page.translations {
                give(&mut self.state.caches.translations, translations, drop);
            }
        }
        self.state.used -= freed;
        self.budget.release(freed);
    }

    /// Takes a root's hold on its page away; an invalid page that nobody holds any more is freed.
    pub fn release_root(&mut self, id: PageId, batch: &mut Batch) {
        let page = &mut self.state.pages[id];
        debug_assert!(page.root_count > 0, "a root was released twice");
        page.root_count -= 1;
        if page.root_count == 0 {
            self.state.pinned -= 1;
            if page.state == PageState::Invalid {
                page.state = PageState::Zapped;
                self.add(id, batch);
            }
        }
        self.state.pages.note_orphan(id);
    }

    fn first_table(&self, gfn: Gfn) -> Option<ActivePage> {
        let mut pages = self.state.pages.of(gfn);
        let id = pages.find(|id| !self.state.pages[*id].role.is_direct())?;
        self.state.pages.active(id)
    }

    /// Zaps every page that belongs to a guest frame.
    pub fn zap_gfn(&mut self, gfn: Gfn) -> usize {
        let mut batch = Batch::new();
        let mut zapped = 0;
        while let Some(page) = self.first_table(gfn) {
            zapped += self.prepare_zap(page, &mut batch);
        }
        self.commit(batch);
        zapped
    }
}

impl<H: Host> Mmu<H> {
    /// Zaps every shadow page, in bounded steps between which guests may go on with new ones.
    pub fn zap_all(&self) {
        self.locked(|core| core.start_zap_all());
        while self.locked(|core| core.zap_obsolete(32)) {}
    }

    /// Zaps every shadow page of a guest table. Returns how many pages went.
    pub fn unprotect(&self, gfn: Gfn) -> usize {
        self.locked(|core| core.zap_gfn(gfn))
    }
}

impl<H: Host> Core<'_, H> {
    /// Makes every page obsolete. No root stays in use.
    fn start_zap_all(&mut self) {
        self.state.generation = self.state.generation.wrapping_add(1);
        let mut batch = Batch::new();
        self.release_previous_roots(&mut batch);
        self.commit(batch);
        self.root_epoch.fetch_add(1, Ordering::Release);
        self.state.flush_pending = true;
    }

    /// Zaps up to `step` obsolete pages (and their orphans), oldest first; whether any are left.
    fn zap_obsolete(&mut self, step: usize) -> bool {
        let mut batch = Batch::new();
        let mut left = step;
        self.state.pages.hand = self.state.pages.active_list().first();
        let mut more = false;
        while let Some(id) = self.state.pages.hand {
            if self.state.pages[id].generation == self.state.generation {
                self.state.pages.hand = self.state.pages.next(id);
                continue;
            }
            if left == 0 {
                more = true;
                break;
            }
            left -= 1;
            let Some(page) = self.state.pages.active(id) else {
                break;
            };
            self.prepare_zap(page, &mut batch);
        }
        self.state.pages.hand = None;
        self.commit(batch);
        more
    }
}

/// Keeps `item` in a cache that has room, or disposes of it.
fn give<T>(cache: &mut Vec<T>, item: T, dispose: impl FnOnce(T)) {
    if cache.len() < CACHED.min(cache.capacity()) {
        cache.push(item);
    } else {
        dispose(item);
    }
}
