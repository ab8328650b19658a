//! INT 13h: the disk, by cylinder, head and sector, and by its extensions (EDD 3.0).

use umbra_vcpu::address::Gpa;
use umbra_vcpu::registers::{Gpr, SegmentRegister};

use crate::{Caller, Firmware, Platform, Service};

/// The number of the disk that a boot sector comes from.
pub const DISK_NUMBER: u8 = 0x80;
/// Bytes in a sector.
pub const SECTOR_SIZE: usize = 512;

/// The geometry that BIOSes give to disks of any size.
const HEADS: u64 = 16;
const SECTORS: u64 = 63;
const MOST_CYLINDERS: u64 = 1024;

const INVALID_FUNCTION: u8 = 0x01;
const WRITE_PROTECTED: u8 = 0x03;
const SECTOR_NOT_FOUND: u8 = 0x04;

type Outcome = Result<(), u8>;

/// Carries out a disk service, which reports by AH and CF.
pub fn call<P: Platform>(firmware: &Firmware, caller: &mut Caller<'_, P>) {
    let function = caller.high(Gpr::Rax);
    let disk = firmware
        .disk
        .filter(|_| caller.low(Gpr::Rdx) == DISK_NUMBER);
    let outcome = match disk {
        // A reset concerns the controller.
        _ if function == 0x00 => {
            status(caller, 0);
            Ok(())
        }
        None => Err(INVALID_FUNCTION),
        Some(disk) => serve(caller, disk, function),
    };
    match outcome {
        Ok(()) => caller.report(Service::Done),
        Err(error) => {
            caller.set_high(Gpr::Rax, error);
            caller.report(Service::Failed);
        }
    }
}

fn serve<P: Platform>(caller: &mut Caller<'_, P>, disk: &[u8], function: u8) -> Outcome {
    let sectors = (disk.len() / SECTOR_SIZE) as u64;
    match function {
        0x01 => {
            status(caller, 0);
            Ok(())
        }
        0x02 => {
            let count = usize::from(caller.low(Gpr::Rax));
            let first = position(caller).ok_or(SECTOR_NOT_FOUND)?;
            let target = caller.address(SegmentRegister::Es, caller.word(Gpr::Rbx));
            read(caller, disk, first, count, target)?;
            caller.set_word(Gpr::Rax, count as u16);
            Ok(())
        }
        0x03 | 0x05 | 0x43 => Err(WRITE_PROTECTED),
        0x08 => {
            let last = cylinders(sectors) - 1;
            let cylinder_low = (last & 0xff) as u8;
            let cylinder_high = (last >> 8 & 3) as u8;
            let sector = cylinder_high << 6 | SECTORS as u8;
            caller.set_word(Gpr::Rcx, u16::from_le_bytes([sector, cylinder_low]));
            caller.set_word(Gpr::Rdx, u16::from_le_bytes([1, HEADS as u8 - 1]));
            caller.set_low(Gpr::Rbx, 0);
            caller.set_word(Gpr::Rax, 0);
            Ok(())
        }
        0x15 => {
            const FIXED_DISK: u8 = 3;
            caller.set_word(Gpr::Rcx, (sectors >> 16) as u16);
            caller.set_word(Gpr::Rdx, sectors as u16);
            status(caller, FIXED_DISK);
            Ok(())
        }
        0x41 if caller.word(Gpr::Rbx) == 0x55aa => {
            const VERSION: u8 = 0x30;
            const FIXED_DISK_ACCESS: u16 = 1;
            caller.set_word(Gpr::Rbx, 0xaa55);
            caller.set_word(Gpr::Rcx, FIXED_DISK_ACCESS);
            status(caller, VERSION);
            Ok(())
        }
        0x42 => read_by_packet(caller, disk),
        0x48 => parameters(caller, sectors),
        _ => Err(INVALID_FUNCTION),
    }
}

fn status<P: Platform>(caller: &mut Caller<'_, P>, status: u8) {
    caller.set_high(Gpr::Rax, status);
}

/// How many cylinders a disk shows: all that it needs, as far as they can be numbered.
fn cylinders(sectors: u64) -> u64 {
    sectors.div_ceil(HEADS * SECTORS).clamp(1, MOST_CYLINDERS)
}

/// The sector that CX and DH name.
fn position<P: Platform>(caller: &Caller<'_, P>) -> Option<u64> {
    let [low, high] = caller.word(Gpr::Rcx).to_le_bytes();
    let cylinder = u64::from(high) | u64::from(low >> 6) << 8;
    let sector = u64::from(low & 0x3f).checked_sub(1)?;
    let head = u64::from(caller.high(Gpr::Rdx));
    (head < HEADS && sector < SECTORS).then_some((cylinder * HEADS + head) * SECTORS + sector)
}

/// Copies `count` sectors from number `first` on to memory.
fn read<P: Platform>(
    caller: &mut Caller<'_, P>,
    disk: &[u8],
    first: u64,
    count: usize,
    target: Gpa,
) -> Outcome {
    let start = usize::try_from(first)
        .ok()
        .and_then(|first| first.checked_mul(SECTOR_SIZE));
    let bytes = start
        .and_then(|start| disk.get(start..)?.get(..count * SECTOR_SIZE))
        .ok_or(SECTOR_NOT_FOUND)?;
    caller.platform.write(target, bytes);
    Ok(())
}

/// Extended read: DS:SI points at a packet.
fn read_by_packet<P: Platform>(caller: &mut Caller<'_, P>, disk: &[u8]) -> Outcome {
    let mut packet = [0; 16];
    let at = caller.address(SegmentRegister::Ds, caller.word(Gpr::Rsi));
    caller.platform.read(at, &mut packet);
    let half = |offset: usize| u16::from_le_bytes([packet[offset], packet[offset + 1]]);
    if packet[0] < 16 {
        return Err(INVALID_FUNCTION);
    }
    let target = Gpa::new((u64::from(half(6)) << 4) + u64::from(half(4)));
    let mut first = [0; 8];
    first.copy_from_slice(&packet[8..]);
    let first = u64::from_le_bytes(first);
    read(caller, disk, first, usize::from(half(2)), target)?;
    status(caller, 0);
    Ok(())
}

/// Extended parameters into the 26 bytes at DS:SI.
fn parameters<P: Platform>(caller: &mut Caller<'_, P>, sectors: u64) -> Outcome {
    const SIZE: u16 = 26;
    let at = caller.address(SegmentRegister::Ds, caller.word(Gpr::Rsi));
    let mut given = [0; 2];
    caller.platform.read(at, &mut given);
    if u16::from_le_bytes(given) < SIZE {
        return Err(INVALID_FUNCTION);
    }
    let mut result = [0; SIZE as usize];
    result[..2].copy_from_slice(&SIZE.to_le_bytes());
    result[4..8].copy_from_slice(&(cylinders(sectors) as u32).to_le_bytes());
    result[8..12].copy_from_slice(&(HEADS as u32).to_le_bytes());
    result[12..16].copy_from_slice(&(SECTORS as u32).to_le_bytes());
    result[16..24].copy_from_slice(&sectors.to_le_bytes());
    result[24..].copy_from_slice(&(SECTOR_SIZE as u16).to_le_bytes());
    caller.platform.write(at, &result);
    status(caller, 0);
    Ok(())
}
