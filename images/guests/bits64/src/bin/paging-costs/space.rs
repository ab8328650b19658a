//! Page tables, and the frames that they and their pages take.

use umbra_guest::memory::{self, FREE_END, FREE_START, PhysAddr, VirtAddr};
use umbra_guest::{BootInfo, Checks, cpu, println};

pub const PAGE: u64 = 4096;
pub const ENTRIES: u64 = 512;
pub const WRITABLE: u64 = 0b10;
const PRESENT_WRITABLE_USER: u64 = 0b111;
const FLAGS: u64 = 0xfff;
/// Where the new mappings begin: entry 1 of the root table.
const BASE: usize = 1 << 39;
const LARGE_PAGE: usize = 2 << 20;
/// Where the identity mapping ends.
const MAPPED_END: u64 = 1 << 30;

/// Frames that nobody uses.
#[derive(Clone)]
pub struct Frames {
    next: u64,
    end: u64,
}

impl Frames {
    pub fn new(boot: &BootInfo) -> Self {
        Self {
            next: FREE_START,
            end: boot.ram_end.clamp(FREE_END, MAPPED_END),
        }
    }

    /// So many frames, one after the other.
    fn take(&mut self, count: u64) -> PhysAddr {
        let first = PhysAddr(self.next);
        self.next += count * PAGE;
        assert!(self.next <= self.end, "out of free RAM");
        first
    }

    /// So many frames that are given out anew.
    pub fn share(&mut self, count: u64) -> Self {
        let next = self.take(count).0;
        Self {
            next,
            end: next + count * PAGE,
        }
    }

    /// An empty table.
    pub fn table(&mut self) -> PhysAddr {
        let table = self.take(1);
        memory::clear(table, PAGE as usize);
        table
    }

    /// A page that begins with this number.
    pub fn page(&mut self, marker: u64) -> PhysAddr {
        let page = self.take(1);
        memory::poke(page, marker);
        page
    }
}

pub fn entry(table: PhysAddr, index: u64) -> u64 {
    memory::peek(table.plus(8 * index))
}

/// What a table's entry points to.
pub fn target(entry: u64) -> PhysAddr {
    PhysAddr(entry & !FLAGS)
}

pub fn set_entry(table: PhysAddr, index: u64, target: PhysAddr) {
    memory::poke(table.plus(8 * index), target.0 | PRESENT_WRITABLE_USER);
}

/// Page directories for `tables` tables below entry 1 of `root`; `table` makes each.
pub fn map_tables(
    frames: &mut Frames,
    root: PhysAddr,
    tables: u64,
    mut table: impl FnMut(&mut Frames, u64) -> PhysAddr,
) {
    let pointers = frames.table();
    let mut directory = pointers;
    for number in 0..tables {
        if number % ENTRIES == 0 {
            directory = frames.table();
            set_entry(pointers, number / ENTRIES, directory);
        }
        let table = table(frames, number);
        set_entry(directory, number % ENTRIES, table);
    }
    set_entry(root, 1, pointers);
}

pub fn root() -> PhysAddr {
    PhysAddr(cpu::read_cr3() as u64 & !(PAGE - 1))
}

/// Where a page of a table is.
pub fn address(table: u64, page: u64) -> VirtAddr {
    VirtAddr(BASE + table as usize * LARGE_PAGE + (page * PAGE) as usize)
}

/// Reads the page's marker where the tables show it.
pub fn check(checks: &mut Checks, table: u64, page: u64, marker: u64) {
    let read = memory::peek::<u64>(PhysAddr(address(table, page).0 as u64));
    checks.equal("the page of the table", marker, read);
}

pub fn report(name: &str, ticks: u64, times: u64) {
    println!(
        "cost {name}: {}.{:02}",
        ticks / times,
        ticks % times * 100 / times
    );
}
