//! `smp-stress`: all processors change and use the same page tables at once, and check each access
//! against what the tables say.
//!
//! Protocol: a region's pages change under its lock, between two steps of its sequence number. An
//! access between which and its checks the number stays, and even, must do exactly what the tables
//! say: once every processor has acknowledged a shootdown, none may use an old translation. Any other
//! access ran beside a change, and may do what was right before or after it.
//!
//! On the command line: `cpus=N`, `rounds=N` for each processor, `seed=N`.

#![no_std]
#![no_main]

mod frames;
mod region;
mod shootdown;

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use region::{PAGES, REGIONS, Region, View};
use umbra_guest::interrupts::{self, Mode};
use umbra_guest::memory::{PhysAddr, VirtAddr, peek};
use umbra_guest::paging::Numbers;
use umbra_guest::paging::space::{self, PAGE, Space, bits, take_frame};
use umbra_guest::smp::{self, LIMIT};
use umbra_guest::{BootInfo, Checks, cpu, guest, memory};

guest!("smp-stress", pvh, run);

const ROUNDS: u64 = 1500;
/// One of so many rounds changes the tables.
const ROUNDS_PER_CHANGE: usize = 6;
/// One of so many rounds loads another root, which shares all tables.
const ROUNDS_PER_ROOT: usize = 40;

const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 2;

static WORLD: [Region; REGIONS] = [const { Region::new() }; REGIONS];
/// Two roots with the same entries.
static ROOTS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
static ROUNDS_LEFT: AtomicU64 = AtomicU64::new(0);
static SEED: AtomicU32 = AtomicU32::new(0);
/// Accesses beside which nothing changed, those beside a change, and faults that a second attempt did
/// not have.
static STRICT: AtomicU32 = AtomicU32::new(0);
static LOOSE: AtomicU32 = AtomicU32::new(0);
static REPEATED: AtomicU32 = AtomicU32::new(0);
/// Each processor's last stored value.
static STORED: [AtomicU64; LIMIT] = [const { AtomicU64::new(0) }; LIMIT];

fn run(boot: &BootInfo, checks: &mut Checks) {
    let count = smp::count(boot);
    let option = |name, default| boot.number(name).unwrap_or(default);
    ROUNDS_LEFT.store(option("rounds", ROUNDS), SeqCst);
    SEED.store(option("seed", 1) as u32, SeqCst);
    build();
    interrupts::map();
    interrupts::initialize_pic(0x20, 0xffff);
    smp::with_processors(Mode::XApic, shootdown::handle, || {
        for number in 1..count {
            smp::start(number);
        }
        shootdown::begin(count);
        checks.ok(format_args!(
            "{count} processors, {REGIONS} regions of {PAGES} pages"
        ));
        for number in 1..count {
            smp::begin(number, work);
        }
        work(0);
        smp::wait_until(|| (1..count).all(smp::is_idle));
        for number in 0..count {
            if number == 0 {
                look_everywhere(0);
            } else {
                smp::call(number, look_everywhere);
            }
        }
    });
    let [strict, loose, repeated] = [&STRICT, &LOOSE, &REPEATED].map(|count| count.load(SeqCst));
    checks.equal("most accesses are checked", true, strict > loose);
    checks.ok(format_args!("{strict} accesses did what the tables say"));
    checks.ok(format_args!(
        "{loose} ran beside a change, {repeated} faulted once"
    ));
    checks.ok(format_args!("{} shootdowns", shootdown::count()));
}

/// Builds both roots, and the window whose one directory is seen twice: once so that its pages decide,
/// and once read-only.
fn build() {
    let space = Space::new(space::Mode::Long);
    space::turn_on(space);
    let directory = PhysAddr(space.get(view_base(View::Full), 3) & space.mode.address_mask());
    let directory = if directory.0 == 0 {
        take_frame()
    } else {
        directory
    };
    space.set(view_base(View::Full), 3, directory.0 | bits::P | bits::W);
    space.set(view_base(View::ReadOnly), 3, directory.0 | bits::P);
    for (index, region) in WORLD.iter().enumerate() {
        region.place(
            directory.plus(8 * index as u64),
            space::take(2 << 20, 2 << 20),
        );
    }
    frames::fill_pool();
    let copy = take_frame();
    for offset in (0..PAGE).step_by(8) {
        memory::poke(copy.plus(offset), peek::<u64>(space.root.plus(offset)));
    }
    ROOTS[0].store(space.root.0, SeqCst);
    ROOTS[1].store(copy.0, SeqCst);
}

/// Where a view of the window begins.
fn view_base(view: View) -> VirtAddr {
    let window = space::Mode::Long.window();
    match view {
        View::Full => window,
        View::ReadOnly => window.plus(1 << 30),
    }
}

/// The address of a page in a view.
fn address(view: View, region: usize, page: usize) -> VirtAddr {
    view_base(view).plus((region << 21) + (region::index(page) << 12))
}

fn work(number: usize) {
    let mut numbers =
        Numbers::new(SEED.load(SeqCst).wrapping_mul(0x9e37_79b9) ^ (number as u32 + 1));
    for _ in 0..ROUNDS_LEFT.load(SeqCst) {
        let place = numbers.below(REGIONS);
        if numbers.below(ROUNDS_PER_CHANGE) == 0 {
            WORLD[place].change(place, &mut numbers);
        } else if numbers.below(ROUNDS_PER_ROOT) == 0 {
            cpu::load_root(PhysAddr(ROOTS[numbers.below(2)].load(SeqCst)));
        } else {
            use_page(number, place, &mut numbers);
        }
    }
}

/// The processors are done: every access must do what the tables say.
fn look_everywhere(number: usize) {
    let loose = LOOSE.load(SeqCst);
    for place in 0..REGIONS {
        for page in 0..PAGES {
            for view in [View::Full, View::ReadOnly] {
                read(place, page, view);
                write(number, place, page, view);
            }
        }
    }
    if LOOSE.load(SeqCst) != loose {
        smp::fail(format_args!("something changes though nobody works"));
    }
}

fn use_page(number: usize, place: usize, numbers: &mut Numbers) {
    let page = numbers.below(PAGES);
    let view = [View::Full, View::Full, View::ReadOnly][numbers.below(3)];
    if numbers.below(2) == 0 {
        read(place, page, view);
    } else {
        write(number, place, page, view);
    }
}

fn read(place: usize, page: usize, view: View) {
    let region = &WORLD[place];
    let before = region.snapshot(page);
    let got = smp::load(address(view, place, page));
    let expected = if before.is_present() {
        Ok(frames::tag(before.frame()))
    } else {
        Err(0)
    };
    let entry = before.read_leaf();
    if !region.is_unchanged(&before) {
        LOOSE.fetch_add(1, SeqCst);
        if let Ok(value) = got
            && !frames::was_a_tag(value)
        {
            smp::fail(format_args!(
                "page {place}.{page} reads {value:#x}, no page's"
            ));
        }
        return;
    }
    STRICT.fetch_add(1, SeqCst);
    if got != expected {
        smp::fail(format_args!(
            "page {place}.{page} {view:?} reads {got:x?}, not {expected:x?}: {before:x?}"
        ));
    }
    check_flags(place, page, &before, entry, bits::A);
}

fn write(number: usize, place: usize, page: usize, view: View) {
    let region = &WORLD[place];
    let value = STORED[number].fetch_add(1, SeqCst) + 1;
    let slot = frames::slot(number);
    let target = address(view, place, page).plus(slot as usize);
    let before = region.snapshot(page);
    let mut got = smp::store(target, value);
    let allowed = before.is_writable() && view == View::Full;
    if allowed && got == Err(FAULT_PRESENT | FAULT_WRITE) {
        // More rights need no shootdown, but the fault has dropped the old translation.
        REPEATED.fetch_add(1, SeqCst);
        got = smp::store(target, value);
    }
    let entry = before.read_leaf();
    let arrived = peek::<u64>(before.frame().plus(slot));
    let seen = smp::load(address(View::ReadOnly, place, page).plus(slot as usize));
    if !region.is_unchanged(&before) {
        LOOSE.fetch_add(1, SeqCst);
        return;
    }
    STRICT.fetch_add(1, SeqCst);
    let expected = match (before.is_present(), allowed) {
        (true, true) => Ok(()),
        (true, false) => Err(FAULT_PRESENT | FAULT_WRITE),
        (false, _) => Err(FAULT_WRITE),
    };
    if got != expected {
        smp::fail(format_args!(
            "page {place}.{page} {view:?} is written: {got:x?}, not {expected:x?}: {before:x?}"
        ));
    }
    if allowed && (arrived, seen) != (value, Ok(value)) {
        smp::fail(format_args!(
            "page {place}.{page} was written {value:#x}, has {arrived:#x}, shows {seen:x?}"
        ));
    }
    let flags = if allowed { bits::A | bits::D } else { 0 };
    check_flags(place, page, &before, entry, flags);
}

/// A successful access has set these flags, and nothing sets D where nothing was writable.
fn check_flags(place: usize, page: usize, before: &region::Snapshot, entry: u64, flags: u64) {
    if !before.is_present() {
        return;
    }
    let never = if before.was_never_writable() {
        bits::D
    } else {
        0
    };
    if entry & flags != flags || entry & never != 0 {
        smp::fail(format_args!(
            "page {place}.{page} has entry {entry:#x}, without {flags:#x} or with {never:#x}"
        ));
    }
}
