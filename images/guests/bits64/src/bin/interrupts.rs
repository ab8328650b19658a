//! `interrupts`: the interrupt controllers of a PC, from the sender to the handler: interprocessor
//! interrupts in both modes of the local APIC, priorities, errors, the I/O APIC's edges and levels,
//! and the i8259 pair behind LINT0.

#![no_std]
#![no_main]

use umbra_guest::cpu::{cpuid, inb, msr, outb, rdmsr, wrmsr};
use umbra_guest::interrupts::{self, MASKED, Mode, register};
use umbra_guest::memory::{self, VirtAddr};
use umbra_guest::trap::{catch, vector};
use umbra_guest::{BootInfo, Checks, guest};

guest!("interrupts", pvh, run);

const PIC_FIRST: u8 = 0x20;
const FIXED: u32 = 1 << 14;
const TO_MYSELF: u32 = 1 << 18;
const TO_ALL: u32 = 2 << 18;
const TO_OTHERS: u32 = 3 << 18;
const LEVEL: u32 = 1 << 15;
const REMOTE_IRR: u32 = 1 << 14;
/// COM1: interrupt enable, and modem control, whose OUT2 lets the interrupt out.
const SERIAL_ENABLE: u16 = 0x3f9;
const SERIAL_IDENTIFICATION: u16 = 0x3fa;
const SERIAL_MODEM: u16 = 0x3fc;
const SERIAL_IRQ: u32 = 4;
const TRANSMITTER: u8 = 0b10;

fn run(boot: &BootInfo, checks: &mut Checks) {
    interrupts::map();
    interrupts::initialize_pic(PIC_FIRST, 0xffff);
    outb(SERIAL_MODEM, 0x0b);
    interrupts::counting(PIC_FIRST, || {
        interrupts::enable(Mode::XApic);
        local(boot, checks, "xAPIC");
        errors(boot, checks);
        levels(checks);
        pair(checks);
        if interrupts::has_x2apic() {
            interrupts::enable(Mode::X2Apic);
            local(boot, checks, "x2APIC");
            model_specific(checks);
        } else {
            checks.skip("x2APIC: interprocessor interrupts", "no x2APIC");
        }
    });
}

/// Lets in what waits, and checks that these vectors come, in this order.
fn expect<const COUNT: usize>(checks: &mut Checks, what: &str, vectors: [u8; COUNT]) {
    interrupts::open_window();
    let mut expected = [0; 8];
    expected[..COUNT].copy_from_slice(&vectors);
    checks.equal(what, expected, interrupts::take_order());
}

fn requested(vector: u8) -> bool {
    interrupts::read(register::REQUEST + u32::from(vector / 32)) >> (vector % 32) & 1 != 0
}

fn local(boot: &BootInfo, checks: &mut Checks, mode: &str) {
    let id = cpuid(1, 0).ebx >> 24;
    let shift = if mode == "xAPIC" { 24 } else { 0 };
    checks.equal("the ID", id, interrupts::read(register::ID) >> shift);
    let version = interrupts::read(register::VERSION) & 0xff;
    checks.equal("an integrated APIC", 1, version >> 4);

    interrupts::send(0, FIXED | TO_MYSELF | 0x41);
    checks.equal("it waits while interrupts are off", true, requested(0x41));
    expect(checks, "to myself", [0x41]);
    interrupts::send(id, FIXED | 0x42);
    expect(checks, "to my ID", [0x42]);
    interrupts::send(0, FIXED | TO_ALL | 0x43);
    expect(checks, "to all", [0x43]);
    interrupts::send(0, FIXED | TO_OTHERS | 0x44);
    expect(checks, "to all but me", []);
    interrupts::send(id + 1, FIXED | 0x45);
    expect(checks, "to somebody else", []);
    checks.ok(format_args!("{mode}: interprocessor interrupts"));

    for vector in [0x51, 0x71, 0x61, 0x71] {
        interrupts::send(0, FIXED | TO_MYSELF | vector);
    }
    expect(
        checks,
        "the highest comes first, and once",
        [0x71, 0x61, 0x51],
    );
    interrupts::write_cr8(6);
    checks.equal("CR8", 6, interrupts::read_cr8());
    checks.equal(
        "it is the task priority",
        0x60,
        interrupts::read(register::TASK_PRIORITY),
    );
    checks.equal(
        "nothing is served",
        0x60,
        interrupts::read(register::PROCESSOR_PRIORITY),
    );
    for vector in [0x6f, 0x70] {
        interrupts::send(0, FIXED | TO_MYSELF | vector);
    }
    expect(checks, "only above the task priority", [0x70]);
    interrupts::write(register::TASK_PRIORITY, 0x50);
    checks.equal("CR8 follows", 5, interrupts::read_cr8());
    expect(checks, "the other when it may", [0x6f]);
    interrupts::write_cr8(0);
    if !boot.is_lenient() {
        let written = catch(|| interrupts::write_cr8(16));
        checks.raises("CR8 of five bits", vector::GP, 0, written);
    }
    checks.ok(format_args!("{mode}: priorities"));
}

fn errors(boot: &BootInfo, checks: &mut Checks) {
    const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    let what = "errors";
    if boot.is_lenient() {
        return checks.skip(what, umbra_guest::boot::LENIENT);
    }
    let status = || {
        interrupts::write(register::ERROR_STATUS, 0);
        interrupts::read(register::ERROR_STATUS)
    };
    status();
    interrupts::write(register::LVT_ERROR, 0x4e);
    interrupts::send(0, FIXED | TO_MYSELF | 5);
    checks.equal("an illegal vector", SEND_ILLEGAL_VECTOR, status());
    expect(checks, "the error's interrupt", [0x4e]);
    checks.equal("no error", 0, status());
    interrupts::write(register::LVT_ERROR, MASKED);
    checks.ok(what);
}

/// COM1's interrupt as a level, through the I/O APIC.
fn levels(checks: &mut Checks) {
    const VECTOR: u8 = 0x48;
    let low = || interrupts::read_io(0x10 + 2 * SERIAL_IRQ);
    checks.equal("24 inputs", 23, interrupts::read_io(1) >> 16 & 0xff);
    interrupts::route(SERIAL_IRQ, LEVEL | u32::from(VECTOR));
    interrupts::open_window();
    checks.equal("nothing yet", [0; 8], interrupts::take_order());
    outb(SERIAL_ENABLE, TRANSMITTER);
    checks.equal("it is under way", REMOTE_IRR, low() & REMOTE_IRR);
    checks.equal("it is requested", true, requested(VECTOR));
    // Reading the reason lowers the line; otherwise the interrupt would come for ever.
    let _ = inb(SERIAL_IDENTIFICATION);
    expect(checks, "a level interrupts", [VECTOR]);
    checks.equal("it has ended", 0, low() & REMOTE_IRR);
    expect(checks, "a quiet line", []);
    outb(SERIAL_ENABLE, 0);

    interrupts::route(SERIAL_IRQ, VECTOR.into());
    outb(SERIAL_ENABLE, TRANSMITTER);
    expect(checks, "an edge interrupts once", [VECTOR]);
    outb(SERIAL_ENABLE, 0);
    interrupts::route(SERIAL_IRQ, MASKED);
    outb(SERIAL_ENABLE, TRANSMITTER);
    expect(checks, "a masked input is silent", []);
    outb(SERIAL_ENABLE, 0);
    checks.ok("the I/O APIC's levels and edges");
}

/// The same through the i8259 pair.
fn pair(checks: &mut Checks) {
    const EXTERNAL: u32 = 7 << 8;
    let vector = PIC_FIRST + SERIAL_IRQ as u8;
    interrupts::write(register::LVT_LINT0, EXTERNAL | MASKED);
    outb(0x21, !(1 << SERIAL_IRQ));
    outb(SERIAL_ENABLE, TRANSMITTER);
    expect(checks, "LINT0 is masked", []);
    interrupts::write_cr8(15);
    interrupts::write(register::LVT_LINT0, EXTERNAL);
    expect(checks, "external interrupts have no priority", [vector]);
    interrupts::write_cr8(0);
    outb(SERIAL_ENABLE, 0);
    outb(0x21, 0xff);
    outb(SERIAL_ENABLE, TRANSMITTER);
    expect(checks, "a masked line is silent", []);
    outb(0x20, 0x0a);
    checks.equal(
        "but it is requested",
        1 << SERIAL_IRQ,
        inb(0x20) & 1 << SERIAL_IRQ,
    );
    outb(0x21, !(1 << SERIAL_IRQ));
    expect(checks, "and comes when it may", [vector]);
    outb(SERIAL_ENABLE, 0);
    outb(0x21, 0xff);
    interrupts::write(register::LVT_LINT0, MASKED);
    checks.ok("the i8259 pair behind LINT0");
}

/// What only x2APIC mode has.
fn model_specific(checks: &mut Checks) {
    const FIRST: u32 = 0x800;
    wrmsr(FIRST + register::SELF_IPI, 0x49);
    expect(checks, "the register for interrupts to myself", [0x49]);
    let id = cpuid(1, 0).ebx >> 24;
    let logical = (id >> 4) << 16 | 1 << (id & 0xf);
    checks.equal(
        "the logical ID",
        logical,
        interrupts::read(register::LOGICAL_DESTINATION),
    );
    interrupts::send(logical, FIXED | 1 << 11 | 0x4a);
    expect(checks, "to my logical ID", [0x4a]);
    for (what, register, value) in [
        ("the ID", register::ID, 0),
        ("an end of interrupt of one", register::END_OF_INTERRUPT, 1),
        ("the destination format", register::DESTINATION_FORMAT, 0),
        ("the command's upper half", register::COMMAND_HIGH, 0),
        (
            "a task priority of nine bits",
            register::TASK_PRIORITY,
            0x100,
        ),
        ("a reserved spurious bit", register::SPURIOUS, 1 << 31),
    ] {
        let written = catch(|| wrmsr(FIRST + register, value));
        checks.raises(what, vector::GP, 0, written);
    }
    let base = rdmsr(msr::APIC_BASE);
    for (what, value) in [
        ("back to xAPIC mode at once", base & !(1 << 10)),
        ("x2APIC mode without the enable", base & !(1 << 11)),
    ] {
        checks.raises(what, vector::GP, 0, catch(|| wrmsr(msr::APIC_BASE, value)));
    }
    checks.equal("the mode stays", base, rdmsr(msr::APIC_BASE));
    let page = memory::read::<u32>(VirtAddr(0xfee0_0030));
    checks.equal("the page is gone", Ok(u32::MAX), page);
    interrupts::enable(Mode::XApic);
    let _ = cpuid(0, 0);
    interrupts::send(0, FIXED | TO_MYSELF | 0x4b);
    expect(checks, "and in xAPIC mode again", [0x4b]);
    checks.ok("x2APIC's own registers and modes");
}
