//! Shadow page-table entries.
//!
//! A leaf maps a host frame with the rights the guest has right now; a link points to another
//! shadow page and permits everything (permissions are taken at the leaf, from the whole path); an
//! MMIO entry is not present and remembers that there is no memory behind its page.

use crate::registers::Rights;
use umbra_vcpu::address::{Hpa, Pfn};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
const MMIO: u64 = 1 << 62;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How an entry maps its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mapping {
    /// A 4 KiB page.
    Small,
    /// A page as large as the table's level.
    Large,
}

/// One entry as the hardware sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Spte(pub u64);

impl Spte {
    pub const EMPTY: Self = Self(0);

    pub fn leaf(frame: Pfn, rights: Rights, mapping: Mapping) -> Self {
        let mut value = frame.base().as_u64() | PRESENT | ACCESSED;
        if rights.contains(Rights::WRITE) {
            value |= WRITE | DIRTY;
        }
        if rights.contains(Rights::USER) {
            value |= USER;
        }
        if !rights.contains(Rights::EXECUTE) {
            value |= NO_EXECUTE;
        }
        if mapping == Mapping::Large {
            value |= PAGE_SIZE;
        }
        Self(value)
    }

    pub fn link(frame: Hpa) -> Self {
        Self(frame.as_u64() | PRESENT | WRITE | USER | ACCESSED)
    }

    /// A PAE pointer: nothing but the present bit may be set (SDM vol. 3A table 4-8).
    pub fn pointer(frame: Hpa) -> Self {
        Self(frame.as_u64() | PRESENT)
    }

    pub fn mmio(generation: u32, rights: Rights) -> Self {
        Self(MMIO | u64::from(generation) << 12 | u64::from(rights.bits()) << 1)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    pub fn is_large(self) -> bool {
        self.0 & PAGE_SIZE != 0
    }

    pub fn is_writable(self) -> bool {
        self.0 & WRITE != 0 && self.is_present()
    }

    pub fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }

    /// The rights and generation of an MMIO entry.
    pub fn as_mmio(self) -> Option<(u32, Rights)> {
        (self.0 & (MMIO | PRESENT) == MMIO).then(|| {
            (
                (self.0 >> 12) as u32,
                Rights::from_bits_truncate((self.0 >> 1) as u8 & 7),
            )
        })
    }

    pub fn frame(self) -> Pfn {
        Pfn::containing(Hpa::new(self.0 & ADDRESS))
    }

    pub fn rights(self) -> Rights {
        let mut rights = Rights::empty();
        rights.set(Rights::WRITE, self.0 & WRITE != 0);
        rights.set(Rights::USER, self.0 & USER != 0);
        rights.set(Rights::EXECUTE, self.0 & NO_EXECUTE == 0);
        rights
    }

    pub fn write_protected(self) -> Self {
        Self(self.0 & !(WRITE | DIRTY))
    }

    pub fn not_accessed(self) -> Self {
        Self(self.0 & !ACCESSED)
    }

    /// Whether a processor that still holds `self` could do something that `new` forbids, or reach
    /// another frame.
    pub fn needs_flush_before(self, new: Self) -> bool {
        self.is_present()
            && (!new.is_present()
                || self.frame() != new.frame()
                || self.is_large() != new.is_large()
                || !new.rights().contains(self.rights()))
    }
}
