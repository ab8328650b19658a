//! The time-stamp counter and its frequency.
//!
//! The kernel knows the frequency as a whole number of MHz, and where neither the processor nor a
//! hypervisor tells it, from three interrupts, which come late on a busy host. All guest time rests on
//! this number, so it is measured here against channel 2 of the interval timer, without interrupts:
//! the count is read between two reads of the counter, and only readings that lie close together
//! count. uhyve has no such timer, but tells the exact frequency.
//!
//! Protocol: [`calibrate`] runs once, before anything asks for the frequency.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::instructions::port::Port;

const PIT_FREQUENCY: u128 = 1_193_182;
const CHANNEL_2: u16 = 0x42;
const PIT_CONTROL: u16 = 0x43;
const SYSTEM_CONTROL: u16 = 0x61;
const GATE: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const OUTPUT: u8 = 1 << 5;
/// Channel 2, both bytes, interrupt on terminal count: the output rises when the count ends.
const COUNT_DOWN: u8 = 0xb0;
const LATCH: u8 = 0x80;
const START: u16 = u16::MAX;
/// The measurement ends below this count, after 41 ms; the count itself ends after 55 ms.
const END: u16 = 0x4000;
/// Attempts, of which a host that pauses may spoil some.
const ATTEMPTS: usize = 8;
/// Readings at each end, the best of which counts.
const READINGS: usize = 16;

static FREQUENCY: AtomicU64 = AtomicU64::new(0);

/// The time-stamp counter of this core, in ticks.
pub fn now() -> u64 {
    // SAFETY: ring 0 may always read the counter, and every 64-bit processor has one.
    unsafe { _rdtsc() }
}

/// Ticks of the time-stamp counter in a second, at least 1 000 000.
pub fn frequency() -> u64 {
    FREQUENCY.load(Ordering::Relaxed).max(1_000_000)
}

/// How far the counter gets in so many microseconds.
pub fn ticks_in_microseconds(microseconds: u64) -> u64 {
    let ticks = u128::from(microseconds) * u128::from(frequency()) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The nanoseconds in which the counter goes so far.
pub fn nanoseconds_in_ticks(ticks: u64) -> u64 {
    let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(frequency());
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

/// Measures the frequency.
pub fn calibrate() {
    let measured = if hermit::env::is_uhyve() {
        None
    } else {
        (0..ATTEMPTS).find_map(|_| measure())
    };
    let told = u64::from(hermit::time::frequency_mhz()) * 1_000_000;
    FREQUENCY.store(measured.unwrap_or(told), Ordering::Relaxed);
}

/// One measurement; `None` if there is no timer or the host paused.
fn measure() -> Option<u64> {
    let control = read(SYSTEM_CONTROL);
    write(SYSTEM_CONTROL, control & !SPEAKER | GATE);
    write(PIT_CONTROL, COUNT_DOWN);
    let [low, high] = START.to_le_bytes();
    write(CHANNEL_2, low);
    write(CHANNEL_2, high);
    let first = best_reading();
    // Polling cannot go on for ever: the output rises when the count ends.
    while has_time_left() && read_count().1 > END {}
    let last = best_reading();
    let valid = has_time_left() && last.1 < first.1;
    write(SYSTEM_CONTROL, control);
    let ticks = u128::from(last.0.checked_sub(first.0)?);
    let elapsed = u128::from(first.1.checked_sub(last.1)?);
    let frequency = (ticks * PIT_FREQUENCY).checked_div(elapsed)?;
    u64::try_from(frequency).ok().filter(|_| valid)
}

/// Whether the count has not ended. Where there is no timer, the port reads all ones.
fn has_time_left() -> bool {
    read(SYSTEM_CONTROL) & OUTPUT == 0
}

/// The reading that took the shortest time: the counter in its middle, and the count.
fn best_reading() -> (u64, u16) {
    let mut shortest = u64::MAX;
    let mut best = (0, 0);
    for _ in 0..READINGS {
        let ((before, after), count) = read_count();
        let took = after.saturating_sub(before);
        if took < shortest {
            shortest = took;
            best = (before + took / 2, count);
        }
    }
    best
}

/// The count, and the counter before and after it was latched.
fn read_count() -> ((u64, u64), u16) {
    let before = now();
    write(PIT_CONTROL, LATCH);
    let after = now();
    let low = read(CHANNEL_2);
    ((before, after), u16::from_le_bytes([low, read(CHANNEL_2)]))
}

fn read(port: u16) -> u8 {
    // SAFETY: the kernel is done with the interval timer and the speaker port, and reading them
    // touches no memory.
    unsafe { Port::new(port).read() }
}

fn write(port: u16, value: u8) {
    // SAFETY: as above; channel 2 is wired to nothing but the speaker, which stays off.
    unsafe { Port::new(port).write(value) }
}
