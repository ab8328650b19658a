//! Counters under KVM's names.

/// What a VM's MMU has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Page faults that the hardware reported.
    pub pf_taken: u64,
    /// Faults after which the guest simply goes on.
    pub pf_fixed: u64,
    /// Faults that the guest itself has to handle.
    pub pf_guest: u64,
    /// Faults that are accesses to memory-mapped I/O.
    pub pf_mmio: u64,
    /// Of these, those found from an MMIO entry without a walk of the guest's tables.
    pub pf_mmio_fast: u64,
    /// Shadow pages made because none matched.
    pub mmu_cache_miss: u64,
    /// Pages zapped to make room for others.
    pub mmu_recycled: u64,
    /// Pages zapped for any reason.
    pub mmu_shadow_zapped: u64,
    /// Writes to guest tables that were noticed.
    pub mmu_pte_write: u64,
    /// Pages zapped because their guest table was written again and again without use.
    pub mmu_flooded: u64,
    /// Pages that are unsync at the moment.
    pub mmu_unsync: u64,
    /// Entries filled ahead of a fault.
    pub mmu_prefetched: u64,
    /// Calls by the shrinker.
    pub shrink_calls: u64,
    /// Pages and cached frames that they freed.
    pub shrink_freed: u64,
    /// TLB flush requests sent.
    pub tlb_flush: u64,
    /// Shadow pages in use.
    pub mmu_pages_used: u64,
    /// Shadow pages allowed.
    pub mmu_pages_limit: u64,
}

/// The counters proper; the rest of [`Statistics`] is read from the state.
pub(crate) type Counters = Statistics;
