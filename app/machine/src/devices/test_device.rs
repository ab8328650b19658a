//! QEMU's `pc-testdev`: memory behind ports and behind physical addresses, and interrupt lines that
//! the guest sets itself. Kernels that test themselves know it.

use alloc::boxed::Box;
use alloc::vec;

use umbra_vcpu::address::Gpa;
use umbra_vcpu::exit::IoWidth;

use super::Level;

/// Four bytes of memory.
pub const DATA_PORT: u16 = 0xe0;
/// The physical address of a page goes here, in four bytes: its translations are dropped.
pub const FLUSH_PORT: u16 = 0xe4;
/// The bytes of [`DATA_PORT`] again.
pub const BYTE_PORT: u16 = 0xe8;
const LAST_PORT: u16 = 0xeb;
/// One byte for each interrupt line: zero is low.
pub const LINE_PORT: u16 = 0x2000;
/// The number of lines.
pub const LINES: usize = 24;
/// The first byte of the memory.
pub const ADDRESS: u64 = 0xff00_0000;
/// The size of the memory in bytes.
pub const SIZE: u64 = 0x1_0000;

/// What an access asks of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The translations of the page at this address are to be dropped.
    FlushPage(Gpa),
}

/// The device.
#[derive(Clone, Debug)]
pub struct TestDevice {
    data: [u8; 4],
    lines: [Level; LINES],
    memory: Box<[u8]>,
}

impl Default for TestDevice {
    fn default() -> Self {
        Self {
            data: [0; 4],
            lines: [Level::Low; LINES],
            memory: vec![0; SIZE as usize].into_boxed_slice(),
        }
    }
}

/// Whether the device answers at a port.
pub const fn owns(port: u16) -> bool {
    matches!(port, DATA_PORT..=LAST_PORT) || line_of(port).is_some()
}

/// The line of a port.
const fn line_of(port: u16) -> Option<usize> {
    match port.checked_sub(LINE_PORT) {
        Some(line) if (line as usize) < LINES => Some(line as usize),
        _ => None,
    }
}

/// The place of a port in the four bytes.
const fn data_index(port: u16) -> Option<usize> {
    match port {
        DATA_PORT..FLUSH_PORT => Some((port - DATA_PORT) as usize),
        BYTE_PORT..=LAST_PORT => Some((port - BYTE_PORT) as usize),
        _ => None,
    }
}

impl TestDevice {
    /// IN. What cannot be read gives ones.
    pub fn read_port(&self, port: u16, width: IoWidth) -> u32 {
        let mut value = [0xff; 4];
        if let Some(index) = data_index(port) {
            let length = usize::from(width.bytes()).min(self.data.len() - index);
            value[..length].copy_from_slice(&self.data[index..index + length]);
        }
        u32::from_le_bytes(value) & width.mask()
    }

    /// OUT.
    pub fn write_port(&mut self, port: u16, width: IoWidth, value: u32) -> Effect {
        let bytes = &value.to_le_bytes()[..width.bytes().into()];
        if let Some(index) = data_index(port) {
            for (place, byte) in self.data[index..].iter_mut().zip(bytes) {
                *place = *byte;
            }
        } else if let Some(line) = line_of(port) {
            for (place, byte) in self.lines[line..].iter_mut().zip(bytes) {
                *place = Level::high_if(*byte != 0);
            }
        } else if port == FLUSH_PORT && width == IoWidth::DoubleWord {
            return Effect::FlushPage(Gpa::new(value.into()).page_base());
        }
        Effect::None
    }

    /// The level of a line.
    pub fn line(&self, line: u8) -> Level {
        self.lines
            .get(usize::from(line))
            .copied()
            .unwrap_or_default()
    }

    /// Reads memory at `offset`; what lies beyond its end stays as it is.
    pub fn read_memory(&self, offset: u64, bytes: &mut [u8]) {
        let memory = self.memory.iter().skip(offset as usize);
        for (byte, place) in bytes.iter_mut().zip(memory) {
            *byte = *place;
        }
    }

    /// Writes memory at `offset`; what lies beyond its end vanishes.
    pub fn write_memory(&mut self, offset: u64, bytes: &[u8]) {
        let memory = self.memory.iter_mut().skip(offset as usize);
        for (place, byte) in memory.zip(bytes) {
            *place = *byte;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use IoWidth::{Byte, DoubleWord, Word};

    #[test]
    fn both_port_ranges_are_the_same_memory() {
        let mut device = TestDevice::default();
        device.write_port(DATA_PORT, DoubleWord, 0x4433_2211);
        device.write_port(BYTE_PORT + 1, Word, 0xbbaa);
        assert_eq!(device.read_port(DATA_PORT, DoubleWord), 0x44bb_aa11);
        assert_eq!(device.read_port(BYTE_PORT + 3, Byte), 0x44);
        assert_eq!(device.read_port(DATA_PORT + 3, Word), 0xff44, "half of it");
        assert_eq!(device.write_port(DATA_PORT + 3, Word, 0), Effect::None);
        assert_eq!(device.read_port(FLUSH_PORT, DoubleWord), 0xffff_ffff);
    }

    #[test]
    fn a_page_is_flushed_by_four_bytes() {
        let mut device = TestDevice::default();
        assert_eq!(
            device.write_port(FLUSH_PORT, DoubleWord, 0x1234_5678),
            Effect::FlushPage(Gpa::new(0x1234_5000))
        );
        assert_eq!(device.write_port(FLUSH_PORT, Byte, 1), Effect::None);
    }

    #[test]
    fn lines_follow_their_ports() {
        let mut device = TestDevice::default();
        device.write_port(LINE_PORT + 5, Byte, 7);
        assert!(device.line(5).is_high() && !device.line(4).is_high());
        device.write_port(LINE_PORT + 5, Byte, 0);
        assert!(!device.line(5).is_high());
        device.write_port(LINE_PORT + 23, DoubleWord, u32::MAX);
        assert!(device.line(23).is_high() && !device.line(24).is_high());
    }

    #[test]
    fn memory_ends_with_the_device() {
        let mut device = TestDevice::default();
        device.write_memory(SIZE - 2, &[1, 2, 3, 4]);
        let mut bytes = [9; 4];
        device.read_memory(SIZE - 2, &mut bytes);
        assert_eq!(bytes, [1, 2, 9, 9]);
        assert!(owns(0xe0) && owns(0xeb) && !owns(0xec) && owns(0x2017) && !owns(0x2018));
    }
}
