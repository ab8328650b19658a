//! Thousands of random operations on two address spaces, against a model of what the tables say.

use super::space::{PAGE, Space, bits, peek_entry, poke_entry, take_frame};
use super::suite::{Suite, error};
use crate::cpu::{self, cr0, invlpg};
use crate::memory::{self, PhysAddr, VirtAddr, poke};
use crate::trap::vector;
use crate::user::Program;

const PAGES: usize = 24;
const FRAMES: usize = 12;
const STEPS: u32 = 4000;

/// A repeatable source of numbers (xorshift).
pub struct Numbers(u32);

impl Numbers {
    /// Starts from `seed`, which is not zero.
    pub const fn new(seed: u32) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.draw() as usize % end
    }
}

/// Two spaces with `PAGES` pages each around the border of two leaf tables; the second of these
/// tables is the same in both spaces.
struct World {
    spaces: [Space; 2],
    current: usize,
    base: VirtAddr,
    frames: [PhysAddr; FRAMES],
    contents: [u32; FRAMES],
    write_protect: bool,
}

pub fn run(suite: &mut Suite<'_>) {
    let mode = suite.mode;
    let other = Space::new(mode);
    suite.map_programs(other);
    let half = PAGES / 2 * PAGE as usize;
    let base = VirtAddr(mode.window().0 + 10 * mode.span(2) as usize - half);
    for space in [suite.space, other] {
        space.entry(base, 1);
    }
    suite.space.entry(base.plus(half), 1);
    other.set(base.plus(half), 2, suite.space.get(base.plus(half), 2));
    cpu::reload_root();
    let mut world = World {
        spaces: [suite.space, other],
        current: 0,
        base,
        frames: [PhysAddr(0); FRAMES],
        contents: [0; FRAMES],
        write_protect: true,
    };
    for frame in &mut world.frames {
        *frame = take_frame();
    }
    let mut numbers = Numbers::new(0x2545_f491);
    for step in 0..STEPS {
        world.step(suite, &mut numbers, step);
    }
    cpu::set_cr0(cr0::WP);
    suite.space.enter();
    suite
        .checks
        .ok("random operations on two address spaces agree with the tables");
}

impl World {
    fn page(&self, index: usize) -> VirtAddr {
        self.base.plus(index * PAGE as usize)
    }

    fn step(&mut self, suite: &mut Suite<'_>, numbers: &mut Numbers, step: u32) {
        let page = self.page(numbers.below(PAGES));
        match numbers.below(16) {
            0..=3 => {
                let frame = self.frames[numbers.below(FRAMES)].0;
                let flags = [bits::P, bits::P | bits::W, bits::P | bits::U, bits::PWU, 0];
                let space = self.spaces[numbers.below(2)];
                let entry = leaf_entry(space, page);
                poke_entry(space.mode, entry, frame | flags[numbers.below(5)]);
                invlpg(page);
            }
            4 => {
                self.current ^= 1;
                self.spaces[self.current].enter();
            }
            5 => {
                let space = self.spaces[numbers.below(2)];
                let flip = [bits::W, bits::U, bits::P][numbers.below(3)];
                let entry = space.entry(page, 2);
                let value = peek_entry(space.mode, entry);
                poke_entry(space.mode, entry, value ^ flip);
                cpu::reload_root();
            }
            6 => {
                self.write_protect = !self.write_protect;
                if self.write_protect {
                    cpu::set_cr0(cr0::WP);
                } else {
                    cpu::clear_cr0(cr0::WP);
                }
            }
            7 => {
                let frame = numbers.below(FRAMES);
                self.contents[frame] = numbers.draw();
                poke(self.frames[frame], self.contents[frame]);
            }
            access => self.access(suite, page, access, step),
        }
    }

    fn access(&mut self, suite: &mut Suite<'_>, page: VirtAddr, access: usize, step: u32) {
        let (write, user) = (access % 2 == 1, access >= 12);
        let space = self.spaces[self.current];
        let before = Self::walk(space, page);
        let expected = self.expected(before, write, user);
        let got = match (write, user) {
            (false, false) => memory::read::<u32>(page),
            (true, false) => memory::write(page, step).map(|()| step),
            (false, true) => suite.user(Program::Read, page, 0),
            (true, true) => suite.user(Program::Write, page, step).map(|_| step),
        };
        let what = format_args!("step {step}: write {write}, user {user}, entries {before:x?}");
        match expected {
            Err(code) => {
                suite.faults(what, code, page, got);
                let after = Self::walk(space, page).leaf;
                suite
                    .checks
                    .equal("D after a fault", before.leaf & bits::D, after & bits::D);
            }
            Ok(frame) => {
                let value = suite.checks.succeeds(what, got);
                if write {
                    self.contents[frame] = step;
                } else {
                    suite.checks.equal(what, self.contents[frame], value);
                }
                let entries = Self::walk(space, page);
                let (leaf, upper) = (entries.leaf, entries.upper);
                let dirty = if write {
                    bits::D
                } else {
                    before.leaf & bits::D
                };
                suite
                    .checks
                    .equal("A of both levels", bits::A, leaf & upper & bits::A);
                suite.checks.equal("D", dirty, leaf & bits::D);
            }
        }
    }

    fn walk(space: Space, page: VirtAddr) -> Entries {
        let upper = peek_entry(space.mode, space.entry(page, 2));
        Entries {
            upper,
            leaf: peek_entry(space.mode, leaf_entry(space, page)),
        }
    }

    /// The frame's index, or the fault's error code.
    fn expected(&self, entries: Entries, write: bool, user: bool) -> Result<usize, u32> {
        let mut code = if write { error::WRITE } else { 0 } | if user { error::USER } else { 0 };
        let both = entries.upper & entries.leaf;
        if both & bits::P == 0 {
            return Err(code);
        }
        code |= error::PROTECTION;
        let read_only = both & bits::W == 0 && (user || self.write_protect);
        if user && both & bits::U == 0 || write && read_only {
            return Err(code);
        }
        let frame = entries.leaf & 0xffff_f000;
        self.frames
            .iter()
            .position(|known| known.0 == frame)
            .ok_or(u32::from(vector::PF))
    }
}

/// The leaf entry, also while the level above is not present.
fn leaf_entry(space: Space, page: VirtAddr) -> PhysAddr {
    let table = peek_entry(space.mode, space.entry(page, 2)) & space.mode.address_mask();
    PhysAddr(table + space.mode.index(page, 1) * space.mode.entry_bytes())
}

/// The two entries that decide.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entries {
    upper: u64,
    leaf: u64,
}
