//! Instructions on device memory: each form runs on RAM, where the processor carries it out, and on
//! the test device's memory at the same address, where a hypervisor must; registers, flags, memory
//! and exceptions must be the same. Two pages side by side are RAM and device in every combination,
//! and operands lie across their border.
//!
//! It needs QEMU's `pc-testdev` (on bare QEMU: `-device pc-testdev`).

mod forms;
mod runner;

use core::fmt::Display;

use crate::boot::BootInfo;
use crate::check::Checks;
use crate::cpu::{self, cr4, invlpg, outl};
use crate::exceptions::attempt;
use crate::memory::{self, PhysAddr, VirtAddr};
use crate::paging::error;
use crate::paging::space::{PAGE, Space, bits, take};
use crate::trap::{Trap, vector};
use forms::{Form, Table};
use runner::State;

/// What an instruction does to its operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Access {
    Read,
    Write,
    ReadWrite,
}

/// The device's memory.
const DEVICE: PhysAddr = PhysAddr(0xff00_0000);
/// The device's port with four bytes of memory.
const DATA_PORT: u16 = 0xe0;
/// Where forms find their operands: two pages.
const WINDOW: VirtAddr = VirtAddr(0x4000_0000);
/// Where the device's two pages always are.
const DEVICE_ALIAS: VirtAddr = VirtAddr(0x4001_0000);
/// Operands: one aligned to 16 bytes, one across the border.
const ALIGNED: usize = 0xff0;
const CROSSING: usize = 0xffd;
/// The part of the window that forms may touch, in 32-bit words.
const WATCHED: usize = 0xfe0;
const WORDS: usize = 16;

const STATUS_FLAGS: usize = 0x8d5;
const DIRECTION_FLAG: usize = 0x400;
const STACK_BYTES: u64 = PAGE;

/// What is behind one page of the window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Backing {
    Ram,
    Device,
    ReadOnly,
    Missing,
}

use Backing::{Device, Missing, Ram, ReadOnly};

/// Everything that a form leaves behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Outcome {
    /// Vector, error code, CR2 of page faults and instruction pointer, if there was an exception.
    trap: Option<(u8, u32, usize, usize)>,
    state: State,
    memory: [u32; WORDS],
}

impl Outcome {
    /// A page fault of a read-modify-write: it is a write's, and no flag has changed.
    fn fault_as_a_write(&mut self, start: &Start) {
        if let Some((vector::PF, code, ..)) = &mut self.trap {
            *code |= error::WRITE;
            self.state.flags = start.flags & (STATUS_FLAGS | DIRECTION_FLAG);
        }
    }
}

struct Suite<'a> {
    checks: &'a mut Checks,
    space: Space,
    ram: PhysAddr,
    stack: PhysAddr,
    lenient: bool,
}

/// Runs everything. Paging must be on with `space`.
pub fn run(boot: &BootInfo, checks: &mut Checks, space: Space) {
    let mut suite = Suite {
        checks,
        space,
        ram: take(2 * PAGE, PAGE),
        stack: take(STACK_BYTES, PAGE),
        lenient: boot.is_lenient(),
    };
    for page in 0..2 {
        let alias = DEVICE_ALIAS.plus((page * PAGE) as usize);
        space.map(alias, 1, DEVICE.plus(page * PAGE), bits::P | bits::W);
    }
    cpu::set_cr4(cr4::OSFXSR);
    suite.device_is_there();
    suite.table(
        "in 32-bit addressing",
        &forms::common(),
        &[ALIGNED, CROSSING],
    );
    suite.table("with aligned operands", &forms::aligned(), &[ALIGNED]);
    #[cfg(target_arch = "x86_64")]
    {
        cpu::wrmsr(cpu::msr::GS_BASE, (WINDOW.0 + ALIGNED - COUNT) as u64);
        suite.table("in 64-bit mode", &forms::native(), &[ALIGNED, CROSSING]);
        let pairs = forms::native_aligned();
        suite.table("with 16-byte operands", &pairs, &[ALIGNED]);
        cpu::wrmsr(cpu::msr::GS_BASE, 0);
    }
    #[cfg(target_arch = "x86")]
    suite.table("in 32-bit mode", &forms::native(), &[ALIGNED, CROSSING]);
    suite.single_steps();
}

/// Loads a floating-point number from the device, which Umbra does not emulate. Paging must be on with
/// `space`.
pub fn load_float(space: Space) {
    space.map(DEVICE_ALIAS, 1, DEVICE, bits::P | bits::W);
    // SAFETY: the load changes only the x87 stack, which nothing uses.
    unsafe { core::arch::asm!("fld dword ptr [{}]", in(reg) DEVICE_ALIAS.0) };
}

/// (E)CX before each form.
const COUNT: usize = 5;

/// Registers and memory before a form.
#[derive(Clone, Copy)]
struct Start {
    accumulator: usize,
    data: usize,
    flags: usize,
    /// The first word of memory, and by how much words differ.
    memory: (u32, u32),
}

const STARTS: [Start; 3] = [
    Start {
        accumulator: 0x8182_8384_u32 as usize,
        data: -5_isize as usize,
        flags: 2,
        memory: (0x8374_6556, 0x0123_4567),
    },
    Start {
        accumulator: usize::MAX,
        data: -5_isize as usize,
        flags: 2 | STATUS_FLAGS,
        memory: (0, 0),
    },
    // CMPXCHG finds what it expects, and CMPS equal bytes.
    Start {
        accumulator: usize::MAX / 0xff * 0x81,
        data: usize::MAX / 0xff * 0x81,
        flags: 3,
        memory: (0x8181_8181, 0),
    },
];

impl Start {
    fn word(&self, index: usize) -> u32 {
        let (first, step) = self.memory;
        first.wrapping_add(step.wrapping_mul(index as u32))
    }

    fn state(&self, operand: usize, stack: usize) -> State {
        let mut general = [0; runner::REGISTERS];
        for (index, register) in general.iter_mut().enumerate() {
            *register = index.wrapping_mul(usize::MAX / 0xff);
        }
        general[0] = self.accumulator;
        general[1] = COUNT;
        general[2] = self.data;
        general[3] = WINDOW.0 + operand;
        general[4] = stack;
        general[5] = WINDOW.0 + ALIGNED;
        general[6] = WINDOW.0 + operand - 3;
        general[7] = WINDOW.0 + operand - 12;
        State {
            general,
            flags: self.flags,
        }
    }
}

impl Suite<'_> {
    fn device_is_there(&mut self) {
        let words = [0x1234_5678_u32, 0x89ab_cdef];
        for word in words {
            let result = memory::write(DEVICE_ALIAS, word);
            self.checks.succeeds("a store to the test device", result);
            let read = memory::read(DEVICE_ALIAS);
            self.checks
                .equal("what the test device keeps", Ok(word), read);
        }
        self.checks.ok("the test device");
    }

    /// Where page `index` can be read and written whatever its rights in the window.
    fn alias(&self, backing: Backing, index: u64) -> Option<VirtAddr> {
        match backing {
            Ram | ReadOnly => Some(self.ram.plus(index * PAGE).identity()),
            Device => Some(DEVICE_ALIAS.plus((index * PAGE) as usize)),
            Missing => None,
        }
    }

    /// The watched part of page `index`, whatever its rights in the window.
    fn watched(&self, backings: [Backing; 2], index: usize) -> Option<VirtAddr> {
        let alias = self.alias(backings[index], index as u64)?;
        let offset = if index == 0 { WATCHED } else { 0 };
        Some(alias.plus(offset))
    }

    fn map(&self, backings: [Backing; 2]) {
        for (index, backing) in (0..).zip(backings) {
            let page = WINDOW.plus((index * PAGE) as usize);
            let frame = match backing {
                Ram | ReadOnly | Missing => self.ram.plus(index * PAGE),
                Device => DEVICE.plus(index * PAGE),
            };
            let flags = match backing {
                Ram | Device => bits::P | bits::W,
                ReadOnly => bits::P,
                Missing => 0,
            };
            self.space.map(page, 1, frame, flags);
            invlpg(page);
            if backing == Ram {
                // The page is dirty already: an emulator that has computed flags when it finds that
                // it is not would run RCL again with them.
                let word = page.plus(if index == 0 { WATCHED } else { 0 });
                let value = memory::read::<u32>(word);
                if let Ok(value) = value {
                    let _ = memory::write(word, value);
                }
            }
        }
    }

    /// Runs a form from `start` with its operand at `operand` in the window.
    fn outcome(
        &mut self,
        code: usize,
        start: &Start,
        operand: usize,
        backings: [Backing; 2],
    ) -> Outcome {
        let mut memory: [u32; WORDS] = core::array::from_fn(|index| start.word(index));
        for (index, words) in memory.chunks_mut(WORDS / 2).enumerate() {
            if let Some(watched) = self.watched(backings, index) {
                store_words(watched, words);
            }
        }
        // Half of the page is for exceptions, the rest for what a form pops.
        let top = self.stack.plus(STACK_BYTES / 2);
        for index in 0..4 {
            memory::poke(top.plus(4 * index), 0x5000_0000 + index as u32);
        }
        outl(DATA_PORT, 0x0a0b_0c0d);
        self.map(backings);
        let mut state = start.state(operand, top.identity().0);
        let result = runner::run(&mut state, code);
        memory.fill(0);
        for (index, words) in memory.chunks_mut(WORDS / 2).enumerate() {
            if let Some(watched) = self.watched(backings, index) {
                load_words(words, watched);
            }
        }
        state.flags &= STATUS_FLAGS | DIRECTION_FLAG;
        Outcome {
            trap: result.err().map(|trap| {
                let address = if trap.vector == vector::PF {
                    trap.cr2
                } else {
                    0
                };
                (trap.vector, trap.error_code, address, trap.ip)
            }),
            state,
            memory,
        }
    }

    fn table(&mut self, what: impl Display, table: &Table, operands: &[usize]) {
        self.checks
            .equal("the forms' code", true, table.is_regular());
        for (index, form) in table.forms.iter().enumerate() {
            if !has_instruction(form) {
                continue;
            }
            for start in &STARTS {
                for operand in operands {
                    self.form(form, table.code(index), start, *operand);
                }
            }
            // An exception needs a stack.
            if !form.moves_stack() {
                self.faults(form, table.code(index), operands);
            }
        }
        self.checks
            .ok(format_args!("{} forms {what}", table.forms.len()));
    }

    fn form(&mut self, form: &Form, code: usize, start: &Start, operand: usize) {
        let expected = self.outcome(code, start, operand, [Ram, Ram]);
        for backings in [[Device, Device], [Ram, Device], [Device, Ram]] {
            let outcome = self.outcome(code, start, operand, backings);
            self.same(form, operand, backings, expected, outcome);
        }
    }

    /// A page that is missing or cannot be written beside a device's.
    fn faults(&mut self, form: &Form, code: usize, operands: &[usize]) {
        let start = &STARTS[0];
        for operand in operands {
            for other in [Missing, ReadOnly] {
                for (reference, backings) in [
                    ([Ram, other], [Device, other]),
                    ([other, Ram], [other, Device]),
                ] {
                    // Some emulators have changed the carry already when the write faults.
                    if backings[0] == ReadOnly && form.rotates_through_carry() {
                        continue;
                    }
                    let mut expected = self.outcome(code, start, *operand, reference);
                    let mut outcome = self.outcome(code, start, *operand, backings);
                    // What starts in the device's page is a hypervisor's to carry out, and faults as
                    // the manual says, though some emulators begin a read-modify-write with a mere
                    // read, and change flags before it is written.
                    if form.access == Access::ReadWrite && backings[0] == Device {
                        expected.fault_as_a_write(start);
                        if self.lenient {
                            outcome.fault_as_a_write(start);
                        }
                    }
                    self.same(form, *operand, backings, expected, outcome);
                }
            }
        }
    }

    fn same(
        &mut self,
        form: &Form,
        operand: usize,
        backings: [Backing; 2],
        mut expected: Outcome,
        mut outcome: Outcome,
    ) {
        for side in [&mut expected, &mut outcome] {
            side.state.flags &= !form.undefined;
        }
        let [first, second] = backings;
        let text = form.text;
        let what = format_args!("`{text}` at {operand:#x} of {first:?} and {second:?}");
        self.checks.equal(what, expected, outcome);
    }

    /// A step ends behind an instruction, or behind one element of a repeated one.
    fn single_steps(&mut self) {
        self.map([Device, Device]);
        let address = WINDOW.0 + ALIGNED;
        #[cfg(target_arch = "x86_64")]
        let result = attempt!("pushfq", "or qword ptr [rsp], 0x100", "popfq"
            => "mov [{a}], eax" => "nop"; a = in(reg) address);
        #[cfg(target_arch = "x86")]
        let result = attempt!("pushfd", "or dword ptr [esp], 0x100", "popfd"
            => "mov [{a}], eax" => "nop"; a = in(reg) address);
        self.checks
            .traps("a single step over a store", vector::DB, result);
        #[cfg(target_arch = "x86_64")]
        let result = attempt!("pushfq", "or qword ptr [rsp], 0x100", "popfq"
            => "rep stosb" => "nop"; inout("rcx") 3_usize => _, inout("rdi") address => _, in("al") 1_u8);
        #[cfg(target_arch = "x86")]
        let result = attempt!("pushfd", "or dword ptr [esp], 0x100", "popfd"
            => "rep stosb" => "nop"; inout("ecx") 3_usize => _, inout("edi") address => _, in("al") 1_u8);
        self.element_step(result);
        self.checks.ok("single steps");
    }

    fn element_step(&mut self, result: Result<(), Trap>) {
        let what = "a single step over one element";
        let trap = self.checks.faults(what, vector::DB, 0, result);
        let single_step = 1 << 14;
        self.checks
            .equal("DR6.BS", single_step, trap.dr6 & single_step);
    }
}

/// Stores `words` at `to` by one instruction.
fn store_words(to: VirtAddr, words: &[u32]) {
    move_words(words.as_ptr() as usize, to.0, words.len());
}

/// Loads `words` from `from` by one instruction.
fn load_words(words: &mut [u32], from: VirtAddr) {
    move_words(from.0, words.as_mut_ptr() as usize, words.len());
}

fn move_words(from: usize, to: usize, count: usize) {
    // SAFETY: the crate's fact 2: one side is a slice, the other RAM or a device that nobody else
    // uses, each as long as `count` words.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        core::arch::asm!("rep movsd", inout("rsi") from => _, inout("rdi") to => _,
            inout("rcx") count => _, options(nostack, preserves_flags));
        #[cfg(target_arch = "x86")]
        core::arch::asm!("mov {saved}, esi", "mov esi, {from}", "rep movsd", "mov esi, {saved}",
            saved = out(reg) _, from = in(reg) from, inout("edi") to => _,
            inout("ecx") count => _, options(nostack, preserves_flags));
    }
}

fn has_instruction(form: &Form) -> bool {
    let features = cpu::cpuid(1, 0).ecx;
    match form.text.split(' ').next() {
        Some("movbe") => features & 1 << 22 != 0,
        Some("popcnt") => features & 1 << 23 != 0,
        _ if form.text.contains("cmpxchg16b") => features & 1 << 13 != 0,
        _ => true,
    }
}
