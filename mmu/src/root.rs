//! Roots: where the hardware's walk begins, one in use per virtual CPU and a few previous ones.
//!
//! A root holds its pages by their root count. In long mode it is one page; outside it is up to four
//! page directories behind a page-directory-pointer table of the virtual CPU's own, below 4 GiB.

use crate::error::MmuError;
use crate::host::Host;
use crate::page::{ActivePage, PageId};
use crate::registers::{Format, GuestPaging, Pdptrs};
use crate::role::{EntryFormat, Role, bits};
use crate::spte::Spte;
use crate::state::Core;
use crate::sync::Reach;
use crate::vcpu::RootChange;
use crate::zap::Batch;
use umbra_vcpu::address::{Gfn, Gva, Hpa};

/// The most previous roots that can be configured.
pub(crate) const MAXIMUM_PREVIOUS: usize = 8;

/// What makes two roots the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RootKey {
    pub role: Role,
    pub table: Gfn,
    pub pdptrs: Pdptrs,
}

impl RootKey {
    pub fn of(paging: &GuestPaging) -> Self {
        Self {
            role: Role::root(paging),
            table: paging.table,
            pdptrs: paging.pdptrs,
        }
    }

    /// Follows a change of nothing but CR3 and the pointers. Whether it is another key now.
    pub fn set_table(&mut self, paging: &GuestPaging) -> bool {
        let changed = self.table != paging.table || self.pdptrs != paging.pdptrs;
        self.table = paging.table;
        self.pdptrs = paging.pdptrs;
        changed
    }
}

/// Pages held for one value of the guest's registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Root {
    pub key: RootKey,
    pub pages: [Option<PageId>; 4],
    /// How often the virtual CPU had flushed its translations when all that the root leads to was
    /// last up to date.
    pub synced: u64,
}

/// The roots of one virtual CPU.
pub(crate) struct VcpuRoots {
    pub current: Option<Root>,
    /// The most recent first.
    pub previous: [Option<Root>; MAXIMUM_PREVIOUS],
    /// The page-directory-pointer table for use outside long mode.
    pub pointers: Hpa,
}

/// Which of a root's pages translates `gva`.
#[inline]
pub(crate) const fn first_index(format: Format, gva: Gva) -> usize {
    if format.is_long() {
        0
    } else {
        (gva.as_u64() >> 30 & 3) as usize
    }
}

/// Pages that loading a root can need.
pub(crate) const ROOT_PAGES: usize = 4;

impl<H: Host> Core<'_, H> {
    /// Whether every page of a root is still good to use.
    pub fn is_usable(&self, root: &Root) -> bool {
        root.pages.iter().flatten().all(|id| {
            self.state.pages.active(*id).is_some()
                && self.state.pages[*id].generation == self.state.generation
        })
    }

    fn roots(&mut self, vcpu: usize) -> &mut VcpuRoots {
        self.state.vcpus[vcpu]
            .as_mut()
            .expect("a virtual CPU outlives its MMU's use of it")
    }

    /// The page that the hardware reads first for `gva`, where the current root is known to be good.
    #[inline]
    pub fn current_page(&self, vcpu: usize, format: Format, gva: Gva) -> Option<PageId> {
        let root = self.state.vcpus[vcpu].as_ref()?.current.as_ref()?;
        root.pages[first_index(format, gva)]
    }

    /// The page that the hardware reads first for `gva`, if the root is usable.
    pub fn root_page(&self, vcpu: usize, key: &RootKey, gva: Gva) -> Option<ActivePage> {
        let root = self.state.vcpus[vcpu].as_ref()?.current.as_ref()?;
        if root.key != *key {
            return None;
        }
        let index = first_index(key.role.format, gva);
        let page = self.state.pages.active(root.pages[index]?)?;
        (self.state.pages[page.id()].generation == self.state.generation).then_some(page)
    }

    /// Makes the root for `key` the current one if it is that already or a previous one, and brings
    /// up to date what it leads to unless it is so since `flushes`. `None` if it takes more.
    pub fn use_cached_root(
        &mut self,
        vcpu: usize,
        key: &RootKey,
        flushes: u64,
    ) -> Option<RootChange> {
        let roots = self.state.vcpus[vcpu].as_ref()?;
        let current = roots.current.as_ref()?;
        if !self.is_usable(current) {
            return None;
        }
        let mut change = RootChange::Same;
        if current.key != *key {
            let position = roots.previous.iter().position(|root| {
                root.as_ref()
                    .is_some_and(|root| root.key == *key && self.is_usable(root))
            })?;
            let roots = self.roots(vcpu);
            core::mem::swap(&mut roots.current, &mut roots.previous[position]);
            roots.previous[..=position].rotate_right(1);
            change = RootChange::Changed;
            self.write_pointers(vcpu);
        }
        self.sync_current(vcpu, flushes);
        Some(change)
    }

    /// Makes the root for `paging` the current one, up to date.
    pub fn load_root(
        &mut self,
        vcpu: usize,
        key: &RootKey,
        paging: &GuestPaging,
        flushes: u64,
    ) -> Result<RootChange, MmuError> {
        if let Some(change) = self.use_cached_root(vcpu, key, flushes) {
            return Ok(change);
        }
        let mut batch = Batch::new();
        self.retire_current(vcpu, &mut batch);
        let cached = self.take_previous(vcpu, key, &mut batch);
        self.commit(batch);
        let root = match cached {
            Some(root) => root,
            None => self.build_root(*key, paging, flushes)?,
        };
        self.roots(vcpu).current = Some(root);
        self.write_pointers(vcpu);
        self.sync_current(vcpu, flushes);
        Ok(RootChange::Changed)
    }

    /// Brings up to date what the current root leads to.
    pub fn sync_current(&mut self, vcpu: usize, flushes: u64) {
        let any = self.state.pages.unsync().count() > 0;
        let Some(root) = &mut self.roots(vcpu).current else {
            return;
        };
        let synced = core::mem::replace(&mut root.synced, flushes);
        if any && synced != flushes {
            let pages = root.pages;
            self.sync_within(pages.into_iter().flatten(), Reach::All);
        }
    }

    /// Lets the pointers that the hardware reads outside long mode be those of the current root.
    fn write_pointers(&mut self, vcpu: usize) {
        let roots = self.roots(vcpu);
        let pointers = roots.pointers;
        let Some(root) = roots.current.filter(|root| !root.key.role.format.is_long()) else {
            return;
        };
        for (index, page) in root.pages.into_iter().enumerate() {
            let value = page.map_or(Spte::EMPTY, |id| Spte::pointer(self.state.pages[id].frame));
            self.host.store(pointers, index, value.0);
        }
    }

    /// INVLPG: the one address in the current root, and its upper tables, are up to date as of
    /// `flushes`. Other roots will be when they are loaded. `false` if the current root, too, has to
    /// be loaded first.
    pub fn invalidate_address(
        &mut self,
        vcpu: usize,
        key: &RootKey,
        gva: Gva,
        flushes: u64,
    ) -> bool {
        let current = self.roots(vcpu).current;
        let Some(root) = current
            .filter(|root| root.key == *key && root.synced + 1 == flushes && self.is_usable(root))
        else {
            return false;
        };
        let unsync = self.state.pages.unsync();
        if unsync.tables > 0 {
            self.sync_within(root.pages.into_iter().flatten(), Reach::UpperTables);
        }
        if unsync.leaves > 0
            && let Some(page) = root.pages[first_index(key.role.format, gva)]
        {
            self.sync_address(page, gva);
        }
        self.roots(vcpu).current = Some(Root {
            synced: flushes,
            ..root
        });
        true
    }

    /// The hardware's address of the current root.
    pub fn root_address(&mut self, vcpu: usize, paging: &GuestPaging) -> Hpa {
        let roots = self.roots(vcpu);
        match roots.current.and_then(|root| root.pages[0]) {
            Some(page) if paging.format.is_long() => self.state.pages[page].frame,
            _ => roots.pointers,
        }
    }

    fn build_root(
        &mut self,
        key: RootKey,
        paging: &GuestPaging,
        flushes: u64,
    ) -> Result<Root, MmuError> {
        let mut wanted = [None; 4];
        match paging.format {
            Format::Long4 | Format::Long5 => wanted[0] = Some(key.table),
            Format::Legacy => wanted = [Some(key.table); 4],
            Format::Unpaged => {
                wanted = core::array::from_fn(|index| Some(Gfn::new((index as u64) << 18)));
            }
            Format::Pae => {
                for (gfn, pointer) in wanted.iter_mut().zip(paging.pdptrs.0) {
                    *gfn = (pointer & bits::PRESENT != 0)
                        .then(|| EntryFormat::of(paging).table(pointer));
                }
            }
        }
        self.make_pages_available(wanted.iter().flatten().count())?;
        let mut pages = [None; 4];
        for (index, gfn) in wanted.iter().enumerate() {
            let Some(gfn) = *gfn else { continue };
            if let Some(page) = self.get_page(gfn, key.role.for_pointer(index)) {
                let roots = &mut self.state.pages[page.id()].root_count;
                *roots += 1;
                self.state.pinned += usize::from(*roots == 1);
                self.state.pages.note_orphan(page.id());
                pages[index] = Some(page.id());
            }
        }
        Ok(Root {
            key,
            pages,
            synced: flushes,
        })
    }

    fn release(&mut self, root: &Root, batch: &mut Batch) {
        for id in root.pages.iter().flatten() {
            self.release_root(*id, batch);
        }
    }

    /// The current root becomes the most recent previous one, if it is any good.
    fn retire_current(&mut self, vcpu: usize, batch: &mut Batch) {
        let Some(root) = self.roots(vcpu).current.take() else {
            return;
        };
        let keep = self.config.previous_roots.min(MAXIMUM_PREVIOUS);
        if keep == 0 || !self.is_usable(&root) {
            self.release(&root, batch);
            return;
        }
        let previous = &mut self.roots(vcpu).previous;
        let oldest = previous[keep - 1].take();
        previous[..keep].rotate_right(1);
        previous[0] = Some(root);
        if let Some(oldest) = oldest {
            self.release(&oldest, batch);
        }
    }

    fn take_previous(&mut self, vcpu: usize, key: &RootKey, batch: &mut Batch) -> Option<Root> {
        let position = self
            .roots(vcpu)
            .previous
            .iter()
            .position(|root| root.as_ref().is_some_and(|root| root.key == *key))?;
        let root = self.roots(vcpu).previous[position].take()?;
        self.roots(vcpu).previous[position..].rotate_left(1);
        if self.is_usable(&root) {
            return Some(root);
        }
        self.release(&root, batch);
        None
    }

    /// Lets go of all previous roots of all virtual CPUs; whether there were any.
    pub fn release_previous_roots(&mut self, batch: &mut Batch) -> bool {
        let mut any = false;
        for vcpu in 0..self.state.vcpus.len() {
            for position in 0..MAXIMUM_PREVIOUS {
                let Some(roots) = self.state.vcpus[vcpu].as_mut() else {
                    break;
                };
                if let Some(root) = roots.previous[position].take() {
                    any = true;
                    self.release(&root, batch);
                }
            }
        }
        any
    }

    /// Lets go of all roots of one virtual CPU.
    pub fn release_all_roots(&mut self, vcpu: usize, batch: &mut Batch) {
        let roots = self.roots(vcpu);
        let (current, previous) = (roots.current.take(), roots.previous);
        roots.previous = [None; MAXIMUM_PREVIOUS];
        for root in current.into_iter().chain(previous.into_iter().flatten()) {
            self.release(&root, batch);
        }
    }
}
