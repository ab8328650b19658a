//! The public face: one [`Mmu`] a VM, one [`Vcpu`] a virtual CPU.
//!
//! Each operation takes the VM's lock once it has all the memory that it may need, does its work on
//! the [`Core`], and sends what flush is pending before it lets go of the lock.

#![allow(
    clippy::redundant_closure_for_method_calls,
    reason = "the methods' own lifetimes are not general enough"
)]

use crate::budget::Budget;
use crate::caches::{FAULT, Needs};
use crate::config::MmuConfig;
use crate::error::{MmuError, NoPageAvailable};
use crate::fault::{FAULT_PAGES, FaultOutcome, Step};
use crate::host::{Host, Touch};
use crate::lock::{AtomicU64, Mutex, MutexGuard, Ordering};
use crate::page::{MAXIMUM_PAGES, PageTable};
use crate::pool::Members;
use crate::registers::{Access, Attempt, Fault, PageFault};
use crate::rmap::RmapNodes;
use crate::slot::Slots;
use crate::state::{CACHED, Caches, Core, State};
use crate::statistics::{Counters, Statistics};
use crate::vcpu::Vcpu;
use crate::walk::WalkEnd;
use crate::zap::Batch;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use umbra_vcpu::address::{Gpa, Gva};

/// The shadow MMU of one VM, shared by its virtual CPUs.
pub struct Mmu<H: Host> {
    pub(crate) host: H,
    pub(crate) config: MmuConfig,
    pub(crate) budget: Arc<Budget>,
    /// The other MMUs under the same total limit.
    pub(crate) members: Option<Weak<Members<H>>>,
    pub(crate) root_epoch: AtomicU64,
    pub(crate) state: Mutex<State>,
}

/// Why [`Mmu::translate`] has no address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranslateError {
    /// The access faults: inject this.
    Fault(PageFault),
    /// Another processor changed the guest's tables meanwhile: try again.
    Retry,
}

/// How often an operation is tried. Making room may each time take another page of the operation's own
/// path, and other VMs, too, take what comes free.
const ATTEMPTS: usize = 2 * FAULT_PAGES;

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

    /// Runs `work` with its memory at hand. If only the total limit is in the way, all VMs give pages
    /// up in proportion, and it runs again.
    pub(crate) fn with_relief<R>(
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
    }
}
