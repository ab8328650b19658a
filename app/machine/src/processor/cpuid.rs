//! CPUID as the guest sees it: the host's answers, reduced to what Umbra virtualizes.
//!
//! Feature words pass through masks of what is known to work under shadow paging; a bit that is
//! not named here is hidden, so a new processor never shows a guest what Umbra cannot do
//! (SDM vol. 2A CPUID; APM vol. 3 appendix E).

pub use core::arch::x86_64::CpuidResult;

use umbra_vcpu::registers::ControlRegisters;
use x86_64::registers::control::Cr4Flags;
use x86_64::registers::xcontrol::XCr0Flags;

use super::features::{Features, GuestFeatures, Vendor};
use super::msr::ApicBase;
use super::paravirtual;
use crate::machine::ProcessorNumber;

/// The highest basic leaf that guests see: extended state.
const MAX_BASIC_LEAF: u32 = 0xd;
/// The leaf by which Umbra says who it is, behind KVM's, where many kernels look for nothing else.
pub const HYPERVISOR_LEAF: u32 = 0x4000_0100;
/// The highest extended leaf that guests see: address sizes.
const MAX_EXTENDED_LEAF: u32 = 0x8000_0008;
/// What [`HYPERVISOR_LEAF`] says in EBX, ECX and EDX.
pub const HYPERVISOR_SIGNATURE: [u8; 12] = *b"UmbraUmbra  ";
/// Guest physical addresses are never wider, whatever the host has.
const MAX_PHYSICAL_ADDRESS_BITS: u8 = 40;

/// State components that can be switched between guests without supervisor state or PKRU.
pub const EXTENDED_STATE: u64 =
    XCr0Flags::X87.bits() | XCr0Flags::SSE.bits() | XCr0Flags::AVX.bits() | AVX512_STATE;
pub(super) const AVX512_STATE: u64 =
    XCr0Flags::OPMASK.bits() | XCr0Flags::ZMM_HI256.bits() | XCr0Flags::HI16_ZMM.bits();

const fn bits<const N: usize>(positions: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut index = 0;
    while index < N {
        mask |= 1 << positions[index];
        index += 1;
    }
    mask
}

/// SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C,
/// RDRAND.
const LEAF_1_ECX: u32 = bits([0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
const LEAF_1_ECX_X2APIC: u32 = 1 << 21;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_XSAVE: u32 = 1 << 26;
const LEAF_1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
/// FMA, AVX, F16C: what needs the AVX state.
const LEAF_1_ECX_AVX: u32 = bits([12, 28, 29]);
/// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, PGE, CMOV, PAT, PSE-36, CLFSH, MMX,
/// FXSR, SSE, SSE2.
const LEAF_1_EDX: u32 = bits([
    0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26,
]);
const LEAF_1_EDX_APIC: u32 = 1 << 9;
const LEAF_1_EDX_MTRR: u32 = 1 << 12;
const LEAF_1_EDX_MCA: u32 = 1 << 14;
/// EBX says how many APIC IDs the package has.
const LEAF_1_EDX_HTT: u32 = 1 << 28;

/// The local APIC's timer runs in all power states.
const LEAF_6_EAX_ALWAYS_RUNNING_TIMER: u32 = 1 << 2;

/// FSGSBASE, BMI1, AVX2, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, no FPU CS/DS, RDSEED, ADX, SMAP,
/// CLFLUSHOPT, CLWB, SHA, and AVX-512 F, DQ, IFMA, CD, BW, VL.
const LEAF_7_EBX: u32 = bits([
    0, 3, 5, 6, 7, 8, 9, 13, 16, 17, 18, 19, 20, 21, 23, 24, 28, 29, 30, 31,
]);
const LEAF_7_EBX_TSC_ADJUST: u32 = 1 << 1;
const LEAF_7_EBX_AVX: u32 = 1 << 5;
const LEAF_7_EBX_AVX512: u32 = bits([16, 17, 21, 28, 30, 31]);
/// UMIP; AVX-512 VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ; RDPID, MOVDIRI,
/// MOVDIR64B.
const LEAF_7_ECX: u32 = bits([1, 2, 6, 8, 9, 10, 11, 12, 14, 22, 27, 28]);
const LEAF_7_ECX_AVX: u32 = bits([9, 10]);
const LEAF_7_ECX_AVX512: u32 = bits([1, 6, 11, 12, 14]);
const LEAF_7_ECX_RDPID: u32 = 1 << 22;
const LEAF_7_ECX_UMIP: u32 = 1 << 2;
/// Protection keys, which the shadow MMU does whatever the host's processor can.
const LEAF_7_ECX_PKU: u32 = 1 << 3;
const LEAF_7_ECX_OSPKE: u32 = 1 << 4;
/// Fast short REP MOVSB, VP2INTERSECT, SERIALIZE, AVX-512 FP16.
const LEAF_7_EDX: u32 = bits([4, 8, 14, 23]);
const LEAF_7_EDX_AVX512: u32 = bits([8, 23]);
/// AVX-VNNI, AVX512-BF16, fast zero-length REP MOVSB, fast short REP STOSB, CMPSB, AVX-IFMA.
const LEAF_7_1_EAX: u32 = bits([4, 5, 10, 11, 12, 23]);
const LEAF_7_1_EAX_AVX: u32 = bits([4, 23]);
const LEAF_7_1_EAX_AVX512: u32 = 1 << 5;

/// XSAVEOPT, XSAVEC, XGETBV with ECX = 1; no XSAVES, which needs IA32_XSS.
const LEAF_D_1_EAX: u32 = bits([0, 1, 2]);
const LEAF_D_COMPONENT_ALIGNED: u32 = 1 << 1;
/// The legacy region and the header of an XSAVE area.
const XSAVE_BASE_SIZE: u32 = 576;

/// LAHF, ABM, SSE4A, misaligned SSE, PREFETCHW, XOP, FMA4, TBM.
const EXTENDED_1_ECX: u32 = bits([0, 5, 6, 7, 8, 11, 16, 21]);
const EXTENDED_1_ECX_AVX: u32 = bits([11, 16]);
/// The package has several processors, which are cores, not threads.
const EXTENDED_1_ECX_LEGACY_CORES: u32 = 1 << 1;
/// The bits that repeat leaf 1, and MMXEXT, 3DNowExt, 3DNow.
const EXTENDED_1_EDX: u32 = bits([
    0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 15, 16, 17, 22, 23, 24, 30, 31,
]) | EXTENDED_1_EDX_SYSCALL
    | EXTENDED_1_EDX_NX
    | EXTENDED_1_EDX_GIGABYTE_PAGES
    | EXTENDED_1_EDX_RDTSCP
    | EXTENDED_1_EDX_LONG_MODE;
const EXTENDED_1_EDX_SYSCALL: u32 = 1 << 11;
const EXTENDED_1_EDX_NX: u32 = 1 << 20;
const EXTENDED_1_EDX_GIGABYTE_PAGES: u32 = 1 << 26;
const EXTENDED_1_EDX_RDTSCP: u32 = 1 << 27;
const EXTENDED_1_EDX_LONG_MODE: u32 = 1 << 29;
const EXTENDED_7_EDX_INVARIANT_TSC: u32 = 1 << 8;
/// CLZERO.
const EXTENDED_8_EBX: u32 = 1 << 0;

const NOTHING: CpuidResult = CpuidResult {
    eax: 0,
    ebx: 0,
    ecx: 0,
    edx: 0,
};

/// What the driver cannot give a guest though the host's CPUID shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverLimits {
    /// The state components that the driver switches, in the bits of XCR0; zero if it switches by
    /// FXSAVE.
    pub extended_state: u64,
    /// Features that the driver cannot virtualize, such as [`Features::RDTSCP`].
    pub unsupported: Features,
}

/// What CPUID tells a processor of itself. A machine's processors are the cores of one package, with
/// one thread each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its number, which is its APIC ID.
    pub number: ProcessorNumber,
    /// How many processors there are.
    pub processors: u8,
    /// Where its local APIC is, and whether.
    pub apic_base: ApicBase,
}

impl Identity {
    /// The only processor of a machine.
    fn alone() -> Self {
        Self {
            number: ProcessorNumber::BOOT,
            processors: 1,
            apic_base: ApicBase::new(ProcessorNumber::BOOT),
        }
    }

    const fn apic_id(&self) -> u32 {
        self.number.get() as u32
    }

    /// How many bits of an APIC ID number the package's cores.
    const fn core_bits(&self) -> u32 {
        match self.processors.checked_next_power_of_two() {
            Some(ids) => ids.trailing_zeros(),
            None => u8::BITS,
        }
    }
}

/// The guest's CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidPolicy {
    features: GuestFeatures,
    max_basic: u32,
    max_extended: u32,
}

impl CpuidPolicy {
    /// Reads what is needed of the host's CPUID: `host` carries out the instruction with a leaf
    /// (EAX) and a subleaf (ECX).
    pub fn new(host: &dyn Fn(u32, u32) -> CpuidResult, limits: &DriverLimits) -> Self {
        let leaf_0 = host(0, 0);
        let max_basic = leaf_0.eax.min(MAX_BASIC_LEAF);
        let max_extended = match host(0x8000_0000, 0).eax {
            highest @ 0x8000_0000.. => highest.min(MAX_EXTENDED_LEAF),
            _ => 0,
        };
        let vendor = match &leaf_0.ebx.to_le_bytes() {
            b"Auth" | b"Hygo" => Vendor::Amd,
            _ => Vendor::Intel,
        };
        let mut policy = Self {
            features: GuestFeatures {
                features: Features::all() - limits.unsupported,
                physical_address_bits: 36,
                extended_state: 0,
                vendor,
            },
            max_basic,
            max_extended,
        };
        policy.features.extended_state = policy.host_extended_state(host, limits);
        policy.features.physical_address_bits = policy.host_physical_address_bits(host);
        policy.features.features &= policy.shown_features(host);
        policy
    }

    /// The guest's features.
    pub const fn features(&self) -> &GuestFeatures {
        &self.features
    }

    /// Answers CPUID with `leaf` in EAX and `subleaf` in ECX. Few leaves ask for the guest's control
    /// registers, which cost some processors a while.
    pub fn query(
        &self,
        host: &dyn Fn(u32, u32) -> CpuidResult,
        leaf: u32,
        subleaf: u32,
        control: &dyn Fn() -> ControlRegisters,
        identity: &Identity,
    ) -> CpuidResult {
        let mut result = self.answer(host, leaf, subleaf, &|| control().xcr0, identity);
        match leaf {
            1 => {
                if control().cr4 & Cr4Flags::OSXSAVE.bits() != 0 {
                    result.ecx |= LEAF_1_ECX_OSXSAVE;
                }
                if !identity.apic_base.is_enabled() {
                    result.edx &= !LEAF_1_EDX_APIC;
                }
            }
            7 if subleaf == 0 && control().cr4 & Cr4Flags::PROTECTION_KEY_USER.bits() != 0 => {
                result.ecx |= LEAF_7_ECX_OSPKE;
            }
            0x8000_0001 if !identity.apic_base.is_enabled() => result.edx &= !LEAF_1_EDX_APIC,
            _ => {}
        }
        result
    }

    fn answer(
        &self,
        host: &dyn Fn(u32, u32) -> CpuidResult,
        leaf: u32,
        subleaf: u32,
        xcr0: &dyn Fn() -> u64,
        identity: &Identity,
    ) -> CpuidResult {
        match leaf {
            HYPERVISOR_LEAF => hypervisor_leaf(),
            0 => CpuidResult {
                eax: self.max_basic,
                ..host(0, 0)
            },
            _ if leaf <= self.max_basic => self.basic(host, leaf, subleaf, xcr0, identity),
            0x8000_0000 if self.max_extended != 0 => CpuidResult {
                eax: self.max_extended,
                ..host(leaf, 0)
            },
            0x8000_0001.. if leaf <= self.max_extended => self.extended(host, leaf, identity),
            _ => paravirtual::cpuid(leaf, identity.processors).unwrap_or(NOTHING),
        }
    }

    fn basic(
        &self,
        host: &dyn Fn(u32, u32) -> CpuidResult,
        leaf: u32,
        subleaf: u32,
        xcr0: &dyn Fn() -> u64,
        identity: &Identity,
    ) -> CpuidResult {
        match leaf {
            1 => self.leaf_1(host(1, 0), identity),
            2 => host(2, 0),
            4 => cache(host(4, subleaf), identity),
            6 => CpuidResult {
                eax: LEAF_6_EAX_ALWAYS_RUNNING_TIMER,
                ..NOTHING
            },
            7 => self.leaf_7(host, subleaf),
            0xb => topology(subleaf, identity),
            0xd => self.leaf_d(host, subleaf, xcr0()),
            _ => NOTHING,
        }
    }

    fn leaf_1(&self, host: CpuidResult, identity: &Identity) -> CpuidResult {
        let mut ecx = host.ecx & LEAF_1_ECX | LEAF_1_ECX_HYPERVISOR;
        if self.has_feature(Features::X2APIC) {
            ecx |= LEAF_1_ECX_X2APIC;
        }
        if self.has_feature(Features::TSC_DEADLINE) {
            ecx |= LEAF_1_ECX_TSC_DEADLINE;
        }
        if self.features.extended_state == 0 {
            ecx &= !LEAF_1_ECX_XSAVE;
        }
        if !self.has_state(XCr0Flags::AVX.bits()) {
            ecx &= !LEAF_1_ECX_AVX;
        }
        let mut edx = host.edx & LEAF_1_EDX | LEAF_1_EDX_APIC | LEAF_1_EDX_MTRR | LEAF_1_EDX_MCA;
        if identity.processors > 1 {
            edx |= LEAF_1_EDX_HTT;
        }
        CpuidResult {
            eax: host.eax,
            // Brand index and CLFLUSH size are the host's.
            ebx: host.ebx & 0xffff | 1 << identity.core_bits() << 16 | identity.apic_id() << 24,
            ecx,
            edx,
        }
    }

    fn leaf_7(&self, host: &dyn Fn(u32, u32) -> CpuidResult, subleaf: u32) -> CpuidResult {
        let avx = self.has_state(XCr0Flags::AVX.bits());
        let avx512 = self.has_state(AVX512_STATE);
        let filter = |value: u32, mask: u32, avx_mask: u32, avx512_mask: u32| {
            let mut value = value & mask;
            if !avx {
                value &= !avx_mask;
            }
            if !avx512 {
                value &= !avx512_mask;
            }
            value
        };
        let subleaves = host(7, 0).eax;
        match subleaf {
            0 => {
                let leaf = host(7, 0);
                let mut ebx = filter(leaf.ebx, LEAF_7_EBX, LEAF_7_EBX_AVX, LEAF_7_EBX_AVX512);
                if self.has_feature(Features::TSC_ADJUST) {
                    ebx |= LEAF_7_EBX_TSC_ADJUST;
                }
                for (feature, bit) in [
                    (Features::FSGSBASE, 0),
                    (Features::SMEP, 7),
                    (Features::SMAP, 20),
                ] {
                    if !self.has_feature(feature) {
                        ebx &= !(1 << bit);
                    }
                }
                let mut ecx = filter(leaf.ecx, LEAF_7_ECX, LEAF_7_ECX_AVX, LEAF_7_ECX_AVX512);
                if !self.has_feature(Features::RDTSCP) {
                    ecx &= !LEAF_7_ECX_RDPID;
                }
                if !self.has_feature(Features::UMIP) {
                    ecx &= !LEAF_7_ECX_UMIP;
                }
                if self.has_feature(Features::PKU) {
                    ecx |= LEAF_7_ECX_PKU;
                }
                CpuidResult {
                    eax: subleaves.min(1),
                    ebx,
                    ecx,
                    edx: filter(leaf.edx, LEAF_7_EDX, 0, LEAF_7_EDX_AVX512),
                }
            }
            1 if subleaves >= 1 => CpuidResult {
                eax: filter(
                    host(7, 1).eax,
                    LEAF_7_1_EAX,
                    LEAF_7_1_EAX_AVX,
                    LEAF_7_1_EAX_AVX512,
                ),
                ..NOTHING
            },
            _ => NOTHING,
        }
    }

    fn leaf_d(
        &self,
        host: &dyn Fn(u32, u32) -> CpuidResult,
        subleaf: u32,
        xcr0: u64,
    ) -> CpuidResult {
        let allowed = self.features.extended_state;
        if allowed == 0 {
            return NOTHING;
        }
        match subleaf {
            0 => CpuidResult {
                eax: allowed as u32,
                ebx: standard_size(host, xcr0 & allowed),
                ecx: standard_size(host, allowed),
                edx: (allowed >> 32) as u32,
            },
            1 => {
                let instructions = host(0xd, 1).eax & LEAF_D_1_EAX;
                CpuidResult {
                    eax: instructions,
                    ebx: if instructions & 0b10 == 0 {
                        0
                    } else {
                        compacted_size(host, xcr0 & allowed)
                    },
                    ..NOTHING
                }
            }
            2..=63 if allowed & (1 << subleaf) != 0 => {
                let component = host(0xd, subleaf);
                CpuidResult {
                    ecx: component.ecx & LEAF_D_COMPONENT_ALIGNED,
                    edx: 0,
                    ..component
                }
            }
            _ => NOTHING,
        }
    }

    fn extended(
        &self,
        host: &dyn Fn(u32, u32) -> CpuidResult,
        leaf: u32,
        identity: &Identity,
    ) -> CpuidResult {
        let host_leaf = host(leaf, 0);
        match leaf {
            0x8000_0001 => {
                let mut ecx = host_leaf.ecx & EXTENDED_1_ECX;
                if !self.has_state(XCr0Flags::AVX.bits()) {
                    ecx &= !EXTENDED_1_ECX_AVX;
                }
                let mut edx = host_leaf.edx & EXTENDED_1_EDX;
                if self.features.vendor == Vendor::Amd {
                    edx |= LEAF_1_EDX_APIC | LEAF_1_EDX_MTRR | LEAF_1_EDX_MCA;
                    if identity.processors > 1 {
                        ecx |= EXTENDED_1_ECX_LEGACY_CORES;
                    }
                }
                for (feature, bit) in [
                    (Features::NX, EXTENDED_1_EDX_NX),
                    (Features::GIGABYTE_PAGES, EXTENDED_1_EDX_GIGABYTE_PAGES),
                    (Features::RDTSCP, EXTENDED_1_EDX_RDTSCP),
                    (Features::LONG_MODE, EXTENDED_1_EDX_LONG_MODE),
                ] {
                    if !self.has_feature(feature) {
                        edx &= !bit;
                    }
                }
                CpuidResult {
                    ebx: if self.features.vendor == Vendor::Amd {
                        host_leaf.ebx
                    } else {
                        0
                    },
                    ecx,
                    edx,
                    ..host_leaf
                }
            }
            // The brand string and the caches.
            0x8000_0002..=0x8000_0006 => host_leaf,
            0x8000_0007 => CpuidResult {
                edx: host_leaf.edx & EXTENDED_7_EDX_INVARIANT_TSC,
                ..NOTHING
            },
            0x8000_0008 => CpuidResult {
                eax: 48 << 8 | u32::from(self.features.physical_address_bits),
                ebx: host_leaf.ebx & EXTENDED_8_EBX,
                // Intel reserves it.
                ecx: match self.features.vendor {
                    Vendor::Amd => {
                        let other_cores = u32::from(identity.processors).saturating_sub(1);
                        identity.core_bits() << 12 | other_cores
                    }
                    Vendor::Intel => 0,
                },
                edx: 0,
            },
            _ => NOTHING,
        }
    }

    const fn has_feature(&self, feature: Features) -> bool {
        self.features.has(feature)
    }

    const fn has_state(&self, components: u64) -> bool {
        self.features.extended_state & components == components
    }

    fn host_extended_state(
        &self,
        host: &dyn Fn(u32, u32) -> CpuidResult,
        limits: &DriverLimits,
    ) -> u64 {
        if self.max_basic < 0xd || host(1, 0).ecx & LEAF_1_ECX_XSAVE == 0 {
            return 0;
        }
        let leaf = host(0xd, 0);
        let host_state = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
        let mut state = host_state & limits.extended_state & EXTENDED_STATE;
        let base = XCr0Flags::X87.bits() | XCr0Flags::SSE.bits();
        if state & base != base || !self.has_feature(Features::XSAVE) {
            return 0;
        }
        // AVX-512 comes whole and with AVX, or not at all.
        if state & AVX512_STATE != AVX512_STATE || state & XCr0Flags::AVX.bits() == 0 {
            state &= !AVX512_STATE;
        }
        state
    }

    fn host_physical_address_bits(&self, host: &dyn Fn(u32, u32) -> CpuidResult) -> u8 {
        if self.max_extended < 0x8000_0008 {
            return 36;
        }
        (host(0x8000_0008, 0).eax as u8).clamp(32, MAX_PHYSICAL_ADDRESS_BITS)
    }

    fn shown_features(&self, host: &dyn Fn(u32, u32) -> CpuidResult) -> Features {
        let answer = |leaf| self.answer(host, leaf, 0, &|| 0, &Identity::alone());
        let (leaf_1, leaf_7, extended_1) = (answer(1), answer(7), answer(0x8000_0001));
        let table = [
            (Features::VME, leaf_1.edx, 1),
            (Features::DE, leaf_1.edx, 2),
            (Features::PSE, leaf_1.edx, 3),
            (Features::TSC, leaf_1.edx, 4),
            (Features::PAE, leaf_1.edx, 6),
            (Features::MCE, leaf_1.edx, 7),
            (Features::PGE, leaf_1.edx, 13),
            (Features::PSE36, leaf_1.edx, 17),
            (Features::FXSR, leaf_1.edx, 24),
            (Features::SSE, leaf_1.edx, 25),
            (Features::PCID, leaf_1.ecx, 17),
            (Features::X2APIC, leaf_1.ecx, 21),
            (Features::TSC_DEADLINE, leaf_1.ecx, 24),
            (Features::XSAVE, leaf_1.ecx, 26),
            (Features::FSGSBASE, leaf_7.ebx, 0),
            (Features::TSC_ADJUST, leaf_7.ebx, 1),
            (Features::SMEP, leaf_7.ebx, 7),
            (Features::SMAP, leaf_7.ebx, 20),
            (Features::UMIP, leaf_7.ecx, 2),
            (Features::PKU, leaf_7.ecx, 3),
            (Features::LA57, leaf_7.ecx, 16),
            (Features::NX, extended_1.edx, 20),
            (Features::GIGABYTE_PAGES, extended_1.edx, 26),
            (Features::RDTSCP, extended_1.edx, 27),
            (Features::LONG_MODE, extended_1.edx, 29),
        ];
        let mut shown: Features = table
            .into_iter()
            .filter(|(_, word, bit)| word & (1 << bit) != 0)
            .map(|(feature, _, _)| feature)
            .collect();
        // Intel shows SYSCALL only while the processor is in 64-bit mode; whoever has long mode has it.
        let syscall = extended_1.edx & (EXTENDED_1_EDX_SYSCALL | EXTENDED_1_EDX_LONG_MODE);
        shown.set(Features::SYSCALL, syscall != 0);
        shown
    }
}

fn hypervisor_leaf() -> CpuidResult {
    let word = |start: usize| {
        u32::from_le_bytes([
            HYPERVISOR_SIGNATURE[start],
            HYPERVISOR_SIGNATURE[start + 1],
            HYPERVISOR_SIGNATURE[start + 2],
            HYPERVISOR_SIGNATURE[start + 3],
        ])
    };
    CpuidResult {
        eax: HYPERVISOR_LEAF,
        ebx: word(0),
        ecx: word(4),
        edx: word(8),
    }
}

/// The package's levels: a thread in each core, the cores, and no more (SDM vol. 2A leaf 0BH).
fn topology(subleaf: u32, identity: &Identity) -> CpuidResult {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let (id_bits, processors, level) = match subleaf {
        0 => (0, 1, THREAD),
        1 => (identity.core_bits(), identity.processors.into(), CORE),
        _ => (0, 0, 0),
    };
    CpuidResult {
        eax: id_bits,
        ebx: processors,
        ecx: level << 8 | subleaf & 0xff,
        edx: identity.apic_id(),
    }
}

/// A cache of the package (SDM vol. 2A leaf 04H): the cores share those of the third level and above.
fn cache(host: CpuidResult, identity: &Identity) -> CpuidResult {
    const TYPE: u32 = 0x1f;
    const LEVEL: u32 = 7;
    const FIRST_SHARED_LEVEL: u32 = 3;
    let description = host.eax & 0x3fff;
    if description & TYPE == 0 {
        return CpuidResult {
            eax: description,
            ..host
        };
    }
    let other_ids = (1 << identity.core_bits()) - 1;
    let shared = description >> 5 & LEVEL >= FIRST_SHARED_LEVEL;
    let sharers = if shared { other_ids } else { 0 };
    CpuidResult {
        eax: description | sharers << 14 | other_ids << 26,
        ..host
    }
}

fn components(state: u64) -> impl Iterator<Item = u32> {
    (2..64).filter(move |component| state & (1 << component) != 0)
}

/// The size in bytes of an XSAVE area in the standard format (SDM vol. 1 13.4.1).
fn standard_size(host: &dyn Fn(u32, u32) -> CpuidResult, state: u64) -> u32 {
    components(state).fold(XSAVE_BASE_SIZE, |size, component| {
        let leaf = host(0xd, component);
        size.max(leaf.ebx.saturating_add(leaf.eax))
    })
}

/// The size in bytes of an XSAVE area in the compacted format (SDM vol. 1 13.4.3).
fn compacted_size(host: &dyn Fn(u32, u32) -> CpuidResult, state: u64) -> u32 {
    components(state).fold(XSAVE_BASE_SIZE, |size, component| {
        let leaf = host(0xd, component);
        let start = if leaf.ecx & LEAF_D_COMPONENT_ALIGNED == 0 {
            size
        } else {
            size.checked_next_multiple_of(64).unwrap_or(size)
        };
        start.saturating_add(leaf.eax)
    })
}

#[cfg(test)]
mod tests;
