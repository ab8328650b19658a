//! More than one processor: starting them, calling them, and accesses that may fault on any of them.
//!
//! Protocol: [`start`] is called once, on the processor that the loader started, while it is alone.
//! From then on every processor takes interrupts and exceptions by the same tables; the crate's
//! `Global`s are only read, and what processors share are atomics. Each processor waits in HLT for
//! the jobs that [`call`] gives it. A processor's number is the ID of its local APIC.
//!
//! On exceptions only [`load`] and [`store`] come back: what they raise is their result.

use core::arch::{asm, global_asm};
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use crate::cpu::{self, cpuid, efer, exit, msr, rdmsr, rdtsc, wrmsr};
use crate::interrupts::{self, register};
use crate::memory::{PhysAddr, VirtAddr, poke};
use crate::trap::{Disposition, Frame, Global, Trap, vector, with_hook};
use crate::{check, println, tables};

/// How many processors there can be.
pub const LIMIT: usize = 4;

/// Calls a processor that waits for a job.
const CALL_VECTOR: u8 = 0xf0;
const SPURIOUS_VECTOR: u8 = 0xff;
const NMI_VECTOR: u8 = 2;

/// Commands of the local APIC.
pub mod command {
    #![allow(missing_docs)]
    pub const FIXED: u32 = 1 << 14;
    pub const LOWEST_PRIORITY: u32 = FIXED | 1 << 8;
    pub const NMI: u32 = FIXED | 4 << 8;
    pub const INIT: u32 = FIXED | 5 << 8;
    pub const START_UP: u32 = FIXED | 6 << 8;
    pub const LOGICAL: u32 = 1 << 11;
    pub const MYSELF: u32 = 1 << 18;
    pub const ALL: u32 = 2 << 18;
    pub const OTHERS: u32 = 3 << 18;
}

/// Where processors begin: a page of RAM below 1 MiB.
const TRAMPOLINE: u32 = 0x8000;
const STACK_BYTES: usize = 0x8000;

// From real mode through protected mode to long mode, with the first processor's control registers
// (SDM vol. 3, 9.4.4 and 10.8.5).
global_asm!(
    ".pushsection .rodata.trampoline, \"a\"",
    ".balign 16",
    "guest_trampoline:",
    ".code16",
    "cli",
    "cld",
    "movw %cs, %ax",
    "movw %ax, %ds",
    "lgdtl guest_trampoline_gdt_pointer - guest_trampoline",
    "movl %cr0, %eax",
    "andl $0x9fffffff, %eax",
    "orl $1, %eax",
    "movl %eax, %cr0",
    "ljmpl $0x08, $({at} + guest_trampoline_32 - guest_trampoline)",
    ".code32",
    "guest_trampoline_32:",
    "movl $0x10, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movl {at} + guest_trampoline_cr4 - guest_trampoline, %eax",
    "movl %eax, %cr4",
    "movl {at} + guest_trampoline_cr3 - guest_trampoline, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl {at} + guest_trampoline_efer - guest_trampoline, %eax",
    "wrmsr",
    "movl {at} + guest_trampoline_cr0 - guest_trampoline, %eax",
    "movl %eax, %cr0",
    "ljmpl $0x18, $({at} + guest_trampoline_64 - guest_trampoline)",
    ".code64",
    "guest_trampoline_64:",
    "movl $1, %eax",
    "cpuid",
    "shrl $24, %ebx",
    "movl %ebx, %edi",
    "incl %ebx",
    "imulq ${stack_bytes}, %rbx, %rbx",
    "leaq guest_processor_stacks(%rbx), %rsp",
    "xorl %ebp, %ebp",
    "movq ${enter}, %rax",
    "callq *%rax",
    ".balign 8",
    "guest_trampoline_gdt:",
    ".quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff",
    "guest_trampoline_gdt_pointer:",
    ".word 31",
    ".long {at} + guest_trampoline_gdt - guest_trampoline",
    ".balign 4",
    "guest_trampoline_cr0: .long 0",
    "guest_trampoline_cr3: .long 0",
    "guest_trampoline_cr4: .long 0",
    "guest_trampoline_efer: .long 0",
    "guest_trampoline_end:",
    ".popsection",
    ".pushsection .bss.stack, \"aw\", @nobits",
    ".balign 16",
    "guest_processor_stacks: .skip {limit} * {stack_bytes}",
    ".popsection",
    at = const TRAMPOLINE,
    stack_bytes = const STACK_BYTES,
    limit = const LIMIT,
    enter = sym enter,
    options(att_syntax),
);

unsafe extern "C" {
    static guest_trampoline: u8;
    static guest_trampoline_end: u8;
    static guest_trampoline_cr0: u8;
    static guest_trampoline_cr3: u8;
    static guest_trampoline_cr4: u8;
    static guest_trampoline_efer: u8;
}

/// What happens to an interrupt, or an NMI as vector 2. It runs on any processor, between any two
/// instructions of a job.
pub type Handler = fn(vector: u8);

/// A piece of work for a processor, which is given its own number.
pub type Job = fn(number: usize);

static HANDLER: Global<Option<Handler>> = Global::new(None);
static MODE: Global<interrupts::Mode> = Global::new(interrupts::Mode::XApic);
/// Each processor's own number, where its GS base points.
static NUMBERS: [AtomicU32; LIMIT] = [const { AtomicU32::new(0) }; LIMIT];
/// How often each processor has been started.
static STARTS: [AtomicU32; LIMIT] = [const { AtomicU32::new(0) }; LIMIT];
/// The job that each processor has or is to begin; zero for none.
static JOBS: [AtomicUsize; LIMIT] = [const { AtomicUsize::new(0) }; LIMIT];

/// The number of the processor that asks.
pub fn number() -> usize {
    let number: u32;
    // SAFETY: every processor's GS base points to its entry of `NUMBERS`.
    unsafe { asm!("mov {:e}, gs:[0]", out(reg) number, options(nostack, preserves_flags)) };
    number as usize
}

/// Lets `body` run while processors can be started, in `mode` of their local APICs, whose pages must
/// be mapped. `handler` sees the interrupts of all of them.
pub fn with_processors(mode: interrupts::Mode, handler: Handler, body: impl FnOnce()) {
    HANDLER.set(Some(handler));
    MODE.set(mode);
    with_hook(hook, || {
        copy_trampoline();
        set_number(0);
        interrupts::enable(mode);
        // SAFETY: interrupts enter `hook`, which keeps all registers.
        unsafe { asm!("sti", options(nomem, nostack)) };
        body();
        // SAFETY: as before `sti`.
        unsafe { asm!("cli", options(nomem, nostack)) };
    });
}

fn copy_trampoline() {
    let start = &raw const guest_trampoline;
    let length = (&raw const guest_trampoline_end) as usize - start as usize;
    // SAFETY: these bytes are the trampoline's, which nothing writes.
    let bytes = unsafe { core::slice::from_raw_parts(start, length) };
    let at = PhysAddr(TRAMPOLINE.into());
    crate::memory::copy_to(at, bytes);
    for (field, value) in [
        (&raw const guest_trampoline_cr0, cpu::read_cr0()),
        (&raw const guest_trampoline_cr3, cpu::read_cr3()),
        (&raw const guest_trampoline_cr4, cpu::read_cr4()),
        (
            &raw const guest_trampoline_efer,
            (rdmsr(msr::EFER) & !efer::LMA) as usize,
        ),
    ] {
        let offset = field as usize - start as usize;
        poke(at.plus(offset as u64), value as u32);
    }
}

/// How often processor `number` has been started.
pub fn starts(number: usize) -> u32 {
    STARTS[number].load(Ordering::SeqCst)
}

/// Starts processor `number` by INIT and start-up messages, and waits until it runs.
pub fn start(number: usize) {
    const PATIENCE: u64 = 20_000_000;
    const ATTEMPTS: u32 = 200;
    let before = starts(number);
    JOBS[number].store(0, Ordering::SeqCst);
    interrupts::send(number as u32, command::INIT);
    // A processor that runs ignores the second message.
    for _ in 0..ATTEMPTS {
        interrupts::send(number as u32, command::START_UP | TRAMPOLINE >> 12);
        let begin = rdtsc();
        while rdtsc() - begin < PATIENCE {
            if starts(number) != before {
                return;
            }
            spin_loop();
        }
    }
    fail(format_args!("processor {number} does not start"));
}

/// Gives processor `number` a job, without waiting for its end.
pub fn begin(number: usize, job: Job) {
    JOBS[number].store(job as usize, Ordering::SeqCst);
    interrupts::send(number as u32, command::FIXED | u32::from(CALL_VECTOR));
}

/// Whether processor `number` has no job.
pub fn is_idle(number: usize) -> bool {
    JOBS[number].load(Ordering::SeqCst) == 0
}

/// Lets processor `number`, another one, do a job, and waits for its end.
pub fn call(number: usize, job: Job) {
    begin(number, job);
    wait_until(|| is_idle(number));
}

/// Runs `body` on this processor while interrupts, but no NMIs, wait.
pub fn with_interrupts_off(body: impl FnOnce()) {
    // SAFETY: interrupts wait meanwhile; they are on again at once.
    unsafe { asm!("cli", options(nomem, nostack)) };
    body();
    // SAFETY: interrupts enter `hook`, which keeps all registers.
    unsafe { asm!("sti", options(nomem, nostack)) };
}

/// Waits for something that another processor does.
pub fn wait_until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        spin_loop();
    }
}

/// Ends the guest because of what this processor has found.
pub fn fail(what: core::fmt::Arguments<'_>) -> ! {
    static FAILED: AtomicBool = AtomicBool::new(false);
    if FAILED.swap(true, Ordering::SeqCst) {
        // Another processor is just saying what it found.
        loop {
            spin_loop();
        }
    }
    println!("FAIL processor {}: {what}", number());
    exit(check::FAILED)
}

fn set_number(number: usize) {
    NUMBERS[number].store(number as u32, Ordering::SeqCst);
    wrmsr(msr::GS_BASE, (&raw const NUMBERS[number]) as u64);
}

/// Where a processor comes from the trampoline.
extern "C" fn enter(number: u32) -> ! {
    let number = number as usize;
    tables::load();
    set_number(number);
    interrupts::enable(MODE.get());
    STARTS[number].fetch_add(1, Ordering::SeqCst);
    loop {
        let job = JOBS[number].load(Ordering::SeqCst);
        if job == 0 {
            // SAFETY: `hook` keeps all registers. A call that comes before HLT is not lost, because
            // STI takes effect after it.
            unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
            continue;
        }
        // SAFETY: only `begin` stores something else than zero: a `Job`.
        let run: Job = unsafe { core::mem::transmute(job) };
        // SAFETY: as before HLT.
        unsafe { asm!("sti", options(nomem, nostack)) };
        run(number);
        // SAFETY: as before HLT.
        unsafe { asm!("cli", options(nomem, nostack)) };
        JOBS[number].store(0, Ordering::SeqCst);
    }
}

fn hook(trap: &Trap, frame: &mut Frame) -> Disposition {
    match trap.vector {
        vector::PF => return repair(trap, frame),
        NMI_VECTOR => handle(NMI_VECTOR),
        0..32 => return Disposition::GiveUp,
        SPURIOUS_VECTOR => {}
        CALL_VECTOR => interrupts::write(register::END_OF_INTERRUPT, 0),
        number => {
            handle(number);
            interrupts::write(register::END_OF_INTERRUPT, 0);
        }
    }
    Disposition::Resume
}

fn handle(vector: u8) {
    if let Some(handler) = HANDLER.get() {
        handler(vector);
    }
}

/// A page fault of [`load`] or [`store`].
fn repair(trap: &Trap, frame: &mut Frame) -> Disposition {
    let probes = [&raw const guest_probe_load, &raw const guest_probe_store];
    let [_, address] = frame.index_registers();
    if probes.into_iter().all(|probe| probe as usize != frame.ip) || trap.cr2 != address {
        return Disposition::GiveUp;
    }
    frame.ip = (&raw const guest_probe_faulted) as usize;
    frame.ax = trap.error_code as usize;
    Disposition::Resume
}

global_asm!(
    "guest_load:",
    "xor edx, edx",
    "guest_probe_load:",
    "mov rax, [rdi]",
    "ret",
    "guest_store:",
    "xor edx, edx",
    "guest_probe_store:",
    "mov [rdi], rsi",
    "ret",
    "guest_probe_faulted:",
    "mov edx, 1",
    "ret",
);

/// A value, or an error code where `faulted` is not zero.
#[repr(C)]
struct Outcome {
    value: u64,
    faulted: u64,
}

unsafe extern "C" {
    fn guest_load(address: usize) -> Outcome;
    fn guest_store(address: usize, value: u64) -> Outcome;
    static guest_probe_load: u8;
    static guest_probe_store: u8;
    static guest_probe_faulted: u8;
}

impl Outcome {
    fn result(self) -> Result<u64, u32> {
        if self.faulted == 0 {
            Ok(self.value)
        } else {
            Err(self.value as u32)
        }
    }
}

/// Loads 64 bits.
///
/// # Errors
///
/// The error code of the page fault that the load raised.
pub fn load(address: VirtAddr) -> Result<u64, u32> {
    // SAFETY: it reads test data, and a page fault comes back.
    unsafe { guest_load(address.0) }.result()
}

/// Stores 64 bits.
///
/// # Errors
///
/// The error code of the page fault that the store raised.
pub fn store(address: VirtAddr, value: u64) -> Result<(), u32> {
    // SAFETY: the crate's fact 2; a page fault comes back.
    unsafe { guest_store(address.0, value) }
        .result()
        .map(|_| ())
}

/// How many processors to use: `cpus=N` on the command line, or as many as the firmware's device
/// says there are.
///
/// # Panics
///
/// If that is none, or more than [`LIMIT`].
pub fn count(boot: &crate::BootInfo) -> usize {
    let present = crate::firmware::read().map_or(1, |firmware| firmware.processors.into());
    let count = boot.number("cpus").unwrap_or(present) as usize;
    assert!((1..=LIMIT).contains(&count), "{count} processors");
    count
}

/// The ID that CPUID gives the processor that asks.
pub fn cpuid_number() -> usize {
    (cpuid(1, 0).ebx >> 24) as usize
}

/// A lock that waits by spinning, with interrupts as they are.
pub struct Lock(AtomicBool);

impl Lock {
    /// A lock that is free.
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Runs `body` while no other processor runs under this lock.
    pub fn with<T>(&self, body: impl FnOnce() -> T) -> T {
        while self.0.swap(true, Ordering::Acquire) {
            wait_until(|| !self.0.load(Ordering::Relaxed));
        }
        let value = body();
        self.0.store(false, Ordering::Release);
        value
    }
}

impl Default for Lock {
    fn default() -> Self {
        Self::new()
    }
}
