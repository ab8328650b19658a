//! `clocks`: compares every clock of a PC with every other: the time-stamp counter, the power
//! management timer, the real-time clock, the interval timer, and the local APIC's timer, as counters
//! and by the interrupts that they send. With `minute` on the command line it watches for a minute.
//!
//! A clock is read between two reads of the time-stamp counter, so each comparison knows how far
//! the two moments may be apart, however slow or busy the machine is. Interrupts must not come
//! early; how late they come depends on the machine, so the best of some attempts counts.

#![no_std]
#![no_main]

use core::fmt::Display;

use umbra_guest::cpu::{inb, inl, outb, rdtsc, wrmsr};
use umbra_guest::interrupts::{self, Mode, register};
use umbra_guest::{BootInfo, Checks, guest, println};

guest!("clocks", pvh, run);

const PM_TIMER: u16 = 0x608;
const PM_FREQUENCY: u64 = 3_579_545;
const PIT_FREQUENCY: u64 = 1_193_182;
/// Clocks agree to one part in this many.
const TOLERANCE: u64 = 100;
const ATTEMPTS: u32 = 5;
/// The i8259 pair's first vector.
const PIC_FIRST: u8 = 0x20;
const VECTOR: u8 = 0x50;
/// How late the best of some interrupts may come, in milliseconds.
const LATENESS: u64 = 25;

fn run(boot: &BootInfo, checks: &mut Checks) {
    let seconds = if boot.has_word("minute") { 60 } else { 2 };
    interrupts::map();
    interrupts::initialize_pic(PIC_FIRST, 0xffff);
    interrupts::enable(Mode::XApic);
    let rates = counters(checks, seconds);
    interval_timer(checks, &rates);
    interrupts::counting(PIC_FIRST, || {
        local_timer(checks, &rates, "xAPIC");
        if interrupts::has_x2apic() {
            interrupts::enable(Mode::X2Apic);
            local_timer(checks, &rates, "x2APIC");
            deadline_timer(checks, &rates);
        } else {
            checks.skip("x2APIC's timer", "no x2APIC");
        }
        lines(checks, &rates);
    });
}

/// Ticks per second.
struct Rates {
    tsc: u64,
    local_apic: u64,
}

/// A clock's value, read between two values of the time-stamp counter.
#[derive(Clone, Copy)]
struct Reading {
    before: u64,
    value: u64,
    after: u64,
}

impl Reading {
    /// The reading with the smallest uncertainty of some.
    fn take(mut read: impl FnMut() -> u64) -> Self {
        let mut one = || {
            let before = rdtsc();
            let value = read();
            let after = rdtsc();
            Self {
                before,
                value,
                after,
            }
        };
        let first = one();
        (0..8).map(|_| one()).fold(first, |best, next| {
            if next.after - next.before < best.after - best.before {
                next
            } else {
                best
            }
        })
    }

    const fn middle(&self) -> u64 {
        self.before + (self.after - self.before) / 2
    }
}

/// Checks that an interval took `ticks` of a clock of `frequency`, if it took between `least` and
/// `most` ticks of the time-stamp counter.
fn agree(
    checks: &mut Checks,
    what: impl Display,
    (ticks, frequency): (u64, u64),
    (least, most): (u64, u64),
    tsc: u64,
) {
    let expected = scale(ticks, tsc, frequency);
    let least = least - least / TOLERANCE;
    let most = most + most / TOLERANCE;
    checks.equal(
        format_args!("{what}: {expected} ticks between {least} and {most}"),
        true,
        (least..=most).contains(&expected),
    );
}

fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    (u128::from(value) * u128::from(numerator) / u128::from(denominator)) as u64
}

fn pm_timer() -> u64 {
    inl(PM_TIMER).into()
}

fn clock_register(index: u8) -> u8 {
    outb(0x70, index);
    inb(0x71)
}

/// What the time-stamp counter was when the real-time clock's second changed: not before, not after.
fn next_second(mut meanwhile: impl FnMut()) -> (u64, u64) {
    let old = clock_register(0);
    let mut before = rdtsc();
    loop {
        let second = clock_register(0);
        let after = rdtsc();
        if second != old {
            return (before, after);
        }
        before = after;
        meanwhile();
    }
}

/// Counters that run by themselves, over whole seconds of the real-time clock.
fn counters(checks: &mut Checks, seconds: u64) -> Rates {
    interrupts::write(register::DIVIDE, interrupts::DIVIDE_BY_16);
    interrupts::write(register::LVT_TIMER, interrupts::MASKED);
    interrupts::write(register::INITIAL_COUNT, u32::MAX);
    let local_apic = || u64::from(u32::MAX - interrupts::read(register::CURRENT_COUNT));

    let (first_before, first_after) = next_second(|| {});
    let pm_first = Reading::take(pm_timer);
    let local_first = Reading::take(local_apic);
    let mut last = (rdtsc(), pm_timer(), local_apic());
    println!("watching for {seconds} seconds");
    let mut monotonic = 0_u64;
    let mut half = None;
    let mut end = (0, 0);
    for second in 0..seconds {
        end = next_second(|| {
            let now = (rdtsc(), pm_timer(), local_apic());
            checks.equal(
                format_args!("no clock runs backwards: {last:?}, {now:?}"),
                true,
                now.0 >= last.0 && now.1 >= last.1 && now.2 >= last.2,
            );
            last = now;
            monotonic += 1;
        });
        if second == seconds / 2 - 1 {
            half = Some(Reading::take(local_apic));
        }
    }
    let pm_last = Reading::take(pm_timer);
    let local_last = Reading::take(local_apic);

    let tsc = scale(
        pm_last.middle() - pm_first.middle(),
        PM_FREQUENCY,
        pm_last.value - pm_first.value,
    );
    let rate = |first: &Reading, last: &Reading| {
        scale(
            last.value - first.value,
            tsc,
            last.middle() - first.middle(),
        )
    };
    let local_apic = rate(&local_first, &local_last);
    println!("tsc {tsc} Hz, local APIC {local_apic} Hz, {monotonic} readings");
    agree(
        checks,
        "the real-time clock",
        (seconds, 1),
        (end.0 - first_after, end.1 - first_before),
        tsc,
    );
    checks.ok("time-stamp counter, power management timer and real-time clock");

    let half = half.unwrap_or(local_first);
    for (part, first, last) in [
        ("first", &local_first, &half),
        ("second", &half, &local_last),
    ] {
        agree(
            checks,
            format_args!("the local APIC's timer in the {part} half"),
            (last.value - first.value, local_apic),
            (last.before - first.after, last.after - first.before),
            tsc,
        );
    }
    checks.ok("the local APIC's timer counts evenly");
    interrupts::write(register::INITIAL_COUNT, 0);
    Rates { tsc, local_apic }
}

/// The interval timer without interrupts: channel 2 as kernels calibrate by it, channel 0's count.
fn interval_timer(checks: &mut Checks, rates: &Rates) {
    const COUNT: u64 = PIT_FREQUENCY / 50;
    let [low, high] = (COUNT as u16).to_le_bytes();
    let mut best = u64::MAX;
    for _ in 0..ATTEMPTS {
        outb(0x61, inb(0x61) & !0b10 | 0b01);
        outb(0x43, 0xb0);
        outb(0x42, low);
        let start_before = rdtsc();
        outb(0x42, high);
        let start_after = rdtsc();
        let mut before = start_after;
        let after = loop {
            let output = inb(0x61) & 0x20;
            let after = rdtsc();
            if output != 0 {
                break after;
            }
            before = after;
        };
        let expected = scale(COUNT, rates.tsc, PIT_FREQUENCY);
        checks.equal(
            format_args!(
                "channel 2 ends after {COUNT} ticks, not before: {expected} of {}",
                after - start_before
            ),
            true,
            after - start_before >= expected - expected / TOLERANCE,
        );
        best = best.min(before.saturating_sub(start_after));
    }
    let expected = scale(COUNT, rates.tsc, PIT_FREQUENCY);
    checks.equal(
        format_args!("channel 2 ends after {COUNT} ticks: {expected}, {best}"),
        true,
        best <= expected + expected / TOLERANCE,
    );
    checks.ok("channel 2 of the interval timer");

    outb(0x43, 0x34);
    outb(0x40, 0);
    outb(0x40, 0);
    let read = || {
        outb(0x43, 0x00);
        let low = inb(0x40);
        u64::from(u16::from_le_bytes([low, inb(0x40)]))
    };
    // The count wraps after 55 ms: a pause of the whole machine spoils an attempt.
    let limit = rates.tsc / 20;
    let mut compared = false;
    for _ in 0..10 * ATTEMPTS {
        let first = Reading::take(read);
        while rdtsc() - first.after < rates.tsc / 50 {}
        let last = Reading::take(read);
        if last.after - first.before < limit {
            let ticks = first.value.wrapping_sub(last.value) & 0xffff;
            agree(
                checks,
                "channel 0's count",
                (ticks, PIT_FREQUENCY),
                (last.before - first.after, last.after - first.before),
                rates.tsc,
            );
            compared = true;
            break;
        }
    }
    checks.equal("an attempt at channel 0 was not disturbed", true, compared);
    checks.ok("channel 0 of the interval timer");
}

/// Checks interrupts that are due some milliseconds after `arm`, which returns how many ticks of the
/// time-stamp counter that is: none may come early, and the best must not come late.
fn one_shots(checks: &mut Checks, rates: &Rates, what: impl Display, mut arm: impl FnMut() -> u64) {
    let mut best = u64::MAX;
    for _ in 0..ATTEMPTS {
        forget_interrupts();
        let start = rdtsc();
        let expected = arm();
        let armed = rdtsc();
        let arrival = loop {
            if let Some(arrival) = interrupts::take_last() {
                break arrival;
            }
            interrupts::wait();
        };
        checks.equal(format_args!("{what}: the vector"), VECTOR, arrival.vector);
        let elapsed = arrival.tsc - start;
        checks.equal(
            format_args!("{what} does not come early: {elapsed} of {expected}"),
            true,
            elapsed >= expected - expected / TOLERANCE,
        );
        best = best.min((arrival.tsc - armed).saturating_sub(expected));
    }
    println!(
        "{what}: {} us late at best",
        scale(best, 1_000_000, rates.tsc)
    );
    checks.equal(
        format_args!("{what} is late by {best} at best"),
        true,
        best <= rates.tsc / 1000 * LATENESS,
    );
}

/// Checks interrupts of `period` ticks of the time-stamp counter: not too many, and half of them at
/// least, for a machine that pauses may lose some. `acknowledge` runs after each.
fn periodic(
    checks: &mut Checks,
    rates: &Rates,
    what: impl Display,
    period: u64,
    mut acknowledge: impl FnMut(),
) {
    const COUNT: u32 = 20;
    forget_interrupts();
    let start = rdtsc();
    let mut count = 0;
    while count < COUNT {
        interrupts::wait();
        acknowledge();
        count += interrupts::take_count();
    }
    let periods = (rdtsc() - start) / period;
    println!(
        "{what}: {count} interrupts in {periods} periods of {} us",
        scale(period, 1_000_000, rates.tsc)
    );
    let count = u64::from(count);
    checks.equal(
        format_args!("{what}: {count} in {periods} periods"),
        true,
        count <= periods + 2 && 2 * count >= periods,
    );
}

/// Takes and forgets what an earlier check has left.
fn forget_interrupts() {
    interrupts::open_window();
    interrupts::take_count();
    interrupts::take_last();
}

fn local_timer(checks: &mut Checks, rates: &Rates, mode: &str) {
    let milliseconds = |count: u64| count * rates.local_apic / 1000;
    interrupts::write(register::DIVIDE, interrupts::DIVIDE_BY_16);
    interrupts::write(register::LVT_TIMER, VECTOR.into());
    one_shots(checks, rates, format_args!("{mode} one-shot"), || {
        interrupts::write(register::INITIAL_COUNT, milliseconds(10) as u32);
        rates.tsc / 100
    });
    checks.equal(
        "a one-shot timer stops",
        0,
        interrupts::read(register::CURRENT_COUNT),
    );
    interrupts::write(
        register::LVT_TIMER,
        interrupts::PERIODIC | u32::from(VECTOR),
    );
    interrupts::write(register::INITIAL_COUNT, milliseconds(20) as u32);
    periodic(
        checks,
        rates,
        format_args!("{mode} periodic"),
        rates.tsc / 50,
        || {},
    );
    interrupts::write(register::INITIAL_COUNT, 0);
    interrupts::write(register::LVT_TIMER, interrupts::MASKED);
    checks.ok(format_args!("the local APIC's timer in {mode} mode"));
}

fn deadline_timer(checks: &mut Checks, rates: &Rates) {
    let what = "the local APIC's timer with a deadline";
    if !interrupts::has_tsc_deadline() {
        return checks.skip(what, "no TSC deadline");
    }
    interrupts::write(
        register::LVT_TIMER,
        interrupts::DEADLINE | u32::from(VECTOR),
    );
    one_shots(checks, rates, "deadline", || {
        let wait = rates.tsc / 100;
        wrmsr(interrupts::TSC_DEADLINE, rdtsc() + wait);
        wait
    });
    interrupts::write(register::LVT_TIMER, interrupts::MASKED);
    checks.ok(what);
}

/// Interrupts by the lines of the ISA bus.
fn lines(checks: &mut Checks, rates: &Rates) {
    const COUNT: u64 = PIT_FREQUENCY / 100;
    let [low, high] = (COUNT as u16).to_le_bytes();
    interrupts::route(2, VECTOR.into());
    one_shots(checks, rates, "interval timer, I/O APIC", || {
        outb(0x43, 0x30);
        outb(0x40, low);
        outb(0x40, high);
        scale(COUNT, rates.tsc, PIT_FREQUENCY)
    });
    interrupts::route(2, interrupts::MASKED);
    checks.ok("the interval timer interrupts through the I/O APIC");

    const EXTERNAL: u32 = 7 << 8;
    interrupts::write(register::LVT_LINT0, EXTERNAL);
    let [low, high] = ((2 * COUNT) as u16).to_le_bytes();
    outb(0x43, 0x34);
    outb(0x40, low);
    outb(0x40, high);
    outb(0x21, 0xfe);
    let period = scale(2 * COUNT, rates.tsc, PIT_FREQUENCY);
    periodic(checks, rates, "interval timer, i8259", period, || {});
    outb(0x21, 0xff);
    checks.ok("the interval timer interrupts through the i8259 pair");

    interrupts::route(8, VECTOR.into());
    let interrupts_of_clock = clock_register(0x0b);
    outb(0x70, 0x0a);
    // 64 Hz.
    outb(0x71, 0x2a);
    outb(0x70, 0x0b);
    outb(0x71, interrupts_of_clock | 1 << 6);
    clock_register(0x0c);
    periodic(checks, rates, "real-time clock", rates.tsc / 64, || {
        clock_register(0x0c);
    });
    outb(0x70, 0x0b);
    outb(0x71, interrupts_of_clock);
    interrupts::route(8, interrupts::MASKED);
    checks.ok("the real-time clock interrupts");
}
