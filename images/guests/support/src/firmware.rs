//! QEMU's firmware configuration device (fw_cfg), by its selector and data ports.

use crate::cpu::{inb, outw};

const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const SIGNATURE: u16 = 0x00;
const RAM_SIZE: u16 = 0x03;
const PROCESSORS: u16 = 0x05;

/// What the device says of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Firmware {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// How many processors there are.
    pub processors: u16,
}

/// Reads the device; `None` where there is none.
pub fn read() -> Option<Firmware> {
    (&item(SIGNATURE) == b"QEMU").then(|| Firmware {
        ram_bytes: u64::from_le_bytes(item(RAM_SIZE)),
        processors: u16::from_le_bytes(item(PROCESSORS)),
    })
}

fn item<const BYTES: usize>(selector: u16) -> [u8; BYTES] {
    outw(SELECTOR, selector);
    core::array::from_fn(|_| inb(DATA))
}
