//! Levels of a page table, counted from the leaf: level 1 entries map 4 KiB each.

use umbra_vcpu::address::{Gfn, Gva};

/// The entries of one shadow page.
pub const ENTRIES: usize = 512;

/// A level of a page table (SDM vol. 3A 4.2): the table at level *n* holds entries that each cover
/// 512^(n-1) pages of 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Level {
    /// Page table: 4 KiB an entry.
    One = 1,
    /// Page directory: 2 MiB an entry.
    Two = 2,
    /// Page-directory-pointer table: 1 GiB an entry.
    Three = 3,
    /// PML4: 512 GiB an entry.
    Four = 4,
    /// PML5: 256 TiB an entry.
    Five = 5,
}

impl Level {
    /// All levels, leaf first.
    pub const ALL: [Self; 5] = [Self::One, Self::Two, Self::Three, Self::Four, Self::Five];

    /// The level's number, 1 to 5.
    #[inline]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Position in an array that holds something for each level.
    #[inline]
    pub(crate) const fn slot(self) -> usize {
        self as usize - 1
    }

    /// The level that this level's entries point to; `None` below a page table.
    #[inline]
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::One => None,
            Self::Two => Some(Self::One),
            Self::Three => Some(Self::Two),
            Self::Four => Some(Self::Three),
            Self::Five => Some(Self::Four),
        }
    }

    /// 4 KiB pages covered by one entry.
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << (9 * (self as u32 - 1))
    }

    /// The index of the entry that covers `gva` in a table of 512 entries.
    #[inline]
    pub(crate) const fn index(self, gva: Gva) -> usize {
        ((gva.as_u64() >> (12 + 9 * (self as u32 - 1))) & 511) as usize
    }

    /// The first frame of the naturally aligned range, one entry large, that holds `gfn`.
    #[inline]
    pub(crate) const fn align(self, gfn: Gfn) -> Gfn {
        Gfn::new(gfn.as_u64() & !(self.pages() - 1))
    }
}
