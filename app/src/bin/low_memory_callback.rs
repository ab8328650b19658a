//! The booted test of the kernel's low-memory callback.
//!
//! It fills the heap with a hoard of blocks, which the callback gives back, and checks what happens
//! to requests that do not fit otherwise. It prints one line for each check and exits with 0, or
//! with 1 after a line that says which check failed and the values.
//!
//! Protocol: only the boot processor's one task runs, so the hoard and the callback's settings need
//! no lock. The callback runs inside an allocation of that same task.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::alloc::{alloc, alloc_zeroed, dealloc, realloc};
use core::alloc::Layout;
use core::ffi::c_char;
use core::fmt::Debug;
use core::hint::black_box;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::Relaxed};

use hermit::mm::{
    HeapStatistics, fail_requests, heap_statistics, set_heap_reserve, set_low_memory_callback,
    set_low_memory_watermark, with_fallible_requests,
};
use hermit::println;

/// What the hoard consists of.
const BLOCK: Layout = layout(64 << 10);
/// Less than a page.
const SMALL: Layout = layout(256);
/// Does not fit once the hoard has filled the heap.
const LARGE: Layout = layout(1 << 20);
/// Larger than any heap.
const IMPOSSIBLE: Layout = layout(1 << 46);

/// Blocks that the callback gives back each time.
static BLOCKS_PER_CALL: AtomicUsize = AtomicUsize::new(0);
/// Whether the callback itself makes requests.
static CALLBACK_ALLOCATES: AtomicBool = AtomicBool::new(false);
/// Calls of the callback.
static CALLS: AtomicUsize = AtomicUsize::new(0);
/// Calls of the callback that haven't returned.
static DEPTH: AtomicUsize = AtomicUsize::new(0);
/// The most that `DEPTH` ever was.
static DEEPEST: AtomicUsize = AtomicUsize::new(0);
/// Size of the request that the callback saw last.
static REQUESTED: AtomicUsize = AtomicUsize::new(0);
/// What the callback's own small request and its own impossible one got.
static OWN_REQUESTS: [AtomicPtr<u8>; 2] = [const { AtomicPtr::new(ptr::null_mut()) }; 2];

/// Entry point that Hermit calls after it has booted.
// SAFETY: the kernel declares exactly this function, and no other crate defines it.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: i32, _argv: *const *const c_char, _env: *const *const c_char) {
    let mut checks = Checks { passed: 0 };

    fails_without_callback(&mut checks);
    set_low_memory_callback(callback);
    succeeds_after_release(&mut checks);
    retries_while_there_is_progress(&mut checks);
    is_not_reentered(&mut checks);
    fails_once_when_nothing_is_released(&mut checks);
    reallocates(&mut checks);
    zeroes(&mut checks);
    keeps_the_watermark(&mut checks);
    keeps_the_reserve(&mut checks);
    fails_for_tests(&mut checks);

    println!("low_memory_callback: {} checks passed", checks.passed);
    hermit::scheduler::shutdown(0);
}

fn fails_without_callback(checks: &mut Checks) {
    hoard::fill();
    let block = request(LARGE);
    let statistics = heap_statistics();
    checks.check(
        "without a callback, a large request fails",
        block.is_null(),
        statistics,
    );
    checks.check(
        "the failed request is counted",
        statistics.failed_requests > 0,
        statistics,
    );
    checks.check(
        "no callback was called",
        statistics.callback_calls == 0,
        statistics,
    );
    checks.check(
        "the heap is full",
        statistics.free < LARGE.size(),
        statistics,
    );
}

fn succeeds_after_release(checks: &mut Checks) {
    let before = prepare(usize::MAX);
    let block = request(LARGE);
    let after = heap_statistics();
    checks.check(
        "the same request succeeds after a release",
        !block.is_null(),
        after,
    );
    checks.check("the callback was called once", calls() == 1, calls());
    checks.check(
        "it saw the request",
        REQUESTED.load(Relaxed) == LARGE.size(),
        &REQUESTED,
    );
    let released = after.bytes_released - before.bytes_released;
    checks.check(
        "the released bytes are counted",
        released > LARGE.size(),
        released,
    );
    checks.check(
        "the failures are not",
        after.failed_requests == before.failed_requests,
        after.failed_requests,
    );
    checks.check(
        "the low-water mark is kept",
        after.low_water < LARGE.size(),
        after,
    );
    release(block, LARGE);
}

fn retries_while_there_is_progress(checks: &mut Checks) {
    prepare(1);
    let block = request(LARGE);
    checks.check(
        "many small releases serve a large request",
        !block.is_null(),
        calls(),
    );
    // The last block that the hoard got may have completed another gap.
    let needed = LARGE.size() / BLOCK.size() - 1;
    checks.check("each release was asked for", calls() >= needed, calls());
    release(block, LARGE);
}

fn is_not_reentered(checks: &mut Checks) {
    let before = prepare(usize::MAX);
    CALLBACK_ALLOCATES.store(true, Relaxed);
    let block = request(LARGE);
    CALLBACK_ALLOCATES.store(false, Relaxed);
    let after = heap_statistics();

    let [small, impossible] = OWN_REQUESTS.each_ref().map(|own| own.load(Relaxed));
    checks.check(
        "a callback that allocates helps too",
        !block.is_null(),
        after,
    );
    checks.check("its own small request is served", !small.is_null(), small);
    checks.check(
        "its own impossible request fails",
        impossible.is_null(),
        impossible,
    );
    checks.check("it was called once", calls() == 1, calls());
    let deepest = DEEPEST.load(Relaxed);
    checks.check("it was never re-entered", deepest == 1, deepest);
    let skipped = after.reentries_skipped - before.reentries_skipped;
    checks.check("the skipped re-entry is counted", skipped == 1, skipped);

    release(small, BLOCK);
    release(block, LARGE);
}

fn fails_once_when_nothing_is_released(checks: &mut Checks) {
    let before = prepare(0);
    let block = request(LARGE);
    let after = heap_statistics();
    checks.check(
        "a callback without memory leads to null",
        block.is_null(),
        block,
    );
    checks.check("after one call", calls() == 1, calls());
    let failed = after.failed_requests - before.failed_requests;
    checks.check("as one failure", failed == 1, failed);

    BLOCKS_PER_CALL.store(usize::MAX, Relaxed);
    let block = request(LARGE);
    checks.check("the next request is served again", !block.is_null(), block);
    release(block, LARGE);

    prepare(usize::MAX);
    let block = request(IMPOSSIBLE);
    checks.check("an impossible request fails", block.is_null(), block);
    checks.check("once nothing is left to release", calls() == 2, calls());
}

fn reallocates(checks: &mut Checks) {
    const PATTERN: u8 = 0xa5;
    let small = request(BLOCK);
    checks.check("there is a block to grow", !small.is_null(), small);
    // SAFETY: the block is as large as its layout says.
    unsafe { small.write_bytes(PATTERN, BLOCK.size()) };
    let is_intact = |block: *const u8| {
        // SAFETY: `block` is the one above, or a larger one that it became.
        (0..BLOCK.size()).all(|index| unsafe { block.add(index).read() } == PATTERN)
    };

    prepare(0);
    // SAFETY: the block was allocated with this layout.
    let grown = black_box(unsafe { realloc(small, BLOCK, LARGE.size()) });
    checks.check("without memory, growing fails", grown.is_null(), grown);
    checks.check("after one call of the callback", calls() == 1, calls());
    checks.check("the block stays as it was", is_intact(small), small);

    prepare(usize::MAX);
    // SAFETY: the block was allocated with this layout, and growing it has failed.
    let grown = black_box(unsafe { realloc(small, BLOCK, LARGE.size()) });
    checks.check("after a release, growing succeeds", !grown.is_null(), grown);
    checks.check("with one call of the callback", calls() == 1, calls());
    checks.check("and keeps the content", is_intact(grown), grown);

    prepare(usize::MAX);
    // SAFETY: the block has grown to this layout.
    let shrunk = black_box(unsafe { realloc(grown, LARGE, BLOCK.size()) });
    checks.check("shrinking needs no callback", calls() == 0, calls());
    checks.check("and succeeds", is_intact(shrunk), shrunk);
    release(shrunk, BLOCK);
}

fn zeroes(checks: &mut Checks) {
    prepare(0);
    // SAFETY: the layout has a size.
    let block = black_box(unsafe { alloc_zeroed(LARGE) });
    checks.check(
        "without memory, a zeroed request fails",
        block.is_null(),
        block,
    );
    checks.check("after one call of the callback", calls() == 1, calls());

    // What the hoard gives back isn't zero.
    prepare(usize::MAX);
    // SAFETY: the layout has a size.
    let block = black_box(unsafe { alloc_zeroed(LARGE) });
    checks.check(
        "after a release, a zeroed request succeeds",
        !block.is_null(),
        block,
    );
    checks.check("with one call of the callback", calls() == 1, calls());
    // SAFETY: the block is as large as its layout says.
    let first = (0..LARGE.size()).find(|&index| unsafe { block.add(index).read() } != 0);
    checks.check("and is zero", first.is_none(), first);
    release(block, LARGE);
}

fn keeps_the_watermark(checks: &mut Checks) {
    hoard::release(usize::MAX);
    let free = heap_statistics().free;
    checks.check("there is memory again", free > 8 * LARGE.size(), free);

    BLOCKS_PER_CALL.store(0, Relaxed);
    set_low_memory_watermark(free - 4 * LARGE.size());
    CALLS.store(0, Relaxed);
    let block = request(LARGE);
    checks.check("above the watermark, no callback", calls() == 0, calls());
    release(block, LARGE);

    set_low_memory_watermark(free);
    let before = heap_statistics();
    let block = request(LARGE);
    let after = heap_statistics();
    checks.check(
        "the watermark calls it ahead of time",
        calls() == 1,
        calls(),
    );
    checks.check("but fails nothing", !block.is_null(), block);
    checks.check(
        "and counts no failure",
        after.failed_requests == before.failed_requests,
        after.failed_requests,
    );
    // SAFETY: the block was allocated with this layout.
    let grown = black_box(unsafe { realloc(block, LARGE, 2 * LARGE.size()) });
    checks.check("growing calls it too", calls() == 2, calls());
    checks.check("and fails as little", !grown.is_null(), grown);
    release(grown, layout(2 * LARGE.size()));

    let block = request(IMPOSSIBLE);
    checks.check(
        "below the watermark, the impossible fails",
        block.is_null(),
        block,
    );
    checks.check("and has asked only once", calls() == 3, calls());
    set_low_memory_watermark(0);
}

fn keeps_the_reserve(checks: &mut Checks) {
    BLOCKS_PER_CALL.store(0, Relaxed);
    let free = heap_statistics().free;
    set_heap_reserve(free - LARGE.size());
    let block = request(LARGE);
    checks.check("others get at the reserve", !block.is_null(), block);
    with_fallible_requests(|| {
        let large = request(BLOCK);
        checks.check("what may fail does not", large.is_null(), large);
        let small = request(SMALL);
        checks.check("small requests do", !small.is_null(), small);
        release(small, SMALL);
    });
    let again = request(BLOCK);
    checks.check("and others again", !again.is_null(), again);
    release(again, BLOCK);
    release(block, LARGE);

    set_heap_reserve(0);
    let block = with_fallible_requests(|| request(BLOCK));
    checks.check("without a reserve, all do", !block.is_null(), block);
    release(block, BLOCK);
}

fn fails_for_tests(checks: &mut Checks) {
    let before = heap_statistics();
    fail_requests(1, 2);
    let other = request(BLOCK);
    checks.check("what must not fail does not count", !other.is_null(), other);
    release(other, BLOCK);
    let blocks = with_fallible_requests(|| [(); 4].map(|()| request(BLOCK)));
    let failed = blocks.map(<*mut u8>::is_null);
    checks.check(
        "the second and the third request fail",
        failed == [false, true, true, false],
        failed,
    );
    let after = heap_statistics().failed_requests - before.failed_requests;
    checks.check("which is counted", after == 2, after);
    for block in blocks.into_iter().filter(|block| !block.is_null()) {
        release(block, BLOCK);
    }
}

/// The callback under test.
fn callback(request: Layout) -> usize {
    CALLS.fetch_add(1, Relaxed);
    REQUESTED.store(request.size(), Relaxed);
    let depth = DEPTH.fetch_add(1, Relaxed) + 1;
    DEEPEST.fetch_max(depth, Relaxed);

    let released = hoard::release(BLOCKS_PER_CALL.load(Relaxed));
    // Were it re-entered, its own requests would never end.
    if depth == 1 && CALLBACK_ALLOCATES.load(Relaxed) {
        OWN_REQUESTS[0].store(self::request(BLOCK), Relaxed);
        OWN_REQUESTS[1].store(self::request(IMPOSSIBLE), Relaxed);
    }

    DEPTH.fetch_sub(1, Relaxed);
    released
}

/// Fills the heap and lets each call of the callback give `blocks_per_call` blocks back.
fn prepare(blocks_per_call: usize) -> HeapStatistics {
    BLOCKS_PER_CALL.store(0, Relaxed);
    hoard::fill();
    BLOCKS_PER_CALL.store(blocks_per_call, Relaxed);
    CALLS.store(0, Relaxed);
    DEEPEST.store(0, Relaxed);
    heap_statistics()
}

fn calls() -> usize {
    CALLS.load(Relaxed)
}

fn request(layout: Layout) -> *mut u8 {
    // SAFETY: all layouts of this test have a size.
    black_box(unsafe { alloc(layout) })
}

fn release(block: *mut u8, layout: Layout) {
    // SAFETY: callers have allocated the block with this layout, and checked that.
    unsafe { dealloc(block, layout) };
}

const fn layout(size: usize) -> Layout {
    match Layout::from_size_align(size, 64) {
        Ok(layout) => layout,
        Err(_) => panic!("the size is too large"),
    }
}

/// Counts what is right, and ends the test at what is wrong.
struct Checks {
    passed: usize,
}

impl Checks {
    fn check(&mut self, what: &str, holds: bool, values: impl Debug) {
        if !holds {
            println!("FAILED: {what}: {values:?}; {:?}", heap_statistics());
            hermit::scheduler::shutdown(1);
        }
        println!("ok: {what}");
        self.passed += 1;
    }
}

/// Blocks that fill the heap. Each begins with the address of the next, so that keeping them
/// allocates nothing.
mod hoard {
    use super::{AtomicPtr, BLOCK, Relaxed, ptr, request};

    static FIRST: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

    /// Takes blocks until the heap has none left, and makes sure that they aren't zero.
    pub fn fill() {
        loop {
            let block = request(BLOCK);
            if block.is_null() {
                return;
            }
            // SAFETY: the block is as large and as aligned as its layout says.
            unsafe {
                block.write_bytes(0xff, BLOCK.size());
                block.cast::<*mut u8>().write_unaligned(FIRST.load(Relaxed));
            }
            FIRST.store(block, Relaxed);
        }
    }

    /// Gives up to `count` blocks back, the latest first, and returns their size in bytes.
    pub fn release(count: usize) -> usize {
        let mut released = 0;
        while released < count.saturating_mul(BLOCK.size()) {
            let block = FIRST.load(Relaxed);
            if block.is_null() {
                break;
            }
            // SAFETY: the block is in the hoard, so it begins with the address of the next.
            FIRST.store(unsafe { block.cast::<*mut u8>().read_unaligned() }, Relaxed);
            super::release(block, BLOCK);
            released += BLOCK.size();
        }
        released
    }
}
