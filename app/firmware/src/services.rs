//! The other services, by their vectors, and the interrupts of devices.

use umbra_vcpu::address::Gpa;
use umbra_vcpu::registers::{Gpr, SegmentRegister};

use crate::memory::{COLUMNS, CONVENTIONAL_KIB, DATA_AREA, EQUIPMENT, MIDNIGHT, ROWS, TICKS};
use crate::{Caller, Firmware, Platform, Service, disk};

const MIB: u64 = 1 << 20;
/// Ticks of the timer in a day.
const DAY: u32 = 0x18_00b0;

/// Carries out what `vector` stands for.
pub fn call<P: Platform>(firmware: &Firmware, platform: &mut P, vector: u8) {
    let mut caller = Caller { platform };
    match vector {
        0x08 => {
            count_tick(&mut caller);
            end_of_interrupt(&mut caller, vector);
        }
        0x09..=0x0f | 0x70..=0x77 => end_of_interrupt(&mut caller, vector),
        0x10 => video(&mut caller),
        0x11 => caller.set_word(Gpr::Rax, EQUIPMENT),
        0x12 => caller.set_word(Gpr::Rax, CONVENTIONAL_KIB),
        0x13 => disk::call(firmware, &mut caller),
        0x15 => system(firmware, &mut caller),
        0x16 => keyboard(&mut caller),
        // No bootable disk is left, or the guest starts again.
        0x18 | 0x19 => caller.platform.write_port(0xcf9, 0x06),
        0x1a => clock(&mut caller),
        // Exceptions and services that are not there.
        _ => {}
    }
}

fn end_of_interrupt<P: Platform>(caller: &mut Caller<'_, P>, vector: u8) {
    const MASTER: u16 = 0x20;
    const SLAVE: u16 = 0xa0;
    const END: u8 = 0x20;
    if vector >= 0x70 {
        caller.platform.write_port(SLAVE, END);
    }
    caller.platform.write_port(MASTER, END);
}

fn ticks<P: Platform>(caller: &Caller<'_, P>) -> u32 {
    let mut ticks = [0; 4];
    caller
        .platform
        .read(Gpa::new(DATA_AREA + TICKS), &mut ticks);
    u32::from_le_bytes(ticks)
}

fn set_ticks<P: Platform>(caller: &mut Caller<'_, P>, ticks: u32, midnight: u8) {
    let (count, flag) = (DATA_AREA + TICKS, DATA_AREA + MIDNIGHT);
    caller.platform.write(Gpa::new(count), &ticks.to_le_bytes());
    caller.platform.write(Gpa::new(flag), &[midnight]);
}

fn count_tick<P: Platform>(caller: &mut Caller<'_, P>) {
    let mut midnight = [0];
    caller
        .platform
        .read(Gpa::new(DATA_AREA + MIDNIGHT), &mut midnight);
    let next = ticks(caller).wrapping_add(1);
    if next >= DAY {
        set_ticks(caller, 0, 1);
    } else {
        set_ticks(caller, next, midnight[0]);
    }
}

/// INT 10h: a text screen that only scrolls.
fn video<P: Platform>(caller: &mut Caller<'_, P>) {
    const TEXT_MODE: u8 = 3;
    match caller.high(Gpr::Rax) {
        // The cursor is where the terminal has it.
        0x03 => {
            const SHAPE: u16 = 0x0607;
            caller.set_word(Gpr::Rcx, SHAPE);
            caller.set_word(Gpr::Rdx, 0);
        }
        0x09 | 0x0a => {
            let byte = caller.low(Gpr::Rax);
            let most = u16::from(COLUMNS) * u16::from(ROWS);
            for _ in 0..caller.word(Gpr::Rcx).min(most) {
                caller.platform.print(byte);
            }
        }
        0x0e => {
            let byte = caller.low(Gpr::Rax);
            caller.platform.print(byte);
        }
        0x0f => {
            caller.set_word(Gpr::Rax, u16::from_le_bytes([TEXT_MODE, COLUMNS]));
            caller.set_high(Gpr::Rbx, 0);
        }
        0x13 => write_string(caller),
        // An unknown service leaves the registers, by which callers tell.
        _ => {}
    }
}

fn write_string<P: Platform>(caller: &mut Caller<'_, P>) {
    /// Each character has an attribute behind it.
    const WITH_ATTRIBUTES: u8 = 2;
    let step = if caller.low(Gpr::Rax) & WITH_ATTRIBUTES == 0 {
        1
    } else {
        2
    };
    let start = caller.word(Gpr::Rbp);
    for index in 0..caller.word(Gpr::Rcx).min(4096) {
        let offset = start.wrapping_add(index.wrapping_mul(step));
        let mut byte = [0];
        let at = caller.address(SegmentRegister::Es, offset);
        caller.platform.read(at, &mut byte);
        caller.platform.print(byte[0]);
    }
}

/// INT 15h: memory sizes and the A20 line, which is always open.
fn system<P: Platform>(firmware: &Firmware, caller: &mut Caller<'_, P>) {
    const UNSUPPORTED: u8 = 0x86;
    let result = match caller.word(Gpr::Rax) {
        0xe820 => memory_map(firmware, caller),
        0xe801 => {
            const UNITS: u64 = 64 << 10;
            let below = extended_memory(firmware).min(15 * MIB) >> 10;
            let above = extended_memory(firmware).saturating_sub(15 * MIB) / UNITS;
            let above = above.min(0xffff) as u16;
            for (first, second) in [(Gpr::Rax, Gpr::Rbx), (Gpr::Rcx, Gpr::Rdx)] {
                caller.set_word(first, below as u16);
                caller.set_word(second, above);
            }
            Service::Done
        }
        0x2400 | 0x2401 => {
            caller.set_high(Gpr::Rax, 0);
            Service::Done
        }
        0x2402 => {
            caller.set_word(Gpr::Rax, 1);
            Service::Done
        }
        0x2403 => {
            caller.set_high(Gpr::Rax, 0);
            caller.set_word(Gpr::Rbx, 0b11);
            Service::Done
        }
        ax if ax >> 8 == 0x88 => {
            let kib = (extended_memory(firmware) >> 10).min(0xfc00);
            caller.set_word(Gpr::Rax, kib as u16);
            Service::Done
        }
        _ => {
            caller.set_high(Gpr::Rax, UNSUPPORTED);
            Service::Failed
        }
    };
    caller.report(result);
}

/// The bytes of RAM from 1 MiB on, below the first hole.
fn extended_memory(firmware: &Firmware) -> u64 {
    firmware
        .memory_map
        .iter()
        .find(|range| range.start == MIB && range.kind == 1)
        .map_or(0, |range| range.length)
}

/// E820: EBX is the number of the entry to come, zero at the first and at the end.
fn memory_map<P: Platform>(firmware: &Firmware, caller: &mut Caller<'_, P>) -> Service {
    const SIGNATURE: u32 = u32::from_be_bytes(*b"SMAP");
    const ENTRY_SIZE: u32 = 20;
    let index = caller.double(Gpr::Rbx) as usize;
    let entry = firmware.memory_map.get(index);
    let fits = caller.double(Gpr::Rdx) == SIGNATURE && caller.double(Gpr::Rcx) >= ENTRY_SIZE;
    let Some(range) = entry.filter(|_| fits) else {
        caller.set_high(Gpr::Rax, 0x86);
        return Service::Failed;
    };
    let mut bytes = [0; ENTRY_SIZE as usize];
    bytes[..8].copy_from_slice(&range.start.to_le_bytes());
    bytes[8..16].copy_from_slice(&range.length.to_le_bytes());
    bytes[16..].copy_from_slice(&range.kind.to_le_bytes());
    let at = caller.address(SegmentRegister::Es, caller.word(Gpr::Rdi));
    caller.platform.write(at, &bytes);
    let next = if index + 1 < firmware.memory_map.len() {
        index + 1
    } else {
        0
    };
    caller.set_double(Gpr::Rbx, next as u32);
    caller.set_double(Gpr::Rax, SIGNATURE);
    caller.set_double(Gpr::Rcx, ENTRY_SIZE);
    Service::Done
}

/// INT 16h: no key is ever pressed.
fn keyboard<P: Platform>(caller: &mut Caller<'_, P>) {
    const ZERO: u16 = 1 << 6;
    match caller.high(Gpr::Rax) {
        0x00 | 0x10 => caller.set_word(Gpr::Rax, 0),
        0x01 | 0x11 => caller.change_flags(ZERO, ZERO),
        0x02 | 0x12 => caller.set_low(Gpr::Rax, 0),
        _ => {}
    }
}

/// INT 1Ah: the timer's ticks.
fn clock<P: Platform>(caller: &mut Caller<'_, P>) {
    let result = match caller.high(Gpr::Rax) {
        0x00 => {
            let ticks = ticks(caller);
            let mut midnight = [0];
            let flag = Gpa::new(DATA_AREA + MIDNIGHT);
            caller.platform.read(flag, &mut midnight);
            caller.platform.write(flag, &[0]);
            caller.set_word(Gpr::Rcx, (ticks >> 16) as u16);
            caller.set_word(Gpr::Rdx, ticks as u16);
            caller.set_low(Gpr::Rax, midnight[0]);
            Service::Done
        }
        0x01 => {
            let ticks = u32::from(caller.word(Gpr::Rcx)) << 16 | u32::from(caller.word(Gpr::Rdx));
            set_ticks(caller, ticks, 0);
            Service::Done
        }
        _ => Service::Failed,
    };
    caller.report(result);
}
