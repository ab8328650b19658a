//! The page that is accessed, and how.

use umbra_guest::cpu::{self, invlpg};
use umbra_guest::memory::{self, PhysAddr, VirtAddr, peek, poke};
use umbra_guest::paging::space::{Mode, PAGE, Space, bits, take, take_frame};
use umbra_guest::paging::{CODE_RESULT, USER_ENTRY, call, copy_code};
use umbra_guest::trap::{Trap, vector};
use umbra_guest::user::{self, Program};

use crate::entries::Pair;
use crate::rules::Access;

/// Which page of its large page it is.
const NUMBER: u64 = 5;
/// Where in the page data is read and written; code is at its start.
const DATA: usize = 0x800;
/// What is there to be read.
const BEFORE: u32 = 0x5afe_da7a;
/// What is written there.
const WRITTEN: u32 = 0xdead_10cc;
const LARGE_PAGE: u64 = 2 << 20;
/// Ring 3's programs lie 1 GiB after the page.
const PROGRAMS: VirtAddr = Mode::Long.window().plus(1 << 30);

/// The page and the two entries that map it.
pub struct Page {
    address: VirtAddr,
    large: PhysAddr,
    table: PhysAddr,
    directory_entry: PhysAddr,
    table_entry: PhysAddr,
    current: Pair,
}

/// A page fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Its error code.
    pub error_code: u32,
}

/// What came of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Observed {
    /// The page fault, if there was one.
    pub fault: Option<Fault>,
    /// The entries afterwards.
    pub after: Pair,
    /// Whether everything else is right: CR2, the value that was read or written, what the code
    /// returned, and that no other exception came.
    pub is_consistent: bool,
}

impl Page {
    /// Maps what the accesses need.
    pub fn new(space: Space) -> Self {
        let address = Mode::Long.window().plus((NUMBER * PAGE) as usize);
        let large = take(LARGE_PAGE, LARGE_PAGE);
        copy_code(large.plus(NUMBER * PAGE));
        let programs = take_frame();
        memory::copy_to(programs, user::programs());
        space.map(PROGRAMS, 1, programs, bits::P | bits::U);
        let table_entry = space.entry(address, 1);
        let directory_entry = space.entry(address, 2);
        let mut page = Self {
            address,
            large,
            table: PhysAddr(table_entry.0 & !(PAGE - 1)),
            directory_entry,
            table_entry,
            current: Pair {
                directory: 0,
                table: 0,
            },
        };
        page.read_back();
        page
    }

    /// Maps the page as `pair` says, accesses it, and looks at what happened.
    pub fn attempt(&mut self, access: Access, pair: Pair) -> Observed {
        self.map(pair);
        let data = self.large.plus(NUMBER * PAGE + DATA as u64);
        poke(data, BEFORE);
        let (target, result) = self.access(access);
        let value = peek::<u32>(data);
        let (fault, is_consistent) = match result {
            Ok(returned) => (None, self.is_success(access, returned, value)),
            Err(trap) => (
                Some(Fault {
                    error_code: trap.error_code,
                }),
                trap.vector == vector::PF && trap.cr2 == target.0 && value == BEFORE,
            ),
        };
        Observed {
            fault,
            after: self.read_back(),
            is_consistent,
        }
    }

    fn is_success(&self, access: Access, returned: u32, value: u32) -> bool {
        match access {
            Access::UserRead | Access::Read | Access::ReadAlignmentCheck => {
                (returned, value) == (BEFORE, BEFORE)
            }
            Access::UserWrite | Access::Write | Access::WriteAlignmentCheck => value == WRITTEN,
            Access::UserFetch | Access::Fetch => (returned, value) == (CODE_RESULT, BEFORE),
        }
    }

    /// Where the access goes, and what comes of it.
    fn access(&self, access: Access) -> (VirtAddr, Result<u32, Trap>) {
        let data = self.address.plus(DATA);
        match access {
            Access::UserRead => (data, in_ring3(Program::Read, data)),
            Access::UserWrite => (data, in_ring3(Program::Write, data)),
            Access::UserFetch => {
                let code = self.address.plus(USER_ENTRY);
                (code, in_ring3(Program::Jump, code))
            }
            Access::Read => (data, memory::read(data)),
            Access::Write => (data, memory::write(data, WRITTEN).map(|()| WRITTEN)),
            Access::Fetch => (self.address, call(self.address)),
            Access::ReadAlignmentCheck => (data, without_smap(|| memory::read(data))),
            Access::WriteAlignmentCheck => (
                data,
                without_smap(|| memory::write(data, WRITTEN).map(|()| WRITTEN)),
            ),
        }
    }

    fn map(&mut self, pair: Pair) {
        if self.current.table != pair.table {
            let frame = self.large.plus(NUMBER * PAGE);
            poke(self.table_entry, pair.table | frame.0);
        }
        if self.current.directory != pair.directory {
            let target = self.target(pair);
            poke(self.directory_entry, pair.directory | target.0);
        }
        self.current = pair;
        invlpg(self.address);
    }

    /// The entries now; what the processor marked must not be taken for what was written.
    fn read_back(&mut self) -> Pair {
        let target = self.target(self.current);
        let frame = self.large.plus(NUMBER * PAGE);
        self.current = Pair {
            directory: peek::<u64>(self.directory_entry) ^ target.0,
            table: peek::<u64>(self.table_entry) ^ frame.0,
        };
        self.current
    }

    /// What the page directory's entry points to.
    const fn target(&self, pair: Pair) -> PhysAddr {
        if pair.directory & bits::PS != 0 {
            self.large
        } else {
            self.table
        }
    }
}

fn in_ring3(program: Program, address: VirtAddr) -> Result<u32, Trap> {
    let trap = user::run(program.at(PROGRAMS), [address.0, WRITTEN as usize], 0);
    if trap.vector == vector::DONE {
        Ok(trap.ax as u32)
    } else {
        Err(trap)
    }
}

/// A trap clears RFLAGS.AC on its way back.
fn without_smap<T>(access: impl FnOnce() -> T) -> T {
    cpu::suspend_access_prevention();
    let value = access();
    cpu::resume_access_prevention();
    value
}
