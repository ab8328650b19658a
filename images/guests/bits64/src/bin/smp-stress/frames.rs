//! Page frames with contents that tell them apart.
//!
//! Protocol: the first word of a frame is its tag, which changes whenever it is given back; then one
//! word for each processor, which only this one stores to. Frames in the pool have words of zero:
//! whoever takes one checks that nobody has stored to it through an old translation.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use umbra_guest::memory::{FREE_END, FREE_START, PhysAddr, clear, peek, poke};
use umbra_guest::paging::space::{PAGE, take_frame};
use umbra_guest::smp::{self, LIMIT, Lock};

const ALL: usize = ((FREE_END - FREE_START) / PAGE) as usize;
const POOL: usize = 48;

static TAGS: [AtomicU64; ALL] = [const { AtomicU64::new(0) }; ALL];
static NEXT_TAG: AtomicU64 = AtomicU64::new(1);
static LOCK: Lock = Lock::new();
static FREE: [AtomicU64; POOL] = [const { AtomicU64::new(0) }; POOL];
static FREE_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Fills the pool.
pub fn fill_pool() {
    for _ in 0..POOL {
        give_back(take_frame());
    }
}

/// The offset of a processor's word.
pub const fn slot(number: usize) -> u64 {
    64 + 8 * number as u64
}

/// What a frame's first word is.
pub fn tag(frame: PhysAddr) -> u64 {
    TAGS[index(frame)].load(SeqCst)
}

/// Whether any frame ever had this tag.
pub fn was_a_tag(value: u64) -> bool {
    (1..NEXT_TAG.load(SeqCst)).contains(&value)
}

fn index(frame: PhysAddr) -> usize {
    ((frame.0 - FREE_START) / PAGE) as usize
}

/// Gives a frame that nobody can use a new tag and words of zero.
pub fn renew(frame: PhysAddr) {
    let tag = NEXT_TAG.fetch_add(1, SeqCst);
    for number in 0..LIMIT {
        poke(frame.plus(slot(number)), 0_u64);
    }
    poke(frame, tag);
    TAGS[index(frame)].store(tag, SeqCst);
}

/// Takes a frame; `None` if there is none.
pub fn take() -> Option<PhysAddr> {
    let frame = LOCK.with(|| {
        let count = FREE_COUNT.load(SeqCst).checked_sub(1)?;
        FREE_COUNT.store(count, SeqCst);
        Some(PhysAddr(FREE[count].load(SeqCst)))
    })?;
    let words = (0..LIMIT).map(|number| peek::<u64>(frame.plus(slot(number))));
    if peek::<u64>(frame) != tag(frame) || words.into_iter().any(|word| word != 0) {
        smp::fail(format_args!("frame {frame:?} was stored to after its end"));
    }
    Some(frame)
}

/// Takes a frame for a page table without entries.
pub fn take_table() -> Option<PhysAddr> {
    let frame = take()?;
    clear(frame, PAGE as usize);
    Some(frame)
}

/// Gives a frame back that nobody can use any more.
pub fn give_back(frame: PhysAddr) {
    renew(frame);
    LOCK.with(|| {
        let count = FREE_COUNT.load(SeqCst);
        FREE[count].store(frame.0, SeqCst);
        FREE_COUNT.store(count + 1, SeqCst);
    });
}
