//! The guest's physical memory with the holes of a PC.

use alloc::vec::Vec;

use umbra_vcpu::address::{Gpa, PAGE_SIZE};

/// Where conventional memory ends: the last KiB below 640 KiB belongs to the BIOS.
const LOW_END: u64 = 0x9_fc00;
/// Where the RAM behind conventional memory and that KiB ends.
const LOW_RAM_END: u64 = 0xa_0000;
/// Where the memory begins in which firmware leaves its tables and option ROMs. It ends with the BIOS
/// area.
const FIRMWARE_START: u64 = 0xc_0000;
/// Where memory goes on above the legacy video and BIOS area.
const HIGH_START: u64 = 0x10_0000;
/// Where the hole for devices below 4 GiB begins.
const DEVICE_HOLE: u64 = 0xc000_0000;
/// Where memory goes on above that hole.
const ABOVE_4G: u64 = 1 << 32;

/// What a range of physical memory is, as e820 and its descendants number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM that the guest may use.
    Usable = 1,
    /// Not to be used.
    Reserved = 2,
}

/// A range of physical memory, not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// The first byte.
    pub start: Gpa,
    /// The number of bytes.
    pub length: u64,
    /// What it is.
    pub kind: MemoryKind,
}

impl MemoryRange {
    /// The first byte after the range.
    pub const fn end(&self) -> Gpa {
        self.start.wrapping_add(self.length)
    }

    /// Whether `length` bytes at `at` lie inside.
    pub fn contains(&self, at: Gpa, length: u64) -> bool {
        at >= self.start && at.checked_add(length).is_some_and(|end| end <= self.end())
    }
}

/// The guest's memory map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    ranges: Vec<MemoryRange>,
}

impl MemoryMap {
    /// The map of a PC with `size` bytes of RAM: RAM up to 640 KiB, from 1 MiB to at most 3 GiB, and
    /// the rest above 4 GiB. What the hole below 1 MiB shadows is lost, as on a PC.
    pub fn new(size: u64) -> Self {
        let mut ranges = Vec::new();
        let mut add = |start: u64, end: u64, kind| {
            if start < end {
                ranges.push(MemoryRange {
                    start: Gpa::new(start),
                    length: end - start,
                    kind,
                });
            }
        };
        add(0, size.min(LOW_END), MemoryKind::Usable);
        add(LOW_END, HIGH_START, MemoryKind::Reserved);
        add(HIGH_START, size.min(DEVICE_HOLE), MemoryKind::Usable);
        let above = size.saturating_sub(DEVICE_HOLE);
        add(ABOVE_4G, ABOVE_4G.saturating_add(above), MemoryKind::Usable);
        Self { ranges }
    }

    /// All ranges, in the order of their addresses.
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    /// The ranges of RAM.
    pub fn usable(&self) -> impl Iterator<Item = &MemoryRange> {
        self.ranges
            .iter()
            .filter(|range| range.kind == MemoryKind::Usable)
    }

    /// Whether `length` bytes at `at` lie in one range of RAM.
    pub fn is_usable(&self, at: Gpa, length: u64) -> bool {
        self.usable().any(|range| range.contains(at, length))
    }

    /// The RAM behind the map in whole pages. That is more than what is usable: the page that holds
    /// the end of conventional memory is RAM to its last byte, as on a PC, and so is the BIOS area,
    /// for firmware's tables.
    pub fn ram(&self) -> impl Iterator<Item = MemoryRange> {
        self.ranges.iter().filter_map(|range| {
            let (start, end) = (range.start.as_u64(), range.end().as_u64());
            let (start, end) = match range.kind {
                MemoryKind::Usable if end == LOW_END => (start, LOW_RAM_END),
                MemoryKind::Usable => (start, end & !(PAGE_SIZE - 1)),
                MemoryKind::Reserved => (FIRMWARE_START, end),
            };
            (start < end).then_some(MemoryRange {
                start: Gpa::new(start),
                length: end - start,
                ..*range
            })
        })
    }

    /// The least size for [`MemoryMap::new`] with which `length` bytes at `at` are usable RAM; `None`
    /// if they touch a hole.
    pub fn size_for(&self, at: Gpa, length: u64) -> Option<u64> {
        let end = at.checked_add(length)?.as_u64();
        let size = if at.as_u64() >= ABOVE_4G {
            end.checked_sub(ABOVE_4G)?.checked_add(DEVICE_HOLE)?
        } else {
            end
        };
        Self::new(size).is_usable(at, length).then_some(size)
    }

    /// Bytes of usable RAM from address 0.
    pub fn below_1m(&self) -> u64 {
        self.usable()
            .find(|range| range.start.as_u64() == 0)
            .map_or(0, |range| range.length)
    }

    /// Bytes of usable RAM that begin at 1 MiB.
    pub fn above_1m(&self) -> u64 {
        self.usable()
            .find(|range| range.start.as_u64() == HIGH_START)
            .map_or(0, |range| range.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_holes() {
        let map = MemoryMap::new(5 << 30);
        let usable: Vec<_> = map
            .usable()
            .map(|range| (range.start.as_u64(), range.end().as_u64()))
            .collect();
        assert_eq!(
            usable,
            [
                (0, LOW_END),
                (HIGH_START, DEVICE_HOLE),
                (ABOVE_4G, ABOVE_4G + (2 << 30))
            ]
        );
    }

    #[test]
    fn ram_is_whole_pages() {
        let ram = |size| -> Vec<_> {
            MemoryMap::new(size)
                .ram()
                .map(|range| (range.start.as_u64(), range.end().as_u64()))
                .collect()
        };
        let low = (0, 0xa_0000);
        let firmware = (FIRMWARE_START, HIGH_START);
        assert_eq!(ram(64 << 20), [low, firmware, (HIGH_START, 64 << 20)]);
        assert_eq!(ram((2 << 20) + 1), [low, firmware, (HIGH_START, 2 << 20)]);
        assert_eq!(ram(0x1fff), [(0, 0x1000), firmware]);
        assert_eq!(ram(0), [firmware]);
    }

    #[test]
    fn the_size_that_has_ram_at_an_address() {
        let map = MemoryMap::new(2 << 20);
        let size = |at, length| map.size_for(Gpa::new(at), length);
        assert_eq!(size(16 << 20, 1 << 20), Some(17 << 20));
        assert_eq!(size(ABOVE_4G, 4096), Some(DEVICE_HOLE + 4096));
        assert_eq!(size(0xa_0000, 1), None);
        assert_eq!(size(0x9_0000, 0x10_0000), None);
        assert_eq!(size(DEVICE_HOLE - 1, 2), None);
        assert_eq!(size(u64::MAX, 2), None);
    }

    #[test]
    fn small_memory_has_no_upper_ranges() {
        let map = MemoryMap::new(64 << 20);
        assert_eq!(map.above_1m(), 63 << 20);
        assert_eq!(map.usable().count(), 2);
        assert!(!map.is_usable(Gpa::new(LOW_END - 1), 2));
        assert!(!map.is_usable(Gpa::new(u64::MAX), 2));
    }
}
