//! QEMU's firmware configuration device, its port interface (QEMU's docs/specs/fw_cfg).
//!
//! A 16-bit write to the selector port chooses an item; each read of the data port gives its next
//! byte, and zeros past its end. There is no DMA interface, and item 1 says so.

use alloc::borrow::Cow;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// The selector's port.
pub const SELECTOR_PORT: u16 = 0x510;
/// The data port.
pub const DATA_PORT: u16 = 0x511;

/// Keys of items that have fixed numbers.
pub mod key {
    #![allow(
        missing_docs,
        reason = "the specification's names are the documentation"
    )]
    pub const SIGNATURE: u16 = 0x00;
    pub const ID: u16 = 0x01;
    pub const RAM_SIZE: u16 = 0x03;
    pub const CPU_COUNT: u16 = 0x05;
    pub const KERNEL_ADDRESS: u16 = 0x07;
    pub const KERNEL_SIZE: u16 = 0x08;
    pub const INITRD_ADDRESS: u16 = 0x0a;
    pub const INITRD_SIZE: u16 = 0x0b;
    pub const MAX_CPUS: u16 = 0x0f;
    pub const KERNEL_ENTRY: u16 = 0x10;
    pub const KERNEL_DATA: u16 = 0x11;
    pub const INITRD_DATA: u16 = 0x12;
    pub const COMMAND_LINE_ADDRESS: u16 = 0x13;
    pub const COMMAND_LINE_SIZE: u16 = 0x14;
    pub const COMMAND_LINE_DATA: u16 = 0x15;
    pub const SETUP_ADDRESS: u16 = 0x16;
    pub const SETUP_SIZE: u16 = 0x17;
    pub const SETUP_DATA: u16 = 0x18;
    pub const FILE_DIRECTORY: u16 = 0x19;
    pub const FIRST_FILE: u16 = 0x20;
}

/// The length of a name in the file directory, with its terminating zero.
const NAME_LENGTH: usize = 56;
const TRADITIONAL_INTERFACE: u32 = 1;

/// A range of an e820 memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// The first byte.
    pub address: umbra_vcpu::address::Gpa,
    /// The size in bytes.
    pub size: u64,
    /// 1 for RAM, 2 for reserved, 3 for ACPI tables.
    pub kind: u32,
}

/// The items of the configuration device.
#[derive(Clone, Debug)]
pub struct FwCfg {
    items: BTreeMap<u16, Cow<'static, [u8]>>,
    files: Vec<(&'static str, u16)>,
    selected: u16,
    position: usize,
}

impl Default for FwCfg {
    fn default() -> Self {
        let mut device = Self {
            items: BTreeMap::new(),
            files: Vec::new(),
            selected: key::SIGNATURE,
            position: 0,
        };
        device.set(key::SIGNATURE, b"QEMU");
        device.set(key::ID, &TRADITIONAL_INTERFACE.to_le_bytes());
        device.write_directory();
        device
    }
}

impl FwCfg {
    /// Gives the item `key` these bytes. Numbers are little-endian.
    pub fn set(&mut self, key: u16, bytes: &[u8]) {
        self.items.insert(key, Cow::Owned(bytes.to_vec()));
    }

    /// Gives the kernel's image.
    pub fn set_kernel(&mut self, image: &'static [u8]) {
        self.set_data(key::KERNEL_SIZE, key::KERNEL_DATA, image);
    }

    /// Gives the initial RAM disk or first module.
    pub fn set_initrd(&mut self, image: &'static [u8]) {
        self.set_data(key::INITRD_SIZE, key::INITRD_DATA, image);
    }

    /// Gives bytes that are not copied, and their size.
    fn set_data(&mut self, size_key: u16, data_key: u16, bytes: &'static [u8]) {
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.set(size_key, &size.to_le_bytes());
        self.items.insert(data_key, Cow::Borrowed(bytes));
    }

    /// Says how much RAM there is, in bytes.
    pub fn set_ram_size(&mut self, bytes: u64) {
        self.set(key::RAM_SIZE, &bytes.to_le_bytes());
    }

    /// Says how many processors there are.
    pub fn set_cpu_count(&mut self, count: u16) {
        self.set(key::CPU_COUNT, &count.to_le_bytes());
        self.set(key::MAX_CPUS, &count.to_le_bytes());
    }

    /// Gives the kernel's command line, without its terminating zero.
    pub fn set_command_line(&mut self, text: &[u8]) {
        let mut bytes = text.to_vec();
        bytes.push(0);
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.set(key::COMMAND_LINE_SIZE, &size.to_le_bytes());
        self.set(key::COMMAND_LINE_DATA, &bytes);
    }

    /// Gives the memory map, as the file `etc/e820`.
    pub fn set_memory_map(&mut self, entries: &[E820Entry]) {
        let mut bytes = Vec::with_capacity(entries.len() * 20);
        for entry in entries {
            bytes.extend_from_slice(&entry.address.as_u64().to_le_bytes());
            bytes.extend_from_slice(&entry.size.to_le_bytes());
            bytes.extend_from_slice(&entry.kind.to_le_bytes());
        }
        self.set_file("etc/e820", &bytes);
    }

    /// Gives the file `name` (at most 55 bytes, longer ones are cut) these bytes.
    pub fn set_file(&mut self, name: &'static str, bytes: &[u8]) {
        let known = self.files.iter().find(|(known, _)| *known == name);
        let key = if let Some((_, key)) = known {
            *key
        } else {
            let key = key::FIRST_FILE + self.files.len() as u16;
            self.files.push((name, key));
            key
        };
        self.set(key, bytes);
        self.write_directory();
    }

    /// Writes [`SELECTOR_PORT`].
    pub const fn select(&mut self, key: u16) {
        self.selected = key;
        self.position = 0;
    }

    /// Reads [`DATA_PORT`].
    pub fn read(&mut self) -> u8 {
        let item = self.items.get(&self.selected);
        let Some(&byte) = item.and_then(|item| item.get(self.position)) else {
            return 0;
        };
        self.position += 1;
        byte
    }

    fn write_directory(&mut self) {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (name, key) in &self.files {
            let size = self.items.get(key).map_or(0, |item| item.len());
            let size = u32::try_from(size).unwrap_or(u32::MAX);
            let mut padded = [0; NAME_LENGTH];
            let length = name.len().min(NAME_LENGTH - 1);
            padded[..length].copy_from_slice(&name.as_bytes()[..length]);
            directory.extend_from_slice(&size.to_be_bytes());
            directory.extend_from_slice(&key.to_be_bytes());
            directory.extend_from_slice(&[0; 2]);
            directory.extend_from_slice(&padded);
        }
        self.items
            .insert(key::FILE_DIRECTORY, Cow::Owned(directory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_vcpu::address::Gpa;

    fn read(device: &mut FwCfg, key: u16, length: usize) -> Vec<u8> {
        device.select(key);
        (0..length).map(|_| device.read()).collect()
    }

    #[test]
    fn the_signature_and_numbers() {
        let mut device = FwCfg::default();
        device.set_ram_size(0x1000_0000);
        device.set_cpu_count(1);
        assert_eq!(read(&mut device, 0, 6), b"QEMU\0\0", "zeros follow");
        assert_eq!(read(&mut device, 0, 4), b"QEMU", "selecting starts again");
        assert_eq!(read(&mut device, 1, 4), [1, 0, 0, 0]);
        assert_eq!(read(&mut device, 3, 8), [0, 0, 0, 0x10, 0, 0, 0, 0]);
        assert_eq!(read(&mut device, 5, 2), [1, 0]);
        assert_eq!(read(&mut device, 0x7777, 2), [0, 0]);
    }

    #[test]
    fn the_directory_names_the_memory_map() {
        let mut device = FwCfg::default();
        device.set_memory_map(&[E820Entry {
            address: Gpa::new(0x10_0000),
            size: 0x70_0000,
            kind: 1,
        }]);
        let directory = read(&mut device, key::FILE_DIRECTORY, 68);
        assert_eq!(directory[..12], [0, 0, 0, 1, 0, 0, 0, 20, 0, 0x20, 0, 0]);
        assert_eq!(&directory[12..21], b"etc/e820\0");
        let map = read(&mut device, 0x20, 20);
        assert_eq!(
            map,
            [
                0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x70, 0, 0, 0, 0, 0, 1, 0, 0, 0
            ]
        );
    }

    #[test]
    fn the_kernel_and_its_disk_are_there_with_their_sizes() {
        let mut device = FwCfg::default();
        assert_eq!(read(&mut device, key::KERNEL_SIZE, 4), [0; 4]);
        device.set_kernel(b"kernel");
        device.set_initrd(b"disk");
        assert_eq!(read(&mut device, key::KERNEL_SIZE, 4), [6, 0, 0, 0]);
        assert_eq!(read(&mut device, key::KERNEL_DATA, 7), b"kernel\0");
        assert_eq!(read(&mut device, key::INITRD_SIZE, 4), [4, 0, 0, 0]);
        assert_eq!(read(&mut device, key::INITRD_DATA, 4), b"disk");
    }

    #[test]
    fn the_command_line_ends_with_a_zero() {
        let mut device = FwCfg::default();
        device.set_command_line(b"quiet");
        assert_eq!(read(&mut device, key::COMMAND_LINE_SIZE, 4), [6, 0, 0, 0]);
        assert_eq!(read(&mut device, key::COMMAND_LINE_DATA, 6), b"quiet\0");
    }
}
