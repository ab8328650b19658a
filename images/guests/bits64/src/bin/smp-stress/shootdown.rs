//! TLB shootdowns: whoever takes rights away tells all processors and waits until each has dropped
//! its translations.
//!
//! Protocol: each processor has one request, which says what to drop and who has not yet done so. It
//! is written before the interrupt is sent, by which any processor serves all requests that wait for
//! it. A second interrupt, or an NMI in the middle of the first, does no harm.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};

use umbra_guest::cpu::{invlpg, reload_root};
use umbra_guest::interrupts;
use umbra_guest::memory::VirtAddr;
use umbra_guest::paging::Numbers;
use umbra_guest::smp::{self, LIMIT, command};

use crate::address;
use crate::region::View;

const VECTOR: u8 = 0x61;
/// One of so many shootdowns comes as an NMI.
const PER_NMI: usize = 12;

/// What is to be dropped.
#[derive(Clone, Copy)]
pub enum Scope {
    /// A page, in both views.
    Page(usize, usize),
    /// All.
    All,
}

struct Request {
    /// The address in the full view; zero for all.
    full: AtomicUsize,
    read_only: AtomicUsize,
    /// Who has not dropped it yet, a bit each.
    pending: AtomicU32,
}

static REQUESTS: [Request; LIMIT] = [const {
    Request {
        full: AtomicUsize::new(0),
        read_only: AtomicUsize::new(0),
        pending: AtomicU32::new(0),
    }
}; LIMIT];
static PROCESSORS: AtomicU32 = AtomicU32::new(1);
static COUNT: AtomicU32 = AtomicU32::new(0);

/// So many processors take part from now on.
pub fn begin(count: usize) {
    PROCESSORS.store((1 << count) - 1, SeqCst);
}

/// How many there were.
pub fn count() -> u32 {
    COUNT.load(SeqCst)
}

/// Serves every request that waits for this processor.
pub fn handle(_vector: u8) {
    let me = 1 << smp::number();
    for request in &REQUESTS {
        if request.pending.load(SeqCst) & me != 0 {
            let [full, read_only] = [&request.full, &request.read_only].map(|at| at.load(SeqCst));
            drop_translations(full, read_only);
            request.pending.fetch_and(!me, SeqCst);
        }
    }
}

fn drop_translations(full: usize, read_only: usize) {
    if full == 0 {
        reload_root();
    } else {
        invlpg(VirtAddr(full));
        invlpg(VirtAddr(read_only));
    }
}

/// Makes every processor drop translations, and comes back when all have.
pub fn shoot(scope: Scope, numbers: &mut Numbers) {
    let (full, read_only) = match scope {
        Scope::Page(place, page) => (
            address(View::Full, place, page).0,
            address(View::ReadOnly, place, page).0,
        ),
        Scope::All => (0, 0),
    };
    drop_translations(full, read_only);
    COUNT.fetch_add(1, SeqCst);
    let number = smp::number();
    let others = PROCESSORS.load(SeqCst) & !(1 << number);
    let request = &REQUESTS[number];
    request.full.store(full, SeqCst);
    request.read_only.store(read_only, SeqCst);
    request.pending.store(others, SeqCst);
    let command = if numbers.below(PER_NMI) == 0 {
        command::NMI
    } else {
        command::FIXED | u32::from(VECTOR)
    };
    if numbers.below(2) == 0 {
        interrupts::send(0, command | command::OTHERS);
    } else {
        for target in (0..LIMIT as u32).filter(|target| others >> target & 1 != 0) {
            interrupts::send(target, command);
        }
    }
    smp::wait_until(|| request.pending.load(SeqCst) == 0);
}
