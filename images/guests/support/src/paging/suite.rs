//! What all groups of checks use: pages of the window, accesses from both rings, expected faults.

use core::arch::asm;
use core::fmt::Display;

use super::space::{Mode, PAGE, Space, bits, take_frame};
use crate::boot::BootInfo;
use crate::check::Checks;
use crate::cpu::{self, cr4, efer, invlpg, msr, read_cr4};
use crate::memory::{self, PhysAddr, VirtAddr, copy_to};
use crate::trap::{Trap, catch, vector};
use crate::user::{self, Program};

/// #PF error code bits (SDM vol. 3, 4.7).
pub mod error {
    #![allow(missing_docs)]
    pub const PROTECTION: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
    pub const KEY: u32 = 1 << 5;
}

/// What the code that [`copy_code`] writes returns in EAX.
pub const CODE_RESULT: u32 = 0x600d_c0de;

/// Offset of its entry for ring 3.
pub const USER_ENTRY: usize = 16;

/// One mode's checks.
pub struct Suite<'a> {
    /// The count.
    pub checks: &'a mut Checks,
    /// The current address space.
    pub space: Space,
    /// Its mode.
    pub mode: Mode,
    programs: VirtAddr,
    lenient: bool,
}

impl<'a> Suite<'a> {
    /// Prepares a page with ring 3's programs.
    pub fn new(boot: &BootInfo, checks: &'a mut Checks, space: Space) -> Self {
        let mut suite = Self {
            checks,
            space,
            mode: space.mode,
            programs: VirtAddr(0x8000_0000),
            lenient: boot.is_lenient(),
        };
        suite.map_programs(space);
        suite
    }

    /// Maps ring 3's programs in `space`.
    pub fn map_programs(&mut self, space: Space) {
        let frame = take_frame();
        copy_to(frame, user::programs());
        space.map(self.programs, 1, frame, bits::P | bits::U);
        invlpg(self.programs);
    }

    /// Page number `index` of the window.
    pub fn page(&self, index: usize) -> VirtAddr {
        self.mode.window().plus(index * PAGE as usize)
    }

    /// Maps page `index` to a fresh frame with `flags`, flushes it, and returns both.
    pub fn fresh(&mut self, index: usize, flags: u64) -> (VirtAddr, PhysAddr) {
        let (page, frame) = (self.page(index), take_frame());
        self.space.map(page, 1, frame, flags);
        invlpg(page);
        (page, frame)
    }

    /// Like [`Self::fresh`], with code that returns [`CODE_RESULT`] to ring 0, and at
    /// [`USER_ENTRY`] ends with it for ring 3.
    pub fn fresh_code(&mut self, index: usize, flags: u64) -> (VirtAddr, PhysAddr) {
        let (page, frame) = self.fresh(index, flags);
        copy_code(frame);
        (page, frame)
    }

    /// Changes the entry for `page` at `level` and flushes it.
    pub fn change(&mut self, page: VirtAddr, level: u32, clear: u64, set: u64) {
        self.space.change(page, level, clear, set);
        if self.mode == Mode::Pae && level == 3 {
            cpu::reload_root();
        } else {
            invlpg(page);
        }
    }

    /// The instruction-fetch bit that a fault on a fetch reports now.
    pub fn fetch(&self) -> u32 {
        let nx =
            !self.mode.is_legacy() && self.mode.has_nx() && cpu::rdmsr(msr::EFER) & efer::NXE != 0;
        if nx || read_cr4() & cr4::SMEP != 0 {
            error::FETCH
        } else {
            0
        }
    }

    /// Checks that ring 0 loads `expected` from `address`.
    pub fn reads(&mut self, what: impl Display, expected: u32, address: VirtAddr) {
        let got = self.checks.succeeds(&what, memory::read::<u32>(address));
        self.checks.equal(&what, expected, got);
    }

    /// Checks that ring 0 can store `value` at `address`.
    pub fn writes(&mut self, what: impl Display, address: VirtAddr, value: u32) {
        self.checks.succeeds(what, memory::write(address, value));
    }

    /// Checks that ring 0's load from `address` faults with `code`.
    pub fn read_faults(&mut self, what: impl Display, code: u32, address: VirtAddr) {
        self.faults(what, code, address, memory::read::<u32>(address));
    }

    /// Checks that ring 0's store to `address` faults with `code`.
    pub fn write_faults(&mut self, what: impl Display, code: u32, address: VirtAddr) {
        self.faults(what, code, address, memory::write(address, 0xbad_u32));
    }

    /// Checks that `result` is a page fault with `code` at `address`.
    pub fn faults<T>(
        &mut self,
        what: impl Display,
        code: u32,
        address: VirtAddr,
        mut result: Result<T, Trap>,
    ) -> Trap {
        // SDM vol. 3, 4.7: reserved bits of an entry count only if it is present.
        if self.lenient
            && let Err(trap) = &mut result
            && trap.error_code & error::RESERVED != 0
        {
            trap.error_code |= error::PROTECTION;
        }
        let trap = self.checks.raises(&what, vector::PF, code, result);
        self.checks
            .equal(format_args!("{what}: CR2"), address.0, trap.cr2);
        trap
    }

    /// Runs one of ring 3's programs.
    pub fn user(&self, program: Program, address: VirtAddr, value: u32) -> Result<u32, Trap> {
        let trap = user::run(program.at(self.programs), [address.0, value as usize], 0);
        if trap.vector == vector::DONE {
            Ok(trap.ax as u32)
        } else {
            Err(trap)
        }
    }

    /// Checks that ring 3 loads `expected` from `address`.
    pub fn user_reads(&mut self, what: impl Display, expected: u32, address: VirtAddr) {
        let got = self.user(Program::Read, address, 0);
        let got = self.checks.succeeds(&what, got);
        self.checks.equal(&what, expected, got);
    }

    /// Checks that ring 3 can store `value` at `address`.
    pub fn user_writes(&mut self, what: impl Display, address: VirtAddr, value: u32) {
        let result = self.user(Program::Write, address, value);
        self.checks.succeeds(&what, result);
    }

    /// Checks that ring 3's `program` faults with `code` (its user bit is added) at `address`.
    pub fn user_faults(
        &mut self,
        what: impl Display,
        program: Program,
        code: u32,
        address: VirtAddr,
    ) {
        let result = self.user(program, address, 0xbad);
        self.faults(what, code | error::USER, address, result);
    }

    /// Checks that ring 0 can run the code at `page`.
    pub fn runs(&mut self, what: impl Display, page: VirtAddr) {
        let got = self.checks.succeeds(&what, call(page));
        self.checks.equal(&what, CODE_RESULT, got);
    }

    /// Checks that ring 3 can run the code at `page`.
    pub fn user_runs(&mut self, what: impl Display, page: VirtAddr) {
        let result = self.user(Program::Jump, page.plus(USER_ENTRY), 0);
        let got = self.checks.succeeds(&what, result);
        self.checks.equal(&what, CODE_RESULT, got);
    }

    /// Checks that ring 0's fetch from `page` faults with `code`; the fetch bit is added.
    pub fn fetch_faults(&mut self, what: impl Display, code: u32, page: VirtAddr) {
        let code = code | self.fetch();
        let trap = self.faults(&what, code, page, call(page));
        self.checks
            .equal(format_args!("{what}: instruction pointer"), page.0, trap.ip);
    }

    /// Checks that ring 3's fetch from `page` faults with `code`; fetch and user bits are added.
    pub fn user_fetch_faults(&mut self, what: impl Display, code: u32, page: VirtAddr) {
        let code = code | self.fetch();
        self.user_faults(what, Program::Jump, code, page.plus(USER_ENTRY));
    }
}

/// Writes code into `frame` that returns [`CODE_RESULT`] to ring 0, and at [`USER_ENTRY`] ends with
/// it for ring 3.
pub fn copy_code(frame: PhysAddr) {
    let [a, b, c, d] = CODE_RESULT.to_le_bytes();
    copy_to(frame, &[0xb8, a, b, c, d, 0xc3]);
    copy_to(
        frame.plus(USER_ENTRY as u64),
        &[0xb8, a, b, c, d, 0xcd, vector::DONE],
    );
}

/// Calls the code at `address`.
///
/// # Errors
///
/// The exception that the call or the code raised.
pub fn call(address: VirtAddr) -> Result<u32, Trap> {
    catch(|| {
        let result: u32;
        // SAFETY: the code there (`copy_code`) only sets EAX; a fault is caught.
        unsafe { asm!("call {}", in(reg) address.0, lateout("eax") result, clobber_abi("C")) };
        result
    })
}
