//! A region: 2 MiB of the window, mapped by one directory entry, of which a few pages are used.
//!
//! Protocol: all changes happen in [`Region::change`], under the lock. A frame is given back after
//! the shootdown that made it unreachable.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use umbra_guest::memory::{PhysAddr, peek, poke};
use umbra_guest::paging::Numbers;
use umbra_guest::paging::space::{PAGE, bits};
use umbra_guest::smp::Lock;

use crate::frames;
use crate::shootdown::{Scope, shoot};

/// How many regions there are.
pub const REGIONS: usize = 3;
/// How many pages of each are used.
pub const PAGES: usize = 8;

const ENTRIES: u64 = 512;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// In a page's state, besides its frame and the entry's rights: it was never writable.
const NEVER_WRITABLE: u64 = bits::U;

/// Under which of its two addresses the window is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum View {
    /// The pages' own rights count.
    Full,
    /// An upper level forbids writing.
    ReadOnly,
}

/// The place of a used page among the 512.
pub const fn index(page: usize) -> usize {
    [0, 1, 2, 7, 255, 256, 510, 511][page]
}

/// A region.
pub struct Region {
    lock: Lock,
    /// Odd while something changes.
    sequence: AtomicU64,
    /// Where its directory entry is.
    entry: AtomicU64,
    /// The 2 MiB of RAM that a large page shows.
    chunk: AtomicU64,
    /// Its page table; zero without one, where a large page or nothing is mapped.
    table: AtomicU64,
    /// What each page's entry says: frame, present, writable; zero if it is not mapped.
    states: [AtomicU64; PAGES],
}

/// What the tables say of a page at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    sequence: u64,
    state: u64,
    leaf: PhysAddr,
}

impl Snapshot {
    /// Whether the page is mapped.
    pub const fn is_present(&self) -> bool {
        self.state & bits::P != 0
    }

    /// Whether its entry allows writing.
    pub const fn is_writable(&self) -> bool {
        self.state & bits::W != 0
    }

    /// Whether it never allowed that.
    pub const fn was_never_writable(&self) -> bool {
        self.state & NEVER_WRITABLE != 0
    }

    /// The frame; a frame of no meaning if there is none.
    pub const fn frame(&self) -> PhysAddr {
        PhysAddr(if self.is_present() {
            self.state & ADDRESS
        } else {
            umbra_guest::memory::FREE_START
        })
    }

    /// The entry that maps the page, as it is now.
    pub fn read_leaf(&self) -> u64 {
        peek(self.leaf)
    }
}

impl Region {
    /// A region that is nowhere yet.
    pub const fn new() -> Self {
        Self {
            lock: Lock::new(),
            sequence: AtomicU64::new(0),
            entry: AtomicU64::new(0),
            chunk: AtomicU64::new(0),
            table: AtomicU64::new(0),
            states: [const { AtomicU64::new(0) }; PAGES],
        }
    }

    /// Gives it a directory entry and RAM.
    pub fn place(&self, entry: PhysAddr, chunk: PhysAddr) {
        self.entry.store(entry.0, SeqCst);
        self.chunk.store(chunk.0, SeqCst);
        for number in 0..ENTRIES {
            frames::renew(chunk.plus(number * PAGE));
        }
    }

    /// What the tables say of a page now.
    pub fn snapshot(&self, page: usize) -> Snapshot {
        let sequence = self.sequence.load(SeqCst);
        let leaf = match self.table.load(SeqCst) {
            0 => self.entry(),
            table => leaf(PhysAddr(table), page),
        };
        Snapshot {
            sequence,
            state: self.states[page].load(SeqCst),
            leaf,
        }
    }

    /// Whether nothing has changed since.
    pub fn is_unchanged(&self, snapshot: &Snapshot) -> bool {
        snapshot.sequence.is_multiple_of(2) && self.sequence.load(SeqCst) == snapshot.sequence
    }

    fn entry(&self) -> PhysAddr {
        PhysAddr(self.entry.load(SeqCst))
    }

    /// The frame of the region's own RAM for a page.
    fn own_frame(&self, page: usize) -> PhysAddr {
        PhysAddr(self.chunk.load(SeqCst) + index(page) as u64 * PAGE)
    }

    /// Changes something at random.
    pub fn change(&self, place: usize, numbers: &mut Numbers) {
        self.lock.with(|| {
            self.sequence.fetch_add(1, SeqCst);
            let entry: u64 = peek(self.entry());
            if entry & bits::P == 0 {
                self.create(numbers);
            } else if entry & bits::PS != 0 {
                self.change_large(numbers);
            } else {
                match numbers.below(24) {
                    0 => self.replace_table(0, numbers),
                    1 => self.replace_table(self.large_entry(numbers), numbers),
                    2 | 3 => self.move_table(numbers),
                    _ => self.change_page(place, numbers.below(PAGES), numbers),
                }
            }
            self.sequence.fetch_add(1, SeqCst);
        });
    }

    /// Nothing is mapped: maps a large page or a table. No translation is cached, so none is dropped.
    fn create(&self, numbers: &mut Numbers) {
        if numbers.below(2) == 0 {
            let entry = self.large_entry(numbers);
            self.set_states_of_large(entry);
            poke(self.entry(), entry);
        } else if let Some(table) = frames::take_table() {
            self.table.store(table.0, SeqCst);
            poke(self.entry(), table.0 | bits::P | bits::W);
        }
    }

    fn large_entry(&self, numbers: &mut Numbers) -> u64 {
        let writable = if numbers.below(2) == 0 { bits::W } else { 0 };
        self.chunk.load(SeqCst) | bits::P | bits::PS | writable
    }

    fn set_states_of_large(&self, entry: u64) {
        for (page, state) in self.states.iter().enumerate() {
            let rights = entry & (bits::P | bits::W);
            state.store(self.own_frame(page).0 | rights, SeqCst);
        }
    }

    /// A large page is mapped: splits it, or takes it away, or changes its rights or flags.
    fn change_large(&self, numbers: &mut Numbers) {
        let entry: u64 = peek(self.entry());
        match numbers.below(6) {
            0 => {
                exchange(self.entry(), 0);
                self.states.iter().for_each(|state| state.store(0, SeqCst));
            }
            1 => {
                retain(self.entry(), !bits::W);
                self.set_states_of_large(entry & !bits::W);
            }
            2 => retain(self.entry(), !(bits::A | bits::D)),
            _ => {
                let Some(table) = frames::take_table() else {
                    return;
                };
                let chunk = self.chunk.load(SeqCst);
                for number in 0..ENTRIES {
                    let small = (chunk + number * PAGE) | entry & (bits::P | bits::W);
                    poke(table.plus(8 * number), small);
                }
                self.table.store(table.0, SeqCst);
                exchange(self.entry(), table.0 | bits::P | bits::W);
            }
        }
        shoot(Scope::All, numbers);
    }

    /// Replaces the table by a large page or nothing.
    fn replace_table(&self, entry: u64, numbers: &mut Numbers) {
        let table = PhysAddr(self.table.swap(0, SeqCst));
        exchange(self.entry(), entry);
        shoot(Scope::All, numbers);
        for (page, state) in self.states.iter().enumerate() {
            self.release(page, state.swap(0, SeqCst));
        }
        frames::give_back(table);
        if entry & bits::P != 0 {
            self.set_states_of_large(entry);
        }
    }

    /// Puts a copy in the table's place.
    fn move_table(&self, numbers: &mut Numbers) {
        let Some(copy) = frames::take_table() else {
            return;
        };
        let table = PhysAddr(self.table.load(SeqCst));
        for offset in (0..PAGE).step_by(8) {
            poke(copy.plus(offset), peek::<u64>(table.plus(offset)));
        }
        self.table.store(copy.0, SeqCst);
        exchange(self.entry(), copy.0 | bits::P | bits::W);
        shoot(Scope::All, numbers);
        frames::give_back(table);
    }

    /// A page of a table.
    fn change_page(&self, place: usize, page: usize, numbers: &mut Numbers) {
        let leaf = leaf(PhysAddr(self.table.load(SeqCst)), page);
        let state = &self.states[page];
        let now = state.load(SeqCst);
        let scope = Scope::Page(place, page);
        if now & bits::P == 0 {
            let Some(new) = new_state(numbers) else {
                return;
            };
            state.store(new, SeqCst);
            poke(leaf, entry_of(new));
            return;
        }
        match numbers.below(6) {
            0 => {
                state.store(0, SeqCst);
                exchange(leaf, 0);
                shoot(scope, numbers);
                self.release(page, now);
            }
            1 => {
                let Some(new) = new_state(numbers) else {
                    return;
                };
                state.store(new, SeqCst);
                exchange(leaf, entry_of(new));
                shoot(scope, numbers);
                self.release(page, now);
            }
            2 => {
                state.store(now & !bits::W, SeqCst);
                retain(leaf, !bits::W);
                shoot(scope, numbers);
            }
            3 => {
                retain(leaf, !(bits::A | bits::D));
                shoot(scope, numbers);
            }
            _ => {
                // More rights: whoever has less will fault once.
                state.store(now & !NEVER_WRITABLE | bits::W, SeqCst);
                extend(leaf, bits::W);
            }
        }
    }

    /// A page's frame is no longer mapped.
    fn release(&self, page: usize, state: u64) {
        let frame = PhysAddr(state & ADDRESS);
        if state & bits::P == 0 {
            return;
        }
        if frame == self.own_frame(page) {
            frames::renew(frame);
        } else {
            frames::give_back(frame);
        }
    }
}

/// A new frame with rights.
fn new_state(numbers: &mut Numbers) -> Option<u64> {
    let rights = [bits::W, NEVER_WRITABLE][numbers.below(2)];
    Some(frames::take()?.0 | bits::P | rights)
}

/// The entry that a state means; states say with a bit of their own what was never writable.
const fn entry_of(state: u64) -> u64 {
    state & !NEVER_WRITABLE
}

fn leaf(table: PhysAddr, page: usize) -> PhysAddr {
    table.plus(8 * index(page) as u64)
}

/// An entry as an atomic: processors set flags in it at any time.
fn atomic(entry: PhysAddr) -> &'static AtomicU64 {
    umbra_guest::memory::atomic(entry)
}

fn exchange(entry: PhysAddr, value: u64) {
    atomic(entry).swap(value, SeqCst);
}

fn retain(entry: PhysAddr, bits: u64) {
    atomic(entry).fetch_and(bits, SeqCst);
}

fn extend(entry: PhysAddr, bits: u64) {
    atomic(entry).fetch_or(bits, SeqCst);
}
