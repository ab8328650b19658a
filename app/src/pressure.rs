//! Memory pressure: all guests' MMUs in one pool, and the heap's low-memory callback that makes them
//! give shadow pages back.
//!
//! Protocol: the callback runs inside an allocation, perhaps one that an MMU makes. The pool only
//! try-locks, and nothing here allocates. What counts as progress is what the heap got back: frames
//! are freed one by one, but go back to the heap in slabs.

use core::alloc::Layout;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Once;
use umbra_mmu::{MmuPool, Shrunk};
use umbra_report::HeapCounters;
use umbra_vcpu::address::PAGE_SIZE;

use crate::memory::GuestHost;
use crate::physical;

/// Fewest shadow pages that one call asks for: single ones seldom make up a whole slab.
const MINIMUM_SCAN: usize = 4 * physical::SLAB_FRAMES;
/// Bytes that should stay free, so that the kernel's own allocations rarely meet an empty heap.
const WATERMARK: usize = 1 << 20;

/// MMUs that were passed over because they were locked.
static SKIPPED: AtomicU64 = AtomicU64::new(0);
static POOL: Once<MmuPool<GuestHost>> = Once::new();

/// The pool that all guests' MMUs belong to. Its first use installs the callback.
pub fn pool() -> &'static MmuPool<GuestHost> {
    POOL.call_once(|| {
        hermit::mm::set_low_memory_callback(give_back);
        hermit::mm::set_low_memory_watermark(WATERMARK);
        MmuPool::new(usize::MAX)
    })
}

/// Frees shadow pages until the heap has got enough back for `request`, or nothing is left to give.
/// Returns the bytes that went back.
fn give_back(request: Layout) -> usize {
    let Some(pool) = POOL.get() else {
        return 0;
    };
    let start = physical::released_bytes();
    let released = || physical::released_bytes().wrapping_sub(start);
    let pages = request.size().div_ceil(PAGE_SIZE as usize);
    loop {
        let shrunk = pool.scan(pages.max(MINIMUM_SCAN));
        SKIPPED.fetch_add(shrunk.skipped as u64, Ordering::Relaxed);
        if shrunk.freed == 0 || released() >= request.size() {
            return released();
        }
    }
}

/// Gives `pages` shadow pages back, as far as there are so many.
pub fn shrink(pages: usize) -> Shrunk {
    let shrunk = pool().scan(pages);
    SKIPPED.fetch_add(shrunk.skipped as u64, Ordering::Relaxed);
    shrunk
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
        shrink_skipped: SKIPPED.load(Ordering::Relaxed),
    }
}
