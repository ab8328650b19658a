//! What this processor's virtualization extension can do (APM vol. 2 15.4 and vol. 3 appendix E).

use core::arch::x86_64::{__cpuid, __cpuid_count};

use bitflags::bitflags;
use umbra_vcpu::Unsupported;
use x86_64::registers::model_specific::Msr;

use crate::permission::msr;
use crate::vmcb::{Intercepts4, Intercepts5, TlbControl};

bitflags! {
    /// Features of CPUID Fn8000_000A_EDX that the driver uses when they exist.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u32 {
        /// SVM can be locked off in VM_CR.
        const SVM_LOCK = 1 << 2;
        /// An exit gives the address of the next instruction.
        const NRIP_SAVE = 1 << 3;
        /// VMRUN can flush one address-space identifier.
        const FLUSH_BY_ASID = 1 << 6;
        /// An exit gives operands of MOV CR and INVLPG.
        const DECODE_ASSISTS = 1 << 7;
    }
}

bitflags! {
    /// Instructions that exist on this processor and that need an intercept of their own.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Instructions: u32 {
        /// XSETBV and XSAVE.
        const XSAVE = 1 << 0;
        /// RDTSCP, hence TSC_AUX.
        const RDTSCP = 1 << 1;
        /// INVPCID.
        const INVPCID = 1 << 2;
        /// RDPRU.
        const RDPRU = 1 << 3;
        /// INVLPGB and TLBSYNC.
        const INVLPGB = 1 << 4;
        /// MCOMMIT.
        const MCOMMIT = 1 << 5;
    }
}

/// What the processor offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Optional features of the extension.
    pub features: Features,
    /// Instructions that exist.
    pub instructions: Instructions,
    /// How many address-space identifiers there are, the host's 0 among them.
    pub asid_count: u32,
    /// The width of physical addresses in bits.
    pub physical_address_bits: u8,
    /// EFER bits that the processor has, besides those of long mode.
    pub efer_bits: u64,
    /// CR4 bits that the processor has.
    pub cr4_bits: u64,
}

/// Bits of EFER.
pub mod efer {
    #![allow(missing_docs, reason = "the manual's names")]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const SVME: u64 = 1 << 12;
    pub const FFXSR: u64 = 1 << 14;
}

/// CR4 bits 10:0 came before SVM did.
const CR4_ALWAYS: u64 = 0x7ff;

const VM_CR_SVMDIS: u64 = 1 << 4;

impl Capabilities {
    /// Asks the processor. Runs in ring 0 (it reads VM_CR).
    ///
    /// # Errors
    /// [`Unsupported`] if guests cannot be run here, with the reason.
    pub fn discover() -> Result<Self, Unsupported> {
        let unsupported = |reason| Err(Unsupported { reason });
        if __cpuid(0x8000_0000).eax < 0x8000_000a || __cpuid(0x8000_0001).ecx & (1 << 2) == 0 {
            return unsupported(
                "CPUID offers no SVM (Fn8000_0001_ECX[SVM]); enable it in the host",
            );
        }
        let svm = __cpuid(0x8000_000a);
        let features = Features::from_bits_truncate(svm.edx);
        // SAFETY: VM_CR exists where SVM does, and reading it changes nothing.
        if unsafe { Msr::new(msr::VM_CR).read() } & VM_CR_SVMDIS != 0 {
            return unsupported("SVM is disabled in VM_CR; enable it in the firmware's set-up");
        }
        let extended = __cpuid(0x8000_0001);
        if extended.edx & (1 << 20) == 0 || extended.edx & (1 << 29) == 0 {
            return unsupported("the processor lacks long mode or no-execute pages");
        }
        if svm.ebx < 2 {
            return unsupported("SVM offers no address-space identifier for guests");
        }
        let sizes = (__cpuid(0x8000_0000).eax >= 0x8000_0008).then(|| __cpuid(0x8000_0008));
        let basic = __cpuid(1);
        let structured = (__cpuid(0).eax >= 7).then(|| __cpuid_count(7, 0));
        let (seven_ebx, seven_ecx) = structured.map_or((0, 0), |leaf| (leaf.ebx, leaf.ecx));
        let wide = sizes.map_or(0, |leaf| leaf.ebx);
        let mut instructions = Instructions::empty();
        for (instruction, present) in [
            (Instructions::XSAVE, basic.ecx & (1 << 26) != 0),
            (Instructions::RDTSCP, extended.edx & (1 << 27) != 0),
            (Instructions::INVPCID, seven_ebx & (1 << 10) != 0),
            (Instructions::RDPRU, wide & (1 << 4) != 0),
            (Instructions::INVLPGB, wide & (1 << 3) != 0),
            (Instructions::MCOMMIT, wide & (1 << 8) != 0),
        ] {
            instructions.set(instruction, present);
        }
        let mut efer_bits = efer::SCE | efer::NXE;
        if extended.edx & (1 << 25) != 0 {
            efer_bits |= efer::FFXSR;
        }
        let cr4_bits = [
            (11, seven_ecx & (1 << 2)),
            (12, seven_ecx & (1 << 16)),
            (16, seven_ebx & (1 << 0)),
            (17, basic.ecx & (1 << 17)),
            (18, basic.ecx & (1 << 26)),
            (20, seven_ebx & (1 << 7)),
            (21, seven_ebx & (1 << 20)),
            (22, seven_ecx & (1 << 3)),
            (23, seven_ecx & (1 << 7)),
        ]
        .into_iter()
        .filter(|&(_, present)| present != 0)
        .fold(CR4_ALWAYS, |bits, (bit, _)| bits | 1 << bit);
        Ok(Self {
            features,
            instructions,
            asid_count: svm.ebx,
            physical_address_bits: sizes.map_or(36, |leaf| leaf.eax as u8),
            efer_bits,
            cr4_bits,
        })
    }

    /// The one place where optional control bits are asked for.
    ///
    /// # Errors
    /// [`Unsupported`] that names the bit which this processor does not have.
    pub const fn control(&self, control: Control) -> Result<Control, Unsupported> {
        let (available, reason) = match control {
            Control::Intercept4(bit) => {
                if bit.contains(Intercepts4::RDPRU) {
                    (
                        self.instructions.contains(Instructions::RDPRU),
                        "the RDPRU intercept needs RDPRU (Fn8000_0008_EBX[4])",
                    )
                } else if bit.contains(Intercepts4::XSETBV) {
                    (
                        self.instructions.contains(Instructions::XSAVE),
                        "the XSETBV intercept needs XSAVE (Fn0000_0001_ECX[26])",
                    )
                } else {
                    (true, "")
                }
            }
            Control::Intercept5(bit) => {
                if bit.contains(Intercepts5::INVPCID) {
                    (
                        self.instructions.contains(Instructions::INVPCID),
                        "the INVPCID intercept needs INVPCID (Fn0000_0007_EBX[10])",
                    )
                } else if bit.contains(Intercepts5::MCOMMIT) {
                    (
                        self.instructions.contains(Instructions::MCOMMIT),
                        "the MCOMMIT intercept needs MCOMMIT (Fn8000_0008_EBX[8])",
                    )
                } else {
                    (
                        self.instructions.contains(Instructions::INVLPGB),
                        "the INVLPGB and TLBSYNC intercepts need INVLPGB (Fn8000_0008_EBX[3])",
                    )
                }
            }
            Control::Tlb(TlbControl::FlushGuest) => (
                self.features.contains(Features::FLUSH_BY_ASID),
                "TLB_CONTROL 3 needs FlushByAsid (Fn8000_000A_EDX[6])",
            ),
            Control::Tlb(TlbControl::DoNothing | TlbControl::FlushAll) => (true, ""),
        };
        if available {
            Ok(control)
        } else {
            Err(Unsupported { reason })
        }
    }
}

/// A control bit that not every processor has. All others came with the first version of SVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// One of the intercepts at offset 0x010.
    Intercept4(Intercepts4),
    /// One of the intercepts at offset 0x014.
    Intercept5(Intercepts5),
    /// A TLB control.
    Tlb(TlbControl),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare() -> Capabilities {
        Capabilities {
            features: Features::empty(),
            instructions: Instructions::empty(),
            asid_count: 16,
            physical_address_bits: 40,
            efer_bits: efer::SCE | efer::NXE,
            cr4_bits: CR4_ALWAYS,
        }
    }

    #[test]
    fn a_missing_control_is_named() {
        let error = bare()
            .control(Control::Tlb(TlbControl::FlushGuest))
            .expect_err("no FlushByAsid");
        assert!(error.reason.contains("FlushByAsid"));
        let error = bare()
            .control(Control::Intercept5(Intercepts5::INVPCID))
            .expect_err("no INVPCID");
        assert!(error.reason.contains("INVPCID"));
        assert!(
            bare()
                .control(Control::Intercept4(Intercepts4::VMRUN))
                .is_ok()
        );
    }

    #[test]
    fn a_feature_allows_its_control() {
        let capable = Capabilities {
            features: Features::FLUSH_BY_ASID,
            instructions: Instructions::all(),
            ..bare()
        };
        for control in [
            Control::Tlb(TlbControl::FlushGuest),
            Control::Intercept4(Intercepts4::RDPRU),
            Control::Intercept4(Intercepts4::XSETBV),
            Control::Intercept5(Intercepts5::INVPCID),
            Control::Intercept5(Intercepts5::INVLPGB),
            Control::Intercept5(Intercepts5::MCOMMIT),
        ] {
            assert_eq!(capable.control(control), Ok(control));
        }
    }
}
