//! Memory type range registers (SDM vol. 3A 12.11), kept in software: they change no guest access,
//! because Umbra gives all guest RAM the write-back type. Guests read back what they wrote.

use umbra_vcpu::event::Exception;

const CAPABILITIES: u32 = 0xfe;
const VARIABLE_FIRST: u32 = 0x200;
const VARIABLE_LAST: u32 = VARIABLE_FIRST + 2 * VARIABLE_COUNT as u32 - 1;
const DEFAULT_TYPE: u32 = 0x2ff;
const FIXED: [u32; FIXED_COUNT] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

const VARIABLE_COUNT: usize = 8;
const FIXED_COUNT: usize = 11;
/// The fixed range of the VGA window, 0xa0000 to 0xbffff.
const VGA_RANGE: usize = 2;

/// Eight variable ranges, the fixed ranges, and write-combining.
const CAPABILITIES_VALUE: u64 = 1 << 10 | 1 << 8 | VARIABLE_COUNT as u64;
const DEFAULT_TYPE_WRITABLE: u64 = 1 << 11 | 1 << 10 | 0xff;
const MASK_VALID: u64 = 1 << 11;
const WRITE_BACK: u8 = 6;

/// The registers, set up as firmware does: all memory write-back but for the VGA window.
#[derive(Clone, Debug)]
pub struct Mtrrs {
    default_type: u64,
    fixed: [u64; FIXED_COUNT],
    /// PHYSBASE and PHYSMASK of each range in turn.
    variable: [u64; 2 * VARIABLE_COUNT],
}

impl Default for Mtrrs {
    fn default() -> Self {
        let mut fixed = [u64::from_le_bytes([WRITE_BACK; 8]); FIXED_COUNT];
        fixed[VGA_RANGE] = 0;
        Self {
            default_type: 1 << 11 | 1 << 10 | u64::from(WRITE_BACK),
            fixed,
            variable: [0; 2 * VARIABLE_COUNT],
        }
    }
}

impl Mtrrs {
    /// The value of register `index`, or `None` if that is no MTRR.
    pub fn read(&self, index: u32) -> Option<u64> {
        match index {
            CAPABILITIES => Some(CAPABILITIES_VALUE),
            DEFAULT_TYPE => Some(self.default_type),
            VARIABLE_FIRST..=VARIABLE_LAST => {
                Some(self.variable[(index - VARIABLE_FIRST) as usize])
            }
            _ => fixed_position(index).map(|position| self.fixed[position]),
        }
    }

    /// Writes register `index`, or returns `None` if that is no MTRR. `reserved_address_bits` are
    /// the bits above the guest's physical addresses.
    pub fn write(
        &mut self,
        index: u32,
        value: u64,
        reserved_address_bits: u64,
    ) -> Option<Result<(), Exception>> {
        let register = match index {
            CAPABILITIES => return Some(Err(Exception::GENERAL_PROTECTION)),
            DEFAULT_TYPE => {
                if value & !DEFAULT_TYPE_WRITABLE != 0 || !is_type(value as u8) {
                    return Some(Err(Exception::GENERAL_PROTECTION));
                }
                &mut self.default_type
            }
            VARIABLE_FIRST..=VARIABLE_LAST => {
                let is_mask = index & 1 != 0;
                let valid = if is_mask {
                    value & (0xfff & !MASK_VALID) == 0
                } else {
                    value & 0xf00 == 0 && is_type(value as u8)
                };
                if !valid || value & reserved_address_bits != 0 {
                    return Some(Err(Exception::GENERAL_PROTECTION));
                }
                &mut self.variable[(index - VARIABLE_FIRST) as usize]
            }
            _ => {
                let position = fixed_position(index)?;
                if !value.to_le_bytes().into_iter().all(is_type) {
                    return Some(Err(Exception::GENERAL_PROTECTION));
                }
                &mut self.fixed[position]
            }
        };
        *register = value;
        Some(Ok(()))
    }
}

fn fixed_position(index: u32) -> Option<usize> {
    FIXED.iter().position(|&fixed| fixed == index)
}

/// Uncacheable, write-combining, write-through, write-protected, write-back.
const fn is_type(memory_type: u8) -> bool {
    matches!(memory_type, 0 | 1 | 4 | 5 | 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESERVED: u64 = !((1 << 40) - 1);

    #[test]
    fn firmware_values() {
        let mtrrs = Mtrrs::default();
        assert_eq!(mtrrs.read(0xfe), Some(0x508));
        assert_eq!(mtrrs.read(0x2ff), Some(0xc06));
        assert_eq!(mtrrs.read(0x250), Some(0x0606_0606_0606_0606));
        assert_eq!(mtrrs.read(0x259), Some(0));
        for index in [0xff, 0x1ff, 0x210, 0x251, 0x260, 0x270, 0x300] {
            assert_eq!(mtrrs.read(index), None, "{index:#x}");
        }
    }

    #[test]
    fn values_are_checked_and_read_back() {
        let mut mtrrs = Mtrrs::default();
        let refused = Some(Err(Exception::GENERAL_PROTECTION));
        assert_eq!(mtrrs.write(0xfe, 0, RESERVED), refused);
        for (index, bad, good) in [
            (0x2ff, 2, 0x800),
            (0x2ff, 1 << 12, 0xc06),
            (0x200, 0x1002, 0xe000_0000),
            (0x200, 1 << 40, 0xff_ffff_f006),
            (0x200, 0x106, 1),
            (0x20f, 1, 0xff_c000_0800),
            (0x26f, 0x0300_0000_0000_0000, 0x0506_0104_0000_0606),
        ] {
            assert_eq!(
                mtrrs.write(index, bad, RESERVED),
                refused,
                "{index:#x} = {bad:#x}"
            );
            assert_eq!(mtrrs.write(index, good, RESERVED), Some(Ok(())));
            assert_eq!(mtrrs.read(index), Some(good));
        }
    }
}
