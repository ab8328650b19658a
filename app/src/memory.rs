//! A guest's RAM, and what the MMU needs from the host for one guest.
//!
//! RAM is a table of frames, one entry for each guest page below the end of memory. A page gets its
//! frame when it is first touched, from the same heap as everything else, and keeps it until the
//! guest is gone. Pages in the PC's hole below 1 MiB and below 4 GiB have no memory slot, so they
//! are never touched.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use umbra_loader::{GuestRam, OutOfRam};
use umbra_machine::ProcessorNumber;
use umbra_mmu::{
    Frames, GuestMemory, MemorySlot, OutOfMemory, SlotFlags, SlotId, TlbFlush, Touch, Zone,
};
use umbra_report::options::ShrinkPoint;
use umbra_vcpu::address::{Gfn, Gpa, Hpa, PAGE_SIZE, Pfn};

use crate::injection::Shrinks;
use crate::physical::{self, FrameAllocator};

/// The guest's RAM below the end of its last range.
pub struct Ram {
    /// Host frame of each guest frame; 0 for one that was never touched.
    frames: Box<[AtomicU64]>,
    allocator: FrameAllocator,
}

/// One contiguous range of RAM.
#[derive(Clone, Copy, Debug)]
pub struct RamRange {
    /// The first page.
    pub base: Gfn,
    /// The number of 4 KiB pages.
    pub pages: u64,
}

impl Ram {
    /// RAM that ends where the last of `ranges` ends, none of it touched.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the table does not fit the heap.
    pub fn new(ranges: &[RamRange]) -> Result<Self, OutOfMemory> {
        let end = ranges
            .iter()
            .map(|range| range.base.as_u64() + range.pages)
            .max()
            .unwrap_or(0);
        let mut frames = Vec::new();
        frames
            .try_reserve_exact(end as usize)
            .map_err(|_| OutOfMemory)?;
        frames.extend((0..end).map(|_| AtomicU64::new(0)));
        Ok(Self {
            frames: frames.into_boxed_slice(),
            allocator: FrameAllocator::default(),
        })
    }

    /// The frame behind a guest frame, if it has one.
    pub fn peek(&self, gfn: Gfn) -> Option<Pfn> {
        let frame = self
            .frames
            .get(gfn.as_u64() as usize)?
            .load(Ordering::Acquire);
        (frame != 0).then(|| Pfn::new(frame))
    }

    /// The frame behind a guest frame, allocated now if this is its first use.
    fn touch(&self, gfn: Gfn) -> Result<Pfn, OutOfMemory> {
        let entry = self.frames.get(gfn.as_u64() as usize).ok_or(OutOfMemory)?;
        let current = entry.load(Ordering::Acquire);
        if current != 0 {
            return Ok(Pfn::new(current));
        }
        let frame = self.allocator.allocate().ok_or(OutOfMemory)?;
        match entry.compare_exchange(0, frame.as_u64(), Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(frame),
            Err(other) => {
                self.allocator.free(frame);
                Ok(Pfn::new(other))
            }
        }
    }

    /// Copies guest memory out; what was never touched reads as zero.
    pub fn read(&self, at: Gpa, buffer: &mut [u8]) {
        for_each_page(at, buffer.len(), |gfn, offset, range| {
            let part = &mut buffer[range];
            match self.peek(gfn) {
                Some(frame) => physical::read_frame(frame, offset, part),
                None => part.fill(0),
            }
            Ok(())
        })
        .expect("reading never fails");
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        for frame in self
            .frames
            .iter_mut()
            .map(|frame| *frame.get_mut())
            .filter(|&frame| frame != 0)
        {
            self.allocator.free(Pfn::new(frame));
        }
    }
}

/// Calls `visit` for each page of `length` bytes at `at` with the page, the offset in it, and which
/// of the bytes lie there.
fn for_each_page(
    at: Gpa,
    length: usize,
    mut visit: impl FnMut(Gfn, usize, core::ops::Range<usize>) -> Result<(), OutOfMemory>,
) -> Result<(), OutOfMemory> {
    let mut done = 0;
    while done < length {
        let address = at.wrapping_add(done as u64);
        let offset = address.page_offset() as usize;
        let part = (PAGE_SIZE as usize - offset).min(length - done);
        visit(Gfn::containing(address), offset, done..done + part)?;
        done += part;
    }
    Ok(())
}

/// Why the host could not write guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwritable {
    /// The guest has no RAM there.
    NoMemory(Gpa),
    /// The heap has no frame left for it.
    OutOfMemory,
}

impl fmt::Display for Unwritable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory(at) => write!(formatter, "the guest has no RAM at {at}"),
            Self::OutOfMemory => formatter.write_str("the image's heap is exhausted"),
        }
    }
}

/// What the MMU of one guest asks of the host.
pub struct GuestHost {
    ram: Ram,
    /// Frames of shadow pages; apart from RAM, so that whole slabs of them become free.
    shadow_frames: FrameAllocator,
    /// Where each memory slot begins: slot `n` is range `n`.
    slots: Box<[RamRange]>,
    /// The processors that must drop their translations, one bit each.
    flush_requests: AtomicU8,
    shrinks: Shrinks,
}

impl GuestHost {
    /// The host side of a guest with these ranges of RAM, which shrinks shadow pages for a test.
    ///
    /// # Errors
    /// [`OutOfMemory`] if its tables do not fit the heap.
    pub fn new(ranges: &[RamRange], shrinks: Shrinks) -> Result<Self, OutOfMemory> {
        Ok(Self {
            ram: Ram::new(ranges)?,
            shadow_frames: FrameAllocator::default(),
            slots: ranges.into(),
            flush_requests: AtomicU8::new(0),
            shrinks,
        })
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The shrinks for a test.
    pub const fn shrinks(&self) -> &Shrinks {
        &self.shrinks
    }

    /// The slots to register with the MMU.
    pub fn memory_slots(&self) -> impl Iterator<Item = MemorySlot> {
        self.slots.iter().zip(0..).map(|(range, index)| MemorySlot {
            id: SlotId(index),
            base: range.base,
            pages: range.pages,
            flags: SlotFlags::empty(),
        })
    }

    /// Whether a processor's translations must be dropped before it is entered; asking answers the
    /// request.
    #[inline]
    pub fn take_flush_request(&self, processor: ProcessorNumber) -> bool {
        let own = 1 << processor.get();
        self.flush_requests.load(Ordering::Acquire) & own != 0
            && self.flush_requests.fetch_and(!own, Ordering::AcqRel) & own != 0
    }

    /// Copies bytes into the guest's RAM.
    ///
    /// # Errors
    /// [`Unwritable`] if some of it is not RAM, or the heap is exhausted.
    pub fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), Unwritable> {
        if !self.contains(at, bytes.len() as u64) {
            return Err(Unwritable::NoMemory(at));
        }
        for_each_page(at, bytes.len(), |gfn, offset, range| {
            physical::write_frame(self.ram.touch(gfn)?, offset, &bytes[range]);
            Ok(())
        })
        .map_err(|OutOfMemory| Unwritable::OutOfMemory)
    }

    /// Whether all of a range is RAM.
    pub fn contains(&self, at: Gpa, length: u64) -> bool {
        self.slots.iter().any(|range| {
            let start = range.base.base().as_u64();
            let end = start + range.pages * PAGE_SIZE;
            at.as_u64() >= start
                && at
                    .as_u64()
                    .checked_add(length)
                    .is_some_and(|last| last <= end)
        })
    }

    fn gfn(&self, slot: SlotId, page: u64) -> Gfn {
        self.slots[usize::from(slot.0)].base.offset(page)
    }
}

impl GuestMemory for GuestHost {
    fn frame(&self, slot: SlotId, page: u64, touch: Touch) -> Result<Option<Pfn>, OutOfMemory> {
        let gfn = self.gfn(slot, page);
        match touch {
            Touch::Peek => Ok(self.ram.peek(gfn)),
            Touch::Allocate => {
                self.shrinks.pass(ShrinkPoint::Fault);
                self.ram.touch(gfn).map(Some)
            }
        }
    }

    fn load_u32(&self, frame: Pfn, offset: usize) -> u32 {
        physical::words(frame)[offset / 4].load(Ordering::Acquire)
    }

    fn load_u64(&self, frame: Pfn, offset: usize) -> u64 {
        physical::entries(frame)[offset / 8].load(Ordering::Acquire)
    }

    fn compare_exchange_u32(
        &self,
        frame: Pfn,
        offset: usize,
        current: u32,
        new: u32,
    ) -> Result<u32, u32> {
        physical::words(frame)[offset / 4].compare_exchange(
            current,
            new,
            Ordering::AcqRel,
            Ordering::Acquire,
        )
    }

    fn compare_exchange_u64(
        &self,
        frame: Pfn,
        offset: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        physical::entries(frame)[offset / 8].compare_exchange(
            current,
            new,
            Ordering::AcqRel,
            Ordering::Acquire,
        )
    }
}

impl Frames for GuestHost {
    fn allocate(&self, zone: Zone) -> Option<Hpa> {
        let frame = match zone {
            Zone::Any => {
                self.shrinks.pass(ShrinkPoint::Fault);
                self.shadow_frames.allocate()
            }
            Zone::Below4GiB => physical::allocate_below_4g(),
        };
        frame.map(Pfn::base)
    }

    fn free(&self, frame: Hpa) {
        self.shrinks.pass(ShrinkPoint::Commit);
        let frame = Pfn::containing(frame);
        if physical::is_from_heap(frame) {
            self.shadow_frames.free(frame);
        } else {
            physical::free_below_4g(frame);
        }
    }

    fn load(&self, frame: Hpa, index: usize) -> u64 {
        physical::entries(Pfn::containing(frame))[index].load(Ordering::Acquire)
    }

    fn store(&self, frame: Hpa, index: usize, value: u64) {
        physical::entries(Pfn::containing(frame))[index].store(value, Ordering::Release);
    }

    fn swap(&self, frame: Hpa, index: usize, value: u64) -> u64 {
        physical::entries(Pfn::containing(frame))[index].swap(value, Ordering::AcqRel)
    }

    fn compare_exchange(
        &self,
        frame: Hpa,
        index: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        physical::entries(Pfn::containing(frame))[index].compare_exchange(
            current,
            new,
            Ordering::AcqRel,
            Ordering::Acquire,
        )
    }
}

impl TlbFlush for GuestHost {
    fn flush_all(&self) {
        self.shrinks.pass(ShrinkPoint::Locked);
        self.flush_requests.store(u8::MAX, Ordering::Release);
    }
}

/// The loader's view of the guest's RAM.
pub struct LoaderRam<'a> {
    host: &'a GuestHost,
}

impl<'a> LoaderRam<'a> {
    /// A view through which a guest that does not run yet is filled.
    pub const fn new(host: &'a GuestHost) -> Self {
        Self { host }
    }
}

impl GuestRam for LoaderRam<'_> {
    fn write(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), OutOfRam> {
        self.host.write(at, bytes).map_err(|_| OutOfRam)
    }

    fn zero(&mut self, at: Gpa, length: u64) -> Result<(), OutOfRam> {
        if !self.host.contains(at, length) {
            return Err(OutOfRam);
        }
        // What was never touched reads as zero already.
        for_each_page(at, length as usize, |gfn, offset, range| {
            if let Some(frame) = self.host.ram.peek(gfn) {
                let zeros = [0; PAGE_SIZE as usize];
                physical::write_frame(frame, offset, &zeros[..range.len()]);
            }
            Ok(())
        })
        .map_err(|OutOfMemory| OutOfRam)
    }
}
