//! Roots: where the hardware's walk begins, one in use per virtual CPU and a few previous ones.
//!
//! A root holds its pages by their root count. In long mode it is one page; outside it is up to four
//! page directories behind a page-directory-pointer table of the virtual CPU's own, below 4 GiB.

use crate::error::MmuError;
use crate::host::Host;
use crate::lock::Ordering;
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
#[derive(Clone, Copy, Eq, Debug)]
pub(crate) struct RootKey {
    pub role: Role,
    pub table: Gfn,
    pub pdptrs: Pdptrs,
}

impl PartialEq for RootKey {
    /// The table first, in which most keys differ.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.table == other.table && self.role == other.role && self.pdptrs == other.pdptrs
    }
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
    /// When it last became the current one, as [`VcpuRoots::switches`] counts.
    used: u64,
}

/// The roots of one virtual CPU: one in use, and the previous ones.
pub(crate) struct VcpuRoots {
    held: [Option<Root>; 1 + MAXIMUM_PREVIOUS],
    /// The place of the one in use.
    current: Option<usize>,
    /// How often another root has become the current one.
    switches: u64,
    /// The epoch at which all of them were last found usable.
    usable_at: Option<u64>,
    /// The page-directory-pointer table for use outside long mode.
    pub pointers: Hpa,
}

impl VcpuRoots {
    /// None yet.
    pub const fn new(pointers: Hpa) -> Self {
        Self {
            held: [None; 1 + MAXIMUM_PREVIOUS],
            current: None,
            switches: 0,
            usable_at: None,
            pointers,
        }
    }

    /// All that are held.
    pub fn iter(&self) -> impl Iterator<Item = &Root> {
        self.held.iter().flatten()
    }

    #[inline]
    fn current(&self) -> Option<&Root> {
        self.held.get(self.current?)?.as_ref()
    }

    #[inline]
    fn current_mut(&mut self) -> Option<&mut Root> {
        self.held.get_mut(self.current?)?.as_mut()
    }

    /// Makes the root for `key` the current one, if it is among those held.
    #[inline]
    fn switch_to(&mut self, key: &RootKey) -> Option<RootChange> {
        if self.current().is_some_and(|root| root.key == *key) {
            return Some(RootChange::Same);
        }
        let mut places = self.held.iter();
        let place = places.position(|root| root.as_ref().is_some_and(|root| root.key == *key))?;
        self.use_place(place);
        Some(RootChange::Changed)
    }

    #[inline]
    fn use_place(&mut self, place: usize) {
        self.current = Some(place);
        self.switches += 1;
        if let Some(root) = &mut self.held[place] {
            root.used = self.switches;
        }
    }

    /// Takes out the root that has not been the current one for the longest time, so that no more than
    /// `keep` stay.
    fn take_excess(&mut self, keep: usize) -> Option<Root> {
        if self.iter().count() <= keep {
            return None;
        }
        let oldest = self.held.iter_mut().filter(|root| root.is_some());
        oldest
            .min_by_key(|root| root.as_ref().map_or(0, |root| root.used))?
            .take()
    }
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
        let root = self.state.vcpus[vcpu].as_ref()?.current()?;
        root.pages[first_index(format, gva)]
    }

    /// The page that the hardware reads first for `gva`, if the root is usable.
    pub fn root_page(&self, vcpu: usize, key: &RootKey, gva: Gva) -> Option<ActivePage> {
        let root = self.state.vcpus[vcpu].as_ref()?.current()?;
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
        // Whatever invalidates a root counts an epoch while it holds the lock.
        let epoch = self.root_epoch.load(Ordering::Acquire);
        let roots = self.state.vcpus[vcpu].as_ref()?;
        if roots.usable_at != Some(epoch) {
            if !roots.iter().all(|root| self.is_usable(root)) {
                return None;
            }
            self.roots(vcpu).usable_at = Some(epoch);
        }
        let change = self.roots(vcpu).switch_to(key)?;
        if change == RootChange::Changed {
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
        self.release_unusable_roots(vcpu);
        if let Some(change) = self.use_cached_root(vcpu, key, flushes) {
            return Ok(change);
        }
        let keep = self.config.previous_roots.min(MAXIMUM_PREVIOUS);
        let mut batch = Batch::new();
        self.roots(vcpu).current = None;
        while let Some(root) = self.roots(vcpu).take_excess(keep) {
            self.release(&root, &mut batch);
        }
        self.commit(batch);
        let root = self.build_root(*key, paging, flushes)?;
        let roots = self.roots(vcpu);
        let place = roots.held.iter().position(Option::is_none);
        let place = place.expect("one more root has a place than is kept");
        roots.held[place] = Some(root);
        roots.use_place(place);
        self.write_pointers(vcpu);
        self.sync_current(vcpu, flushes);
        Ok(RootChange::Changed)
    }

    /// Lets go of the roots whose pages have been zapped or are obsolete.
    fn release_unusable_roots(&mut self, vcpu: usize) {
        let mut batch = Batch::new();
        for place in 0..self.roots(vcpu).held.len() {
            if let Some(root) = self.roots(vcpu).held[place]
                && !self.is_usable(&root)
            {
                let roots = self.roots(vcpu);
                roots.held[place] = None;
                roots.current = roots.current.filter(|current| *current != place);
                self.release(&root, &mut batch);
            }
        }
        self.commit(batch);
    }

    /// Brings up to date what the current root leads to.
    #[inline]
    pub fn sync_current(&mut self, vcpu: usize, flushes: u64) {
        let any = self.state.pages.unsync().count() > 0;
        let Some(root) = self.roots(vcpu).current_mut() else {
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
        let Some(root) = roots
            .current()
            .filter(|root| !root.key.role.format.is_long())
        else {
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
        let epoch = self.root_epoch.load(Ordering::Acquire);
        let roots = self.roots(vcpu);
        let is_usable = roots.usable_at == Some(epoch);
        let Some(root) = roots
            .current_mut()
            .filter(|root| is_usable && root.key == *key && root.synced + 1 == flushes)
        else {
            return false;
        };
        root.synced = flushes;
        let pages = root.pages;
        let unsync = self.state.pages.unsync();
        if unsync.tables > 0 {
            self.sync_within(pages.into_iter().flatten(), Reach::UpperTables);
        }
        if unsync.leaves > 0
            && let Some(page) = pages[first_index(key.role.format, gva)]
        {
            self.sync_address(page, gva);
        }
        true
    }

    /// The hardware's address of the current root.
    #[inline]
    pub fn root_address(&mut self, vcpu: usize, paging: &GuestPaging) -> Hpa {
        let roots = self.roots(vcpu);
        match roots.current().and_then(|root| root.pages[0]) {
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
            used: 0,
        })
    }

    fn release(&mut self, root: &Root, batch: &mut Batch) {
        for id in root.pages.iter().flatten() {
            self.release_root(*id, batch);
        }
    }

    /// Lets go of all previous roots of all virtual CPUs; whether there were any.
    pub fn release_previous_roots(&mut self, batch: &mut Batch) -> bool {
        let mut any = false;
        for vcpu in 0..self.state.vcpus.len() {
            for place in 0..=MAXIMUM_PREVIOUS {
                let Some(roots) = self.state.vcpus[vcpu].as_mut() else {
                    break;
                };
                if roots.current != Some(place)
                    && let Some(root) = roots.held[place].take()
                {
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
        roots.current = None;
        let held = core::mem::replace(&mut roots.held, [None; 1 + MAXIMUM_PREVIOUS]);
        for root in held.into_iter().flatten() {
            self.release(&root, batch);
        }
    }
}
