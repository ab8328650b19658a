//! The guest's paging registers, and what they mean: format of the tables, permissions that apply.
//!
//! The hardware always runs with CR0.PG, CR0.WP, CR4.PAE and EFER.NXE set, whatever the guest has
//! set, and without global pages and PCIDs: [`HardwareControls`] says how to get there.

use crate::config::{Feature, GuestFeatures};
use crate::level::Level;
use bitflags::bitflags;
use umbra_vcpu::address::{Gfn, Gpa, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::idt::PageFaultErrorCode;

/// The value of CR3.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Cr3(u64);

impl Cr3 {
    /// CR3 with this value.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The value.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The frame of the root table, wherever the format lets one lie.
    const fn table(self) -> Gfn {
        Gfn::containing(Gpa::new(self.0 & 0x000f_ffff_ffff_f000))
    }

    /// The PAE page-directory-pointer table: 32-byte aligned (SDM vol. 3A 4.4.1).
    pub(crate) const fn pointer_table(self) -> Gpa {
        Gpa::new(self.0 & 0xffff_ffe0)
    }
}

/// The four page-directory-pointer-table entries that a processor keeps in registers under PAE
/// paging (SDM vol. 3A 4.4.1).
#[derive(Clone, Copy, Eq, Debug, Default)]
pub struct Pdptrs(pub [u64; 4]);

impl PartialEq for Pdptrs {
    /// Without a call to compare memory: most roots are compared only to find them equal.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        let differences = self.0.iter().zip(other.0).map(|(own, other)| own ^ other);
        differences.fold(0, |all, difference| all | difference) == 0
    }
}

/// A present PAE page-directory-pointer-table entry has reserved bits set: the instruction that
/// loads it raises #GP(0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidPdpte {
    /// Which of the four.
    pub index: usize,
    /// Its value.
    pub value: u64,
}

/// The protection-key rights register (SDM vol. 3A 4.6.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Pkru(pub u32);

impl Pkru {
    pub(crate) const fn access_disabled(self, key: u8) -> bool {
        self.0 >> (2 * key) & 1 != 0
    }

    pub(crate) const fn write_disabled(self, key: u8) -> bool {
        self.0 >> (2 * key + 1) & 1 != 0
    }
}

/// The registers that decide how a guest's addresses are translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagingRegisters {
    /// CR0 as the guest sees it.
    pub cr0: Cr0Flags,
    /// CR3 as the guest sees it.
    pub cr3: Cr3,
    /// CR4 as the guest sees it.
    pub cr4: Cr4Flags,
    /// `IA32_EFER` as the guest sees it. Long mode is taken from LME and CR0.PG, not from LMA.
    pub efer: EferFlags,
    /// The PAE pointers as of the last load; not read in other modes.
    pub pdptrs: Pdptrs,
}

impl PagingRegisters {
    /// The state after reset: no paging.
    pub const RESET: Self = Self {
        cr0: Cr0Flags::from_bits_retain(0x6000_0010),
        cr3: Cr3(0),
        cr4: Cr4Flags::empty(),
        efer: EferFlags::empty(),
        pdptrs: Pdptrs([0; 4]),
    };

    /// What a change to `other` means for the reading of tables.
    #[inline]
    pub(crate) fn difference(&self, other: &Self) -> Difference {
        let cr0 = Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT;
        let cr4 = Cr4Flags::PAGE_SIZE_EXTENSION
            | Cr4Flags::PHYSICAL_ADDRESS_EXTENSION
            | Cr4Flags::L5_PAGING
            | Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION
            | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION
            | Cr4Flags::PROTECTION_KEY_USER;
        let efer = EferFlags::LONG_MODE_ENABLE | EferFlags::NO_EXECUTE_ENABLE;
        let changed = (self.cr0 ^ other.cr0) & cr0;
        if (self.cr4 ^ other.cr4).intersects(cr4) || (self.efer ^ other.efer).intersects(efer) {
            Difference::Rules
        } else if changed.is_empty() {
            Difference::Tables
        } else if changed == Cr0Flags::WRITE_PROTECT {
            Difference::WriteProtection
        } else {
            Difference::Rules
        }
    }

    /// Whether CR3 points to four pointers that a load of CR3 reads (PAE paging, not long mode).
    pub fn uses_pdptrs(&self) -> bool {
        self.cr0.contains(Cr0Flags::PAGING)
            && self.cr4.contains(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION)
            && !self.efer.contains(EferFlags::LONG_MODE_ENABLE)
    }
}

/// In what two values of the paging registers differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Difference {
    /// In nothing but where the tables are, or in what doesn't matter to paging.
    Tables,
    /// In CR0.WP besides.
    WriteProtection,
    /// In how tables are read.
    Rules,
}

/// What an instruction does to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write, or the write of a read-modify-write.
    Write,
    /// An instruction fetch.
    Execute,
}

/// An access by the emulation of an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    /// RFLAGS, for AC (SMAP).
    pub rflags: RFlags,
    /// Whether it marks the guest's entries accessed and dirty.
    pub marking: Marking,
}

/// Whether a translation sets accessed and dirty bits in the guest's tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Marking {
    /// As the access itself would.
    SetAccessedDirty,
    /// Leave the tables as they are, as a debugger would.
    Leave,
}

/// A page fault that the hardware took in the guest.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The linear address.
    pub gva: Gva,
    /// The hardware's error code. Only what it says of the access is used (write, user, fetch).
    pub error: PageFaultErrorCode,
    /// The guest's privilege level, 0 to 3.
    pub cpl: u8,
    /// The guest's RFLAGS, for AC (SMAP).
    pub rflags: RFlags,
}

/// A page fault for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// The value for CR2.
    pub gva: Gva,
    /// The error code, exact in every bit for the guest's own mode.
    pub error: PageFaultErrorCode,
}

/// Who accesses, as far as permissions depend on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    pub kind: AccessKind,
    pub user: bool,
    /// RFLAGS.AC suspends SMAP: an explicit access of CPL 0 to 2 with AC set.
    pub smap_suspended: bool,
}

impl Attempt {
    pub fn of_access(access: &Access) -> Self {
        Self {
            kind: access.kind,
            user: access.cpl == 3,
            smap_suspended: access.cpl != 3 && access.rflags.contains(RFlags::ALIGNMENT_CHECK),
        }
    }

    /// An access that the hardware calls a supervisor's while CPL is 3 is an implicit one (to the
    /// GDT or TSS, say), for which AC does not count (SDM vol. 3A 4.6.1).
    pub fn of_fault(fault: &Fault) -> Self {
        let kind = if fault.error.contains(PageFaultErrorCode::INSTRUCTION_FETCH) {
            AccessKind::Execute
        } else if fault.error.contains(PageFaultErrorCode::CAUSED_BY_WRITE) {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        Self {
            kind,
            user: fault.error.contains(PageFaultErrorCode::USER_MODE),
            smap_suspended: fault.cpl != 3 && fault.rflags.contains(RFlags::ALIGNMENT_CHECK),
        }
    }
}

/// The kind of table that the hardware walks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShadowMode {
    /// PAE paging with four pointers, outside long mode.
    Pae,
    /// Long mode, 4 levels.
    FourLevel,
    /// Long mode, 5 levels.
    FiveLevel,
}

/// How the guest's registers become the hardware's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HardwareControls {
    /// Set in the hardware's CR0 in any case.
    pub cr0_set: Cr0Flags,
    /// Set in the hardware's CR4 in any case.
    pub cr4_set: Cr4Flags,
    /// Clear in the hardware's CR4 in any case.
    pub cr4_clear: Cr4Flags,
    /// Set in the hardware's EFER in any case.
    pub efer_set: EferFlags,
    /// Clear in the hardware's EFER in any case.
    pub efer_clear: EferFlags,
}

bitflags! {
    /// What a translation permits beyond reading.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub(crate) struct Rights: u8 {
        const WRITE = 1;
        const USER = 2;
        const EXECUTE = 4;
    }
}

/// The format of a guest's tables.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub(crate) enum Format {
    /// No paging: linear addresses are physical.
    Unpaged,
    /// 32-bit paging: two levels of 1024 entries of 4 bytes.
    Legacy,
    /// PAE: four pointers, two levels of 512 entries.
    Pae,
    /// 4-level paging.
    Long4,
    /// 5-level paging.
    Long5,
}

impl Format {
    /// The level of the shadow pages that hang on the root.
    pub const fn root_level(self) -> Level {
        match self {
            Self::Unpaged | Self::Legacy | Self::Pae => Level::Two,
            Self::Long4 => Level::Four,
            Self::Long5 => Level::Five,
        }
    }

    #[inline]
    pub const fn is_long(self) -> bool {
        matches!(self, Self::Long4 | Self::Long5)
    }

    pub const fn shadow_mode(self) -> ShadowMode {
        match self {
            Self::Unpaged | Self::Legacy | Self::Pae => ShadowMode::Pae,
            Self::Long4 => ShadowMode::FourLevel,
            Self::Long5 => ShadowMode::FiveLevel,
        }
    }
}

/// All that translation depends on, derived from the registers once when they change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a bit of a control register"
)]
pub(crate) struct GuestPaging {
    pub format: Format,
    pub write_protect: bool,
    pub no_execute: bool,
    pub page_size_extension: bool,
    pub smep: bool,
    pub smap: bool,
    pub protection_keys: bool,
    pub pkru: Pkru,
    pub table: Gfn,
    pub pdptrs: Pdptrs,
}

impl GuestPaging {
    pub fn new(registers: &PagingRegisters, pkru: Pkru, features: GuestFeatures) -> Self {
        let paging = registers.cr0.contains(Cr0Flags::PAGING);
        let cr4 = |flag| paging && registers.cr4.contains(flag);
        let format = if !paging {
            Format::Unpaged
        } else if registers.efer.contains(EferFlags::LONG_MODE_ENABLE) {
            if cr4(Cr4Flags::L5_PAGING) {
                Format::Long5
            } else {
                Format::Long4
            }
        } else if cr4(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION) {
            Format::Pae
        } else {
            Format::Legacy
        };
        let protection_keys = format.is_long() && cr4(Cr4Flags::PROTECTION_KEY_USER);
        let mut paging = Self {
            format,
            write_protect: registers.cr0.contains(Cr0Flags::WRITE_PROTECT),
            no_execute: matches!(format, Format::Pae | Format::Long4 | Format::Long5)
                && features.flags.contains(Feature::NO_EXECUTE)
                && registers.efer.contains(EferFlags::NO_EXECUTE_ENABLE),
            page_size_extension: format == Format::Legacy && cr4(Cr4Flags::PAGE_SIZE_EXTENSION),
            smep: cr4(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION),
            smap: cr4(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION),
            protection_keys,
            pkru: if protection_keys { pkru } else { Pkru(0) },
            table: Gfn::new(0),
            pdptrs: Pdptrs::default(),
        };
        paging.set_table(registers);
        paging
    }

    /// Follows a change of nothing but CR3 and the pointers.
    pub fn set_table(&mut self, registers: &PagingRegisters) {
        match self.format {
            Format::Unpaged => {}
            Format::Pae => self.pdptrs = registers.pdptrs,
            Format::Legacy => self.table = Gfn::new(registers.cr3.table().as_u64() & 0xf_ffff),
            Format::Long4 | Format::Long5 => self.table = registers.cr3.table(),
        }
    }

    /// Follows a change of CR0.WP.
    pub const fn set_write_protection(&mut self, registers: &PagingRegisters) {
        self.write_protect = registers.cr0.contains(Cr0Flags::WRITE_PROTECT);
    }

    /// The part of an address that translation looks at.
    #[inline]
    pub const fn linear(&self, gva: Gva) -> Gva {
        if self.format.is_long() {
            gva
        } else {
            Gva::new(gva.as_u64() & 0xffff_ffff)
        }
    }

    /// The error code of a fault by `attempt`, with `cause` (present, reserved, key) added.
    pub fn error(&self, attempt: Attempt, cause: PageFaultErrorCode) -> PageFaultErrorCode {
        let mut error = cause;
        error.set(PageFaultErrorCode::USER_MODE, attempt.user);
        error.set(
            PageFaultErrorCode::CAUSED_BY_WRITE,
            attempt.kind == AccessKind::Write,
        );
        // The fetch bit exists only where something can forbid fetches (SDM vol. 3A 4.7).
        error.set(
            PageFaultErrorCode::INSTRUCTION_FETCH,
            attempt.kind == AccessKind::Execute && (self.no_execute || self.smep),
        );
        error
    }

    /// Whether a page with these rights and key forbids `attempt`: the cause for the error code.
    #[inline]
    pub fn forbids(&self, attempt: Attempt, rights: Rights, key: u8) -> Option<PageFaultErrorCode> {
        let user_page = rights.contains(Rights::USER);
        let by_mode = match (attempt.kind, attempt.user) {
            (_, true) if !user_page => true,
            (AccessKind::Execute, true) => !rights.contains(Rights::EXECUTE),
            (AccessKind::Execute, false) => {
                !rights.contains(Rights::EXECUTE) || (self.smep && user_page)
            }
            (AccessKind::Read, true) => false,
            (AccessKind::Write, true) => !rights.contains(Rights::WRITE),
            (kind, false) => {
                (self.smap && user_page && !attempt.smap_suspended)
                    || (kind == AccessKind::Write
                        && self.write_protect
                        && !rights.contains(Rights::WRITE))
            }
        };
        let by_key = self.protection_keys
            && user_page
            && attempt.kind != AccessKind::Execute
            && (self.pkru.access_disabled(key)
                || (attempt.kind == AccessKind::Write
                    && self.pkru.write_disabled(key)
                    && (attempt.user || self.write_protect)));
        if !by_mode && !by_key {
            return None;
        }
        let mut cause = PageFaultErrorCode::PROTECTION_VIOLATION;
        cause.set(PageFaultErrorCode::PROTECTION_KEY, by_key);
        Some(cause)
    }

    pub fn controls(&self) -> HardwareControls {
        let mut cr4_set = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION;
        let mut cr4_clear = Cr4Flags::PAGE_GLOBAL | Cr4Flags::PCID | Cr4Flags::PROTECTION_KEY_USER;
        if self.format == Format::Long5 {
            cr4_set |= Cr4Flags::L5_PAGING;
        } else {
            cr4_clear |= Cr4Flags::L5_PAGING;
        }
        if self.format == Format::Unpaged {
            cr4_clear |= Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION
                | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION;
        }
        let long = EferFlags::LONG_MODE_ENABLE | EferFlags::LONG_MODE_ACTIVE;
        let (efer_set, efer_clear) = if self.format.is_long() {
            (long, EferFlags::empty())
        } else {
            (EferFlags::empty(), long)
        };
        HardwareControls {
            cr0_set: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
            cr4_set,
            cr4_clear,
            efer_set: efer_set | EferFlags::NO_EXECUTE_ENABLE,
            efer_clear,
        }
    }
}
