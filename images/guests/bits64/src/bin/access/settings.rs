//! The settings of the registers that accesses depend on.

use core::fmt;

use umbra_guest::cpu::{self, Feature, cr0, cr4, efer, has, msr};

use crate::entries::KEY;

/// One control bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// 0.
    Off,
    /// 1.
    On,
}

/// CR4.PKE and PKRU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keys {
    /// CR4.PKE is clear.
    Off,
    /// PKRU forbids nothing.
    Free,
    /// PKRU forbids accesses by the pages' key.
    AccessDisabled,
    /// PKRU forbids writes by the pages' key.
    WriteDisabled,
}

/// All of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// CR0.WP.
    pub write_protect: Protection,
    /// EFER.NXE.
    pub no_execute: Protection,
    /// CR4.SMEP.
    pub smep: Protection,
    /// CR4.SMAP.
    pub smap: Protection,
    /// CR4.PKE and PKRU.
    pub keys: Keys,
}

impl Protection {
    const ALL: [Self; 2] = [Self::Off, Self::On];

    const fn on(self) -> bool {
        matches!(self, Self::On)
    }
}

impl Keys {
    const ALL: [Self; 4] = [
        Self::Off,
        Self::Free,
        Self::AccessDisabled,
        Self::WriteDisabled,
    ];

    /// The value of PKRU.
    const fn rights(self) -> u32 {
        match self {
            Self::Off | Self::Free => 0,
            Self::AccessDisabled => 1 << (2 * KEY),
            Self::WriteDisabled => 2 << (2 * KEY),
        }
    }
}

impl Settings {
    /// Nothing but CR0.WP is on.
    pub const BENIGN: Self = Self {
        write_protect: Protection::On,
        no_execute: Protection::Off,
        smep: Protection::Off,
        smap: Protection::Off,
        keys: Keys::Off,
    };

    /// Every one, whether or not this processor has it.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..64).map(|number: usize| Self {
            write_protect: Protection::ALL[number >> 5 & 1],
            no_execute: Protection::ALL[number >> 4 & 1],
            smep: Protection::ALL[number >> 3 & 1],
            smap: Protection::ALL[number >> 2 & 1],
            keys: Keys::ALL[number & 3],
        })
    }

    /// Whether this processor has it.
    pub fn exist(self) -> bool {
        (!self.no_execute.on() || has(Feature::Nx))
            && (!self.smep.on() || has(Feature::Smep))
            && (!self.smap.on() || has(Feature::Smap))
            && (self.keys == Keys::Off || has(Feature::Pku))
    }

    /// Loads the registers.
    pub fn apply(self) {
        let with = |bits: usize, bit: usize, on: bool| if on { bits | bit } else { bits & !bit };
        let old = cpu::read_cr4();
        let mut new = with(old, cr4::SMEP, self.smep.on());
        new = with(new, cr4::SMAP, self.smap.on());
        new = with(new, cr4::PKE, self.keys != Keys::Off);
        if new != old {
            cpu::write_cr4(new);
        }
        if new & cr4::PKE != 0 {
            cpu::wrpkru(0, 0, self.keys.rights());
        }
        let old = cpu::read_cr0();
        let new = with(old, cr0::WP, self.write_protect.on());
        if new != old {
            cpu::write_cr0(new);
        }
        if has(Feature::Nx) {
            let old = cpu::rdmsr(msr::EFER);
            let new = with(old as usize, efer::NXE as usize, self.no_execute.on()) as u64;
            if new != old {
                cpu::wrmsr(msr::EFER, new);
                cpu::reload_root();
            }
        }
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "WP {:?}, NXE {:?}, SMEP {:?}, SMAP {:?}, keys {:?}",
            self.write_protect, self.no_execute, self.smep, self.smap, self.keys
        )
    }
}
