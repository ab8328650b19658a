//! Where modules and boot information go: RAM that the image does not use.

use alloc::vec::Vec;

use umbra_vcpu::address::{Gpa, PAGE_SIZE};

use crate::{GuestRam, LoadError, MemoryMap};

/// Boot information stays out of the first page, which guests own, and below what 32 bits address.
const LOWEST: u64 = 0x1000;
const HIGHEST: u64 = 1 << 32;
/// Conventional memory ends here at the latest.
const LOW_END: u64 = 0x10_0000;

/// Hands out RAM that nothing else occupies.
pub struct Placement<'a> {
    memory_map: &'a MemoryMap,
    /// Start and end of what is taken.
    taken: Vec<(u64, u64)>,
}

/// In which part of memory something goes, with what alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Conventional memory if there is room, otherwise as `High`; 8-byte aligned. Boot information
    /// goes here, because many kernels take the memory behind their image as a heap.
    Low,
    /// Above 1 MiB, page aligned.
    High,
}

impl<'a> Placement<'a> {
    /// All RAM of `memory_map` that none of the `taken` ranges (start and end) covers.
    pub fn new(memory_map: &'a MemoryMap, taken: impl IntoIterator<Item = (u64, u64)>) -> Self {
        Self {
            memory_map,
            taken: taken.into_iter().collect(),
        }
    }

    /// Writes `bytes` where nothing is yet, and returns where.
    ///
    /// # Errors
    /// [`LoadError`] if there is no room for `what`.
    pub fn put(
        &mut self,
        ram: &mut dyn GuestRam,
        what: &'static str,
        place: Place,
        bytes: &[u8],
    ) -> Result<u32, LoadError> {
        let at = self.reserve(what, place, bytes.len() as u64)?;
        ram.write(Gpa::new(u64::from(at)), bytes)
            .map_err(|_| LoadError::HostMemory)?;
        Ok(at)
    }

    /// Takes `length` bytes where nothing is yet.
    ///
    /// # Errors
    /// [`LoadError`] if there is no room for `what`.
    pub fn reserve(
        &mut self,
        what: &'static str,
        place: Place,
        length: u64,
    ) -> Result<u32, LoadError> {
        let found = match place {
            Place::Low => self
                .find(LOWEST, LOW_END, 8, length)
                .or_else(|| self.find(LOW_END, HIGHEST, PAGE_SIZE, length)),
            Place::High => self.find(LOW_END, HIGHEST, PAGE_SIZE, length),
        };
        let start = found.ok_or(LoadError::NoRoom { what, length })?;
        self.taken.push((start, start + length));
        u32::try_from(start).map_err(|_| LoadError::NoRoom { what, length })
    }

    /// The lowest free address, which is the start of a range or the end of something taken.
    fn find(&self, from: u64, to: u64, alignment: u64, length: u64) -> Option<u64> {
        let ends = self.taken.iter().map(|&(_, end)| end);
        let starts = self.memory_map.usable().map(|range| range.start.as_u64());
        ends.chain(starts)
            .map(|candidate| candidate.max(from))
            .filter_map(|candidate| candidate.checked_next_multiple_of(alignment))
            .filter(|&start| {
                let Some(end) = start.checked_add(length.max(1)) else {
                    return false;
                };
                end <= to
                    && self.memory_map.is_usable(Gpa::new(start), length.max(1))
                    && self
                        .taken
                        .iter()
                        .all(|&(first, last)| end <= first || last <= start)
            })
            .min()
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
        let mut placement = Placement::new(&map, [(0x1000, 0x9_0000), (0x10_0000, 0x10_1234)]);
        assert_eq!(placement.reserve("a", Place::Low, 0x100), Ok(0x9_0000));
        assert_eq!(placement.reserve("b", Place::Low, 1), Ok(0x9_0100));
        assert_eq!(placement.reserve("c", Place::High, 0x1001), Ok(0x10_2000));
        assert_eq!(placement.reserve("d", Place::High, 0), Ok(0x10_4000));
        assert_eq!(placement.reserve("e", Place::Low, 0x2_0000), Ok(0x10_4000));
        assert_eq!(
            placement.reserve("f", Place::High, 4 << 20),
            Err(LoadError::NoRoom {
                what: "f",
                length: 4 << 20
            })
        );
    }
}
