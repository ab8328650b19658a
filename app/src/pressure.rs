//! Memory pressure: all guests' MMUs in one pool, and the heap's low-memory callback that makes them
//! give shadow pages back.
//!
//! Protocol: the callback runs inside an allocation, perhaps one that an MMU makes. The pool only
//! try-locks, and nothing here allocates. What counts as progress is what the heap got back: frames
//! are freed one by one, but go back to the heap in slabs.

use alloc::vec::Vec;
use core::alloc::Layout;
use core::sync::atomic::{AtomicU64, Ordering};

use hermit::mm::with_fallible_requests;
use spin::Once;
use umbra_mmu::{MmuPool, Shrunk};
use umbra_report::HeapCounters;
use umbra_vcpu::address::PAGE_SIZE;

use crate::memory::GuestHost;
use crate::physical;

/// Fewest shadow pages that one call asks for: single ones seldom make up a whole slab.
pub const MINIMUM_SCAN: usize = 4 * physical::SLAB_FRAMES;
/// Bytes that should stay free, so that the kernel's own allocations rarely meet an empty heap.
const WATERMARK: usize = 1 << 20;
/// Bytes that guests cannot use up: for allocations whose callers cannot handle a failure.
const RESERVE: usize = 256 << 10;
/// Bytes of such allocations that one guest's start may need: more than its devices, and the tables that
/// its loader makes.
const START: usize = 256 << 10;

/// MMUs that were passed over because they were locked.
static SKIPPED: AtomicU64 = AtomicU64::new(0);
static POOL: Once<MmuPool<GuestHost>> = Once::new();

/// The pool that all guests' MMUs belong to. Its first use, before there is a guest, installs the
/// callback.
pub fn pool() -> &'static MmuPool<GuestHost> {
    POOL.call_once(|| {
        hermit::mm::set_low_memory_callback(give_back);
        hermit::mm::set_low_memory_watermark(WATERMARK);
        hermit::mm::set_heap_reserve(RESERVE);
        MmuPool::new(usize::MAX)
    })
}

/// Frees shadow pages until the heap has got enough back for `request`, or nothing is left to give.
/// Returns the bytes that went back.
fn give_back(request: Layout) -> usize {
    if POOL.get().is_none() {
        return 0;
    }
    let start = physical::released_bytes();
    let released = || physical::released_bytes().wrapping_sub(start);
    let pages = request.size().div_ceil(PAGE_SIZE as usize);
    loop {
        let freed = shrink(pages.max(MINIMUM_SCAN)).freed;
        if freed == 0 || released() >= request.size() {
            return released();
        }
    }
}

/// Whether a guest can be started without fear of an allocation that must not fail.
pub fn has_room_for_start() -> bool {
    let mut room = Vec::<u8>::new();
    with_fallible_requests(|| room.try_reserve_exact(START)).is_ok()
}

/// Gives `pages` shadow pages back, as far as there are so many.
pub fn shrink(pages: usize) -> Shrunk {
    let shrunk = pool().scan(pages);
    SKIPPED.fetch_add(shrunk.skipped as u64, Ordering::Relaxed);
    shrunk
}

/// Bytes that are allocated.
pub fn heap_allocated() -> u64 {
    hermit::mm::heap_statistics().allocated as u64
}

/// What the report says of the heap.
pub fn heap_counters() -> HeapCounters {
    let heap = hermit::mm::heap_statistics();
    HeapCounters {
        heap_free: heap.free as u64,
        heap_allocated: heap.allocated as u64,
        heap_allocations: heap.allocations as u64,
        heap_low_water: heap.low_water as u64,
        heap_watermark: heap.watermark as u64,
        heap_low_memory_calls: heap.callback_calls as u64,
        heap_reserve: RESERVE as u64,
        heap_failed: heap.failed_requests as u64,
        mmu_pages_all: pool().count() as u64,
        shrink_skipped: SKIPPED.load(Ordering::Relaxed),
    }
}
