//! The public face: one [`Mmu`] a VM, one [`Vcpu`] a virtual CPU.
//!
//! Each operation takes the VM's lock once it has all the memory that it may need, does its work on
//! the [`Core`], and sends what flush is pending before it lets go of the lock.

#![allow(
    clippy::redundant_closure_for_method_calls,
    reason = "the methods' own lifetimes are not general enough"
)]

use crate::arena::Storage;
use crate::budget::Budget;
use crate::config::MmuConfig;
use crate::error::{MmuError, NoPageAvailable};
use crate::fault::{FAULT_PAGES, FaultOutcome, Step};
use crate::host::{Host, SlotId, Touch, Zone};
use crate::level::ENTRIES;
use crate::lock::{AtomicU64, Mutex, MutexGuard, Ordering};
use crate::page::{MAXIMUM_PAGES, PageId, PageTable, Translations};
use crate::pool::Members;
use crate::registers::{
    Access, Attempt, Cr3, Fault, Format, GuestPaging, HardwareControls, InvalidPdpte, PageFault,
    PagingRegisters, Pdptrs, Pkru, ShadowMode,
};
use crate::rmap::RmapNodes;
use crate::role::{EntryFormat, bits};
use crate::root::{MAXIMUM_PREVIOUS, ROOT_PAGES, RootKey, VcpuRoots};
use crate::slot::{MemorySlot, Slot, SlotError, SlotFlags, Slots};
use crate::state::{CACHED, Caches, Core, State};
use crate::statistics::{Counters, Statistics};
use crate::walk::WalkEnd;
use crate::zap::Batch;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use hashbrown::HashTable;
use umbra_vcpu::address::{Gfn, Gpa, Gva, Hpa};

/// The shadow MMU of one VM, shared by its virtual CPUs.
pub struct Mmu<H: Host> {
    host: H,
    config: MmuConfig,
    pub(crate) budget: Arc<Budget>,
    /// The other MMUs under the same total limit.
    members: Option<Weak<Members<H>>>,
    root_epoch: AtomicU64,
    state: Mutex<State>,
}

/// A virtual CPU's paging state. It belongs to the MMU that made it.
#[derive(Debug)]
pub struct Vcpu {
    index: usize,
    registers: PagingRegisters,
    pkru: Pkru,
    paging: GuestPaging,
    /// What the root for `paging` is known by.
    root_key: RootKey,
    /// The epoch at which the root was last found good; `None` if it must be loaded.
    root_epoch: Option<u64>,
    /// How often the guest has flushed translations.
    flushes: u64,
    /// The last of these flushes after which the root was brought up to date.
    synced: u64,
    root: Hpa,
}

impl Vcpu {
    /// The registers as they were last loaded.
    pub fn registers(&self) -> &PagingRegisters {
        &self.registers
    }

    /// PKRU as it was last set.
    pub fn pkru(&self) -> Pkru {
        self.pkru
    }

    pub(crate) const fn index(&self) -> usize {
        self.index
    }

    pub(crate) const fn paging(&self) -> &GuestPaging {
        &self.paging
    }

    pub(crate) const fn root_key(&self) -> &RootKey {
        &self.root_key
    }
}

/// Whether the hardware has another root now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RootChange {
    /// The same root as at the last entry.
    Same,
    /// Another root: the hardware must forget the virtual CPU's old translations.
    Changed,
}

/// What the hardware needs to enter the guest.
#[derive(Clone, Copy, Debug)]
pub struct HardwareRoot {
    /// For the hardware's CR3.
    pub root: Hpa,
    /// The kind of table at `root`.
    pub mode: ShadowMode,
    /// Whether that is another one than before.
    pub change: RootChange,
    /// How the guest's control registers become the hardware's.
    pub controls: HardwareControls,
}

/// Why [`Mmu::translate`] has no address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranslateError {
    /// The access faults: inject this.
    Fault(PageFault),
    /// Another processor changed the guest's tables meanwhile: try again.
    Retry,
}

/// Whether memory was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accessed {
    /// It was, or may have been.
    Yes,
    /// No processor has translated an address to it.
    No,
}

/// What an operation may take while it holds the lock.
#[derive(Clone, Copy)]
struct Needs {
    pages: usize,
    entries: usize,
}

const FAULT: Needs = Needs {
    pages: FAULT_PAGES,
    entries: 64,
};
const ROOT: Needs = Needs {
    pages: ROOT_PAGES,
    entries: 8,
};

/// Pages that any operation may take.
const MOST_PAGES: usize = 4;
const _: () = assert!(FAULT_PAGES <= MOST_PAGES && ROOT_PAGES <= MOST_PAGES);

/// How often an operation is tried while other VMs, too, take what comes free.
const ATTEMPTS: usize = 4;

/// Pages' worth of memory that is fetched beyond what is needed, if it is to be had, once any must be.
const SPARE_PAGES: usize = CACHED - MOST_PAGES;

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
    /// An MMU without memory slots and virtual CPUs, with a total limit of its own.
    pub fn new(host: H, config: MmuConfig) -> Self {
        Self::with_budget(host, config, Arc::new(Budget::new(usize::MAX)), None)
    }

    pub(crate) fn with_budget(
        host: H,
        config: MmuConfig,
        budget: Arc<Budget>,
        members: Option<Weak<Members<H>>>,
    ) -> Self {
        let state = State {
            pages: PageTable::new(),
            nodes: RmapNodes::new(),
            slots: Slots::new(),
            caches: Caches {
                frames: Vec::with_capacity(2 * CACHED),
                translations: Vec::with_capacity(2 * CACHED),
            },
            vcpus: Vec::new(),
            limit: config.limit.min(MAXIMUM_PAGES),
            used: 0,
            pinned: 0,
            reserved: 0,
            generation: 0,
            mmio_generation: 0,
            flush_pending: false,
            counters: Counters::default(),
        };
        Self {
            host,
            config,
            budget,
            members,
            root_epoch: AtomicU64::new(0),
            state: Mutex::new(state),
        }
    }

    /// What the MMU was made with.
    pub fn host(&self) -> &H {
        &self.host
    }

    fn core<'a>(&'a self, state: &'a mut State) -> Core<'a, H> {
        Core {
            host: &self.host,
            config: &self.config,
            budget: &self.budget,
            root_epoch: &self.root_epoch,
            state,
        }
    }

    /// Runs `work` under the lock.
    pub(crate) fn locked<R>(&self, work: impl FnOnce(&mut Core<'_, H>) -> R) -> R {
        self.run(self.state.lock(), work)
    }

    /// Runs `work` under the lock if it is free.
    pub(crate) fn try_locked<R>(&self, work: impl FnOnce(&mut Core<'_, H>) -> R) -> Option<R> {
        Some(self.run(self.state.try_lock()?, work))
    }

    fn run<R>(
        &self,
        mut state: MutexGuard<'_, State>,
        work: impl FnOnce(&mut Core<'_, H>) -> R,
    ) -> R {
        let mut core = self.core(&mut state);
        let result = work(&mut core);
        core.release_reservation();
        core.flush();
        result
    }

    /// The lock, with everything in the caches that `needs` names.
    fn topped_up(&self, needs: Needs) -> Result<MutexGuard<'_, State>, MmuError> {
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

    /// Runs `work` with its memory at hand. If only the total limit is in the way, all VMs give pages
    /// up in proportion, and it runs again.
    fn with_relief<R>(
        &self,
        needs: Needs,
        work: impl Fn(&mut Core<'_, H>) -> Result<R, MmuError>,
    ) -> Result<R, MmuError> {
        let mut attempts = 0;
        loop {
            let result = self.run(self.topped_up(needs)?, &work);
            let Err(MmuError::NoPageAvailable(report)) = &result else {
                return result;
            };
            attempts += 1;
            let own_limit_holds = report.used + report.needed <= self.limit();
            let members = self.members.as_ref().and_then(Weak::upgrade);
            let relieved = members
                .filter(|_| own_limit_holds && attempts < ATTEMPTS)
                .is_some_and(|members| members.relieve(self, report.needed));
            if !relieved {
                return result;
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

    /// A virtual CPU after reset.
    ///
    /// # Errors
    /// Out of memory below 4 GiB.
    pub fn create_vcpu(&self) -> Result<Vcpu, MmuError> {
        let pointers = self
            .host
            .allocate(Zone::Below4GiB)
            .ok_or(MmuError::OutOfMemory)?;
        let registers = PagingRegisters::RESET;
        let paging = GuestPaging::new(&registers, Pkru(0), self.config.features);
        let roots = VcpuRoots {
            current: None,
            previous: [None; MAXIMUM_PREVIOUS],
            pointers,
        };
        let Some(index) = self.enter(roots) else {
            self.host.free(pointers);
            return Err(MmuError::OutOfMemory);
        };
        Ok(Vcpu {
            index,
            registers,
            pkru: Pkru(0),
            paging,
            root_key: RootKey::of(&paging),
            root_epoch: None,
            flushes: 0,
            synced: 0,
            root: Hpa::new(0),
        })
    }

    /// Puts a virtual CPU's roots where nobody's are. `None` if the host has no memory for the place.
    fn enter(&self, roots: VcpuRoots) -> Option<usize> {
        let mut larger = Vec::new();
        loop {
            let mut state = self.state.lock();
            let vcpus = &mut state.vcpus;
            if let Some(index) = vcpus.iter().position(Option::is_none) {
                vcpus[index] = Some(roots);
                return Some(index);
            }
            if vcpus.capacity() < larger.capacity() {
                larger.append(vcpus);
                core::mem::swap(&mut larger, vcpus);
            }
            if vcpus.len() < vcpus.capacity() {
                vcpus.push(Some(roots));
                return Some(vcpus.len() - 1);
            }
            let wanted = 2 * vcpus.len() + 4;
            drop(state);
            larger.try_reserve_exact(wanted).ok()?;
        }
    }

    /// Gives back all that a virtual CPU holds. It must not run any more.
    #[allow(clippy::needless_pass_by_value, reason = "the virtual CPU ends here")]
    pub fn destroy_vcpu(&self, vcpu: Vcpu) {
        let pointers = self.locked(|core| {
            let mut batch = Batch::new();
            core.release_all_roots(vcpu.index, &mut batch);
            core.commit(batch);
            core.state.flush_pending = true;
            core.state.vcpus[vcpu.index]
                .take()
                .map(|roots| roots.pointers)
        });
        if let Some(frame) = pointers {
            for index in 0..4 {
                self.host.store(frame, index, 0);
            }
            self.host.free(frame);
        }
    }

    /// Takes over the guest's paging registers after any of them was written. Like every such write
    /// this flushes the guest's TLB, which takes effect with the next [`Mmu::prepare_entry`].
    pub fn load_registers(&self, vcpu: &mut Vcpu, registers: PagingRegisters) {
        let old = core::mem::replace(&mut vcpu.registers, registers);
        vcpu.flushes += 1;
        if old.same_rules(&registers) {
            vcpu.paging.set_table(&registers);
            if vcpu.root_key.set_table(&vcpu.paging) {
                vcpu.root_epoch = None;
            }
        } else {
            self.renew(vcpu);
        }
    }

    /// Takes over PKRU after WRPKRU or XRSTOR.
    pub fn set_pkru(&self, vcpu: &mut Vcpu, pkru: Pkru) {
        if vcpu.pkru != pkru {
            vcpu.pkru = pkru;
            self.renew(vcpu);
        }
    }

    /// Derives anew what depends on the registers.
    fn renew(&self, vcpu: &mut Vcpu) {
        vcpu.paging = GuestPaging::new(&vcpu.registers, vcpu.pkru, self.config.features);
        vcpu.root_key = RootKey::of(&vcpu.paging);
        vcpu.root_epoch = None;
    }

    /// Reads the four page-directory-pointer-table entries that a load of `cr3` under PAE paging
    /// would (SDM vol. 3A 4.4.1).
    ///
    /// # Errors
    /// The first present entry with reserved bits set: #GP(0), and nothing is loaded.
    pub fn read_pdptrs(&self, cr3: Cr3) -> Result<Pdptrs, InvalidPdpte> {
        let table = cr3.pointer_table();
        let width = self.config.features.max_physical_address.min(52);
        let reserved = 0x1e6 | (u64::MAX << width);
        self.locked(|core| {
            let mut pdptrs = Pdptrs::default();
            for (index, entry) in pdptrs.0.iter_mut().enumerate() {
                let offset = table.page_offset() as usize + index * 8;
                let value = core.read_guest(Format::Pae, Gfn::containing(table), offset);
                if value & bits::PRESENT != 0 && value & reserved != 0 {
                    return Err(InvalidPdpte { index, value });
                }
                *entry = value;
            }
            Ok(pdptrs)
        })
    }

    /// Makes sure that the virtual CPU has a root. Call it before every entry into the guest.
    ///
    /// # Errors
    /// See [`MmuError`]; the call can be repeated.
    pub fn prepare_entry(&self, vcpu: &mut Vcpu) -> Result<HardwareRoot, MmuError> {
        let epoch = self.root_epoch.load(Ordering::Acquire);
        let mut change = RootChange::Same;
        if vcpu.root_epoch == Some(epoch) {
            if vcpu.synced != vcpu.flushes {
                self.locked(|core| core.sync_current(vcpu.index, vcpu.flushes));
            }
        } else {
            let (index, key, paging, flushes) =
                (vcpu.index, &vcpu.root_key, &vcpu.paging, vcpu.flushes);
            let cached = self.locked(|core| {
                let change = core.use_cached_root(index, key, flushes)?;
                Some((change, core.root_address(index, paging)))
            });
            let (loaded, root) = match cached {
                Some(found) => found,
                None => self.with_relief(ROOT, |core| {
                    let change = core.load_root(index, key, paging, flushes)?;
                    Ok((change, core.root_address(index, paging)))
                })?,
            };
            if loaded == RootChange::Changed || root != vcpu.root {
                change = RootChange::Changed;
            }
            vcpu.root = root;
            vcpu.root_epoch = Some(epoch);
        }
        vcpu.synced = vcpu.flushes;
        Ok(HardwareRoot {
            root: vcpu.root,
            mode: vcpu.paging.format.shadow_mode(),
            change,
            controls: vcpu.paging.controls(),
        })
    }

    /// Handles a page fault that the hardware took while it ran the guest.
    ///
    /// # Errors
    /// See [`MmuError`]; the guest's state is unchanged, so the call (or the guest) can be repeated.
    pub fn handle_page_fault(
        &self,
        vcpu: &mut Vcpu,
        fault: &Fault,
    ) -> Result<FaultOutcome, MmuError> {
        if let Some(outcome) = self.handle_fault_fast(vcpu, fault) {
            return Ok(outcome);
        }
        loop {
            let step = self.with_relief(FAULT, |core| {
                let root = core.root_page(vcpu.index, &vcpu.root_key, fault.gva);
                let step = core.handle_fault(&vcpu.paging, root, fault);
                let counters = &mut core.state.counters;
                if matches!(step, Ok(Step::Done(_))) {
                    counters.pf_taken += 1;
                }
                match &step {
                    Ok(Step::Done(FaultOutcome::Fixed)) => counters.pf_fixed += 1,
                    Ok(Step::Done(FaultOutcome::Inject(_))) => counters.pf_guest += 1,
                    Ok(Step::Done(FaultOutcome::Mmio { .. })) => counters.pf_mmio += 1,
                    Ok(Step::Allocate { .. }) | Err(_) => {}
                }
                step
            });
            let step =
                step.inspect_err(|_| self.locked(|core| core.state.counters.pf_taken += 1))?;
            match step {
                Step::Done(outcome) => return Ok(outcome),
                Step::Allocate { slot, page } => {
                    self.host.frame(slot, page, Touch::Allocate)?;
                }
            }
        }
    }

    /// Handles the faults that need nothing made but one entry.
    #[inline]
    fn handle_fault_fast(&self, vcpu: &Vcpu, fault: &Fault) -> Option<FaultOutcome> {
        let mut state = self.state.lock();
        if state.nodes.available() < FAULT.entries {
            return None;
        }
        // Whatever invalidates a root in use counts an epoch while it holds the lock.
        if vcpu.root_epoch != Some(self.root_epoch.load(Ordering::Acquire)) {
            return None;
        }
        let mut core = self.core(&mut state);
        let root = core.current_page(vcpu.index, vcpu.paging.format, fault.gva)?;
        let outcome = core.handle_fault_fast(&vcpu.paging, root, fault)?;
        let counters = &mut core.state.counters;
        counters.pf_taken += 1;
        match outcome {
            FaultOutcome::Mmio { .. } => counters.pf_mmio += 1,
            _ => counters.pf_fixed += 1,
        }
        debug_assert!(!core.state.flush_pending, "only an empty entry was filled");
        Some(outcome)
    }

    /// INVLPG, or INVPCID for one address.
    pub fn invalidate_page(&self, vcpu: &mut Vcpu, gva: Gva) {
        vcpu.flushes += 1;
        let done = self
            .locked(|core| core.invalidate_address(vcpu.index, &vcpu.root_key, gva, vcpu.flushes));
        if done {
            vcpu.synced = vcpu.flushes;
        }
    }

    /// INVPCID for more than one address, and whatever else flushes the guest's TLB. It takes effect
    /// with the next [`Mmu::prepare_entry`].
    #[allow(clippy::unused_self, reason = "the virtual CPU is this MMU's")]
    pub fn flush_guest_tlb(&self, vcpu: &mut Vcpu) {
        vcpu.flushes += 1;
    }

    /// Translates an address for the emulation of an instruction.
    ///
    /// # Errors
    /// The fault that the access raises, or that the tables changed meanwhile.
    pub fn translate(&self, vcpu: &Vcpu, gva: Gva, access: &Access) -> Result<Gpa, TranslateError> {
        let gva = vcpu.paging.linear(gva);
        self.locked(|core| {
            match core.walk(
                &vcpu.paging,
                gva,
                Attempt::of_access(access),
                access.marking,
            ) {
                Ok(walk) => Ok(Gpa::new(walk.gfn.base().as_u64() | gva.page_offset())),
                Err(WalkEnd::Fault(fault)) => Err(TranslateError::Fault(fault)),
                Err(WalkEnd::Changed) => Err(TranslateError::Retry),
            }
        })
    }

    /// The host has written guest memory at `gpa`: shadow entries that depend on it are dropped.
    pub fn track_guest_write(&self, gpa: Gpa, bytes: usize) {
        self.locked(|core| {
            let (mut at, mut left) = (gpa, bytes);
            while left > 0 {
                let offset = at.page_offset() as usize;
                let here = left.min(4096 - offset);
                core.track_write(Gfn::containing(at), offset, here);
                at = at.wrapping_add(here as u64);
                left -= here;
            }
        });
    }

    /// Zaps every shadow page of a guest table. Returns how many pages went.
    pub fn unprotect(&self, gfn: Gfn) -> usize {
        self.locked(|core| core.zap_gfn(gfn))
    }

    /// Adds memory to the guest.
    ///
    /// # Errors
    /// See [`SlotError`]; nothing is changed then.
    pub fn add_slot(&self, memory: MemorySlot) -> Result<(), SlotError> {
        let mut slot = Some(Slot::new(memory)?);
        self.locked(|core| {
            core.state.slots.insert(&mut slot)?;
            core.forget_range(memory.base, memory.pages);
            Ok(())
        })
    }

    /// Takes memory away from the guest.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn remove_slot(&self, id: SlotId) -> Result<(), SlotError> {
        self.locked(|core| {
            core.state
                .slots
                .named(id)
                .map(|slot| slot.retiring = true)
                .ok_or(SlotError::Unknown)
        })?;
        self.zap_all();
        let slot = self.locked(|core| {
            core.state.mmio_generation = core.state.mmio_generation.wrapping_add(1);
            core.state.slots.remove(id)
        });
        drop(slot);
        Ok(())
    }

    /// Moves a slot's memory to another place in the guest's physical address space.
    ///
    /// # Errors
    /// See [`SlotError`]; where the new place is not free the slot stays where it is.
    pub fn move_slot(&self, id: SlotId, base: Gfn) -> Result<(), SlotError> {
        let old = self.locked(|core| {
            core.state
                .slots
                .named(id)
                .map(|slot| slot.memory)
                .ok_or(SlotError::Unknown)
        })?;
        self.remove_slot(id)?;
        self.add_slot(MemorySlot { base, ..old }).inspect_err(|_| {
            let restored = self.add_slot(old);
            debug_assert!(restored.is_ok(), "the slot's old place was taken");
        })
    }

    /// Zaps every shadow page, in bounded steps between which guests may go on with new ones.
    pub fn zap_all(&self) {
        self.locked(|core| core.start_zap_all());
        while self.locked(|core| core.zap_obsolete(32)) {}
    }

    /// The pages of a slot that were written since the last call, which starts over.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn take_dirty(&self, id: SlotId, mut page: impl FnMut(Gfn)) -> Result<(), SlotError> {
        self.locked(|core| {
            let mut cursor = 0;
            let mut any = false;
            loop {
                let slot = core.state.slots.named(id).ok_or(SlotError::Unknown)?;
                let Some(gfn) = slot.take_dirty(&mut cursor) else {
                    break;
                };
                core.write_protect(gfn);
                page(gfn);
                any = true;
            }
            core.state.flush_pending |= any;
            Ok(())
        })
    }

    /// Changes how a slot is used: read-only or not, writes logged or not.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<(), SlotError> {
        self.locked(|core| {
            let slot = core.state.slots.named(id).ok_or(SlotError::Unknown)?;
            slot.set_flags(flags);
            let memory = slot.memory;
            for page in 0..memory.pages {
                core.write_protect(memory.base.offset(page));
            }
            Ok(())
        })
    }

    /// Whether the guest has used any of the `pages` pages from `first` on since this was last asked.
    /// Mappings made ahead of use count as used once.
    pub fn take_accessed(&self, first: Gfn, pages: u64) -> Accessed {
        let any = self.locked(|core| {
            let mut any = false;
            for page in 0..pages {
                any |= core.test_and_clear_leaves(first.offset(page));
            }
            // Only after a flush does the hardware set the bits again.
            core.state.flush_pending |= any;
            any
        });
        if any { Accessed::Yes } else { Accessed::No }
    }

    /// Shadow pages that the VM may hold. If it holds more, it gives back what it can.
    pub fn set_limit(&self, pages: usize) {
        self.locked(|core| {
            core.state.limit = pages.min(MAXIMUM_PAGES);
            let excess = core.state.used.saturating_sub(core.state.limit);
            if excess > 0 {
                core.recycle(excess);
            }
        });
    }

    /// Shadow pages that the VM may hold.
    pub fn limit(&self) -> usize {
        self.state.lock().limit
    }

    /// The state of a VM that needs `needed` pages more than it holds.
    pub fn shortage(&self, needed: usize) -> NoPageAvailable {
        self.locked(|core| core.no_page_available(needed))
    }

    /// Shadow pages that the VM holds.
    pub fn used(&self) -> usize {
        self.state.lock().used
    }

    /// Frees the caches that faults fill ahead. Returns how many frames went.
    pub fn release_caches(&self) -> usize {
        self.locked(|core| core.release_caches())
    }

    /// What happened so far.
    pub fn statistics(&self) -> Statistics {
        let state = self.state.lock();
        Statistics {
            mmu_unsync: state.pages.unsync().count() as u64,
            mmu_pages_used: state.used as u64,
            mmu_pages_limit: state.limit as u64,
            ..state.counters
        }
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

    /// New memory: what was known of these frames, that they have none, holds no longer.
    fn forget_range(&mut self, base: Gfn, pages: u64) {
        self.state.mmio_generation = self.state.mmio_generation.wrapping_add(1);
        let inside = |gfn: Gfn| gfn.as_u64().wrapping_sub(base.as_u64()) < pages;
        let mut batch = Batch::new();
        self.state.pages.hand = self.state.pages.active_list().first();
        while let Some(id) = self.state.pages.hand {
            let shadow = &self.state.pages[id];
            let Some(page) = self
                .state
                .pages
                .active(id)
                .filter(|_| inside(shadow.gfn) && !shadow.role.is_direct())
            else {
                self.state.pages.hand = self.state.pages.next(id);
                continue;
            };
            // It was never counted among the tables of a slot: count it, so that zapping balances.
            let gfn = shadow.gfn;
            if let Some(slot) = self.state.slots.of(gfn) {
                slot.disallow_large(gfn);
            }
            self.prepare_zap(page, &mut batch);
        }
        self.commit(batch);
    }

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

impl<H: Host> Drop for Mmu<H> {
    fn drop(&mut self) {
        self.zap_all();
        self.locked(|core| {
            let mut batch = Batch::new();
            for vcpu in 0..core.state.vcpus.len() {
                if core.state.vcpus[vcpu].is_some() {
                    core.release_all_roots(vcpu, &mut batch);
                }
            }
            core.commit(batch);
            for roots in core.state.vcpus.drain(..).flatten() {
                core.host.free(roots.pointers);
            }
            core.release_caches();
        });
        let _ = EntryFormat::of;
    }
}
