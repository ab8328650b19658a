//! The hardware's control registers, derived from the guest's and from the shadow paging.
//!
//! The hardware always pages with CR0.WP and EFER.NXE set. The guest reads its own values through
//! read shadows; it may change only bits that mean the same to both. Real mode runs as virtual-8086
//! mode: CR0.PE is set, and what acts on privilege level 3 is off.
#![deny(unsafe_code)]

use umbra_vcpu::registers::ControlRegisters;
use umbra_vcpu::{ShadowMode, ShadowPaging};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::model_specific::EferFlags;

use crate::capabilities::FixedBits;

/// The bits of CR0 that the guest changes without an exit.
pub const CR0_GUEST_OWNED: u64 = Cr0Flags::MONITOR_COPROCESSOR.bits()
    | Cr0Flags::EMULATE_COPROCESSOR.bits()
    | Cr0Flags::TASK_SWITCHED.bits()
    | Cr0Flags::ALIGNMENT_MASK.bits();

/// The bits of CR4 that the guest changes without an exit.
pub const CR4_GUEST_OWNED: u64 = Cr4Flags::PROTECTED_MODE_VIRTUAL_INTERRUPTS.bits()
    | Cr4Flags::TIMESTAMP_DISABLE.bits()
    | Cr4Flags::DEBUGGING_EXTENSIONS.bits()
    | Cr4Flags::OSFXSR.bits()
    | Cr4Flags::OSXMMEXCPT_ENABLE.bits();

/// Bits of CR4 that the hardware gets from the guest as they are.
const CR4_PASSED: u64 = CR4_GUEST_OWNED
    | Cr4Flags::VIRTUAL_8086_MODE_EXTENSIONS.bits()
    | Cr4Flags::PAGE_SIZE_EXTENSION.bits()
    | Cr4Flags::PAGE_GLOBAL.bits()
    | Cr4Flags::PERFORMANCE_MONITOR_COUNTER.bits()
    | Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION.bits()
    | Cr4Flags::FSGSBASE.bits()
    | Cr4Flags::OSXSAVE.bits();

/// Bits of CR4 that act on user pages: without guest paging there are none, but the shadow tables
/// then map everything as user pages. Protection keys are not among them: the shadow tables have none.
const CR4_WITH_GUEST_PAGING: u64 = Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits()
    | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION.bits();

/// Bits of CR4 that act on code at privilege level 3, as which real mode runs.
const CR4_OF_USER_CODE: u64 = Cr4Flags::VIRTUAL_8086_MODE_EXTENSIONS.bits()
    | Cr4Flags::PROTECTED_MODE_VIRTUAL_INTERRUPTS.bits()
    | Cr4Flags::TIMESTAMP_DISABLE.bits()
    | Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION.bits();

/// What the VMCS holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardwareControl {
    /// Guest CR0.
    pub cr0: u64,
    /// Guest CR4.
    pub cr4: u64,
    /// Guest IA32_EFER.
    pub efer: u64,
    /// CR0 read shadow.
    pub cr0_shadow: u64,
    /// CR4 read shadow.
    pub cr4_shadow: u64,
}

impl HardwareControl {
    /// Derives the hardware's values. A shadow mode that does not fit the guest's mode stays visible:
    /// the checker refuses it.
    pub fn derive(
        guest: &ControlRegisters,
        paging: ShadowPaging,
        cr0_fixed: FixedBits,
        cr4_fixed: FixedBits,
    ) -> Self {
        const PE: u64 = Cr0Flags::PROTECTED_MODE_ENABLE.bits();
        let real_mode = is_real_mode(guest);
        let mut cr0 = guest.cr0 & CR0_GUEST_OWNED
            | Cr0Flags::EXTENSION_TYPE.bits()
            | (Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT | Cr0Flags::NUMERIC_ERROR).bits()
            | cr0_fixed.ones
            | PE;
        let mut cr4 = guest.cr4 & CR4_PASSED
            | (Cr4Flags::PHYSICAL_ADDRESS_EXTENSION | Cr4Flags::MACHINE_CHECK_EXCEPTION).bits()
            | cr4_fixed.ones;
        if real_mode {
            cr0 &= !Cr0Flags::ALIGNMENT_MASK.bits();
            cr4 &= !CR4_OF_USER_CODE;
        }
        if guest.cr0 & Cr0Flags::PAGING.bits() != 0 {
            cr4 |= guest.cr4 & CR4_WITH_GUEST_PAGING;
        }
        if paging.mode == ShadowMode::FiveLevel {
            cr4 |= Cr4Flags::L5_PAGING.bits();
        }
        let long = EferFlags::LONG_MODE_ENABLE | EferFlags::LONG_MODE_ACTIVE;
        let mut efer = guest.efer & EferFlags::SYSTEM_CALL_EXTENSIONS.bits()
            | EferFlags::NO_EXECUTE_ENABLE.bits();
        if is_long_mode(guest) {
            efer |= long.bits();
        }
        Self {
            cr0,
            cr4,
            efer,
            cr0_shadow: guest.cr0,
            cr4_shadow: guest.cr4,
        }
    }
}

/// Whether the guest is in real mode.
pub const fn is_real_mode(guest: &ControlRegisters) -> bool {
    guest.cr0 & Cr0Flags::PROTECTED_MODE_ENABLE.bits() == 0
}

/// Whether the guest is in long mode (IA-32e mode).
pub fn is_long_mode(guest: &ControlRegisters) -> bool {
    guest.efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_vcpu::address::{Gva, Hpa};

    const CR0_FIXED: FixedBits = FixedBits {
        ones: 0x8000_0021,
        allowed: 0xffff_ffff,
    };
    const CR4_FIXED: FixedBits = FixedBits {
        ones: 0x2000,
        allowed: 0x3f_ffff,
    };

    fn derive(cr0: u64, cr4: u64, efer: u64, mode: ShadowMode) -> HardwareControl {
        let guest = ControlRegisters {
            cr0,
            cr2: Gva::new(0),
            cr3: 0,
            cr4,
            cr8: 0,
            efer,
            xcr0: 1,
        };
        let paging = ShadowPaging {
            root: Hpa::new(0x1000),
            mode,
        };
        HardwareControl::derive(&guest, paging, CR0_FIXED, CR4_FIXED)
    }

    #[test]
    fn a_guest_without_paging_pages_in_hardware() {
        let smep = Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits();
        let hardware = derive(0x6000_0011, smep, 0, ShadowMode::Pae);
        assert_eq!(hardware.cr0, 0x8001_0031, "PG, WP, NE on; CD, NW off");
        assert_eq!(hardware.cr4, 0x2060, "PAE, MCE, VMXE; SMEP does not act");
        assert_eq!(hardware.efer, 0x800);
        assert_eq!(hardware.cr0_shadow, 0x6000_0011);
        assert_eq!(hardware.cr4_shadow, smep);
    }

    #[test]
    fn a_long_mode_guest_keeps_its_protections() {
        let smep_smap_pcide_pke = 1 << 20 | 1 << 21 | 1 << 17 | 1 << 22;
        let hardware = derive(
            0x8000_0011,
            smep_smap_pcide_pke | 0x20,
            0x501,
            ShadowMode::FourLevel,
        );
        assert_eq!(hardware.cr4, 1 << 20 | 1 << 21 | 0x2060, "no PCIDE, no PKE");
        assert_eq!(hardware.efer, 0xd01);
    }

    #[test]
    fn five_levels_follow_the_shadow_not_the_guest() {
        let la57 = Cr4Flags::L5_PAGING.bits();
        let long = 0x500;
        assert_eq!(
            derive(0x8000_0011, la57 | 0x20, long, ShadowMode::FourLevel).cr4 & la57,
            0
        );
        assert_ne!(
            derive(0x8000_0011, 0x20, long, ShadowMode::FiveLevel).cr4 & la57,
            0
        );
    }

    #[test]
    fn real_mode_runs_protected_without_the_limits_of_user_code() {
        let user_only = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 11;
        let hardware = derive(0x4_0010, user_only, 0, ShadowMode::Pae);
        assert_eq!(hardware.cr0, 0x8001_0031, "no AM");
        assert_eq!(hardware.cr4 & user_only, 0);
        assert_eq!(hardware.cr0_shadow, 0x4_0010);
        assert_eq!(hardware.cr4_shadow, user_only);
    }
}
