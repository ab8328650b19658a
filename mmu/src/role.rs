//! A shadow page's role: everything besides its guest frame that its entries depend on.
//!
//! Two uses of one guest table share a shadow page only if their roles are equal. A permission that
//! is not in the role (nor enforced by the hardware on the finished entry) would be a hole.

use crate::config::{Feature, GuestFeatures};
use crate::level::Level;
use crate::registers::{Format, GuestPaging, Pkru, Rights};
use bitflags::bitflags;
use umbra_vcpu::address::{Gfn, Gva};

bitflags! {
    /// The parts of a role that are either so or not.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub(crate) struct RoleFlags: u8 {
        /// The page has no guest table behind it: it maps a linear range.
        const DIRECT = 1;
        /// EFER.NXE: bit 63 forbids fetches instead of being reserved.
        const NO_EXECUTE = 2;
        /// CR0.WP.
        const WRITE_PROTECT = 4;
        /// CR4.SMEP with CR0.WP clear: write-enabled user pages became supervisor pages.
        const SMEP_WITHOUT_WP = 8;
        /// CR4.SMAP with CR0.WP clear: likewise.
        const SMAP_WITHOUT_WP = 16;
        /// CR4.PSE.
        const PAGE_SIZE_EXTENSION = 32;
        /// CR4.PKE: the role's PKRU counts.
        const PROTECTION_KEYS = 64;
    }
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Role {
    pub level: Level,
    pub format: Format,
    /// Which part of a 4-byte table's range the page covers: a shadow table has half the entries.
    pub quadrant: u8,
    /// What all the levels above permit.
    pub rights: Rights,
    pub flags: RoleFlags,
    pub pkru: Pkru,
}

impl Role {
    /// The role of the page (or, with four pointers, the first page) that a root points to.
    pub fn root(paging: &GuestPaging) -> Self {
        let unpaged = paging.format == Format::Unpaged;
        let mut flags = RoleFlags::empty();
        flags.set(RoleFlags::DIRECT, unpaged);
        if !unpaged {
            flags.set(RoleFlags::NO_EXECUTE, paging.no_execute);
            flags.set(RoleFlags::WRITE_PROTECT, paging.write_protect);
            flags.set(
                RoleFlags::SMEP_WITHOUT_WP,
                paging.smep && !paging.write_protect,
            );
            flags.set(
                RoleFlags::SMAP_WITHOUT_WP,
                paging.smap && !paging.write_protect,
            );
            flags.set(RoleFlags::PAGE_SIZE_EXTENSION, paging.page_size_extension);
            flags.set(RoleFlags::PROTECTION_KEYS, paging.protection_keys);
        }
        Self {
            level: paging.format.root_level(),
            format: paging.format,
            quadrant: 0,
            rights: Rights::all(),
            flags,
            pkru: paging.pkru,
        }
    }

    pub fn is_direct(&self) -> bool {
        self.flags.contains(RoleFlags::DIRECT)
    }

    /// The same page as the `index`th of the four that PAE pointers point to.
    pub fn for_pointer(mut self, index: usize) -> Self {
        if self.format == Format::Legacy {
            self.quadrant = index as u8;
        }
        self
    }

    /// The role of the page that shadows the guest table below entry `index`.
    pub fn of_table_below(&self, index: usize, level: Level, rights: Rights) -> Self {
        Self {
            level,
            quadrant: if self.format == Format::Legacy {
                (index & 1) as u8
            } else {
                0
            },
            rights,
            ..*self
        }
    }

    /// The role of the page that maps a piece of a large guest page, or of unpaged memory.
    pub fn of_direct_below(&self, level: Level, rights: Rights) -> Self {
        Self {
            level,
            quadrant: 0,
            rights,
            flags: self.flags | RoleFlags::DIRECT,
            ..*self
        }
    }

    #[inline]
    pub fn entries(&self) -> EntryFormat {
        EntryFormat {
            format: self.format,
            no_execute: self.flags.contains(RoleFlags::NO_EXECUTE),
            page_size_extension: self.flags.contains(RoleFlags::PAGE_SIZE_EXTENSION),
            keys: self
                .flags
                .contains(RoleFlags::PROTECTION_KEYS)
                .then_some(self.pkru),
        }
    }

    /// The guest frame and the rights of one of the page's leaves.
    #[inline]
    pub fn leaf(&self, translation: LeafTranslation) -> (Gfn, Rights) {
        let value = translation.0;
        if value & bits::PRESENT == 0 {
            let rights = Rights::from_bits_truncate((value >> 1) as u8);
            return (Gfn::new(value >> 8), rights);
        }
        let format = self.entries();
        let rights = format.leaf_rights(self.rights & format.rights(value), value);
        (format.table(value), rights)
    }

    /// How to keep a leaf of the page whose guest entry is `value`.
    pub fn translation(&self, value: u64, gfn: Gfn, rights: Rights) -> LeafTranslation {
        let entry = LeafTranslation(value);
        let plain = bits::PRESENT | bits::ACCESSED;
        let is_all = self.level == Level::One
            && !self.is_direct()
            && value & plain == plain
            && self.leaf(entry) == (gfn, rights);
        if is_all {
            entry
        } else {
            LeafTranslation::of(gfn, rights)
        }
    }

    /// Where the guest's entry behind shadow entry `index` lies in the guest's table, in bytes.
    pub fn guest_entry_offset(&self, index: usize) -> usize {
        match (self.format, self.level) {
            (Format::Legacy, Level::One) => (usize::from(self.quadrant) * 512 + index) * 4,
            (Format::Legacy, _) => (usize::from(self.quadrant) * 256 + index / 2) * 4,
            _ => index * 8,
        }
    }

    /// The shadow entries that depend on the guest's bytes `from..to` of the table (within one page).
    pub fn entries_of_bytes(&self, from: usize, to: usize) -> core::ops::Range<usize> {
        let (first, last) = match self.format {
            Format::Legacy => (from / 4, (to - 1) / 4),
            _ => (from / 8, (to - 1) / 8),
        };
        let (start, end) = match (self.format, self.level) {
            (Format::Legacy, Level::One) => {
                let base = usize::from(self.quadrant) * 512;
                (
                    first.max(base).saturating_sub(base),
                    (last + 1).saturating_sub(base),
                )
            }
            (Format::Legacy, _) => {
                let base = usize::from(self.quadrant) * 256;
                (
                    first.max(base).saturating_sub(base) * 2,
                    (last + 1).saturating_sub(base) * 2,
                )
            }
            _ => (first, last + 1),
        };
        start.min(512)..end.min(512)
    }
}

/// What a page keeps of a leaf's guest frame and rights: the guest's entry itself, where that says it
/// all, because then it shows at a glance that the guest has not changed it; or else the two, with
/// the bit clear that each present entry has set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LeafTranslation(pub u64);

impl LeafTranslation {
    pub const fn of(gfn: Gfn, rights: Rights) -> Self {
        Self(gfn.as_u64() << 8 | (rights.bits() as u64) << 1)
    }
}

/// How to read one guest entry: what a [`Role`] and a [`GuestPaging`] have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryFormat {
    pub format: Format,
    pub no_execute: bool,
    pub page_size_extension: bool,
    /// PKRU, if protection keys count.
    pub keys: Option<Pkru>,
}

/// The bits of a guest's page-table entry (SDM vol. 3A 4.3 to 4.5).
pub(crate) mod bits {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const PAGE_SIZE: u64 = 1 << 7;
    pub const NO_EXECUTE: u64 = 1 << 63;
}

// As `EntryFormat::rights` takes them over.
const _: () = assert!(
    bits::WRITE >> 1 == Rights::WRITE.bits() as u64
        && bits::USER >> 1 == Rights::USER.bits() as u64
);

/// Bits `low..=high`.
const fn span(low: u32, high: u32) -> u64 {
    if low > high {
        0
    } else {
        (u64::MAX >> (63 - high)) & (u64::MAX << low)
    }
}

impl EntryFormat {
    #[inline]
    pub fn of(paging: &GuestPaging) -> Self {
        Self {
            format: paging.format,
            no_execute: paging.no_execute,
            page_size_extension: paging.page_size_extension,
            keys: paging.protection_keys.then_some(paging.pkru),
        }
    }

    /// Whether an entry's page-size bit makes it map a page at `level`.
    #[inline]
    pub fn is_leaf(&self, level: Level, value: u64, features: GuestFeatures) -> bool {
        if level == Level::One || value & bits::PAGE_SIZE == 0 {
            return level == Level::One;
        }
        match (level, self.format) {
            (Level::Two, Format::Legacy) => self.page_size_extension,
            (Level::Two, _) => true,
            (Level::Three, Format::Long4 | Format::Long5) => {
                features.flags.contains(Feature::GIGABYTE_PAGES)
            }
            _ => false,
        }
    }

    /// The reserved bits of a present entry (SDM vol. 3A tables 4-4 to 4-20, 4.4.2, 4.5.4).
    fn reserved(&self, level: Level, value: u64, features: GuestFeatures) -> u64 {
        let width = u32::from(features.max_physical_address);
        let leaf = self.is_leaf(level, value, features);
        if self.format == Format::Legacy {
            // PSE-36 puts address bits 32 and up at bit 13 and up; bit 21 is always reserved.
            let high = if width > 40 { 40 } else { width };
            return if level == Level::Two && leaf {
                span(high - 19, 21)
            } else {
                0
            };
        }
        let mut reserved = span(width, 51);
        if self.format == Format::Pae {
            reserved |= span(52, 62);
        }
        if !self.no_execute {
            reserved |= bits::NO_EXECUTE;
        }
        match (level, leaf) {
            (Level::One, _) | (Level::Two | Level::Three, false) => {}
            (Level::Two, true) => reserved |= span(13, 20),
            (Level::Three, true) => reserved |= span(13, 29),
            (Level::Four | Level::Five, _) => reserved |= bits::PAGE_SIZE,
        }
        if level == Level::Three && !features.flags.contains(Feature::GIGABYTE_PAGES) {
            reserved |= bits::PAGE_SIZE;
        }
        reserved
    }

    /// Whether a present entry has reserved bits set.
    pub fn is_malformed(&self, level: Level, value: u64, features: GuestFeatures) -> bool {
        value & self.reserved(level, value, features) != 0
    }

    /// The bits without which an entry of this format has no reserved bits set at any level.
    #[inline]
    pub fn suspicious(&self, features: GuestFeatures) -> u64 {
        let high = u64::MAX << features.max_physical_address.min(52);
        // Bits 52 to 62 hold the protection key and what the guest likes, but not under PAE.
        let mut known = if self.format.is_long() {
            span(52, 62)
        } else {
            0
        };
        if self.no_execute {
            known |= bits::NO_EXECUTE;
        }
        high & !known | bits::PAGE_SIZE
    }

    /// What this entry permits by itself.
    #[inline]
    pub fn rights(&self, value: u64) -> Rights {
        // The two lower rights lie as in the entry.
        let kept = Rights::WRITE | Rights::USER;
        let rights = kept & Rights::from_bits_retain((value >> 1) as u8);
        if self.no_execute && value & bits::NO_EXECUTE != 0 {
            rights
        } else {
            rights | Rights::EXECUTE
        }
    }

    /// The frame of the table that a non-leaf entry points to.
    #[inline]
    pub fn table(&self, value: u64) -> Gfn {
        match self.format {
            Format::Legacy => Gfn::new((value & 0xffff_f000) >> 12),
            _ => Gfn::new((value & 0x000f_ffff_ffff_f000) >> 12),
        }
    }

    /// The first frame of the page that a leaf entry at `level` maps.
    #[inline]
    pub fn page(&self, level: Level, value: u64) -> Gfn {
        match (self.format, level) {
            (Format::Legacy, Level::Two) => {
                let high = (value >> 13) & 0xff;
                Gfn::new(((value & 0xffc0_0000) | (high << 32)) >> 12)
            }
            _ => level.align(self.table(value)),
        }
    }

    /// Pages of 4 KiB that a guest leaf at `level` covers.
    pub fn pages(&self, level: Level) -> u64 {
        match (self.format, level) {
            (Format::Legacy, Level::Two) => 1024,
            _ => level.pages(),
        }
    }

    /// Where the entry for `gva` lies in a table at `level`, in bytes.
    #[inline]
    pub fn offset(&self, level: Level, gva: Gva) -> usize {
        match self.format {
            Format::Legacy => {
                let shift = if level == Level::One { 12 } else { 22 };
                ((gva.as_u64() >> shift) & 1023) as usize * 4
            }
            _ => level.index(gva) * 8,
        }
    }

    /// What a leaf with `rights` over its whole path lets the hardware do without asking us: no
    /// writes before the dirty bit is set, and none that a protection key forbids.
    #[inline]
    pub fn leaf_rights(&self, rights: Rights, value: u64) -> Rights {
        let forbidden = self.keys.is_some_and(|pkru| {
            let key = self.key(value);
            rights.contains(Rights::USER) && (pkru.write_disabled(key) || pkru.access_disabled(key))
        });
        if forbidden || value & bits::DIRTY == 0 {
            rights - Rights::WRITE
        } else {
            rights
        }
    }

    /// Whether the key of a leaf forbids reading: only a fetch may bring in such a page.
    pub fn is_fetch_only(&self, rights: Rights, value: u64) -> bool {
        rights.contains(Rights::USER)
            && self
                .keys
                .is_some_and(|pkru| pkru.access_disabled(self.key(value)))
    }

    /// The protection key of a leaf.
    pub fn key(&self, value: u64) -> u8 {
        if self.format.is_long() {
            (value >> 59 & 15) as u8
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pse36_reserves_what_the_width_leaves() {
        let format = EntryFormat {
            format: Format::Legacy,
            no_execute: false,
            page_size_extension: true,
            keys: None,
        };
        let with = |bits| GuestFeatures {
            max_physical_address: bits,
            ..GuestFeatures::default()
        };
        let large = bits::PRESENT | bits::PAGE_SIZE;
        assert_eq!(format.reserved(Level::Two, large, with(32)), span(13, 21));
        assert_eq!(format.reserved(Level::Two, large, with(36)), span(17, 21));
        assert_eq!(format.reserved(Level::Two, large, with(40)), span(21, 21));
        assert_eq!(format.reserved(Level::Two, large, with(52)), span(21, 21));
        assert_eq!(format.reserved(Level::Two, bits::PRESENT, with(36)), 0);
    }

    #[test]
    fn bytes_name_the_entries_that_depend_on_them() {
        let long = Role {
            level: Level::One,
            format: Format::Long4,
            quadrant: 0,
            rights: Rights::all(),
            flags: RoleFlags::empty(),
            pkru: Pkru(0),
        };
        assert_eq!(long.entries_of_bytes(7, 9), 0..2);
        assert_eq!(long.entries_of_bytes(4095, 4096), 511..512);
        let directory = Role {
            level: Level::Two,
            format: Format::Legacy,
            quadrant: 1,
            ..long
        };
        assert_eq!(directory.entries_of_bytes(1024, 1028), 0..2);
        assert!(directory.entries_of_bytes(0, 4).is_empty());
        assert!(directory.entries_of_bytes(2048, 2052).is_empty());
        for index in 0..512 {
            let offset = directory.guest_entry_offset(index);
            assert!(
                directory
                    .entries_of_bytes(offset, offset + 4)
                    .contains(&index)
            );
        }
    }
}
