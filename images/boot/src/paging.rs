//! The page tables that the kernel starts with, and goes on using.
//!
//! RAM is identity-mapped by 2 MiB pages, never 1 GiB ones. The first 2 MiB and everything that
//! isn't RAM stay unmapped: the kernel maps what it wants there itself, and insists on being the
//! first. RAM above 4 GiB is left to the kernel too, except for modules.
//!
//! Intel SDM vol. 3A, 4.5.

use core::cell::UnsafeCell;
use core::ops::Range;

use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, PageTable, PageTableFlags, PhysFrame, Size2MiB,
    Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::console::{ExitCode, fail};
use crate::physical::LARGE_PAGE;

/// One root, one table for 512 GiB, four directories for 4 GiB; the rest is for modules above.
const TABLES: usize = 32;

#[repr(align(4096))]
struct Pool(UnsafeCell<[PageTable; TABLES]>);

// SAFETY: there is one processor, and only `Tables`, of which there is one, uses the pool.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(UnsafeCell::new([const { PageTable::new() }; TABLES]));

struct Frames {
    used: usize,
}

impl Frames {
    fn next(&mut self) -> &'static mut PageTable {
        if self.used == TABLES {
            fail(
                ExitCode::OutOfMemory,
                format_args!("memory is too scattered to map"),
            );
        }
        let table = POOL.0.get().cast::<PageTable>();
        // SAFETY: 1. The index is within the pool (checked above). 2. It never comes again, so this
        // is the only reference to the table.
        let table = unsafe { &mut *table.add(self.used) };
        self.used += 1;
        table
    }
}

// SAFETY: each call gives out another unused table of the pool, which is identity-mapped.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let address = core::ptr::from_mut(self.next()) as u64;
        Some(PhysFrame::containing_address(PhysAddr::new(address)))
    }
}

/// Builds the kernel's page tables, which map every large page that touches one of `ranges` except
/// the first, and returns the frame of their root. To be called once.
pub fn build(ranges: impl Iterator<Item = Range<u64>>) -> PhysFrame {
    let mut frames = Frames { used: 0 };
    let root = frames.next();
    let root_frame = PhysFrame::containing_address(PhysAddr::new(core::ptr::from_mut(root) as u64));
    // SAFETY: all tables come from the pool, whose virtual addresses are the physical ones.
    let mut tables = unsafe { OffsetPageTable::new(root, VirtAddr::zero()) };

    for range in ranges {
        let first = (range.start / LARGE_PAGE).max(1);
        for page in first..range.end.div_ceil(LARGE_PAGE) {
            let frame = PhysFrame::<Size2MiB>::containing_address(PhysAddr::new(page * LARGE_PAGE));
            let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
            // SAFETY: these tables aren't active, and an identity mapping aliases nothing.
            match unsafe { tables.identity_map(frame, flags, &mut frames) } {
                Ok(flush) => flush.ignore(),
                Err(MapToError::PageAlreadyMapped(_)) => {}
                Err(error) => panic!("cannot map {frame:?}: {error:?}"),
            }
        }
    }
    root_frame
}
