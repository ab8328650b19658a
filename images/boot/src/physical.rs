//! Physical memory as the loader finds it. All of it below 4 GiB is identity-mapped.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use crate::console::{ExitCode, fail};

/// Size of the small page.
pub const PAGE: u64 = 4096;
/// Size of the large page, by which the Hermit kernel maps memory.
pub const LARGE_PAGE: u64 = 2 << 20;
/// End of what the stub can read.
const MAPPED_END: u64 = 4 << 30;

/// A physical address that a boot protocol has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PhysicalAddress(pub u64);

impl fmt::Display for PhysicalAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl PhysicalAddress {
    /// Reads `size` bytes that the boot protocol says are there; `what` names them in the error
    /// when they cannot be.
    pub fn bytes(self, size: u64, what: &str) -> &'static [u8] {
        match self.0.checked_add(size) {
            Some(end) if self.0 != 0 && end <= MAPPED_END => {}
            _ => fail(
                ExitCode::BadInput,
                format_args!("{what} of {size} bytes at {self} is not below 4 GiB"),
            ),
        }
        // SAFETY: 1. The range is identity-mapped and not null (checked above). 2. It is memory
        // that the boot protocol has filled for us; the stub writes only to its own statics until
        // it has copied everything it wants.
        unsafe { core::slice::from_raw_parts(self.0 as *const u8, size as usize) }
    }

    /// Reads a C string of at most 64 KiB.
    pub fn string(self, what: &str) -> String {
        const LIMIT: u64 = 64 << 10;
        let limit = LIMIT.min(MAPPED_END.saturating_sub(self.0));
        let bytes = self.bytes(limit, what);
        let Some(length) = bytes.iter().position(|&byte| byte == 0) else {
            fail(
                ExitCode::BadInput,
                format_args!("{what} has no end within {limit} bytes"),
            )
        };
        match core::str::from_utf8(&bytes[..length]) {
            Ok(string) => string.into(),
            Err(error) => fail(ExitCode::BadInput, format_args!("{what}: {error}")),
        }
    }
}

/// What any boot protocol tells, copied out of its structures.
#[derive(Debug, Default)]
pub struct BootInformation {
    /// Usable RAM, in any order.
    pub memory: Vec<Range<u64>>,
    /// Command line, without the image's name if the protocol omits that.
    pub command_line: String,
    /// Modules (files that the loader has put into memory).
    pub modules: Vec<Module>,
    /// A copy of the ACPI root system description pointer.
    pub rsdp: Option<Vec<u8>>,
}

/// A file that the loader has put into memory.
#[derive(Debug)]
pub struct Module {
    /// Where it lies.
    pub range: Range<u64>,
    /// Its name and arguments.
    pub arguments: String,
}

/// Removes `hole` from `ranges`.
pub fn subtract(ranges: Vec<Range<u64>>, hole: &Range<u64>) -> Vec<Range<u64>> {
    ranges
        .into_iter()
        .flat_map(|range| {
            let before = range.start..range.end.min(hole.start);
            let after = range.start.max(hole.end)..range.end;
            [before, after]
        })
        .filter(|range| range.start < range.end)
        .collect()
}

/// Aligns `ranges` inwards to pages, sorts them, joins what touches.
pub fn normalize(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    for range in &mut ranges {
        *range = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
    }
    ranges.retain(|range| range.start < range.end);
    ranges.sort_by_key(|range| range.start);

    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Finds the lowest place for `size` bytes in `memory` with the given alignment, at `from` or above.
pub fn place(memory: &[Range<u64>], size: u64, alignment: u64, from: u64) -> Option<Range<u64>> {
    memory
        .iter()
        .filter_map(|range| {
            let start = range.start.max(from).checked_next_multiple_of(alignment)?;
            let end = start.checked_add(size)?;
            (end <= range.end).then_some(start..end)
        })
        .min_by_key(|place| place.start)
}
