//! What a VM's MMU is told once: the guest's processor features and the policies to follow.

use crate::level::Level;
use bitflags::bitflags;

bitflags! {
    /// Processor features that change how the guest's tables are read.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Feature: u8 {
        /// Execute-disable (CPUID 8000_0001h EDX bit 20).
        const NO_EXECUTE = 1;
        /// Pages of 1 GiB (CPUID 8000_0001h EDX bit 26).
        const GIGABYTE_PAGES = 2;
    }
}

/// What the guest's CPUID shows. Features that have an enabling bit in CR4 or EFER count as present
/// when the guest has managed to set that bit. PSE-36 follows from the physical-address width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestFeatures {
    /// Physical-address bits (MAXPHYADDR), 32 to 52.
    pub max_physical_address: u8,
    /// Features without an enabling bit of their own.
    pub flags: Feature,
}

impl Default for GuestFeatures {
    fn default() -> Self {
        Self {
            max_physical_address: 40,
            flags: Feature::all(),
        }
    }
}

/// How victims are chosen when shadow pages run out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum VictimPolicy {
    /// Second chance by the accessed bits of the entries that point to a page; leaves first.
    #[default]
    Clock,
    /// Strictly the oldest first, used or not; tables with children after those without.
    Fifo,
}

/// A VM's smallest sensible number of shadow pages.
pub const MINIMUM_PAGES: usize = 64;
/// Recycling starts when fewer pages than this are available.
pub const MINIMUM_FREE_PAGES: usize = 5;
/// Recycling makes this many pages available at a time.
pub const REFILL_PAGES: usize = 25;
/// Guest pages for each shadow page in the default limit.
pub const GUEST_PAGES_PER_SHADOW_PAGE: usize = 50;

/// KVM's default limit for a guest with this many 4 KiB pages: one in fifty, at least 64.
pub const fn default_limit(guest_pages: usize) -> usize {
    let limit = guest_pages / GUEST_PAGES_PER_SHADOW_PAGE;
    if limit < MINIMUM_PAGES {
        MINIMUM_PAGES
    } else {
        limit
    }
}

/// The configuration of one VM's MMU.
#[derive(Clone, Copy, Debug)]
pub struct MmuConfig {
    /// What the guest's processor has.
    pub features: GuestFeatures,
    /// Shadow pages that the VM may hold.
    pub limit: usize,
    /// How victims are chosen.
    pub victims: VictimPolicy,
    /// The most pages that recycling zaps before it commits, with one flush: at least 1, which is one
    /// at a time.
    pub batch: usize,
    /// Roots that a virtual CPU keeps besides the one in use, at most 8.
    pub previous_roots: usize,
    /// The largest page that the hardware can map: level 3 needs 1 GiB pages.
    pub largest_mapping: Level,
    /// Neighbouring entries, in all, that a fault looks at (a power of two; 1 is no prefetch).
    pub prefetch: usize,
}

impl Default for MmuConfig {
    fn default() -> Self {
        Self {
            features: GuestFeatures::default(),
            limit: MINIMUM_PAGES,
            victims: VictimPolicy::Clock,
            batch: usize::MAX,
            previous_roots: 3,
            largest_mapping: Level::Two,
            prefetch: 8,
        }
    }
}
