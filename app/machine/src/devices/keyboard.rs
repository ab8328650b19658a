//! The reset line of the absent keyboard controller (ports 0x60 and 0x64).
//!
//! There is no controller: both ports read all ones, which is how drivers notice. But PCs that have
//! none still honour the commands by which system software resets them, and so does this: 0xf0 to
//! 0xff pulse output lines, and 0xd1 writes the output port; in both, bit 0 low is a reset
//! (Intel 8042 as used in the IBM PC AT, Technical Reference 1-43).

use crate::Shutdown;

/// The data port.
pub const DATA_PORT: u16 = 0x60;
/// The status and command port.
pub const COMMAND_PORT: u16 = 0x64;

const WRITE_OUTPUT_PORT: u8 = 0xd1;
const RESET_LINE: u8 = 1 << 0;

/// What remains of the keyboard controller.
#[derive(Clone, Debug, Default)]
pub struct KeyboardReset {
    output_port_follows: bool,
}

impl KeyboardReset {
    /// Handles a write to [`COMMAND_PORT`].
    pub fn command(&mut self, value: u8) -> Option<Shutdown> {
        self.output_port_follows = value == WRITE_OUTPUT_PORT;
        (value >= 0xf0 && value & RESET_LINE == 0).then_some(Shutdown::Reset)
    }

    /// Handles a write to [`DATA_PORT`].
    pub fn data(&mut self, value: u8) -> Option<Shutdown> {
        let output_port = core::mem::take(&mut self.output_port_follows);
        (output_port && value & RESET_LINE == 0).then_some(Shutdown::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_commands_and_nothing_else() {
        let mut keyboard = KeyboardReset::default();
        assert_eq!(keyboard.command(0xfe), Some(Shutdown::Reset));
        assert_eq!(keyboard.command(0xff), None, "pulses no line");
        assert_eq!(keyboard.command(0xaa), None);
        assert_eq!(keyboard.data(0xfe), None, "no command asked for it");
    }

    #[test]
    fn output_port_resets_with_its_low_bit_clear() {
        let mut keyboard = KeyboardReset::default();
        assert_eq!(keyboard.command(0xd1), None);
        assert_eq!(keyboard.data(0xdf), None, "only opens the A20 gate");
        assert_eq!(keyboard.data(0xde), None, "the command is used up");
        assert_eq!(keyboard.command(0xd1), None);
        assert_eq!(keyboard.data(0xde), Some(Shutdown::Reset));
    }
}
