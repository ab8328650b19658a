//! Page frames from the kernel's heap, known by their host physical address.
//!
//! Protocol: a frame belongs to whoever allocated it until it is freed, exactly once. All of RAM is
//! identity-mapped, so a frame is read and written through its physical address. Frames are
//! taken from the heap in slabs, because the heap keeps a header beside each block, which for a
//! page-aligned page costs another page; a slab goes back as soon as all its frames are free.
//! Frames are freed inside the low-memory callback: the lock is never held across a call of
//! the heap, and the tables never grow.

use alloc::alloc::{Layout, alloc, dealloc};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use hermit::mm::{PhysAddr, VirtAddr};
use spin::Mutex;
use umbra_vcpu::address::{Hpa, PAGE_SIZE, Pfn};
use umbra_vcpu::host::HostMemory;

use crate::platform;

/// 64-bit entries in a frame.
pub const ENTRIES: usize = PAGE_SIZE as usize / size_of::<u64>();

/// Translates pointers into the unikernel's memory.
pub struct HostAddressSpace;

impl HostMemory for HostAddressSpace {
    fn physical_address(&self, pointer: NonNull<u8>) -> Hpa {
        let address = VirtAddr::from_ptr(pointer.as_ptr());
        let physical = hermit::mm::virtual_to_physical(address)
            .expect("memory of the unikernel's own is always mapped");
        Hpa::new(physical.as_u64())
    }
}

/// Bytes that slabs gave back to the heap.
static RELEASED: AtomicUsize = AtomicUsize::new(0);

/// Bytes of frames that went back to the heap since the start; wraps around.
pub fn released_bytes() -> usize {
    RELEASED.load(Ordering::Relaxed)
}

/// Frames in a slab.
pub const SLAB_FRAMES: usize = 16;

/// Allocates frames from the heap.
pub struct FrameAllocator {
    places: Places,
    slabs: Mutex<Slabs>,
}

/// For each frame of the host's memory, one more than its place in the slabs, or 0 if it is in none.
struct Places {
    /// The number of the first frame: uhyve's memory may begin anywhere.
    first: u64,
    places: Box<[AtomicU32]>,
}

impl Places {
    fn new() -> Self {
        let ranges = platform::memory_ranges();
        let (start, end) = ranges.iter().fold((u64::MAX, 0), |(start, end), range| {
            (start.min(range.start), end.max(range.end))
        });
        let first = start / PAGE_SIZE;
        let frames = first..end.div_ceil(PAGE_SIZE);
        let places = frames.map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
        Self {
            first,
            places: places.into_boxed_slice(),
        }
    }

    /// The frame's entry; `None` if it is none of the host's memory.
    fn get(&self, frame: Pfn) -> Option<&AtomicU32> {
        let index = frame.as_u64().checked_sub(self.first)?;
        self.places.get(index as usize)
    }

    /// Sets the entry of a frame that came from the heap.
    fn set(&self, frame: Pfn, place: u32) {
        self.get(frame)
            .expect("the heap is made of the host's memory")
            .store(place, Ordering::Release);
    }
}

/// All slabs of an allocator. Empty places are used again.
struct Slabs {
    slabs: Vec<Option<Slab>>,
    /// The slabs that have a free frame, among others.
    with_room: Vec<u32>,
}

struct Slab {
    pointer: NonNull<u8>,
    frames: [Pfn; SLAB_FRAMES],
    /// Bit `n` is set while frame `n` is free.
    free: u16,
}

// SAFETY: a slab is memory of the heap's that no thread in particular owns.
unsafe impl Send for Slab {}

impl FrameAllocator {
    /// An allocator for all the memory that the boot loader has given the kernel.
    pub fn new() -> Self {
        let places = Places::new();
        let slabs = places.places.len().div_ceil(SLAB_FRAMES);
        Self {
            places,
            slabs: Mutex::new(Slabs {
                slabs: Vec::with_capacity(slabs),
                with_room: Vec::with_capacity(slabs),
            }),
        }
    }

    /// A zeroed frame, or `None` if the heap has none left.
    pub fn allocate(&self) -> Option<Pfn> {
        // The lock is released before the heap is asked.
        let taken = self.slabs.lock().take();
        let frame = match taken {
            Some(frame) => frame,
            None => {
                let slab = Slab::new()?;
                let mut slabs = self.slabs.lock();
                slabs.insert(slab, &self.places);
                slabs.take()?
            }
        };
        for entry in entries(frame) {
            entry.store(0, Ordering::Relaxed);
        }
        Some(frame)
    }

    /// Whether `frame` came from this allocator.
    pub fn owns(&self, frame: Pfn) -> bool {
        self.places
            .get(frame)
            .is_some_and(|place| place.load(Ordering::Acquire) != 0)
    }

    /// Takes back a frame of [`FrameAllocator::allocate`].
    pub fn free(&self, frame: Pfn) {
        let place = self
            .places
            .get(frame)
            .map_or(0, |place| place.load(Ordering::Acquire));
        assert_ne!(place, 0, "{frame:?} is not allocated");
        let place = place as usize - 1;
        let empty = self.slabs.lock().give_back(place, &self.places);
        if let Some(slab) = empty {
            // SAFETY: `Slab::new` got the pointer from the heap with this layout, and none of its
            // frames is in use.
            unsafe { dealloc(slab.pointer.as_ptr(), slab_layout()) };
            RELEASED.fetch_add(slab_layout().size(), Ordering::Relaxed);
        }
    }
}

impl Slabs {
    /// Takes a free frame.
    fn take(&mut self) -> Option<Pfn> {
        loop {
            let index = *self.with_room.last()?;
            if let Some(slab) = &mut self.slabs[index as usize]
                && slab.free != 0
            {
                let frame = slab.free.trailing_zeros() as usize;
                slab.free &= slab.free - 1;
                if slab.free == 0 {
                    self.with_room.pop();
                }
                return Some(slab.frames[frame]);
            }
            self.with_room.pop();
        }
    }

    fn insert(&mut self, slab: Slab, places: &Places) {
        let index = self
            .slabs
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.slabs.len());
        for (number, frame) in slab.frames.iter().enumerate() {
            let place = (index * SLAB_FRAMES + number + 1) as u32;
            places.set(*frame, place);
        }
        if index == self.slabs.len() {
            self.slabs.push(Some(slab));
        } else {
            self.slabs[index] = Some(slab);
        }
        self.with_room.push(index as u32);
    }

    /// Takes a frame back, and returns its slab if no other frame of it is in use.
    fn give_back(&mut self, place: usize, places: &Places) -> Option<Slab> {
        let (index, number) = (place / SLAB_FRAMES, place % SLAB_FRAMES);
        let entry = &mut self.slabs[index];
        let slab = entry.as_mut()?;
        let bit = 1 << number;
        assert_eq!(
            slab.free & bit,
            0,
            "{:?} is free already",
            slab.frames[number]
        );
        if slab.free == 0 {
            self.with_room.push(index as u32);
        }
        slab.free |= bit;
        if slab.free != u16::MAX {
            return None;
        }
        for frame in slab.frames {
            places.set(frame, 0);
        }
        self.with_room.retain(|&other| other as usize != index);
        entry.take()
    }
}

impl Slab {
    fn new() -> Option<Self> {
        // SAFETY: the layout's size is not zero.
        let pointer = NonNull::new(unsafe { alloc(slab_layout()) })?;
        let frames = core::array::from_fn(|number| {
            // SAFETY: the offset stays inside the block.
            let page = unsafe { pointer.add(number * PAGE_SIZE as usize) };
            Pfn::containing(HostAddressSpace.physical_address(page))
        });
        Some(Self {
            pointer,
            frames,
            free: u16::MAX,
        })
    }
}

const fn slab_layout() -> Layout {
    match Layout::from_size_align(SLAB_FRAMES * PAGE_SIZE as usize, PAGE_SIZE as usize) {
        Ok(layout) => layout,
        Err(_) => unreachable!(),
    }
}

/// A zeroed frame below 4 GiB, or `None` if there is none left.
pub fn allocate_below_4g() -> Option<Pfn> {
    let frame = Pfn::containing(Hpa::new(hermit::mm::allocate_frame_below_4g()?.as_u64()));
    for entry in entries(frame) {
        entry.store(0, Ordering::Relaxed);
    }
    Some(frame)
}

/// Takes back a frame of [`allocate_below_4g`].
pub fn free_below_4g(frame: Pfn) {
    hermit::mm::deallocate_frame_below_4g(PhysAddr::new(frame.base().as_u64()));
}

/// A frame's content as 64-bit words.
pub fn entries(frame: Pfn) -> &'static [AtomicU64; ENTRIES] {
    // SAFETY: all of RAM is identity-mapped for as long as the unikernel runs. Frames are shared
    // with hardware and with guests, so they are only ever accessed atomically.
    unsafe { &*core::ptr::with_exposed_provenance(frame.base().as_u64() as usize) }
}

/// The eight bytes at `offset` of a frame that guests may be using, least significant first; `None`
/// if they reach past the frame.
#[inline]
pub fn read_word(frame: Pfn, offset: u64) -> Option<u64> {
    if offset > PAGE_SIZE - 8 {
        return None;
    }
    let start = (frame.base().as_u64() + offset) as usize;
    let start: *const u64 = core::ptr::with_exposed_provenance(start);
    // SAFETY: as for `write_frame`.
    Some(unsafe { start.read_unaligned() })
}

/// A frame's content as 32-bit words.
pub fn words(frame: Pfn) -> &'static [AtomicU32; 2 * ENTRIES] {
    // SAFETY: as for `entries`.
    unsafe { &*core::ptr::with_exposed_provenance(frame.base().as_u64() as usize) }
}

/// Copies `bytes` into a frame that guests may be using.
pub fn write_frame(frame: Pfn, offset: usize, bytes: &[u8]) {
    assert!(
        offset + bytes.len() <= PAGE_SIZE as usize,
        "a write past the frame"
    );
    let start = frame.base().as_u64() as usize + offset;
    let start: *mut u8 = core::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the frame is identity-mapped RAM, the range stays inside it, and no Rust reference
    // to guest memory is ever made, so only racing guests could see a mix of old and new bytes.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
}

/// Copies bytes out of a frame that guests may be using.
pub fn read_frame(frame: Pfn, offset: usize, buffer: &mut [u8]) {
    assert!(
        offset + buffer.len() <= PAGE_SIZE as usize,
        "a read past the frame"
    );
    let start = frame.base().as_u64() as usize + offset;
    let start: *const u8 = core::ptr::with_exposed_provenance(start);
    // SAFETY: as for `write_frame`.
    unsafe { core::ptr::copy_nonoverlapping(start, buffer.as_mut_ptr(), buffer.len()) };
}
