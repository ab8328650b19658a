//! PCI configuration mechanism 1 (ports 0xcf8 and 0xcfc) of a bus without devices (PCI Local Bus
//! Specification 3.0, 3.2.2.3.2).
//!
//! Only double-word accesses reach the address register; the data register reads all ones, as for
//! any slot that is empty.

/// The address register's port.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// The data register's first port.
pub const DATA_PORT: u16 = 0xcfc;
/// The data register's last port.
pub const LAST_DATA_PORT: u16 = 0xcff;

const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

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
}
