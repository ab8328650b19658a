//! The guest's model-specific registers that need no device.
//!
//! Protocol: [`Msrs`] keeps what only software needs. What belongs to the driver (control
//! registers, the SYSCALL group, the time-stamp counter's offset) is returned as an [`MsrEffect`]
//! that the run loop carries out. An access to a register that is not here returns
//! [`MsrAccess::Unknown`], which the guest sees as #GP(0) (SDM vol. 4; APM vol. 2 appendix A).

use umbra_vcpu::address::{Gpa, PAGE_SIZE};
use umbra_vcpu::event::Exception;
use umbra_vcpu::registers::ControlRegisters;

use super::control;
use super::features::{Features, GuestFeatures, Vendor};
use super::mtrr::Mtrrs;
use crate::machine::ProcessorNumber;

/// Register numbers.
pub mod index {
    #![allow(missing_docs, reason = "the manuals' names are the documentation")]
    pub const P5_MC_ADDR: u32 = 0x0;
    pub const P5_MC_TYPE: u32 = 0x1;
    pub const TIME_STAMP_COUNTER: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const BIOS_UPDATE_TRIGGER: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const SYSCALL_MASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const AMD_EVENT_SELECT_0: u32 = 0xc001_0000;
    pub const AMD_COUNTER_3: u32 = 0xc001_0007;
    pub const AMD_SYSCFG: u32 = 0xc001_0010;
    pub const AMD_HWCR: u32 = 0xc001_0015;
    pub const AMD_NB_CFG: u32 = 0xc001_001f;
    pub const AMD_PATCH_LOADER: u32 = 0xc001_0020;
    pub const AMD_INT_PENDING: u32 = 0xc001_0055;
    pub const AMD_MMIO_CONF_BASE: u32 = 0xc001_0058;
    pub const AMD_DE_CFG: u32 = 0xc001_1029;
}

/// Fast strings on; branch trace and precise sampling not available.
const MISC_ENABLE_RESET: u64 = 1 << 12 | 1 << 11 | MISC_ENABLE_FAST_STRINGS;
const MISC_ENABLE_FAST_STRINGS: u64 = 1 << 0;
/// Fast strings, automatic thermal control, SpeedStep, MONITOR, the limit of CPUID's leaves, xTPR
/// messages and NX: kept without effect, as under KVM (SDM vol. 4 table 2-2).
const MISC_ENABLE_WRITABLE: u64 =
    1 << 34 | 1 << 23 | 1 << 22 | 1 << 18 | 1 << 16 | 1 << 3 | MISC_ENABLE_FAST_STRINGS;
/// A machine check is in progress, and what it allows.
const MCG_STATUS_WRITABLE: u64 = 0b111;
/// Register numbers above 255 in PCI configuration addresses; kernels switch it on unasked.
const AMD_NB_CFG_EXTENDED_CF8: u64 = 1 << 46;
/// DRAM attributes of the ranges below 1 MiB and above 4 GiB.
const AMD_SYSCFG_WRITABLE: u64 = 0x7c_0000;
/// The time-stamp counter runs at the nominal frequency.
const AMD_HWCR_TSC_FREQUENCY_SELECT: u64 = 1 << 24;
const AMD_HWCR_STATUS_WRITE_ENABLE: u64 = 1 << 18;
/// Bits that only tune the processor and may be set without effect.
const AMD_HWCR_IGNORED: u64 = 1 << 8 | 1 << 6 | 1 << 3;
/// LFENCE waits for all earlier instructions.
const AMD_DE_CFG_LFENCE_SERIALIZES: u64 = 1 << 1;
/// UC-, UC, WT and WB in the order after reset (SDM vol. 3A 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const INTEL_MICROCODE_REVISION: u64 = 1 << 32;
const AMD_PATCH_LEVEL: u64 = 0x0100_0065;

/// IA32_APIC_BASE (SDM vol. 3A 11.4.4, 11.12.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicBase(u64);

/// The mode of the local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApicMode {
    /// Hidden from software; interrupts come straight from the i8259 pair.
    Disabled,
    /// Registers in the page at [`ApicBase::page`].
    XApic,
    /// Registers as MSRs 0x800 to 0x8ff.
    X2Apic,
}

impl ApicBase {
    /// The page's address after reset, and as the ACPI tables have it.
    pub const RESET_PAGE: Gpa = Gpa::new(0xfee0_0000);
    const BOOTSTRAP: u64 = 1 << 8;
    const X2APIC: u64 = 1 << 10;
    const ENABLE: u64 = 1 << 11;

    /// The register of this processor after reset.
    pub fn new(number: ProcessorNumber) -> Self {
        let bootstrap = match number {
            ProcessorNumber::BOOT => Self::BOOTSTRAP,
            _ => 0,
        };
        Self(Self::RESET_PAGE.as_u64() | Self::ENABLE | bootstrap)
    }

    /// The register's value.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether the local APIC exists for software.
    pub const fn is_enabled(self) -> bool {
        self.0 & Self::ENABLE != 0
    }

    /// The page with the registers in xAPIC mode. Where there is RAM, the guest sees the RAM.
    pub const fn page(self) -> Gpa {
        Gpa::new(self.0 & !0xfff)
    }

    /// The mode.
    pub const fn mode(self) -> ApicMode {
        match (self.0 & Self::ENABLE != 0, self.0 & Self::X2APIC != 0) {
            (false, _) => ApicMode::Disabled,
            (true, false) => ApicMode::XApic,
            (true, true) => ApicMode::X2Apic,
        }
    }

    /// The register with the local APIC disabled.
    pub const fn disabled(self) -> Self {
        Self(self.0 & !(Self::ENABLE | Self::X2APIC))
    }

    fn write(self, value: u64, features: &GuestFeatures) -> Result<Self, Exception> {
        let page = (1 << features.physical_address_bits) - PAGE_SIZE;
        let mut writable = Self::ENABLE | page;
        if features.has(Features::X2APIC) {
            writable |= Self::X2APIC;
        }
        let new = Self(value);
        let fixed_differ = (value ^ self.0) & !writable != 0;
        let x2apic_while_disabled = value & (Self::ENABLE | Self::X2APIC) == Self::X2APIC;
        // SDM vol. 3A figure 11-27: x2APIC mode is entered from xAPIC mode and left for disabled.
        let transition = !matches!(
            (self.mode(), new.mode()),
            (ApicMode::X2Apic, ApicMode::XApic) | (ApicMode::Disabled, ApicMode::X2Apic)
        );
        if fixed_differ || x2apic_while_disabled || !transition {
            return Err(Exception::GENERAL_PROTECTION);
        }
        Ok(new)
    }
}

/// What the run loop knows and the registers depend on.
pub struct MsrContext<'a> {
    /// Reads the guest's control registers.
    pub control: &'a dyn Fn() -> ControlRegisters,
    /// Reads a register that the driver holds, as [`umbra_vcpu::Vcpu::hardware_msr`] does.
    pub hardware: &'a dyn Fn(u32) -> Option<u64>,
    /// The host's time-stamp counter now.
    pub host_counter: u64,
}

/// What the run loop must do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the write has not reached the processor yet"]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// Give the driver these control registers.
    ControlRegisters(ControlRegisters),
    /// Write the register by [`umbra_vcpu::Vcpu::set_hardware_msr`]; if that refuses the value, the
    /// guest gets #GP(0).
    Hardware,
    /// Give the driver this offset of the time-stamp counter.
    TscOffset(i64),
    /// The local APIC has another mode now.
    ApicMode(ApicMode),
}

/// Why an access failed; the guest gets #GP(0) in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrAccess {
    /// There is no such register.
    Unknown,
    /// The register is read-only or the value is not allowed.
    Refused,
}

impl From<Exception> for MsrAccess {
    fn from(_: Exception) -> Self {
        Self::Refused
    }
}

/// The registers that software keeps.
#[derive(Clone, Debug)]
pub struct Msrs {
    features: GuestFeatures,
    apic_base: ApicBase,
    tsc_offset: i64,
    tsc_adjust: u64,
    pat: u64,
    mcg_status: u64,
    misc_enable: u64,
    amd_syscfg: u64,
    amd_nb_cfg: u64,
    amd_hwcr: u64,
    mtrrs: Mtrrs,
}

impl Msrs {
    /// The registers of processor `number` with `features` as firmware leaves them. The guest's
    /// time-stamp counter is the host's plus `tsc_offset`.
    pub fn new(number: ProcessorNumber, features: GuestFeatures, tsc_offset: i64) -> Self {
        Self {
            features,
            apic_base: ApicBase::new(number),
            tsc_offset,
            tsc_adjust: 0,
            pat: PAT_RESET,
            mcg_status: 0,
            misc_enable: MISC_ENABLE_RESET,
            amd_syscfg: 0,
            amd_nb_cfg: 0,
            amd_hwcr: AMD_HWCR_TSC_FREQUENCY_SELECT,
            mtrrs: Mtrrs::default(),
        }
    }

    /// IA32_APIC_BASE.
    pub const fn apic_base(&self) -> ApicBase {
        self.apic_base
    }

    /// What the guest's time-stamp counter adds to the host's.
    pub const fn tsc_offset(&self) -> i64 {
        self.tsc_offset
    }

    /// The features that decide which registers exist.
    pub const fn features(&self) -> &GuestFeatures {
        &self.features
    }

    /// RDMSR.
    ///
    /// # Errors
    /// [`MsrAccess`] if the guest must get #GP(0).
    pub fn read(&self, number: u32, context: &MsrContext<'_>) -> Result<u64, MsrAccess> {
        let intel = self.features.vendor == Vendor::Intel;
        Ok(match number {
            index::P5_MC_ADDR | index::P5_MC_TYPE | index::MCG_CAP | index::DEBUGCTL => 0,
            index::PLATFORM_ID | index::PLATFORM_INFO if intel => 0,
            index::TIME_STAMP_COUNTER => context.host_counter.wrapping_add_signed(self.tsc_offset),
            index::APIC_BASE => self.apic_base.bits(),
            index::TSC_ADJUST if self.features.has(Features::TSC_ADJUST) => self.tsc_adjust,
            index::BIOS_SIGN_ID if intel => INTEL_MICROCODE_REVISION,
            index::BIOS_SIGN_ID => AMD_PATCH_LEVEL,
            index::MCG_STATUS => self.mcg_status,
            // No AMD processor has it, but KVM gives it to every guest.
            index::MISC_ENABLE => self.misc_enable,
            index::PAT => self.pat,
            index::EFER => (context.control)().efer,
            index::AMD_SYSCFG if !intel => self.amd_syscfg,
            index::AMD_HWCR if !intel => self.amd_hwcr,
            index::AMD_NB_CFG if !intel => self.amd_nb_cfg,
            // Every AMD processor has the four counters (APM vol. 2 13.2.1); these never count.
            index::AMD_EVENT_SELECT_0..=index::AMD_COUNTER_3
            | index::AMD_INT_PENDING
            | index::AMD_MMIO_CONF_BASE
                if !intel =>
            {
                0
            }
            index::AMD_DE_CFG if !intel => AMD_DE_CFG_LFENCE_SERIALIZES,
            _ if self.in_hardware(number) => {
                (context.hardware)(number).ok_or(MsrAccess::Unknown)?
            }
            _ => self.mtrrs.read(number).ok_or(MsrAccess::Unknown)?,
        })
    }

    /// WRMSR.
    ///
    /// # Errors
    /// [`MsrAccess`] if the guest must get #GP(0).
    pub fn write(
        &mut self,
        number: u32,
        value: u64,
        context: &MsrContext<'_>,
    ) -> Result<MsrEffect, MsrAccess> {
        let intel = self.features.vendor == Vendor::Intel;
        match number {
            index::P5_MC_ADDR | index::P5_MC_TYPE | index::DEBUGCTL => allow_only(value, 0)?,
            index::TIME_STAMP_COUNTER => {
                let offset = value.wrapping_sub(context.host_counter).cast_signed();
                let moved = offset.wrapping_sub(self.tsc_offset);
                self.tsc_adjust = self.tsc_adjust.wrapping_add_signed(moved);
                self.tsc_offset = offset;
                return Ok(MsrEffect::TscOffset(offset));
            }
            index::APIC_BASE => {
                self.apic_base = self.apic_base.write(value, &self.features)?;
                return Ok(MsrEffect::ApicMode(self.apic_base.mode()));
            }
            index::TSC_ADJUST if self.features.has(Features::TSC_ADJUST) => {
                let moved = value.wrapping_sub(self.tsc_adjust).cast_signed();
                self.tsc_adjust = value;
                self.tsc_offset = self.tsc_offset.wrapping_add(moved);
                return Ok(MsrEffect::TscOffset(self.tsc_offset));
            }
            // The way to ask for the microcode's revision starts with a write; loads are ignored.
            index::BIOS_SIGN_ID | index::BIOS_UPDATE_TRIGGER if intel => {}
            index::AMD_PATCH_LOADER | index::AMD_EVENT_SELECT_0..=index::AMD_COUNTER_3
                if !intel => {}
            index::PLATFORM_ID | index::PLATFORM_INFO if intel => return Err(MsrAccess::Refused),
            index::BIOS_SIGN_ID | index::MCG_CAP => return Err(MsrAccess::Refused),
            index::MCG_STATUS => {
                allow_only(value, MCG_STATUS_WRITABLE)?;
                self.mcg_status = value;
            }
            index::MISC_ENABLE => {
                allow_only(value ^ self.misc_enable, MISC_ENABLE_WRITABLE)?;
                self.misc_enable = value;
            }
            index::PAT => {
                if !value
                    .to_le_bytes()
                    .iter()
                    .all(|entry| matches!(entry, 0 | 1 | 4..=7))
                {
                    return Err(MsrAccess::Refused);
                }
                self.pat = value;
            }
            index::EFER => {
                return Ok(MsrEffect::ControlRegisters(control::write_efer(
                    &(context.control)(),
                    value,
                    &self.features,
                )?));
            }
            index::AMD_SYSCFG if !intel => {
                allow_only(value, AMD_SYSCFG_WRITABLE)?;
                self.amd_syscfg = value;
            }
            index::AMD_HWCR if !intel => {
                let kept = AMD_HWCR_TSC_FREQUENCY_SELECT | AMD_HWCR_STATUS_WRITE_ENABLE;
                allow_only(value, kept | AMD_HWCR_IGNORED)?;
                self.amd_hwcr = value & kept;
            }
            index::AMD_NB_CFG if !intel => {
                allow_only(value, AMD_NB_CFG_EXTENDED_CF8)?;
                self.amd_nb_cfg = value;
            }
            index::AMD_INT_PENDING | index::AMD_MMIO_CONF_BASE if !intel => {
                allow_only(value, 0)?;
            }
            index::AMD_DE_CFG if !intel => {
                if value != AMD_DE_CFG_LFENCE_SERIALIZES {
                    return Err(MsrAccess::Refused);
                }
            }
            _ if self.in_hardware(number) => {
                (context.hardware)(number).ok_or(MsrAccess::Unknown)?;
                return Ok(MsrEffect::Hardware);
            }
            _ => {
                let reserved = self.features.reserved_address_bits();
                let written = self.mtrrs.write(number, value, reserved);
                written.ok_or(MsrAccess::Unknown)??;
            }
        }
        Ok(MsrEffect::None)
    }

    fn in_hardware(&self, number: u32) -> bool {
        match number {
            index::SYSENTER_CS..=index::SYSENTER_EIP => true,
            index::STAR..=index::SYSCALL_MASK | index::FS_BASE..=index::KERNEL_GS_BASE => {
                self.features.has(Features::LONG_MODE)
            }
            index::TSC_AUX => self.features.has(Features::RDTSCP),
            _ => false,
        }
    }
}

const fn allow_only(value: u64, writable: u64) -> Result<(), MsrAccess> {
    if value & !writable == 0 {
        Ok(())
    } else {
        Err(MsrAccess::Refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn features(vendor: Vendor) -> GuestFeatures {
        GuestFeatures {
            features: Features::all(),
            physical_address_bits: 40,
            extended_state: 7,
            vendor,
        }
    }

    #[allow(clippy::unnecessary_wraps, reason = "the driver's signature")]
    fn hardware(number: u32) -> Option<u64> {
        Some(u64::from(number))
    }

    fn context(host_counter: u64) -> MsrContext<'static> {
        MsrContext {
            control: &|| control::RESET,
            hardware: &hardware,
            host_counter,
        }
    }

    fn intel() -> Msrs {
        Msrs::new(ProcessorNumber::BOOT, features(Vendor::Intel), -1000)
    }

    #[test]
    fn time_stamp_counter_and_adjust_move_together() {
        let mut msrs = intel();
        assert_eq!(msrs.read(0x10, &context(5000)), Ok(4000));
        let effect = msrs.write(0x10, 10_000, &context(5000));
        assert_eq!(effect, Ok(MsrEffect::TscOffset(5000)));
        assert_eq!(msrs.read(0x3b, &context(0)), Ok(6000));
        assert_eq!(
            msrs.write(0x3b, 0, &context(0)),
            Ok(MsrEffect::TscOffset(-1000))
        );
        assert_eq!(msrs.read(0x10, &context(5000)), Ok(4000));
    }

    #[test]
    fn apic_base_moves_between_the_modes_as_the_manual_draws_it() {
        let mut msrs = intel();
        let base = 0xfee0_0900;
        assert_eq!(msrs.read(0x1b, &context(0)), Ok(base));
        let mut write = |value| msrs.write(0x1b, value, &context(0));
        assert_eq!(
            write(base | 0x400),
            Ok(MsrEffect::ApicMode(ApicMode::X2Apic))
        );
        assert_eq!(write(base), Err(MsrAccess::Refused), "not back to xAPIC");
        assert_eq!(
            write(0xfee0_0100),
            Ok(MsrEffect::ApicMode(ApicMode::Disabled))
        );
        assert_eq!(
            write(base | 0x400),
            Err(MsrAccess::Refused),
            "not from disabled to x2APIC"
        );
        assert_eq!(
            write(0xfee0_0500),
            Err(MsrAccess::Refused),
            "EXTD without EN"
        );
        assert_eq!(write(base), Ok(MsrEffect::ApicMode(ApicMode::XApic)));
        assert_eq!(write(base | 1 << 40), Err(MsrAccess::Refused));
        assert_eq!(write(base | 1), Err(MsrAccess::Refused), "reserved");
        assert_eq!(write(0xfed0_0900), Ok(MsrEffect::ApicMode(ApicMode::XApic)));
        assert_eq!(msrs.apic_base().page(), Gpa::new(0xfed0_0000));
    }

    #[test]
    fn pat_types_are_checked() {
        let mut msrs = intel();
        assert_eq!(msrs.read(0x277, &context(0)), Ok(0x0007_0406_0007_0406));
        assert_eq!(msrs.write(0x277, 2, &context(0)), Err(MsrAccess::Refused));
        assert_eq!(
            msrs.write(0x277, 8 << 56, &context(0)),
            Err(MsrAccess::Refused)
        );
        assert_eq!(
            msrs.write(0x277, 0x0407_0605_0007_0106, &context(0)),
            Ok(MsrEffect::None)
        );
        assert_eq!(msrs.read(0x277, &context(0)), Ok(0x0407_0605_0007_0106));
    }

    #[test]
    fn efer_goes_through_the_control_rules() {
        let mut msrs = intel();
        let Ok(MsrEffect::ControlRegisters(after)) = msrs.write(0xc000_0080, 0x901, &context(0))
        else {
            panic!("EFER must change the control registers");
        };
        assert_eq!(after.efer, 0x901);
        assert_eq!(
            msrs.write(0xc000_0080, 1 << 12, &context(0)),
            Err(MsrAccess::Refused)
        );
    }

    #[test]
    fn the_driver_holds_the_syscall_group() {
        let mut msrs = intel();
        for number in [
            0x174,
            0x176,
            0xc000_0081,
            0xc000_0084,
            0xc000_0100,
            0xc000_0103,
        ] {
            assert_eq!(msrs.read(number, &context(0)), Ok(u64::from(number)));
            assert_eq!(msrs.write(number, 0, &context(0)), Ok(MsrEffect::Hardware));
        }
        let nothing = |_| None;
        let context = MsrContext {
            hardware: &nothing,
            ..context(0)
        };
        assert_eq!(msrs.read(0x174, &context), Err(MsrAccess::Unknown));
    }

    #[test]
    fn vendors_have_their_own_registers() {
        let mut amd = Msrs::new(ProcessorNumber::BOOT, features(Vendor::Amd), 0);
        for number in [
            0xc001_0000,
            0xc001_0007,
            0xc001_0010,
            0xc001_0015,
            0xc001_001f,
            0xc001_1029,
        ] {
            let value = amd.read(number, &context(0)).expect("an AMD register");
            assert_eq!(amd.write(number, value, &context(0)), Ok(MsrEffect::None));
            assert_eq!(intel().read(number, &context(0)), Err(MsrAccess::Unknown));
        }
    }

    #[test]
    fn miscellaneous_features_keep_what_is_written() {
        let mut msrs = Msrs::new(ProcessorNumber::BOOT, features(Vendor::Amd), 0);
        assert_eq!(msrs.read(0x1a0, &context(0)), Ok(0x1801));
        assert!(msrs.write(0x1a0, 0x4_00c5_1809, &context(0)).is_ok());
        assert_eq!(msrs.read(0x1a0, &context(0)), Ok(0x4_00c5_1809));
        for reserved in [0x1801 | 1 << 1, 0x1801 | 1 << 63, 0x1001, 0x1881] {
            let written = msrs.write(0x1a0, reserved, &context(0));
            assert_eq!(written, Err(MsrAccess::Refused), "{reserved:#x}");
        }
    }

    #[test]
    fn unknown_and_read_only_registers() {
        let mut msrs = intel();
        assert_eq!(msrs.read(0xdead, &context(0)), Err(MsrAccess::Unknown));
        assert_eq!(msrs.write(0xdead, 0, &context(0)), Err(MsrAccess::Unknown));
        assert_eq!(msrs.write(0x179, 0, &context(0)), Err(MsrAccess::Refused));
        assert_eq!(msrs.write(0xfe, 0, &context(0)), Err(MsrAccess::Refused));
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            accesses in proptest::collection::vec((any::<u32>(), 0..0x300_u32, any::<u64>(), any::<u64>()), 1..64)
        ) {
            for vendor in [Vendor::Intel, Vendor::Amd] {
                let mut msrs = Msrs::new(ProcessorNumber::BOOT, features(vendor), i64::MIN);
                for (wide, low, value, counter) in &accesses {
                    for number in [*wide, *low, 0xc000_0080 + low, 0xc001_0000 + low] {
                        let written = msrs.write(number, *value, &context(*counter));
                        let read = msrs.read(number, &context(*counter));
                        let unknown = Err(MsrAccess::Unknown);
                        prop_assert!(read != unknown || written.is_err() || number == 0x79
                            || number == index::AMD_PATCH_LOADER);
                    }
                }
            }
        }
    }
}
