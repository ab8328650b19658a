//! Where modules and boot information go: RAM that the image does not use.
//!
//! Protocol: everything is placed first, and written by [`Placement::write`] once all has found its
//! place, so that a refusal leaves guest RAM alone.

use alloc::borrow::Cow;
use alloc::vec::Vec;

use umbra_vcpu::address::{Gpa, PAGE_SIZE};

use crate::{GuestRam, LoadError, MemoryMap};

/// Conventional memory ends here at the latest.
const LOW_END: u64 = 0x10_0000;
/// Boot information stays below what 32 bits address.
const HIGHEST: u64 = u32::MAX as u64;
/// Boot information goes at 64 KiB and above, where GRUB puts it, too: kernels' start-up code often
/// has its first page tables, stack or processor trampoline at fixed addresses below.
const INFORMATION: (u64, u64) = (0x1_0000, LOW_END);
/// Second choice. The first page is left out: guests own it.
const FIRST_PAGES: (u64, u64) = (0x1000, 0x1_0000);
const HIGH: (u64, u64) = (LOW_END, HIGHEST);
const INFORMATION_ALIGNMENT: u64 = 8;

/// In which part of memory something goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Conventional memory if there is room, otherwise as `High`; 8-byte aligned. Boot information
    /// goes here, because many kernels take the memory behind their image as a heap.
    Low,
    /// As `Low`, but page aligned.
    LowPage,
    /// Above 1 MiB, page aligned, as low as possible.
    High,
    /// Above 1 MiB, page aligned, as high as possible but all of it below this address.
    HighBelow(u64),
}

/// Hands out RAM that nothing else occupies.
pub struct Placement<'a> {
    memory_map: &'a MemoryMap,
    /// Start and end of what is taken, in the order of addresses.
    taken: Vec<(u64, u64)>,
    contents: Vec<(Gpa, Cow<'a, [u8]>)>,
}

impl<'a> Placement<'a> {
    /// All RAM of `memory_map` that none of the `taken` ranges (start and end) covers.
    pub fn new(memory_map: &'a MemoryMap, taken: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut taken: Vec<_> = taken.into_iter().collect();
        taken.sort_unstable();
        Self {
            memory_map,
            taken,
            contents: Vec::new(),
        }
    }

    /// Finds a place for `bytes`, and returns where.
    ///
    /// # Errors
    /// [`LoadError::NoRoom`] if there is no room for `what`.
    pub fn put(
        &mut self,
        what: &'static str,
        place: Place,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<u32, LoadError> {
        let bytes = bytes.into();
        let at = self.reserve(what, place, bytes.len() as u64)?;
        self.fill(at, bytes);
        Ok(at)
    }

    /// Takes `length` bytes where nothing is yet; an empty range takes one.
    ///
    /// # Errors
    /// [`LoadError::NoRoom`] if there is no room for `what`.
    pub fn reserve(
        &mut self,
        what: &'static str,
        place: Place,
        length: u64,
    ) -> Result<u32, LoadError> {
        let taken_length = length.max(1);
        let found = match place {
            Place::Low => self.find_low(INFORMATION_ALIGNMENT, taken_length),
            Place::LowPage => self.find_low(PAGE_SIZE, taken_length),
            Place::High => self.find(HIGH, PAGE_SIZE, taken_length),
            Place::HighBelow(limit) => self.find_highest((HIGH.0, HIGH.1.min(limit)), taken_length),
        };
        let no_room = LoadError::NoRoom { what, length };
        let start = found.ok_or(no_room)?;
        let index = self.taken.partition_point(|&(first, _)| first < start);
        self.taken
            .insert(index, (start, start.saturating_add(taken_length)));
        u32::try_from(start).map_err(|_| no_room)
    }

    /// Gives the content of a range that was reserved.
    pub fn fill(&mut self, at: u32, bytes: impl Into<Cow<'a, [u8]>>) {
        self.contents.push((Gpa::new(u64::from(at)), bytes.into()));
    }

    /// Writes everything that was put.
    ///
    /// # Errors
    /// [`LoadError::HostMemory`] if the host has no memory for it.
    pub fn write(&self, ram: &mut dyn GuestRam) -> Result<(), LoadError> {
        for (at, bytes) in &self.contents {
            ram.write(*at, bytes)?;
        }
        Ok(())
    }

    fn find_low(&self, alignment: u64, length: u64) -> Option<u64> {
        self.find(INFORMATION, alignment, length)
            .or_else(|| self.find(FIRST_PAGES, alignment, length))
            .or_else(|| self.find(HIGH, PAGE_SIZE, length))
    }

    /// The highest page-aligned place for `length` bytes within `bounds`.
    fn find_highest(&self, bounds: (u64, u64), length: u64) -> Option<u64> {
        let align = |address: u64| address & !(PAGE_SIZE - 1);
        let usable = self.memory_map.usable().filter_map(|range| {
            let from = range.start.as_u64().max(bounds.0);
            let to = range.end().as_u64().min(bounds.1);
            let mut candidate = align(to.checked_sub(length)?);
            for &(first, last) in self.taken.iter().rev() {
                if first >= candidate.checked_add(length)? {
                    continue;
                }
                if last <= candidate {
                    break;
                }
                candidate = align(first.checked_sub(length)?);
            }
            (candidate >= from).then_some(candidate)
        });
        usable.max()
    }

    /// The lowest place for `length` bytes within `bounds`.
    fn find(&self, bounds: (u64, u64), alignment: u64, length: u64) -> Option<u64> {
        self.memory_map.usable().find_map(|range| {
            let from = range.start.as_u64().max(bounds.0);
            let to = range.end().as_u64().min(bounds.1);
            let mut candidate = from.checked_next_multiple_of(alignment)?;
            for &(first, last) in &self.taken {
                if last <= candidate {
                    continue;
                }
                if candidate.checked_add(length)? <= first {
                    break;
                }
                candidate = last.checked_next_multiple_of(alignment)?;
            }
            (candidate.checked_add(length)? <= to).then_some(candidate)
        })
    }
}

/// A zero-terminated string.
///
/// # Errors
/// [`LoadError::ZeroByte`] if the text holds a zero byte.
pub fn terminated(what: &'static str, text: &str) -> Result<Vec<u8>, LoadError> {
    if text.contains('\0') {
        return Err(LoadError::ZeroByte(what));
    }
    let mut bytes = Vec::from(text.as_bytes());
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_do_not_overlap_and_avoid_what_is_taken() {
        let map = MemoryMap::new(4 << 20);
        let taken = [(0x10_0000, 0x10_1234), (0x1000, 0x9_0000)];
        let mut placement = Placement::new(&map, taken);
        assert_eq!(placement.reserve("a", Place::Low, 0x100), Ok(0x9_0000));
        assert_eq!(placement.reserve("b", Place::Low, 1), Ok(0x9_0100));
        assert_eq!(placement.reserve("c", Place::Low, 1), Ok(0x9_0108));
        assert_eq!(placement.reserve("d", Place::High, 0x1001), Ok(0x10_2000));
        assert_eq!(placement.reserve("e", Place::High, 0), Ok(0x10_4000));
        assert_eq!(placement.reserve("f", Place::Low, 0x2_0000), Ok(0x10_5000));
        assert_eq!(
            placement.reserve("g", Place::High, 4 << 20),
            Err(LoadError::NoRoom {
                what: "g",
                length: 4 << 20
            })
        );
    }

    #[test]
    fn information_keeps_clear_of_the_first_pages_while_it_can() {
        let map = MemoryMap::new(4 << 20);
        let mut placement = Placement::new(&map, []);
        assert_eq!(placement.reserve("a", Place::Low, 8), Ok(0x1_0000));
        let mut placement = Placement::new(&map, [(0x1_0000, 0xa_0000)]);
        assert_eq!(placement.reserve("a", Place::Low, 8), Ok(0x1000));
        let mut placement = Placement::new(&map, [(0, 0xa_0000), (0x10_0000, 0x3f_f001)]);
        let no_room = LoadError::NoRoom {
            what: "a",
            length: 8,
        };
        assert_eq!(placement.reserve("a", Place::Low, 8), Err(no_room));
    }

    #[test]
    fn lengths_that_overflow_have_no_room() {
        let map = MemoryMap::new(4 << 20);
        let mut placement = Placement::new(&map, []);
        let no_room = LoadError::NoRoom {
            what: "a",
            length: u64::MAX,
        };
        assert_eq!(placement.reserve("a", Place::Low, u64::MAX), Err(no_room));
    }
}
