//! Memory pressure: all guests' MMUs in one pool, and the heap's low-memory callback that makes them
//! give shadow pages back.
//!
//! Protocol: the callback runs inside an allocation, perhaps one that an MMU makes. The pool only
//! try-locks, and nothing here allocates. What counts as progress is what the heap got back: frames
//! are freed one by one, but go back to the heap in slabs.

use core::alloc::Layout;

use spin::Once;
use umbra_mmu::MmuPool;
use umbra_vcpu::address::PAGE_SIZE;

use crate::memory::GuestHost;
use crate::physical;

/// Fewest shadow pages that one call asks for: single ones seldom make up a whole slab.
const MINIMUM_SCAN: usize = 4 * physical::SLAB_FRAMES;
/// Bytes that should stay free, so that the kernel's own allocations rarely meet an empty heap.
const WATERMARK: usize = 1 << 20;

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
        if shrunk.freed == 0 || released() >= request.size() {
            return released();
        }
    }
}
