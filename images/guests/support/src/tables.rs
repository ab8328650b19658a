//! GDT, IDT and TSS.
//!
//! Loaded once by [`init`]; tests then break single descriptors and restore them.

use core::arch::asm;

use crate::trap::{Global, guest_trap_stubs, vector};

/// Selectors. Their order suits SYSCALL, SYSRET, SYSENTER and SYSEXIT.
pub const KERNEL_CODE: u16 = 0x08;
/// Ring 0 data and stack.
pub const KERNEL_DATA: u16 = 0x10;
/// Ring 3 code, 32-bit.
pub const USER_CODE_32: u16 = 0x1b;
/// Ring 3 data and stack.
pub const USER_DATA: u16 = 0x23;
/// Ring 3 code, 64-bit.
pub const USER_CODE_64: u16 = 0x2b;
/// The task state segment.
pub const TSS: u16 = 0x30;
/// A descriptor for tests to fill, first of [`FREE_SLOTS`].
pub const FREE_SLOT: u16 = 0x40;
/// How many descriptors tests may fill.
pub const FREE_SLOTS: usize = 4;

/// Ring 3 code of the guest's own width.
#[cfg(target_arch = "x86_64")]
pub const USER_CODE: u16 = USER_CODE_64;
/// Ring 3 code of the guest's own width.
#[cfg(target_arch = "x86")]
pub const USER_CODE: u16 = USER_CODE_32;

const WORD: usize = size_of::<usize>();
const GATE_BYTES: usize = 2 * WORD;
const IST_STACK_BYTES: usize = 0x2000;

#[cfg(target_arch = "x86_64")]
const KERNEL_CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
#[cfg(target_arch = "x86")]
const KERNEL_CODE_DESCRIPTOR: u64 = 0x00cf_9b00_0000_ffff;

type Gdt = [u64; 8 + FREE_SLOTS];

#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Aligned<T>(T);

static GDT: Global<Aligned<Gdt>> = Global::new(Aligned([
    0,
    KERNEL_CODE_DESCRIPTOR,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
    0,
    0,
    0,
    0,
]));
static IDT: Global<Aligned<[u8; 256 * GATE_BYTES]>> = Global::new(Aligned([0; 256 * GATE_BYTES]));
static TASK: Global<Aligned<[u8; 104]>> = Global::new(Aligned([0; 104]));
static TRAP_STACK: Global<Aligned<[u8; IST_STACK_BYTES]>> =
    Global::new(Aligned([0; IST_STACK_BYTES]));
#[cfg(target_arch = "x86_64")]
static IST_STACK: Global<Aligned<[u8; IST_STACK_BYTES]>> =
    Global::new(Aligned([0; IST_STACK_BYTES]));

/// Limit and base, as LGDT, LIDT, SGDT and SIDT have them.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TablePointer {
    /// Size in bytes less one.
    pub limit: u16,
    /// Linear address.
    pub base: usize,
}

/// Where to enter on a gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GateStack {
    /// The current stack, or TSS.RSP0 coming from an outer ring.
    Ordinary,
    /// Interrupt stack table entry 1 (64-bit only).
    Ist1,
    /// Interrupt stack table entry 7, which the TSS leaves empty (64-bit only).
    Ist7,
}

/// Loads all three with every vector handled.
pub fn init() {
    for number in 0..=255 {
        restore_gate(number);
    }
    let stack_end = (&raw const TRAP_STACK) as usize + IST_STACK_BYTES;
    set_task_word(4, stack_end);
    #[cfg(target_arch = "x86")]
    set_task_word(8, usize::from(KERNEL_DATA));
    #[cfg(target_arch = "x86_64")]
    set_task_word(36, (&raw const IST_STACK) as usize + IST_STACK_BYTES);
    // No I/O permission bitmap.
    store::<u16>((&raw const TASK) as usize + 102, 104);
    load();
    load_task(103);
}

/// Makes this processor use our GDT and IDT; it has no TSS then.
pub fn load() {
    load_gdt(gdt_pointer());
    load_idt(idt_pointer());
    // SAFETY: the GDT's selectors are the ones that code and stack already run with in effect.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("push {code}", "lea {t}, [rip + 2f]", "push {t}", "retfq", "2:",
            code = const KERNEL_CODE, t = out(reg) _);
        #[cfg(target_arch = "x86")]
        asm!("push {code}", "lea {t}, [2f]", "push {t}", "retf", "2:", code = const KERNEL_CODE,
            t = out(reg) _);
        asm!("mov ds, {0:x}", "mov es, {0:x}", "mov ss, {0:x}", "mov fs, {1:x}", "mov gs, {1:x}",
            in(reg) KERNEL_DATA, in(reg) 0_u16);
    }
}

const GDT_LIMIT: u16 = (size_of::<Gdt>() - 1) as u16;

/// Our GDT.
pub fn gdt_pointer() -> TablePointer {
    TablePointer {
        limit: GDT_LIMIT,
        base: (&raw const GDT) as usize,
    }
}

/// Our IDT.
pub fn idt_pointer() -> TablePointer {
    TablePointer {
        limit: (256 * GATE_BYTES - 1) as u16,
        base: (&raw const IDT) as usize,
    }
}

/// LGDT.
pub fn load_gdt(pointer: TablePointer) {
    // SAFETY: the operand outlives the instruction; the crate's principle covers its meaning.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// LIDT.
pub fn load_idt(pointer: TablePointer) {
    // SAFETY: as for `load_gdt`.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// SGDT.
pub fn read_gdt() -> TablePointer {
    let mut pointer = TablePointer::default();
    // SAFETY: the operand has the size that the instruction writes.
    unsafe { asm!("sgdt [{}]", in(reg) &raw mut pointer, options(nostack)) };
    pointer
}

/// SIDT.
pub fn read_idt() -> TablePointer {
    let mut pointer = TablePointer::default();
    // SAFETY: the operand has the size that the instruction writes.
    unsafe { asm!("sidt [{}]", in(reg) &raw mut pointer, options(nostack)) };
    pointer
}

/// STR.
pub fn read_task() -> u16 {
    let selector: u16;
    // SAFETY: it only reads the register.
    unsafe { asm!("str {:x}", out(reg) selector, options(nostack)) };
    selector
}

/// Loads the task register with our TSS, of which only bytes up to `limit` count.
pub fn load_task(limit: u16) {
    let base = (&raw const TASK) as u64;
    let present_available_tss = 0x89 << 40;
    let low = u64::from(limit) | (base & 0xff_ffff) << 16 | present_available_tss;
    set_descriptor(TSS, low | (base >> 24 & 0xff) << 56);
    set_descriptor(TSS + 8, base >> 32);
    // SAFETY: the descriptor just written is an available TSS.
    unsafe { asm!("ltr {:x}", in(reg) TSS, options(nostack)) };
}

fn set_task_word(offset: usize, value: usize) {
    store((&raw const TASK) as usize + offset, value);
}

/// Sets the back link of a 32-bit TSS.
#[cfg(target_arch = "x86")]
pub fn set_task_back_link(selector: u16) {
    store((&raw const TASK) as usize, selector);
}

/// Writes a descriptor into the GDT.
pub fn set_descriptor(selector: u16, descriptor: u64) {
    store(
        (&raw const GDT) as usize + usize::from(selector & !7),
        descriptor,
    );
}

/// Reads a descriptor from the GDT.
pub fn descriptor(selector: u16) -> u64 {
    let Aligned(gdt) = GDT.get();
    gdt[usize::from(selector >> 3)]
}

/// Gives vector `number` its usual interrupt gate.
pub fn restore_gate(number: u8) {
    let privilege = if number == vector::DONE { 3 } else { 0 };
    let stack = if cfg!(target_arch = "x86_64") && number == vector::DF {
        GateStack::Ist1
    } else {
        GateStack::Ordinary
    };
    set_gate(number, number, privilege, stack);
}

#[cfg(target_arch = "x86")]
core::arch::global_asm!("guest_ignore_interrupt:", "iretd");
#[cfg(target_arch = "x86_64")]
core::arch::global_asm!("guest_ignore_interrupt:", "iretq");

unsafe extern "C" {
    static guest_ignore_interrupt: u8;
}

/// Makes every vector return at once. Only for interrupts: exceptions would leave error codes.
pub fn ignore_interrupts() {
    for number in 0..=255 {
        write_gate(
            number,
            (&raw const guest_ignore_interrupt) as usize,
            0,
            GateStack::Ordinary,
        );
    }
}

/// Makes interrupts with vector `number` enter the code at `target`.
pub fn set_interrupt_gate(number: u8, target: usize) {
    write_gate(number, target, 0, GateStack::Ordinary);
}

/// Makes vector `number` enter the stub of vector `stub`, from rings up to `privilege`.
pub fn set_gate(number: u8, stub: u8, privilege: u8, stack: GateStack) {
    let target = (&raw const guest_trap_stubs) as usize + usize::from(stub) * 16;
    write_gate(number, target, privilege, stack);
}

fn write_gate(number: u8, target: usize, privilege: u8, stack: GateStack) {
    let stack = match stack {
        GateStack::Ordinary => 0,
        GateStack::Ist1 => 1,
        GateStack::Ist7 => 7,
    };
    let low = (target & 0xffff) as u64
        | u64::from(KERNEL_CODE) << 16
        | stack << 32
        | (0x8e | u64::from(privilege) << 5) << 40
        | (target as u64 >> 16 & 0xffff) << 48;
    let gate = gate_address(number);
    store(gate, low);
    #[cfg(target_arch = "x86_64")]
    store(gate + 8, target as u64 >> 32);
}

/// Makes the gate of vector `number` not present.
pub fn break_gate(number: u8) {
    store(gate_address(number) + 5, 0x0e_u8);
}

fn gate_address(number: u8) -> usize {
    (&raw const IDT) as usize + usize::from(number) * GATE_BYTES
}

fn store<T>(address: usize, value: T) {
    // SAFETY: all callers pass addresses inside this module's tables, which are `Global`s that
    // nobody holds references into.
    unsafe { (address as *mut T).write_unaligned(value) };
}
