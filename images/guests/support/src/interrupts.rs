//! The local APIC in both of its modes, the I/O APIC and the i8259 pair, and interrupts that are
//! counted.
//!
//! Protocol: [`map`] makes the register pages visible. Interrupts are taken only inside
//! [`counting`], and there only while [`wait`] or [`open_window`] lets them in: the crate's fact 1
//! holds at all other times. The handler counts the vector and ends the interrupt at whoever sent it.

use core::arch::asm;

use crate::cpu::{cpuid, inb, msr, outb, rdmsr, rdtsc, read_cr3, wrmsr};
use crate::memory::{PhysAddr, peek, poke};
use crate::paging::space::take_frame;
use crate::tables;
use crate::trap::{Disposition, Frame, Global, Trap, with_hook};

/// Registers of the local APIC: the MSR number less 0x800, the offset in the page divided by 16.
pub mod register {
    #![allow(missing_docs)]
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const PROCESSOR_PRIORITY: u32 = 0x0a;
    pub const END_OF_INTERRUPT: u32 = 0x0b;
    pub const LOGICAL_DESTINATION: u32 = 0x0d;
    pub const DESTINATION_FORMAT: u32 = 0x0e;
    pub const SPURIOUS: u32 = 0x0f;
    pub const IN_SERVICE: u32 = 0x10;
    pub const REQUEST: u32 = 0x20;
    pub const ERROR_STATUS: u32 = 0x28;
    pub const COMMAND: u32 = 0x30;
    pub const COMMAND_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_LINT0: u32 = 0x35;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// An entry of the local vector table, or of the I/O APIC, that sends nothing.
pub const MASKED: u32 = 1 << 16;
/// The timer's modes in its entry.
pub const PERIODIC: u32 = 1 << 17;
/// As [`PERIODIC`].
pub const DEADLINE: u32 = 1 << 18;
/// Divides the timer's clock by 16.
pub const DIVIDE_BY_16: u32 = 0b0011;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;

const LOCAL_PAGE: PhysAddr = PhysAddr(0xfee0_0000);
const IO_PAGE: PhysAddr = PhysAddr(0xfec0_0000);
const X2APIC_FIRST: u32 = 0x800;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const SPURIOUS_VECTOR: u32 = 0xff;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;

/// How the local APIC's registers are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Through its page.
    XApic,
    /// Through MSRs.
    X2Apic,
}

static MODE: Global<Mode> = Global::new(Mode::XApic);

/// Whether the processor has x2APIC mode.
pub fn has_x2apic() -> bool {
    cpuid(1, 0).ecx >> 21 & 1 != 0
}

/// Whether the timer can wait for a value of the time-stamp counter.
pub fn has_tsc_deadline() -> bool {
    cpuid(1, 0).ecx >> 24 & 1 != 0
}

/// Maps the register pages where their physical addresses are.
pub fn map() {
    const PRESENT_WRITABLE: u64 = 0b11;
    const CACHE_DISABLE: u64 = 1 << 4;
    const LARGE: u64 = 1 << 7;
    const LARGE_PAGE: u64 = 2 << 20;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let pointers = PhysAddr(peek::<u64>(PhysAddr(read_cr3() as u64 & ADDRESS)) & ADDRESS);
    let directory = take_frame();
    for page in [IO_PAGE, LOCAL_PAGE] {
        let entry = page.0 & !(LARGE_PAGE - 1) | PRESENT_WRITABLE | CACHE_DISABLE | LARGE;
        poke(directory.plus(page.0 / LARGE_PAGE % 512 * 8), entry);
    }
    let entry = pointers.plus(LOCAL_PAGE.0 / (1 << 30) * 8);
    poke(entry, directory.0 | PRESENT_WRITABLE);
}

/// Reads a register of the local APIC.
pub fn read(register: u32) -> u32 {
    match MODE.get() {
        Mode::XApic => peek(LOCAL_PAGE.plus(16 * u64::from(register))),
        Mode::X2Apic => rdmsr(X2APIC_FIRST + register) as u32,
    }
}

/// Writes a register of the local APIC.
pub fn write(register: u32, value: u32) {
    match MODE.get() {
        Mode::XApic => poke(LOCAL_PAGE.plus(16 * u64::from(register)), value),
        Mode::X2Apic => wrmsr(X2APIC_FIRST + register, value.into()),
    }
}

/// Sends an interprocessor interrupt: `command` as in the low half of the command register, to
/// the APIC with ID `target`.
pub fn send(target: u32, command: u32) {
    match MODE.get() {
        Mode::XApic => {
            write(register::COMMAND_HIGH, target << 24);
            write(register::COMMAND, command);
        }
        Mode::X2Apic => wrmsr(
            X2APIC_FIRST + register::COMMAND,
            u64::from(target) << 32 | u64::from(command),
        ),
    }
}

/// Enables the local APIC in `mode`. The way back from x2APIC mode leads through the disabled state,
/// which clears all registers (SDM vol. 3, 11.12.5).
pub fn enable(mode: Mode) {
    let now = rdmsr(msr::APIC_BASE);
    let base = now & !(BASE_ENABLE | BASE_X2APIC);
    if now & BASE_X2APIC != 0 && mode == Mode::XApic {
        wrmsr(msr::APIC_BASE, base);
    }
    if now & BASE_X2APIC == 0 || mode == Mode::XApic {
        wrmsr(msr::APIC_BASE, base | BASE_ENABLE);
    }
    if mode == Mode::X2Apic {
        wrmsr(msr::APIC_BASE, base | BASE_ENABLE | BASE_X2APIC);
    }
    MODE.set(mode);
    write(register::SPURIOUS, SOFTWARE_ENABLE | SPURIOUS_VECTOR);
}

/// Reads a register of the I/O APIC.
pub fn read_io(register: u32) -> u32 {
    poke(IO_PAGE, register);
    peek(IO_PAGE.plus(0x10))
}

/// Writes a register of the I/O APIC.
pub fn write_io(register: u32, value: u32) {
    poke(IO_PAGE, register);
    poke(IO_PAGE.plus(0x10), value);
}

/// Sets the entry of an input of the I/O APIC: `low` is its low half, for the processor with ID 0.
pub fn route(input: u32, low: u32) {
    write_io(0x10 + 2 * input, MASKED);
    write_io(0x11 + 2 * input, 0);
    write_io(0x10 + 2 * input, low);
}

/// Sets the i8259 pair up with vectors from `first` on and these lines masked.
pub fn initialize_pic(first: u8, masks: u16) {
    let [master, slave] = masks.to_le_bytes();
    for (port, value) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, first),
        (0xa1, first + 8),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, master),
        (0xa1, slave),
    ] {
        outb(port, value);
    }
}

/// An interrupt that came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrival {
    /// Its vector.
    pub vector: u8,
    /// The time-stamp counter in its handler.
    pub tsc: u64,
}

/// How many vectors [`take_order`] remembers.
const ORDER: usize = 8;

/// The vectors that came since [`take_order`], zero where none came.
static VECTORS: Global<[u8; ORDER]> = Global::new([0; ORDER]);
/// Interrupts that came since [`take_count`].
static COUNT: Global<u32> = Global::new(0);
static LAST: Global<Option<Arrival>> = Global::new(None);
/// The vectors of the i8259 pair begin here.
static PIC_FIRST: Global<u8> = Global::new(0);

/// Runs `body` while every vector from 32 on is counted; the i8259 pair's are from `pic_first` on.
pub fn counting<T>(pic_first: u8, body: impl FnOnce() -> T) -> T {
    PIC_FIRST.set(pic_first);
    with_hook(count, body)
}

fn count(trap: &Trap, _frame: &mut Frame) -> Disposition {
    if trap.vector < 32 {
        return Disposition::GiveUp;
    }
    COUNT.set(COUNT.get() + 1);
    let mut vectors = VECTORS.get();
    if let Some(free) = vectors.iter_mut().find(|vector| **vector == 0) {
        *free = trap.vector;
    }
    VECTORS.set(vectors);
    LAST.set(Some(Arrival {
        vector: trap.vector,
        tsc: rdtsc(),
    }));
    let pic_first = PIC_FIRST.get();
    if (pic_first..pic_first + 16).contains(&trap.vector) {
        const END_OF_INTERRUPT: u8 = 0x20;
        if trap.vector >= pic_first + 8 {
            outb(0xa0, END_OF_INTERRUPT);
        }
        outb(0x20, END_OF_INTERRUPT);
    } else if u32::from(trap.vector) != SPURIOUS_VECTOR {
        write(register::END_OF_INTERRUPT, 0);
    }
    Disposition::Resume
}

/// How many interrupts came since the last call.
pub fn take_count() -> u32 {
    let count = COUNT.get();
    COUNT.set(0);
    count
}

/// The last interrupt since the last call.
pub fn take_last() -> Option<Arrival> {
    let last = LAST.get();
    LAST.set(None);
    last
}

/// The vectors that came since the last call, in their order, then zeroes.
pub fn take_order() -> [u8; ORDER] {
    let vectors = VECTORS.get();
    VECTORS.set([0; ORDER]);
    vectors
}

/// CR8: the task priority's upper half.
pub fn read_cr8() -> u64 {
    let value: u64;
    // SAFETY: reading the register has no side effect.
    unsafe { asm!("mov {}, cr8", out(reg) value, options(nomem, nostack)) };
    value
}

/// Sets the task priority's upper half by CR8.
pub fn write_cr8(value: u64) {
    // SAFETY: it holds interrupts back, no more; more than four bits raise #GP.
    unsafe { asm!("mov cr8, {}", in(reg) value, options(nostack)) };
}

/// Halts until an interrupt has come.
pub fn wait() {
    // SAFETY: the handler of `counting` keeps all registers; nothing else runs.
    unsafe { asm!("sti", "hlt", "cli") };
}

core::arch::global_asm!(
    "guest_end_interrupt:",
    "push rax",
    "push rcx",
    "push rdx",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
);

unsafe extern "C" {
    static guest_end_interrupt: u8;
}

/// Makes interrupts with this vector end at once, in x2APIC mode, without being counted.
pub fn end_at_once(vector: u8) {
    tables::set_interrupt_gate(vector, (&raw const guest_end_interrupt) as usize);
}

/// Lets in what waits already.
pub fn open_window() {
    // SAFETY: as in `wait`.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Empties COM1's interrupt sources, so that its line is low.
pub fn quiet_serial() {
    outb(0x3f9, 0);
    let _ = inb(0x3fa);
}
