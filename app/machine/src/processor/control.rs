//! The architecture's rules for guest writes to control registers, EFER and XCR0.
//!
//! Each function takes the guest's registers as they are and the value that the guest writes, and
//! returns the registers as they will be, or the exception that the instruction raises instead. The
//! caller has made sure of privilege level 0. The page-directory-pointer entries that PAE paging
//! loads with CR0, CR3 or CR4 ([`loads_pdptes`]) are in memory, so their check is the MMU's.

use umbra_vcpu::event::Exception;
use umbra_vcpu::registers::{ControlRegisters, Segment, SegmentAttributes};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::model_specific::EferFlags;
use x86_64::registers::xcontrol::XCr0Flags;

use super::cpuid::AVX512_STATE;
use super::features::{Features, GuestFeatures};

const GENERAL_PROTECTION: Exception = Exception::GENERAL_PROTECTION;

/// In MOV to CR3 with CR4.PCIDE set: keep the translations of the new PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;
const CR3_PCID: u64 = 0xfff;

/// The control registers after reset or INIT (SDM vol. 3A table 10-1).
pub const RESET: ControlRegisters = ControlRegisters {
    cr0: 0x6000_0010,
    cr2: umbra_vcpu::address::Gva::new(0),
    cr3: 0,
    cr4: 0,
    cr8: 0,
    efer: 0,
    xcr0: XCr0Flags::X87.bits(),
};

/// Whether the processor is in IA-32e mode.
pub const fn long_mode_active(control: &ControlRegisters) -> bool {
    control.efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0
}

/// Whether paging is on and has three levels, so that the processor holds four
/// page-directory-pointer entries.
pub const fn pae_paging(control: &ControlRegisters) -> bool {
    control.cr0 & Cr0Flags::PAGING.bits() != 0
        && control.cr4 & Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits() != 0
        && !long_mode_active(control)
}

/// Whether the change from `before` to `after` by MOV to CR0 or CR4 loads the
/// page-directory-pointer entries anew (SDM vol. 3A 4.4.1). MOV to CR3 always does.
pub const fn loads_pdptes(before: &ControlRegisters, after: &ControlRegisters) -> bool {
    let cr0 = Cr0Flags::PAGING.bits()
        | Cr0Flags::CACHE_DISABLE.bits()
        | Cr0Flags::NOT_WRITE_THROUGH.bits();
    let cr4 = Cr4Flags::PAGE_GLOBAL.bits()
        | Cr4Flags::PAGE_SIZE_EXTENSION.bits()
        | Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits()
        | Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits();
    pae_paging(after)
        && ((before.cr0 ^ after.cr0) & cr0 != 0 || (before.cr4 ^ after.cr4) & cr4 != 0)
}

/// MOV to CR0 (SDM vol. 3A 2.5 and 4.1.2); `code_segment` gives CS, whose L bit matters when paging
/// starts or ends in a guest with long mode.
///
/// # Errors
/// #GP(0) for a value that the architecture refuses.
pub fn write_cr0(
    current: &ControlRegisters,
    value: u64,
    code_segment: impl Fn() -> Segment,
) -> Result<ControlRegisters, Exception> {
    if value >> 32 != 0 {
        return Err(GENERAL_PROTECTION);
    }
    // Reserved bits of the low half are ignored; ET is fixed to 1.
    let new = Cr0Flags::from_bits_truncate(value) | Cr0Flags::EXTENSION_TYPE;
    let old = Cr0Flags::from_bits_truncate(current.cr0);
    let code_64 = || code_segment().attributes.contains(SegmentAttributes::LONG);
    let invalid = new.contains(Cr0Flags::PAGING) && !new.contains(Cr0Flags::PROTECTED_MODE_ENABLE)
        || new.contains(Cr0Flags::NOT_WRITE_THROUGH) && !new.contains(Cr0Flags::CACHE_DISABLE);
    if invalid {
        return Err(GENERAL_PROTECTION);
    }
    let mut efer = EferFlags::from_bits_retain(current.efer);
    let cr4 = Cr4Flags::from_bits_retain(current.cr4);
    let starts = !old.contains(Cr0Flags::PAGING) && new.contains(Cr0Flags::PAGING);
    let ends = old.contains(Cr0Flags::PAGING) && !new.contains(Cr0Flags::PAGING);
    if starts && efer.contains(EferFlags::LONG_MODE_ENABLE) {
        if !cr4.contains(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION) || code_64() {
            return Err(GENERAL_PROTECTION);
        }
        efer |= EferFlags::LONG_MODE_ACTIVE;
    }
    if ends {
        let in_64_bit_mode = efer.contains(EferFlags::LONG_MODE_ACTIVE) && code_64();
        if in_64_bit_mode || cr4.contains(Cr4Flags::PCID) {
            return Err(GENERAL_PROTECTION);
        }
        efer -= EferFlags::LONG_MODE_ACTIVE;
    }
    Ok(ControlRegisters {
        cr0: new.bits(),
        efer: efer.bits(),
        ..*current
    })
}

/// What a write of CR3 does to cached translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cr3Translations {
    /// Those of the new PCID are dropped, except global ones.
    Dropped,
    /// Those of the new PCID may be used again.
    Kept,
}

/// MOV to CR3 (SDM vol. 3A 2.5 and 4.10.4.1).
///
/// # Errors
/// #GP(0) for a value that the architecture refuses.
pub fn write_cr3(
    current: &ControlRegisters,
    value: u64,
    features: &GuestFeatures,
) -> Result<(ControlRegisters, Cr3Translations), Exception> {
    let with_pcid = current.cr4 & Cr4Flags::PCID.bits() != 0;
    let (value, translations) = if with_pcid && value & CR3_NO_FLUSH != 0 {
        (value & !CR3_NO_FLUSH, Cr3Translations::Kept)
    } else {
        (value, Cr3Translations::Dropped)
    };
    let reserved = if long_mode_active(current) {
        features.reserved_address_bits()
    } else {
        !0xffff_ffff
    };
    if value & reserved != 0 {
        return Err(GENERAL_PROTECTION);
    }
    let registers = ControlRegisters {
        cr3: value,
        ..*current
    };
    Ok((registers, translations))
}

/// The feature that each bit of CR4 needs.
const CR4_NEEDS: [(Cr4Flags, Features); 19] = [
    (Cr4Flags::VIRTUAL_8086_MODE_EXTENSIONS, Features::VME),
    (Cr4Flags::PROTECTED_MODE_VIRTUAL_INTERRUPTS, Features::VME),
    (Cr4Flags::TIMESTAMP_DISABLE, Features::TSC),
    (Cr4Flags::DEBUGGING_EXTENSIONS, Features::DE),
    (Cr4Flags::PAGE_SIZE_EXTENSION, Features::PSE),
    (Cr4Flags::PHYSICAL_ADDRESS_EXTENSION, Features::PAE),
    (Cr4Flags::MACHINE_CHECK_EXCEPTION, Features::MCE),
    (Cr4Flags::PAGE_GLOBAL, Features::PGE),
    (Cr4Flags::OSFXSR, Features::FXSR),
    (Cr4Flags::OSXMMEXCPT_ENABLE, Features::SSE),
    (Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION, Features::UMIP),
    (Cr4Flags::L5_PAGING, Features::LA57),
    (Cr4Flags::FSGSBASE, Features::FSGSBASE),
    (Cr4Flags::PCID, Features::PCID),
    (Cr4Flags::OSXSAVE, Features::XSAVE),
    (
        Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION,
        Features::SMEP,
    ),
    (Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION, Features::SMAP),
    (Cr4Flags::PROTECTION_KEY_USER, Features::PKU),
    (Cr4Flags::PERFORMANCE_MONITOR_COUNTER, Features::empty()),
];

/// The feature that the bit of CR4 with this number needs; `None` for a reserved one.
static CR4_BITS: [Option<Features>; 64] = {
    let mut bits = [None; 64];
    let mut place = 0;
    while place < CR4_NEEDS.len() {
        let (flag, feature) = CR4_NEEDS[place];
        bits[flag.bits().trailing_zeros() as usize] = Some(feature);
        place += 1;
    }
    bits
};

/// Whether the guest may set these bits of CR4.
fn may_set_cr4(mut bits: u64, features: &GuestFeatures) -> bool {
    while bits != 0 {
        let allowed = CR4_BITS[bits.trailing_zeros() as usize];
        if !allowed.is_some_and(|feature| features.has(feature)) {
            return false;
        }
        bits &= bits - 1;
    }
    true
}

/// MOV to CR4 (SDM vol. 3A 2.5 and 4.1.2).
///
/// # Errors
/// #GP(0) for a value that the architecture refuses.
pub fn write_cr4(
    current: &ControlRegisters,
    value: u64,
    features: &GuestFeatures,
) -> Result<ControlRegisters, Exception> {
    // What is set already was allowed.
    if !may_set_cr4(value & !current.cr4, features) {
        return Err(GENERAL_PROTECTION);
    }
    let new = Cr4Flags::from_bits_retain(value);
    let changed = Cr4Flags::from_bits_retain(value ^ current.cr4);
    let long_mode = long_mode_active(current);
    if long_mode
        && (!new.contains(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION)
            || changed.contains(Cr4Flags::L5_PAGING))
    {
        return Err(GENERAL_PROTECTION);
    }
    let pcid_starts = changed.contains(Cr4Flags::PCID) && new.contains(Cr4Flags::PCID);
    if pcid_starts && (!long_mode || current.cr3 & CR3_PCID != 0) {
        return Err(GENERAL_PROTECTION);
    }
    Ok(ControlRegisters {
        cr4: value,
        ..*current
    })
}

/// MOV to CR8 (SDM vol. 3A 11.8.6).
///
/// # Errors
/// #GP(0) if a bit above the fourth is set.
pub fn write_cr8(current: &ControlRegisters, value: u64) -> Result<ControlRegisters, Exception> {
    if value > 0xf {
        return Err(GENERAL_PROTECTION);
    }
    Ok(ControlRegisters {
        cr8: value,
        ..*current
    })
}

/// WRMSR to IA32_EFER (SDM vol. 3A 2.2.1; APM vol. 2 3.1.7). LMA is read-only: what is written to it
/// is ignored.
///
/// # Errors
/// #GP(0) for reserved bits, and for a change of LME while paging is on.
pub fn write_efer(
    current: &ControlRegisters,
    value: u64,
    features: &GuestFeatures,
) -> Result<ControlRegisters, Exception> {
    let mut writable = EferFlags::LONG_MODE_ACTIVE;
    for (flag, feature) in [
        (EferFlags::SYSTEM_CALL_EXTENSIONS, Features::SYSCALL),
        (EferFlags::LONG_MODE_ENABLE, Features::LONG_MODE),
        (EferFlags::NO_EXECUTE_ENABLE, Features::NX),
    ] {
        writable.set(flag, features.has(feature));
    }
    let paging = current.cr0 & Cr0Flags::PAGING.bits() != 0;
    let changes_mode = (value ^ current.efer) & EferFlags::LONG_MODE_ENABLE.bits() != 0;
    if value & !writable.bits() != 0 || paging && changes_mode {
        return Err(GENERAL_PROTECTION);
    }
    let active = EferFlags::LONG_MODE_ACTIVE.bits();
    Ok(ControlRegisters {
        efer: value & !active | current.efer & active,
        ..*current
    })
}

/// XSETBV with `index` in ECX (SDM vol. 1 13.3, vol. 2D XSETBV).
///
/// # Errors
/// #UD while CR4.OSXSAVE is clear; #GP(0) for another register than XCR0 and for combinations that
/// the processor has not.
pub fn write_xcr(
    current: &ControlRegisters,
    index: u32,
    value: u64,
    features: &GuestFeatures,
) -> Result<ControlRegisters, Exception> {
    if current.cr4 & Cr4Flags::OSXSAVE.bits() == 0 {
        return Err(Exception::INVALID_OPCODE);
    }
    let has = |components: u64| value & components == components;
    let valid = index == 0
        && value & !features.extended_state == 0
        && has(XCr0Flags::X87.bits())
        && (value & XCr0Flags::AVX.bits() == 0 || has(XCr0Flags::SSE.bits()))
        && (value & AVX512_STATE == 0 || has(AVX512_STATE | XCr0Flags::AVX.bits()));
    if !valid {
        return Err(GENERAL_PROTECTION);
    }
    Ok(ControlRegisters {
        xcr0: value,
        ..*current
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::features::Vendor;
    use proptest::prelude::*;

    const FEATURES: GuestFeatures = GuestFeatures {
        features: Features::all(),
        physical_address_bits: 40,
        extended_state: 0xe7,
        vendor: Vendor::Intel,
    };
    const PE: u64 = 1;
    const NW: u64 = 1 << 29;
    const CD: u64 = 1 << 30;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LA57: u64 = 1 << 12;
    const PCIDE: u64 = 1 << 17;
    const OSXSAVE: u64 = 1 << 18;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    const GP: Exception = Exception::GENERAL_PROTECTION;

    fn long_mode() -> ControlRegisters {
        ControlRegisters {
            cr0: PG | PE | 0x10,
            cr4: PAE,
            efer: LME | LMA,
            ..RESET
        }
    }

    fn code_32() -> Segment {
        Segment::flat_code32(8)
    }

    fn code_64() -> Segment {
        Segment::flat_code64(8)
    }

    #[test]
    fn cr0_combinations() {
        assert_eq!(write_cr0(&RESET, PG, code_32), Err(GP));
        assert_eq!(write_cr0(&RESET, PE | NW, code_32), Err(GP));
        assert!(write_cr0(&RESET, PE | NW | CD, code_32).is_ok());
        assert_eq!(write_cr0(&RESET, PE | 1 << 32, code_32), Err(GP));
        let ignored = write_cr0(&RESET, PE | 0xffc0, code_32).expect("reserved bits are ignored");
        assert_eq!(ignored.cr0, PE | 0x10, "and ET stays set");
    }

    #[test]
    fn paging_with_lme_enters_long_mode() {
        let before = ControlRegisters {
            cr4: PAE,
            efer: LME,
            ..RESET
        };
        let after = write_cr0(&before, PG | PE, code_32).expect("allowed");
        assert_eq!(after.efer, LME | LMA);
        assert_eq!(write_cr0(&before, PG | PE, code_64), Err(GP), "CS.L");
        let without_pae = ControlRegisters { cr4: 0, ..before };
        assert_eq!(write_cr0(&without_pae, PG | PE, code_32), Err(GP));
        let legacy = ControlRegisters { efer: 0, ..before };
        let after = write_cr0(&legacy, PG | PE, code_32).expect("allowed");
        assert_eq!(after.efer, 0);
        assert!(pae_paging(&after));
        assert!(loads_pdptes(&legacy, &after));
    }

    #[test]
    fn paging_ends_in_compatibility_mode_only() {
        assert_eq!(write_cr0(&long_mode(), PE, code_64), Err(GP));
        let after = write_cr0(&long_mode(), PE, code_32).expect("allowed");
        assert_eq!(after.efer, LME);
        let with_pcid = ControlRegisters {
            cr4: PAE | PCIDE,
            ..long_mode()
        };
        assert_eq!(write_cr0(&with_pcid, PE, code_32), Err(GP));
    }

    #[test]
    fn cr3_reserved_bits_depend_on_the_mode() {
        assert!(write_cr3(&long_mode(), 0xff_ffff_ffff, &FEATURES).is_ok());
        assert_eq!(write_cr3(&long_mode(), 1 << 40, &FEATURES), Err(GP));
        assert_eq!(
            write_cr3(&long_mode(), CR3_NO_FLUSH, &FEATURES),
            Err(GP),
            "no PCIDE"
        );
        let with_pcid = ControlRegisters {
            cr4: PAE | PCIDE,
            ..long_mode()
        };
        let (after, translations) =
            write_cr3(&with_pcid, CR3_NO_FLUSH | 0x1005, &FEATURES).expect("allowed");
        assert_eq!((after.cr3, translations), (0x1005, Cr3Translations::Kept));
        assert_eq!(write_cr3(&RESET, 1 << 32, &FEATURES), Err(GP));
    }

    #[test]
    fn cr4_needs_features() {
        let none = GuestFeatures {
            features: Features::empty(),
            ..FEATURES
        };
        for bit in 0..64 {
            let allowed = write_cr4(&RESET, 1 << bit, &none).is_ok();
            assert_eq!(allowed, bit == 8, "bit {bit}");
        }
        for bit in [13, 14, 15, 19, 23, 24, 25, 31, 32, 63] {
            assert_eq!(write_cr4(&RESET, 1 << bit, &FEATURES), Err(GP), "bit {bit}");
        }
    }

    #[test]
    fn cr4_in_long_mode() {
        assert_eq!(
            write_cr4(&long_mode(), 0, &FEATURES),
            Err(GP),
            "PAE must stay"
        );
        assert_eq!(write_cr4(&long_mode(), PAE | LA57, &FEATURES), Err(GP));
        assert!(write_cr4(&RESET, PAE | LA57, &FEATURES).is_ok());
        assert!(write_cr4(&long_mode(), PAE | PCIDE, &FEATURES).is_ok());
        assert_eq!(write_cr4(&RESET, PAE | PCIDE, &FEATURES), Err(GP));
        let with_pcid_bits = ControlRegisters {
            cr3: 0x1001,
            ..long_mode()
        };
        assert_eq!(write_cr4(&with_pcid_bits, PAE | PCIDE, &FEATURES), Err(GP));
    }

    #[test]
    fn cr8_is_a_nibble() {
        assert_eq!(write_cr8(&RESET, 15).map(|control| control.cr8), Ok(15));
        assert_eq!(write_cr8(&RESET, 16), Err(GP));
    }

    #[test]
    fn efer_rules() {
        assert_eq!(
            write_efer(&long_mode(), 0, &FEATURES),
            Err(GP),
            "LME while paging"
        );
        let after = write_efer(&long_mode(), LME | 1, &FEATURES).expect("allowed");
        assert_eq!(after.efer, LME | LMA | 1, "LMA is read-only");
        assert_eq!(
            write_efer(&RESET, LMA, &FEATURES).map(|control| control.efer),
            Ok(0)
        );
        for bit in [1, 2, 9, 12, 13, 14, 15, 63] {
            assert_eq!(
                write_efer(&RESET, 1 << bit, &FEATURES),
                Err(GP),
                "bit {bit}"
            );
        }
        let none = GuestFeatures {
            features: Features::empty(),
            ..FEATURES
        };
        for bit in [0, 8, 11] {
            assert_eq!(write_efer(&RESET, 1 << bit, &none), Err(GP), "bit {bit}");
        }
    }

    #[test]
    fn xcr0_rules() {
        let enabled = ControlRegisters {
            cr4: OSXSAVE,
            ..RESET
        };
        assert_eq!(
            write_xcr(&RESET, 0, 1, &FEATURES),
            Err(Exception::INVALID_OPCODE)
        );
        for value in [1, 3, 7, 0xe7] {
            let after = write_xcr(&enabled, 0, value, &FEATURES).expect("allowed");
            assert_eq!(after.xcr0, value);
        }
        for value in [0, 2, 5, 0x27, 0xe3, 0x9, 0x200 | 3, 1 << 63 | 1] {
            assert_eq!(
                write_xcr(&enabled, 0, value, &FEATURES),
                Err(GP),
                "{value:#x}"
            );
        }
        assert_eq!(write_xcr(&enabled, 1, 1, &FEATURES), Err(GP));
    }

    proptest! {
        /// Whatever is written in whatever order, the registers stay in a state that VM entry accepts.
        #[test]
        fn no_sequence_reaches_a_forbidden_state(
            writes in proptest::collection::vec((0..4_u8, any::<bool>(), any::<u64>(), any::<u64>()), 0..64)
        ) {
            let mut control = RESET;
            for (register, code, value, mask) in writes {
                let value = value & mask & 0x8000_0000_f007_0fff;
                let segment = if code { code_64() } else { code_32() };
                let next = match register {
                    0 => write_cr0(&control, value, || segment),
                    1 => write_cr4(&control, value, &FEATURES),
                    2 => write_efer(&control, value, &FEATURES),
                    _ => write_cr3(&control, value, &FEATURES).map(|(control, _)| control),
                };
                control = next.unwrap_or(control);
                let paging = control.cr0 & PG != 0;
                prop_assert!(!paging || control.cr0 & PE != 0);
                prop_assert!(control.cr0 & NW == 0 || control.cr0 & CD != 0);
                prop_assert_eq!(long_mode_active(&control), paging && control.efer & LME != 0);
                prop_assert!(!long_mode_active(&control) || control.cr4 & PAE != 0);
                prop_assert!(control.cr4 & PCIDE == 0 || long_mode_active(&control));
            }
        }
    }
}
