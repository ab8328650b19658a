//! A storm of forks, as a shell script makes it: the parent's address space is copied with all pages
//! write-protected on both sides, the child uses some pages and gets copies of others to write to, and
//! when so many processes are alive the oldest one ends, whose frames the next one gets.

use umbra_guest::memory::{self, PhysAddr, VirtAddr};
use umbra_guest::{Checks, cpu};

use crate::space::{
    ENTRIES, Frames, WRITABLE, address, check, entry, map_tables, report, root, set_entry, target,
};

/// Full tables of an address space.
const TABLES: u64 = 4;
/// Pages of each table that a child reads, and of these, those that it writes to.
const READ: u64 = 64;
const WRITTEN: u64 = 8;
/// Frames of a child: root, pointers, directory, tables, written pages.
const FRAMES_OF_CHILD: u64 = 3 + TABLES + TABLES * WRITTEN;
/// Children that come and go, for each that is alive.
const GENERATIONS: u64 = 8;

pub fn measure(checks: &mut Checks, frames: &mut Frames, processes: u64) {
    let parent = root();
    map_tables(frames, parent, TABLES, |frames, number| {
        let table = frames.table();
        for page in 0..ENTRIES {
            set_entry(table, page, frames.page(number * ENTRIES + page));
        }
        table
    });
    cpu::reload_root();
    let all = frames.share(processes * FRAMES_OF_CHILD);
    let mut ticks = 0;
    for generation in 0..=GENERATIONS {
        let mut frames = all.clone();
        let start = cpu::rdtsc();
        for _ in 0..processes {
            // The frames of the one that has ended.
            run_child(checks, &mut frames.share(FRAMES_OF_CHILD), parent);
        }
        // The first ones take frames that were no tables before.
        if generation > 0 {
            ticks += cpu::rdtsc() - start;
        }
    }
    report("fork", ticks, GENERATIONS * processes);
}

/// A child's life until it waits: it is made, runs, and gives the processor back to its parent.
fn run_child(checks: &mut Checks, frames: &mut Frames, parent: PhysAddr) {
    let child = copy(frames, parent);
    cpu::load_root(child);
    for number in 0..TABLES {
        for page in 0..READ {
            check(checks, number, page, number * ENTRIES + page);
        }
        for page in 0..WRITTEN {
            let marker = number * ENTRIES + page;
            let own = frames.page(marker);
            set_entry(table(child, number), page, own);
            let place = address(number, page);
            cpu::invlpg(place);
            write(place, marker + 1);
            checks.equal("the page of the child", marker + 1, memory::peek(own));
        }
    }
    cpu::load_root(parent);
    check(checks, 0, 0, 0);
}

fn write(place: VirtAddr, value: u64) {
    memory::poke(PhysAddr(place.0 as u64), value);
}

fn table(root: PhysAddr, number: u64) -> PhysAddr {
    let pointers = target(entry(root, 1));
    let directory = target(entry(pointers, 0));
    target(entry(directory, number))
}

/// Copies an address space, and takes the right to write away from both.
fn copy(frames: &mut Frames, parent: PhysAddr) -> PhysAddr {
    let child = frames.table();
    for index in 0..ENTRIES {
        memory::poke(child.plus(8 * index), entry(parent, index));
    }
    map_tables(frames, child, TABLES, |frames, number| {
        let (original, copy) = (table(parent, number), frames.table());
        for page in 0..ENTRIES {
            let protected = entry(original, page) & !WRITABLE;
            memory::poke(original.plus(8 * page), protected);
            memory::poke(copy.plus(8 * page), protected);
        }
        copy
    });
    // Its own entries must lose the right, too.
    cpu::reload_root();
    child
}
