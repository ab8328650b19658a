//! Debug registers that the guest and a debugger share.
//!
//! Protocol: the guest reads and writes its own [`DebugRegisters`], whatever the debugger does. The
//! processor gets [`SharedBreakpoints::hardware`]: the guest's as they are while the debugger has no
//! breakpoint. Otherwise each of the debugger's takes a register, one that the guest does not use where
//! there is such, and every MOV DR must exit. [`SharedBreakpoints::split`] tells from the processor's
//! conditions which are the guest's.

use crate::address::Gva;

/// DR6 after reset (SDM vol. 3A table 10-1, APM vol. 2 table 14-1).
pub const DR6_RESET: u64 = 0xffff_0ff0;
/// DR7 with nothing enabled.
pub const DR7_RESET: u64 = 0x400;
/// The conditions B0 to B3 of DR6: one for each breakpoint.
pub const DR6_HITS: u64 = 0xf;
/// DR6.BD: an access to a debug register while DR7.GD was set.
pub const DR6_BD: u64 = 1 << 13;
/// DR6.BS: a single step.
pub const DR6_BS: u64 = 1 << 14;
/// The bits of DR6 that software sets.
pub const DR6_WRITABLE: u64 = 0xe00f;
/// The bits of DR7 that software sets.
pub const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7.GD: accesses to debug registers raise #DB.
pub const DR7_GD: u64 = 1 << 13;
/// The bits of DR7 that enable breakpoints.
const DR7_ENABLES: u64 = 0xff;

/// DR0 to DR3, and DR7.
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

impl DebugExtensions {
    /// What this CR4 says.
    pub const fn of(cr4: u64) -> Self {
        const CR4_DE: u64 = 1 << 3;
        if cr4 & CR4_DE == 0 {
            Self::Disabled
        } else {
            Self::Enabled
        }
    }
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

    /// Whether a breakpoint is enabled.
    pub const fn is_armed(&self) -> bool {
        self.dr7 & DR7_ENABLES != 0
    }

    /// Whether breakpoint `index` is enabled.
    pub const fn is_enabled(&self, index: usize) -> bool {
        self.dr7 >> (2 * index) & 0b11 != 0
    }

    /// Disables breakpoint `index`.
    pub const fn disable(&mut self, index: usize) {
        self.dr7 &= !(0b11 << (2 * index));
    }

    /// Whether `dr6` says that an instruction breakpoint at `rip` was hit.
    pub fn hits_instruction(&self, dr6: u64, rip: u64) -> bool {
        self.addresses.iter().enumerate().any(|(index, &address)| {
            let kind = (self.dr7 >> (16 + 4 * index)) & 3;
            let is_hit = dr6 & (1 << index) != 0;
            is_hit && kind == 0 && self.is_enabled(index) && address == rip
        })
    }

    /// Sets breakpoint `index` and enables it (SDM vol. 3B 18.2.4, 18.2.5).
    const fn set(&mut self, index: usize, breakpoint: &Breakpoint) {
        const GLOBAL: u64 = 0b10;
        self.addresses[index] = breakpoint.address.as_u64();
        let (kind, length) = match breakpoint.kind {
            BreakpointKind::Execute => (0b00, 0b00),
            BreakpointKind::Write(length) => (0b01, length.encoding()),
            BreakpointKind::Access(length) => (0b11, length.encoding()),
        };
        self.dr7 &= !(0b1111 << (16 + 4 * index) | 0b11 << (2 * index));
        self.dr7 |= (length << 2 | kind) << (16 + 4 * index) | GLOBAL << (2 * index);
    }
}

/// What a debugger wants the processor to stop for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Debugging {
    /// Up to four breakpoints; their places are the bits of [`crate::exit::Exit::Breakpoint`].
    pub breakpoints: [Option<Breakpoint>; 4],
    /// The exceptions that exit besides those that always do.
    pub exceptions: ExitingExceptions,
}

impl Debugging {
    /// Whether it has a breakpoint.
    pub fn has_breakpoints(&self) -> bool {
        self.breakpoints.iter().any(Option::is_some)
    }
}

/// Exceptions that exit for a debugger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExitingExceptions {
    /// None.
    #[default]
    None,
    /// The #BP of INT3, whose exit leaves RIP at the instruction.
    Int3,
    /// All: none is delivered behind the debugger's back.
    All,
    /// All but the #BP and #OF of instructions: one of the guest's own is about to be carried out.
    AllButTraps,
}

impl ExitingExceptions {
    /// A bit for each vector, as both vendors' exception bitmaps have them.
    pub const fn bitmap(self) -> u32 {
        use crate::event::vector;
        const ALL: u32 = !(1 << vector::NMI);
        match self {
            Self::None => 0,
            Self::Int3 => 1 << vector::BREAKPOINT,
            Self::All => ALL,
            Self::AllButTraps => ALL & !(1 << vector::BREAKPOINT | 1 << vector::OVERFLOW),
        }
    }

    /// Whether #BP is among them.
    pub const fn include_int3(self) -> bool {
        matches!(self, Self::Int3 | Self::All)
    }
}

/// A breakpoint of a debugger's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakpoint {
    /// The linear address.
    pub address: Gva,
    /// What stops there.
    pub kind: BreakpointKind,
}

/// What a breakpoint stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakpointKind {
    /// The instruction that begins at the address, before it is carried out.
    Execute,
    /// Writes, after the instruction.
    Write(BreakpointLength),
    /// Reads and writes of data, after the instruction.
    Access(BreakpointLength),
}

/// How many bytes a data breakpoint covers. Its address is a multiple of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum BreakpointLength {
    One,
    Two,
    Four,
    Eight,
}

impl BreakpointLength {
    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// LEN in DR7.
    const fn encoding(self) -> u64 {
        match self {
            Self::One => 0b00,
            Self::Two => 0b01,
            Self::Four => 0b11,
            Self::Eight => 0b10,
        }
    }

    /// The longest length with which a breakpoint can begin at `address` and cover no more than `length`
    /// bytes, of which there is at least one.
    pub const fn longest(address: Gva, length: u64) -> Self {
        let address = address.as_u64();
        if address.is_multiple_of(8) && length >= 8 {
            Self::Eight
        } else if address.is_multiple_of(4) && length >= 4 {
            Self::Four
        } else if address.is_multiple_of(2) && length >= 2 {
            Self::Two
        } else {
            Self::One
        }
    }
}

/// Whose a breakpoint of the processor's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Guest,
    /// The debugger's with this number.
    Debugger(u8),
}

/// The processor's debug registers while a debugger may have some of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedBreakpoints {
    /// What the processor's DR0 to DR3 and DR7 hold.
    pub hardware: DebugRegisters,
    owners: [Owner; 4],
}

/// Whose conditions an exception reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hits {
    /// B0 to B3 as the guest finds them in DR6.
    pub guest: u64,
    /// A bit for each of the debugger's breakpoints.
    pub debugger: u8,
}

impl SharedBreakpoints {
    /// The registers with which both work. Where there are more than four breakpoints, the guest's give
    /// way.
    pub fn new(guest: &DebugRegisters, debugging: &Debugging) -> Self {
        let mut shared = Self {
            hardware: *guest,
            owners: [Owner::Guest; 4],
        };
        if !debugging.has_breakpoints() {
            return shared;
        }
        // Accesses exit, and whoever carries them out sees to DR7.GD.
        shared.hardware.dr7 &= !DR7_GD;
        for (number, breakpoint) in (0..).zip(&debugging.breakpoints) {
            if let Some(breakpoint) = breakpoint {
                let index = shared.next_free(guest);
                shared.owners[index] = Owner::Debugger(number);
                shared.hardware.set(index, breakpoint);
            }
        }
        shared
    }

    /// The last register that the debugger does not have; better one that the guest does not use either.
    fn next_free(&self, guest: &DebugRegisters) -> usize {
        let is_free = |index: &usize| self.owners[*index] == Owner::Guest;
        let unused = (0..4)
            .rev()
            .find(|index| is_free(index) && !guest.is_enabled(*index));
        unused.or((0..4).rev().find(is_free)).unwrap_or_default()
    }

    /// Tells from B0 to B3, as the processor has them, who has hit what.
    pub fn split(&self, conditions: u64) -> Hits {
        let mut hits = Hits {
            guest: 0,
            debugger: 0,
        };
        for (index, owner) in self.owners.iter().enumerate() {
            if conditions >> index & 1 != 0 {
                match owner {
                    Owner::Guest => hits.guest |= 1 << index,
                    Owner::Debugger(number) => hits.debugger |= 1 << number,
                }
            }
        }
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DebugExtensions::{Disabled, Enabled};
    use proptest::prelude::*;

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
    fn the_manuals_encodings() {
        let kinds = [
            (BreakpointKind::Execute, 0b0000),
            (BreakpointKind::Write(BreakpointLength::One), 0b0001),
            (BreakpointKind::Write(BreakpointLength::Two), 0b0101),
            (BreakpointKind::Write(BreakpointLength::Four), 0b1101),
            (BreakpointKind::Access(BreakpointLength::Eight), 0b1011),
        ];
        for (kind, field) in kinds {
            let mut registers = DebugRegisters::RESET;
            let address = Gva::new(0x5000);
            registers.set(2, &Breakpoint { address, kind });
            assert_eq!(registers.addresses, [0, 0, 0x5000, 0]);
            assert_eq!(registers.dr7, DR7_RESET | 0b10 << 4 | field << 24);
        }
    }

    #[test]
    fn the_longest_breakpoint_is_aligned() {
        use BreakpointLength::{Eight, Four, One, Two};
        for (address, length, longest) in [
            (0, 100, Eight),
            (8, 7, Four),
            (4, 8, Four),
            (2, 3, Two),
            (1, 8, One),
            (8, 1, One),
        ] {
            let found = BreakpointLength::longest(Gva::new(address), length);
            assert_eq!(found, longest, "{address} {length}");
        }
    }

    fn any_guest() -> impl Strategy<Value = DebugRegisters> {
        (any::<[u64; 4]>(), any::<u32>()).prop_map(|(addresses, dr7)| DebugRegisters {
            addresses,
            dr7: u64::from(dr7) & DR7_WRITABLE | DR7_RESET,
        })
    }

    fn any_debugging() -> impl Strategy<Value = Debugging> {
        let breakpoint = any::<u64>().prop_map(|address| Breakpoint {
            address: Gva::new(address),
            kind: BreakpointKind::Write(BreakpointLength::One),
        });
        prop::array::uniform4(prop::option::of(breakpoint)).prop_map(|breakpoints| Debugging {
            breakpoints,
            exceptions: ExitingExceptions::None,
        })
    }

    proptest! {
        #[test]
        fn the_guest_has_what_the_debugger_leaves(guest in any_guest()) {
            let shared = SharedBreakpoints::new(&guest, &Debugging::default());
            prop_assert_eq!(shared.hardware, guest);
            prop_assert_eq!(shared.split(0b1010), Hits { guest: 0b1010, debugger: 0 });
        }

        #[test]
        fn both_have_their_breakpoints(guest in any_guest(), debugging in any_debugging()) {
            let shared = SharedBreakpoints::new(&guest, &debugging);
            let used = debugging.breakpoints.iter().flatten().count();
            let guests = (0..4).filter(|&index| guest.is_enabled(index)).count();
            let mut kept = 0;
            let mut seen = 0;
            for index in 0..4 {
                let hits = shared.split(1 << index);
                prop_assert_eq!(hits.guest.count_ones() + hits.debugger.count_ones(), 1);
                if hits.debugger == 0 {
                    prop_assert_eq!(hits.guest, 1 << index, "the guest's keep their places");
                    prop_assert_eq!(shared.hardware.addresses[index], guest.addresses[index]);
                    kept += usize::from(guest.is_enabled(index));
                } else {
                    let number = hits.debugger.trailing_zeros() as usize;
                    let breakpoint = debugging.breakpoints[number].unwrap();
                    prop_assert_eq!(shared.hardware.addresses[index], breakpoint.address.as_u64());
                    prop_assert!(shared.hardware.is_enabled(index));
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, used);
            prop_assert_eq!(kept, guests.min(4 - used), "none gives way without need");
        }
    }
}
