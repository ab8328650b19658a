//! A guest's debug registers.
//!
//! Every MOV DR exits and is carried out here. The processor's own DR0 to DR3 are loaded only for
//! entries with a breakpoint enabled; DR6 and DR7 are in the VMCB.

use core::arch::asm;

use umbra_vcpu::address::Gva;

/// DR6 and DR7 after reset (APM vol. 2 table 14-1).
pub const DR6_RESET: u64 = 0xffff_0ff0;
/// DR7 with nothing enabled.
pub const DR7_RESET: u64 = 0x400;

const DR6_BD: u64 = 1 << 13;
/// DR6.BS: a single step.
pub const DR6_BS: u64 = 1 << 14;
/// The bits of DR6 that software sets.
pub const DR6_WRITABLE: u64 = 0xe00f;
/// The bits of DR7 that software sets.
pub const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_GD: u64 = 1 << 13;
const DR7_ENABLES: u64 = 0xff;
/// The longest range that a breakpoint covers, in bytes.
const LONGEST: u64 = 8;

/// The debug registers that the VMCB does not hold, with DR7 as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugRegisters {
    /// DR0 to DR3.
    pub addresses: [u64; 4],
    /// DR7.
    pub dr7: u64,
}

/// What an access to a debug register comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugFault {
    /// #DB, because DR7.GD is set; it is clear now.
    GeneralDetect,
    /// #UD: DR4 or DR5 with CR4.DE.
    InvalidOpcode,
    /// #GP: the upper half of DR6 or DR7.
    GeneralProtection,
}

/// Whether CR4.DE makes DR4 and DR5 invalid instead of names for DR6 and DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugExtensions {
    /// CR4.DE is set.
    Enabled,
    /// CR4.DE is clear.
    Disabled,
}

impl DebugRegisters {
    /// The registers after reset.
    pub const RESET: Self = Self {
        addresses: [0; 4],
        dr7: DR7_RESET,
    };

    /// The common checks of both directions; returns the register's number without aliases.
    fn access(
        &mut self,
        number: u8,
        extensions: DebugExtensions,
        dr6: &mut u64,
    ) -> Result<u8, DebugFault> {
        let number = match (number & 7, extensions) {
            (4 | 5, DebugExtensions::Enabled) => return Err(DebugFault::InvalidOpcode),
            (number @ (4 | 5), DebugExtensions::Disabled) => number + 2,
            (number, _) => number,
        };
        if self.dr7 & DR7_GD != 0 {
            self.dr7 &= !DR7_GD;
            *dr6 |= DR6_BD;
            return Err(DebugFault::GeneralDetect);
        }
        Ok(number)
    }

    /// Reads DR`number`.
    ///
    /// # Errors
    /// [`DebugFault`] if the access faults.
    pub fn read(
        &mut self,
        number: u8,
        extensions: DebugExtensions,
        dr6: &mut u64,
    ) -> Result<u64, DebugFault> {
        Ok(match self.access(number, extensions, dr6)? {
            6 => *dr6,
            7 => self.dr7,
            number => self.addresses[usize::from(number & 3)],
        })
    }

    /// Writes DR`number`.
    ///
    /// # Errors
    /// [`DebugFault`] if the access faults.
    pub fn write(
        &mut self,
        number: u8,
        value: u64,
        extensions: DebugExtensions,
        dr6: &mut u64,
    ) -> Result<(), DebugFault> {
        match self.access(number, extensions, dr6)? {
            6 | 7 if value >> 32 != 0 => return Err(DebugFault::GeneralProtection),
            6 => *dr6 = (value & DR6_WRITABLE) | DR6_RESET,
            7 => self.dr7 = (value & DR7_WRITABLE) | DR7_RESET,
            number => self.addresses[usize::from(number & 3)] = value,
        }
        Ok(())
    }

    /// DR7 for the hardware: without GD, and without breakpoints that would hit the host's code or
    /// stack in `forbidden` between the loading of DR7 and VMRUN.
    pub fn hardware_dr7(&self, forbidden: &[(Gva, Gva)]) -> u64 {
        let mut dr7 = self.dr7 & !DR7_GD;
        for (index, &address) in self.addresses.iter().enumerate() {
            let first = address & !(LONGEST - 1);
            let hits = forbidden.iter().any(|(start, end)| {
                first < end.as_u64() && start.as_u64() < first.saturating_add(LONGEST)
            });
            if hits {
                dr7 &= !(0b11 << (2 * index));
            }
        }
        if dr7 & DR7_ENABLES == 0 {
            DR7_RESET
        } else {
            dr7
        }
    }

    /// Whether a breakpoint is enabled.
    pub const fn is_armed(&self) -> bool {
        self.dr7 & DR7_ENABLES != 0
    }

    /// Whether `dr6` says that an instruction breakpoint at `rip` was hit.
    pub fn hits_instruction(&self, dr6: u64, rip: u64) -> bool {
        self.addresses.iter().zip(0..).any(|(&address, index)| {
            let kind = (self.dr7 >> (16 + 4 * index)) & 3;
            let enables = (self.dr7 >> (2 * index)) & 3;
            dr6 & (1 << index) != 0 && kind == 0 && enables != 0 && address == rip
        })
    }

    /// Loads DR0 to DR3.
    ///
    /// # Safety
    /// Ring 0, with no breakpoint of the host enabled.
    pub unsafe fn load_addresses(&self) {
        let [first, second, third, fourth] = self.addresses;
        // SAFETY: without an enabled breakpoint these registers have no effect.
        unsafe {
            asm!(
                "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                in(reg) first, in(reg) second, in(reg) third, in(reg) fourth,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DebugExtensions::{Disabled, Enabled};

    #[test]
    fn fixed_bits_stay_fixed() {
        let (mut registers, mut dr6) = (DebugRegisters::RESET, DR6_RESET);
        assert_eq!(registers.write(6, 0, Disabled, &mut dr6), Ok(()));
        assert_eq!(dr6, DR6_RESET);
        assert_eq!(registers.write(7, 0xffff_dfff, Disabled, &mut dr6), Ok(()));
        assert_eq!(registers.read(7, Disabled, &mut dr6), Ok(0xffff_07ff));
        assert_eq!(
            registers.write(7, 1 << 32, Disabled, &mut dr6),
            Err(DebugFault::GeneralProtection)
        );
    }

    #[test]
    fn aliases_and_general_detect() {
        let (mut registers, mut dr6) = (DebugRegisters::RESET, DR6_RESET);
        assert_eq!(registers.read(4, Disabled, &mut dr6), Ok(DR6_RESET));
        assert_eq!(
            registers.read(5, Enabled, &mut dr6),
            Err(DebugFault::InvalidOpcode)
        );
        assert_eq!(registers.write(5, DR7_GD, Disabled, &mut dr6), Ok(()));
        assert_eq!(
            registers.read(0, Disabled, &mut dr6),
            Err(DebugFault::GeneralDetect)
        );
        assert_ne!(dr6 & DR6_BD, 0);
        assert_eq!(registers.read(0, Disabled, &mut dr6), Ok(0), "GD is clear");
    }

    #[test]
    fn instruction_breakpoints_are_told_from_others() {
        let mut registers = DebugRegisters::RESET;
        registers.addresses = [0x1000, 0x1000, 0, 0];
        registers.dr7 = DR7_RESET | 0b1111 | 1 << 20;
        assert!(registers.hits_instruction(DR6_RESET | 1, 0x1000));
        assert!(!registers.hits_instruction(DR6_RESET | 1, 0x1001));
        assert!(
            !registers.hits_instruction(DR6_RESET | 2, 0x1000),
            "a write"
        );
        assert!(!registers.hits_instruction(DR6_RESET, 0x1000));
    }

    #[test]
    fn breakpoints_on_the_host_are_left_out() {
        let mut registers = DebugRegisters::RESET;
        registers.addresses = [0x1000, 0x2ffe, 0x4000, 0x5000];
        registers.dr7 = DR7_RESET | DR7_GD | 0b0001_0101;
        let host = [
            (Gva::new(0x3000 - 4), Gva::new(0x3100)),
            (Gva::new(0x5000), Gva::new(0x5001)),
        ];
        assert_eq!(registers.hardware_dr7(&host), DR7_RESET | 0b0001_0001);
        registers.dr7 = DR7_RESET | 0b0100;
        assert_eq!(registers.hardware_dr7(&host), DR7_RESET);
    }
}
