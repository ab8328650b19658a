//! The reset control register of PC chipsets at port 0xcf9 (Intel ICH9 datasheet, 13.7.5).
//!
//! Bit 1 chooses a hard reset, bit 3 a full power cycle; a 0 → 1 change of bit 2 resets.

use crate::Shutdown;

/// The register's port.
pub const PORT: u16 = 0xcf9;

/// What resets when it is written.
pub const HARD_RESET: u8 = HARD | RESET_CPU;

const HARD: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;
const WRITABLE: u8 = 0b1110;

/// The reset control register.
#[derive(Clone, Debug, Default)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// The register's value.
    pub const fn read(&self) -> u8 {
        self.value
    }

    /// Writes the register.
    pub fn write(&mut self, value: u8) -> Option<Shutdown> {
        let rising = value & !self.value & RESET_CPU != 0;
        self.value = value & WRITABLE;
        rising.then_some(Shutdown::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_rising_edge_resets() {
        let mut register = ResetControl::default();
        assert_eq!(register.write(0x02), None);
        assert_eq!(register.read(), 0x02);
        assert_eq!(register.write(HARD_RESET), Some(Shutdown::Reset));
        assert_eq!(register.write(0x06), None);
        assert_eq!(register.write(0x00), None);
        assert_eq!(register.write(0x0e), Some(Shutdown::Reset));
    }
}
