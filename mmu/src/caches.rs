//! Caches: memory is allocated before the lock is taken, for the worst that an operation can need.
//!
//! The lock is let go for each allocation and what it needs looked at anew after it, because the
//! low-memory callback may have come in between and emptied the caches.

#![allow(
    clippy::redundant_closure_for_method_calls,
    reason = "the methods' own lifetimes are not general enough"
)]

use crate::arena::Storage;
use crate::error::MmuError;
use crate::fault::FAULT_PAGES;
use crate::host::{Host, Zone};
use crate::level::ENTRIES;
use crate::lock::MutexGuard;
use crate::mmu::Mmu;
use crate::page::{PageId, Translations};
use crate::root::ROOT_PAGES;
use crate::state::{Core, State};
use alloc::vec::Vec;
use hashbrown::HashTable;
use umbra_vcpu::address::Hpa;

/// What an operation may take while it holds the lock.
#[derive(Clone, Copy)]
pub(crate) struct Needs {
    pub pages: usize,
    pub entries: usize,
}

pub(crate) const FAULT: Needs = Needs {
    pages: FAULT_PAGES,
    entries: 64,
};

pub(crate) const ROOT: Needs = Needs {
    pages: ROOT_PAGES,
    entries: 8,
};

/// Pages that any operation may take.
const MOST_PAGES: usize = 4;

const _: () = assert!(FAULT_PAGES <= MOST_PAGES && ROOT_PAGES <= MOST_PAGES);

/// Pages' worth of memory that is fetched beyond what is needed, if it is to be had, once any must be.
const SPARE_PAGES: usize = 12;

/// Memory allocated without the lock, on its way into the state.
#[derive(Default)]
struct TopUp {
    frames: Vec<Hpa>,
    translations: Vec<Translations>,
    pages: Option<Storage<crate::page::ShadowPage>>,
    nodes: Option<Storage<crate::rmap::Node>>,
    hash: Option<HashTable<PageId>>,
}

fn zeroed_translations() -> Option<Translations> {
    let mut entries = Vec::new();
    entries.try_reserve_exact(ENTRIES).ok()?;
    entries.resize(ENTRIES, 0);
    entries.into_boxed_slice().try_into().ok()
}

/// Brings `items` to `needed`, and beyond if there is enough. `None` if there is not.
fn fetch<T>(
    items: &mut Vec<T>,
    needed: usize,
    mut allocate: impl FnMut() -> Option<T>,
) -> Option<()> {
    if items.len() >= needed {
        return Some(());
    }
    let wanted = needed + SPARE_PAGES;
    items.try_reserve_exact(wanted - items.len()).ok()?;
    while items.len() < wanted {
        match allocate() {
            Some(item) => items.push(item),
            None if items.len() >= needed => break,
            None => return None,
        }
    }
    Some(())
}

/// Moves `items` into a cache as far as it has room without allocating.
fn pour<T>(items: &mut Vec<T>, cache: &mut Vec<T>) {
    let room = cache.capacity() - cache.len();
    cache.extend(items.drain(items.len().saturating_sub(room)..));
}

impl<H: Host> Mmu<H> {
    /// The lock, with everything in the caches that `needs` names.
    pub(crate) fn topped_up(&self, needs: Needs) -> Result<MutexGuard<'_, State>, MmuError> {
        let mut state = self.state.lock();
        let full = state.caches.frames.len() >= needs.pages
            && state.caches.translations.len() >= needs.pages
            && state.pages.arena().available() >= needs.pages
            && state.nodes.available() >= needs.entries
            && !state.pages.hash_needs_room(needs.pages);
        if full {
            return Ok(state);
        }
        drop(state);
        self.top_up(needs)
    }

    fn top_up(&self, needs: Needs) -> Result<MutexGuard<'_, State>, MmuError> {
        let mut top_up = TopUp::default();
        loop {
            let mut state = self.state.lock();
            Self::refill(&mut state, &mut top_up);
            let frames = needs.pages.saturating_sub(state.caches.frames.len());
            let translations = needs.pages.saturating_sub(state.caches.translations.len());
            let pages = (state.pages.arena().available() < needs.pages)
                .then(|| state.pages.arena().wanted_capacity(needs.pages));
            let nodes = (state.nodes.available() < needs.entries)
                .then(|| state.nodes.wanted_capacity(needs.entries));
            let hash = state
                .pages
                .hash_needs_room(needs.pages)
                .then(|| state.pages.wanted_hash_capacity(needs.pages));
            if frames + translations == 0 && pages.is_none() && nodes.is_none() && hash.is_none() {
                self.dispose(&mut top_up);
                return Ok(state);
            }
            drop(state);
            // What has been replaced goes first.
            top_up.pages = None;
            top_up.nodes = None;
            top_up.hash = None;
            let filled = self.allocate(&mut top_up, frames, translations, (pages, nodes, hash));
            if filled.is_none() {
                self.dispose(&mut top_up);
                return Err(MmuError::OutOfMemory);
            }
        }
    }

    fn allocate(
        &self,
        top_up: &mut TopUp,
        frames: usize,
        translations: usize,
        (pages, nodes, hash): (Option<usize>, Option<usize>, Option<usize>),
    ) -> Option<()> {
        fetch(&mut top_up.frames, frames, || self.host.allocate(Zone::Any))?;
        fetch(&mut top_up.translations, translations, zeroed_translations)?;
        if let Some(capacity) = pages {
            top_up.pages = Some(Storage::allocate(capacity)?);
        }
        if let Some(capacity) = nodes {
            top_up.nodes = Some(Storage::allocate(capacity)?);
        }
        if let Some(capacity) = hash {
            let mut table = HashTable::new();
            table.try_reserve(capacity, |_| 0).ok()?;
            top_up.hash = Some(table);
        }
        Some(())
    }

    fn refill(state: &mut State, top_up: &mut TopUp) {
        let caches = &mut state.caches;
        pour(&mut top_up.frames, &mut caches.frames);
        pour(&mut top_up.translations, &mut caches.translations);
        if let Some(storage) = &mut top_up.pages {
            state.pages.arena().grow(storage);
        }
        if let Some(storage) = &mut top_up.nodes {
            state.nodes.grow(storage);
        }
        if let Some(table) = &mut top_up.hash {
            state.pages.grow_hash(table);
        }
    }

    fn dispose(&self, top_up: &mut TopUp) {
        for frame in top_up.frames.drain(..) {
            self.host.free(frame);
        }
    }

    /// Frees the caches that faults fill ahead. Returns how many frames went.
    pub fn release_caches(&self) -> usize {
        self.locked(|core| core.release_caches())
    }
}

impl<H: Host> Core<'_, H> {
    /// Frees what the caches hold.
    pub fn release_caches(&mut self) -> usize {
        let frames = self.state.caches.frames.len();
        while let Some(frame) = self.state.caches.frames.pop() {
            self.host.free(frame);
        }
        self.state.caches.translations.clear();
        frames
    }
}
