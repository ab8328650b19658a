//! `smp-hello`: several processors say who they are, and send each other interrupts in every way that
//! the local APIC knows, in both of its modes.
//!
//! On the command line, `cpus=N` says how many processors there are, if the firmware does not; with
//! `pause` all of them wait in vain for ever.

#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use umbra_guest::cpu::{msr, rdmsr, rdtsc};
use umbra_guest::interrupts::{self, Mode, register};
use umbra_guest::smp::{self, LIMIT, command};
use umbra_guest::{BootInfo, Checks, guest, println};

guest!("smp-hello", pvh, run);

const PING: u8 = 0x41;
const PONG: u8 = 0x42;
const COUNTED: u8 = 0x51;
const NMI: u8 = 2;
const ROUNDS: u32 = 20;

/// How many interrupts with [`COUNTED`] each processor took.
static COUNTS: [AtomicU32; LIMIT] = [const { AtomicU32::new(0) }; LIMIT];
static NMIS: [AtomicU32; LIMIT] = [const { AtomicU32::new(0) }; LIMIT];
static PONGS: AtomicU32 = AtomicU32::new(0);
/// What a job leaves for the first processor.
static RESULT: AtomicU64 = AtomicU64::new(0);
static BEATS: AtomicU64 = AtomicU64::new(0);

fn run(boot: &BootInfo, checks: &mut Checks) {
    let count = smp::count(boot);
    interrupts::map();
    interrupts::initialize_pic(0x20, 0xffff);
    if boot.has_word("pause") {
        smp::with_processors(Mode::XApic, handle, || {
            for number in 1..count {
                smp::start(number);
                smp::begin(number, pause);
            }
            println!("{count} processors wait for ever");
            pause(0);
        });
    }
    smp::with_processors(Mode::XApic, handle, || {
        exchange(checks, count, Mode::XApic);
        stop_and_start(checks, count);
    });
    if interrupts::has_x2apic() {
        smp::with_processors(Mode::X2Apic, handle, || {
            exchange(checks, count, Mode::X2Apic);
        });
    } else {
        checks.skip("x2APIC", "no x2APIC");
    }
}

/// Waits for ever, without interrupts.
fn pause(_: usize) {
    smp::with_interrupts_off(|| {
        loop {
            core::hint::spin_loop();
        }
    });
}

fn handle(vector: u8) {
    let number = smp::number();
    match vector {
        PING => interrupts::send(0, command::FIXED | u32::from(PONG)),
        PONG => drop(PONGS.fetch_add(1, SeqCst)),
        COUNTED => drop(COUNTS[number].fetch_add(1, SeqCst)),
        NMI => drop(NMIS[number].fetch_add(1, SeqCst)),
        _ => smp::fail(format_args!("vector {vector:#x}")),
    }
}

fn exchange(checks: &mut Checks, count: usize, mode: Mode) {
    for number in 1..count {
        let before = smp::starts(number);
        smp::start(number);
        checks.equal("it starts once", before + 1, smp::starts(number));
    }
    introduce(checks, count, mode);
    clocks(checks, count);
    for number in 1..count {
        ping(checks, number);
    }
    broadcasts(checks, count);
    logical(checks, count, mode);
    for number in 1..count {
        nmi(checks, number);
    }
    checks.ok(format_args!(
        "{mode:?}: {count} processors and their interrupts"
    ));
}

/// Every processor's number is the same wherever it is asked for.
fn introduce(checks: &mut Checks, count: usize, mode: Mode) {
    fn who(_: usize) {
        let bootstrap = rdmsr(msr::APIC_BASE) >> 8 & 1;
        let numbers = u64::from(interrupts::read(register::ID)) << 16 | smp::cpuid_number() as u64;
        RESULT.store(bootstrap << 48 | numbers, SeqCst);
    }
    let shift = if mode == Mode::XApic { 24 } else { 0 };
    for number in 0..count {
        on(number, who);
        let result = RESULT.load(SeqCst);
        let id = (result >> 16) as u32 >> shift;
        checks.equal("the APIC's ID", number, id as usize);
        checks.equal("CPUID's", number, (result & 0xffff) as usize);
        checks.equal("the bootstrap flag", number == 0, result >> 48 != 0);
        println!("{mode:?}: processor {number} of {count} is here");
    }
}

/// Lets any processor do a job, also this one.
fn on(number: usize, job: smp::Job) {
    if number == smp::number() {
        job(number);
    } else {
        smp::call(number, job);
    }
}

/// The time-stamp counters are in step.
fn clocks(checks: &mut Checks, count: usize) {
    for number in 1..count {
        let before = rdtsc();
        smp::call(number, |_| RESULT.store(rdtsc(), SeqCst));
        let (there, after) = (RESULT.load(SeqCst), rdtsc());
        checks.equal(
            format_args!("counters in step: {before}, {there}, {after}"),
            true,
            (before..=after).contains(&there),
        );
    }
}

/// A processor that waits in HLT answers again and again.
fn ping(checks: &mut Checks, number: usize) {
    PONGS.store(0, SeqCst);
    for round in 1..=ROUNDS {
        interrupts::send(number as u32, command::FIXED | u32::from(PING));
        smp::wait_until(|| PONGS.load(SeqCst) == round);
    }
    checks.equal("one answer each", ROUNDS, PONGS.load(SeqCst));
}

/// Lets processor `sender` send, and returns who took it.
fn send(count: usize, sender: usize, target: u32, low: u32, expected: impl Fn(u32) -> bool) -> u32 {
    static COMMAND: AtomicU64 = AtomicU64::new(0);
    for counted in &COUNTS {
        counted.store(0, SeqCst);
    }
    COMMAND.store(u64::from(target) << 32 | u64::from(low), SeqCst);
    on(sender, |_| {
        let command = COMMAND.load(SeqCst);
        interrupts::send((command >> 32) as u32, command as u32 | u32::from(COUNTED));
    });
    let taken = || {
        let each = COUNTS.iter().enumerate();
        each.fold(0, |set, (number, taken)| {
            set | u32::from(taken.load(SeqCst) != 0) << number
        })
    };
    smp::wait_until(|| expected(taken()));
    // Whoever has done a job since has taken all that came before.
    for number in 1..count {
        smp::call(number, |_| {});
    }
    taken()
}

/// Lets processor `sender` send, and checks that these processors and no others take it, once.
fn reach(checks: &mut Checks, count: usize, sender: usize, target: u32, low: u32, receivers: u32) {
    let low = command::FIXED | low;
    let taken = send(count, sender, target, low, |taken| {
        taken & receivers == receivers
    });
    let what = format_args!("from {sender} by {low:#x} to {target:#x}");
    checks.equal(what, receivers, taken);
    for counted in &COUNTS {
        checks.equal(what, true, counted.load(SeqCst) <= 1);
    }
}

fn broadcasts(checks: &mut Checks, count: usize) {
    let all = (1 << count) - 1;
    for sender in 0..count {
        let me = 1 << sender;
        for (low, receivers) in [
            (command::MYSELF, me),
            (command::ALL, all),
            (command::OTHERS, all & !me),
        ] {
            reach(checks, count, sender, 0, low, receivers);
        }
        for target in 0..count {
            reach(checks, count, sender, target as u32, 0, 1 << target);
        }
    }
}

/// Logical destinations: in xAPIC mode of the flat model, in x2APIC mode of the only cluster.
fn logical(checks: &mut Checks, count: usize, mode: Mode) {
    if mode == Mode::XApic {
        for number in 0..count {
            on(number, |number| {
                interrupts::write(register::LOGICAL_DESTINATION, 1 << (24 + number));
            });
        }
    }
    for set in 1..1_u32 << count {
        reach(checks, count, 0, set, command::LOGICAL, set);
        // One of them, whichever.
        let low = command::LOWEST_PRIORITY | command::LOGICAL;
        let taken = send(count, 0, set, low, |taken| taken != 0);
        let what = format_args!("one of {set:#x}: {taken:#x}");
        checks.equal(what, true, taken.is_power_of_two() && taken & set == taken);
    }
}

/// An NMI comes also where interrupts are off.
fn nmi(checks: &mut Checks, number: usize) {
    fn wait(number: usize) {
        smp::with_interrupts_off(|| {
            RESULT.store(1, SeqCst);
            smp::wait_until(|| NMIS[number].load(SeqCst) != 0);
        });
    }
    RESULT.store(0, SeqCst);
    NMIS[number].store(0, SeqCst);
    smp::begin(number, wait);
    smp::wait_until(|| RESULT.load(SeqCst) == 1);
    interrupts::send(number as u32, command::NMI);
    smp::wait_until(|| smp::is_idle(number));
    checks.equal("one NMI", 1, NMIS[number].load(SeqCst));
}

/// INIT stops a processor in the middle of a job; a start-up begins anew.
fn stop_and_start(checks: &mut Checks, count: usize) {
    for number in 1..count {
        BEATS.store(0, SeqCst);
        smp::begin(number, |_| {
            loop {
                BEATS.fetch_add(1, SeqCst);
            }
        });
        smp::wait_until(|| BEATS.load(SeqCst) > 100);
        let starts = smp::starts(number);
        smp::start(number);
        checks.equal("started again", starts + 1, smp::starts(number));
        let beats = BEATS.load(SeqCst);
        ping(checks, number);
        checks.equal("the job has ended", beats, BEATS.load(SeqCst));
    }
    checks.ok("INIT ends whatever a processor does");
}
