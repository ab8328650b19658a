//! PCI configuration mechanism 1 (ports 0xcf8 and 0xcfc) of a bus with a host bridge and nothing else
//! (PCI Local Bus Specification 3.0, 3.2.2.3.2 and 6.1).
//!
//! The bridge is there because kernels take a bus without one for broken. All its registers are
//! hardwired. Only double-word accesses reach the address register; where no function answers, the data
//! register reads all ones.

/// The address register's port.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// The data register's first port.
pub const DATA_PORT: u16 = 0xcfc;
/// The data register's last port.
pub const LAST_DATA_PORT: u16 = 0xcff;

const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;
/// Accesses to the data register are configuration cycles.
const ENABLE: u32 = 1 << 31;
/// Bus, device and function in the address register.
const FUNCTION: u32 = 0x00ff_ff00;
/// The register in it, in double words.
const REGISTER: u32 = 0xfc;

/// The bridge's first registers; all others are zero. It has no base addresses and one function.
const HOST_BRIDGE: [u32; 3] = [
    0x1237_8086, // Intel 82441FX, which every kernel knows
    0x0000_0006, // reaches memory, may master the bus
    0x0600_0002, // class: host bridge; revision 2
];

/// The address register.
#[derive(Clone, Debug, Default)]
pub struct PciConfiguration {
    address: u32,
}

impl PciConfiguration {
    /// Reads the address register.
    pub const fn read_address(&self) -> u32 {
        self.address
    }

    /// Writes the address register.
    pub const fn write_address(&mut self, value: u32) {
        self.address = value & ADDRESS_WRITABLE;
    }

    /// Reads the byte of the data register at `port`.
    pub fn read_data(&self, port: u16) -> u8 {
        if self.address & ENABLE == 0 || self.address & FUNCTION != 0 {
            return u8::MAX;
        }
        let register = (self.address & REGISTER) as usize / size_of::<u32>();
        let value = HOST_BRIDGE.get(register).copied().unwrap_or(0);
        value.to_le_bytes()[usize::from(port & 3)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_reads_back_as_probes_expect() {
        let mut pci = PciConfiguration::default();
        pci.write_address(0x8000_0000);
        assert_eq!(pci.read_address(), 0x8000_0000);
        pci.write_address(u32::MAX);
        assert_eq!(pci.read_address(), 0x80ff_fffc);
    }

    /// What a double-word read of the data register gives.
    fn data_at(address: u32) -> u32 {
        let mut pci = PciConfiguration::default();
        pci.write_address(address);
        u32::from_le_bytes([0, 1, 2, 3].map(|byte| pci.read_data(DATA_PORT + byte)))
    }

    #[test]
    fn the_only_function_is_a_host_bridge() {
        assert_eq!(data_at(0x8000_0000), 0x1237_8086);
        assert_eq!(data_at(0x8000_0008) >> 16, 0x0600);
        assert_eq!(
            data_at(0x8000_000c),
            0,
            "one function, no bridge to another bus"
        );
        assert_eq!(data_at(0x8000_0010), 0, "no base address");
        assert_eq!(data_at(0x8000_00fc), 0);
        for empty in [0x8000_0100, 0x8000_0800, 0x8001_0000, 0x80ff_ff00] {
            assert_eq!(data_at(empty), u32::MAX, "{empty:#x}");
        }
        assert_eq!(data_at(0), u32::MAX, "not enabled");
    }
}
