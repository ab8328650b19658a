//! Page frames from the kernel's heap, known by their host physical address.
//!
//! Protocol: a frame belongs to whoever allocated it until it is freed, exactly once. All of RAM is
//! identity-mapped, so a frame is read and written through its physical address. Frames are
//! taken from the heap in slabs, because the heap keeps a header beside each block, which for a
//! page-aligned page costs another page; a slab goes back as soon as all its frames are free. Each
//! allocator has slabs of its own, so that frames that are freed together make slabs free; one table
//! knows the slabs of all of them. Frames are freed inside the low-memory callback: the table's lock
//! is never held across a call of the heap, and the table never grows.

use alloc::alloc::{Layout, alloc, dealloc};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use hermit::mm::{PhysAddr, VirtAddr, with_fallible_requests};
use spin::{Mutex, Once};
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

/// What is known of the frames of all allocators.
struct Table {
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
        Self {
            first,
            places: frames.map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// The frame's entry; 0 if it is none of the host's memory.
    fn get(&self, frame: Pfn) -> u32 {
        self.entry(frame)
            .map_or(0, |place| place.load(Ordering::Acquire))
    }

    /// Sets the entry of a frame that came from the heap.
    fn set(&self, frame: Pfn, place: u32) {
        self.entry(frame)
            .expect("the heap is made of the host's memory")
            .store(place, Ordering::Release);
    }

    fn entry(&self, frame: Pfn) -> Option<&AtomicU32> {
        let index = frame.as_u64().checked_sub(self.first)?;
        self.places.get(index as usize)
    }
}

static TABLE: Once<Table> = Once::new();

/// All slabs. They never outnumber the host's memory, for which there is room from the start.
struct Slabs {
    slabs: Vec<Slab>,
    /// The first slab without memory.
    unused: List,
}

/// A list of slabs, linked by [`Slab::next`] and [`Slab::previous`].
#[derive(Clone, Copy, Default)]
struct List {
    first: Option<u32>,
}

/// A block of frames, or a place for one.
struct Slab {
    /// Where it is in the heap.
    pointer: NonNull<u8>,
    frames: [Pfn; SLAB_FRAMES],
    /// Bit `n` is set while frame `n` is free.
    free: u16,
    previous: Option<u32>,
    next: Option<u32>,
}

// SAFETY: a slab is memory of the heap's that no thread in particular owns.
unsafe impl Send for Slab {}

/// Makes the table that all allocators share, before there is a guest.
pub fn initialize() {
    table();
}

/// The table, made at its first use for all the memory that the boot loader has given the kernel.
fn table() -> &'static Table {
    TABLE.call_once(|| {
        let places = Places::new();
        let slabs = Vec::with_capacity(places.places.len() / SLAB_FRAMES);
        Table {
            places,
            slabs: Mutex::new(Slabs {
                slabs,
                unused: List::default(),
            }),
        }
    })
}

/// Allocates frames from the heap. Its frames must be freed before it is dropped.
#[derive(Default)]
pub struct FrameAllocator {
    /// The slabs that have a free frame. Taken only by the holder of the table's lock.
    with_room: Mutex<List>,
}

impl FrameAllocator {
    /// A zeroed frame, or `None` if the heap has none left.
    pub fn allocate(&self) -> Option<Pfn> {
        let table = table();
        // The lock is released before the heap is asked.
        let taken = table.slabs.lock().take(&mut self.with_room.lock());
        let frame = match taken {
            Some(frame) => frame,
            None => {
                let (pointer, frames) = allocate_slab()?;
                let mut slabs = table.slabs.lock();
                let mut with_room = self.with_room.lock();
                slabs.insert(pointer, frames, &table.places, &mut with_room);
                slabs.take(&mut with_room)?
            }
        };
        for entry in entries(frame) {
            entry.store(0, Ordering::Relaxed);
        }
        Some(frame)
    }

    /// Takes back a frame of [`FrameAllocator::allocate`].
    pub fn free(&self, frame: Pfn) {
        let table = table();
        let place = table.places.get(frame);
        assert_ne!(place, 0, "{frame:?} is not allocated");
        let place = place as usize - 1;
        let empty = table
            .slabs
            .lock()
            .give_back(place, &table.places, &mut self.with_room.lock());
        if let Some(pointer) = empty {
            // SAFETY: `allocate_slab` got the pointer from the heap with this layout, and none of its
            // frames is in use.
            unsafe { dealloc(pointer.as_ptr(), SLAB_LAYOUT) };
            RELEASED.fetch_add(SLAB_LAYOUT.size(), Ordering::Relaxed);
        }
    }
}

/// Whether a frame is one that an allocator has handed out.
pub fn is_from_heap(frame: Pfn) -> bool {
    table().places.get(frame) != 0
}

impl Slabs {
    /// Takes a free frame.
    fn take(&mut self, with_room: &mut List) -> Option<Pfn> {
        let index = with_room.first?;
        let slab = &mut self.slabs[index as usize];
        let frame = slab.frames[slab.free.trailing_zeros() as usize];
        slab.free &= slab.free - 1;
        if slab.free == 0 {
            self.unlink(with_room, index);
        }
        Some(frame)
    }

    /// Puts a block of free frames among the slabs.
    fn insert(
        &mut self,
        pointer: NonNull<u8>,
        frames: [Pfn; SLAB_FRAMES],
        places: &Places,
        with_room: &mut List,
    ) {
        let slab = Slab {
            pointer,
            frames,
            free: u16::MAX,
            previous: None,
            next: None,
        };
        let mut unused = self.unused;
        let index = if let Some(index) = unused.first {
            self.unlink(&mut unused, index);
            self.unused = unused;
            self.slabs[index as usize] = slab;
            index
        } else {
            self.slabs.push(slab);
            self.slabs.len() as u32 - 1
        };
        for (number, frame) in frames.iter().enumerate() {
            let place = (index as usize * SLAB_FRAMES + number + 1) as u32;
            places.set(*frame, place);
        }
        self.link(with_room, index);
    }

    /// Takes a frame back, and returns its slab's memory if no other frame of it is in use.
    fn give_back(
        &mut self,
        place: usize,
        places: &Places,
        with_room: &mut List,
    ) -> Option<NonNull<u8>> {
        let (index, number) = (place / SLAB_FRAMES, place % SLAB_FRAMES);
        let slab = &mut self.slabs[index];
        let bit = 1 << number;
        assert_eq!(
            slab.free & bit,
            0,
            "{:?} is free already",
            slab.frames[number]
        );
        let was_full = slab.free == 0;
        slab.free |= bit;
        if slab.free == u16::MAX {
            let (pointer, frames) = (slab.pointer, slab.frames);
            for frame in frames {
                places.set(frame, 0);
            }
            self.unlink(with_room, index as u32);
            let mut unused = self.unused;
            self.link(&mut unused, index as u32);
            self.unused = unused;
            return Some(pointer);
        }
        if was_full {
            self.link(with_room, index as u32);
        }
        None
    }

    /// Puts a slab at the front of a list.
    fn link(&mut self, list: &mut List, index: u32) {
        let next = list.first.replace(index);
        if let Some(next) = next {
            self.slabs[next as usize].previous = Some(index);
        }
        let slab = &mut self.slabs[index as usize];
        (slab.previous, slab.next) = (None, next);
    }

    /// Takes a slab out of the list that it is in.
    fn unlink(&mut self, list: &mut List, index: u32) {
        let slab = &mut self.slabs[index as usize];
        let (previous, next) = (slab.previous.take(), slab.next.take());
        match previous {
            Some(previous) => self.slabs[previous as usize].next = next,
            None => list.first = next,
        }
        if let Some(next) = next {
            self.slabs[next as usize].previous = previous;
        }
    }
}

/// A block of frames from the heap.
fn allocate_slab() -> Option<(NonNull<u8>, [Pfn; SLAB_FRAMES])> {
    // SAFETY: the layout's size is not zero.
    let block = with_fallible_requests(|| unsafe { alloc(SLAB_LAYOUT) });
    let pointer = NonNull::new(block)?;
    let frames = core::array::from_fn(|number| {
        // SAFETY: the offset stays inside the block.
        let page = unsafe { pointer.add(number * PAGE_SIZE as usize) };
        Pfn::containing(HostAddressSpace.physical_address(page))
    });
    Some((pointer, frames))
}

const SLAB_LAYOUT: Layout =
    match Layout::from_size_align(SLAB_FRAMES * PAGE_SIZE as usize, PAGE_SIZE as usize) {
        Ok(layout) => layout,
        Err(_) => unreachable!(),
    };

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
