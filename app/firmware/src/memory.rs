//! What the firmware keeps in the guest's memory: vectors, data area, stubs.

use alloc::vec;
use alloc::vec::Vec;

use umbra_vcpu::address::Gpa;

use crate::PORT;

/// A range of physical memory as e820 describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// The first byte.
    pub start: u64,
    /// The number of bytes.
    pub length: u64,
    /// 1 for usable RAM, 2 for what is reserved.
    pub kind: u32,
}

/// Bytes and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The guest-physical address.
    pub at: Gpa,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The segment of the stubs, and where they begin in it.
const STUB_SEGMENT: u16 = 0xf000;
const STUBS: u16 = 0xe000;
const STUB_SIZE: usize = 4;
const VECTORS: usize = 256;
/// Left to software: these hold no address.
const USER_VECTORS: core::ops::Range<usize> = 0x60..0x68;

/// Where the BIOS data area begins.
pub const DATA_AREA: u64 = 0x400;
/// The offset of the timer's ticks since midnight in it.
pub const TICKS: u64 = 0x6c;
/// The offset of the flag that midnight has passed.
pub const MIDNIGHT: u64 = 0x70;
/// Conventional memory in KiB; what follows belongs to the firmware.
pub const CONVENTIONAL_KIB: u16 = 639;
/// What INT 11h reports: 80-column colour text, one serial port.
pub const EQUIPMENT: u16 = 0x0220;
/// Text columns, and rows.
pub const COLUMNS: u8 = 80;
pub const ROWS: u8 = 25;
const DATA_AREA_SIZE: usize = 0x100;

pub const fn vector_at(address: u64) -> Option<u8> {
    let first = ((STUB_SEGMENT as u64) << 4) + STUBS as u64;
    let Some(offset) = address.checked_sub(first) else {
        return None;
    };
    if offset % STUB_SIZE as u64 == 0 && offset / (STUB_SIZE as u64) < VECTORS as u64 {
        Some((offset / STUB_SIZE as u64) as u8)
    } else {
        None
    }
}

/// Vectors with the data area behind them, the first byte of the extended data area, and the stubs.
pub fn pieces(has_disk: bool) -> [Piece; 3] {
    let mut low: Vec<u8> = (0..VECTORS)
        .flat_map(|vector| {
            if USER_VECTORS.contains(&vector) {
                return [0; 4];
            }
            let [offset_low, offset_high] = (STUBS + (vector * STUB_SIZE) as u16).to_le_bytes();
            let [segment_low, segment_high] = STUB_SEGMENT.to_le_bytes();
            [offset_low, offset_high, segment_low, segment_high]
        })
        .collect();
    low.extend(data_area(has_disk));
    let [port, _] = PORT.to_le_bytes();
    // out PORT, al; iret
    let stub = [0xe6, port, 0xcf, 0x90];
    let stubs = stub.into_iter().cycle().take(VECTORS * STUB_SIZE).collect();
    let stub_address = (u64::from(STUB_SEGMENT) << 4) + u64::from(STUBS);
    [
        Piece {
            at: Gpa::new(0),
            bytes: low,
        },
        Piece {
            at: Gpa::new(u64::from(CONVENTIONAL_KIB) << 10),
            // The extended data area begins with its size in KiB.
            bytes: vec![1],
        },
        Piece {
            at: Gpa::new(stub_address),
            bytes: stubs,
        },
    ]
}

fn data_area(has_disk: bool) -> [u8; DATA_AREA_SIZE] {
    const SERIAL_PORT: u16 = 0x3f8;
    const TEXT_MODE: u8 = 3;
    const DISPLAY_PORT: u16 = 0x3d4;
    const CHARACTER_HEIGHT: u8 = 16;
    let mut area = [0; DATA_AREA_SIZE];
    let mut set = |offset: usize, bytes: &[u8]| {
        area[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    set(0x00, &SERIAL_PORT.to_le_bytes());
    set(0x0e, &(CONVENTIONAL_KIB << 6).to_le_bytes());
    set(0x10, &EQUIPMENT.to_le_bytes());
    set(0x13, &CONVENTIONAL_KIB.to_le_bytes());
    set(0x49, &[TEXT_MODE, COLUMNS]);
    set(0x63, &DISPLAY_PORT.to_le_bytes());
    set(0x75, &[u8::from(has_disk)]);
    set(0x84, &[ROWS - 1, CHARACTER_HEIGHT]);
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vector_leads_to_its_own_stub() {
        let [low, _, stubs] = pieces(true);
        for vector in 0..VECTORS {
            let entry = &low.bytes[4 * vector..4 * vector + 4];
            let offset = u64::from(u16::from_le_bytes([entry[0], entry[1]]));
            let segment = u64::from(u16::from_le_bytes([entry[2], entry[3]]));
            let address = (segment << 4) + offset;
            if USER_VECTORS.contains(&vector) {
                assert_eq!(address, 0);
                continue;
            }
            assert_eq!(vector_at(address), Some(vector as u8));
            let at = (address - stubs.at.as_u64()) as usize;
            assert_eq!(stubs.bytes[at..at + 3], [0xe6, 0xb9, 0xcf]);
        }
    }

    #[test]
    fn what_is_no_stub_has_no_vector() {
        for address in [0, 0xf_dfff, 0xf_e001, 0xf_e400, u64::MAX] {
            assert_eq!(vector_at(address), None, "{address:#x}");
        }
    }

    #[test]
    fn the_data_area_follows_the_vectors() {
        let [low, extended, _] = pieces(true);
        let base = DATA_AREA as usize;
        assert_eq!(low.bytes[base..base + 2], [0xf8, 3]);
        assert_eq!(low.bytes[base + 0x13..base + 0x15], 639_u16.to_le_bytes());
        assert_eq!(low.bytes[base + 0x75], 1);
        assert_eq!(extended.at.as_u64(), 0x9_fc00);
    }
}
