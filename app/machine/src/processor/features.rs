//! The guest's features as far as paging and the control registers depend on them.

bitflags::bitflags! {
    /// Features that CPUID shows the guest.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u32 {
        /// Virtual-8086 mode extensions (CR4.VME, CR4.PVI).
        const VME = 1 << 0;
        /// Debugging extensions (CR4.DE).
        const DE = 1 << 1;
        /// 4 MiB pages in 32-bit paging (CR4.PSE).
        const PSE = 1 << 2;
        /// Time-stamp counter (CR4.TSD).
        const TSC = 1 << 3;
        /// Physical address extension (CR4.PAE).
        const PAE = 1 << 4;
        /// Machine-check exception (CR4.MCE).
        const MCE = 1 << 5;
        /// Global pages (CR4.PGE).
        const PGE = 1 << 6;
        /// 4 MiB pages above 4 GiB in 32-bit paging.
        const PSE36 = 1 << 7;
        /// FXSAVE (CR4.OSFXSR).
        const FXSR = 1 << 8;
        /// SSE (CR4.OSXMMEXCPT).
        const SSE = 1 << 9;
        /// XSAVE (CR4.OSXSAVE, XCR0).
        const XSAVE = 1 << 10;
        /// RDFSBASE and its relatives (CR4.FSGSBASE).
        const FSGSBASE = 1 << 11;
        /// Supervisor-mode execution prevention (CR4.SMEP).
        const SMEP = 1 << 12;
        /// Supervisor-mode access prevention (CR4.SMAP).
        const SMAP = 1 << 13;
        /// Process-context identifiers (CR4.PCIDE).
        const PCID = 1 << 14;
        /// Protection keys for user pages (CR4.PKE).
        const PKU = 1 << 15;
        /// Five-level paging (CR4.LA57).
        const LA57 = 1 << 16;
        /// User-mode instruction prevention (CR4.UMIP).
        const UMIP = 1 << 17;
        /// Execute-disable (EFER.NXE).
        const NX = 1 << 18;
        /// 1 GiB pages.
        const GIGABYTE_PAGES = 1 << 19;
        /// Long mode (EFER.LME).
        const LONG_MODE = 1 << 20;
        /// SYSCALL (EFER.SCE).
        const SYSCALL = 1 << 21;
        /// RDTSCP (TSC_AUX).
        const RDTSCP = 1 << 22;
        /// TSC-deadline timer (IA32_TSC_DEADLINE).
        const TSC_DEADLINE = 1 << 23;
        /// x2APIC mode (IA32_APIC_BASE.EXTD).
        const X2APIC = 1 << 24;
        /// IA32_TSC_ADJUST.
        const TSC_ADJUST = 1 << 25;
    }
}

/// The processor's maker, which decides which model-specific registers guests expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vendor {
    /// GenuineIntel, and whatever is not AMD.
    Intel,
    /// AuthenticAMD or HygonGenuine.
    Amd,
}

/// What the guest's processor can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFeatures {
    /// The features that CPUID shows.
    pub features: Features,
    /// The width of physical addresses (MAXPHYADDR), 32 to 52 bits.
    pub physical_address_bits: u8,
    /// The state components that XCR0 accepts; zero without XSAVE.
    pub extended_state: u64,
    /// The maker.
    pub vendor: Vendor,
}

impl GuestFeatures {
    /// Whether the guest has all of `features`.
    pub const fn has(&self, features: Features) -> bool {
        self.features.contains(features)
    }

    /// The bits of a physical address that must be zero.
    pub const fn reserved_address_bits(&self) -> u64 {
        match 1_u64.checked_shl(self.physical_address_bits as u32) {
            Some(size) => !(size - 1),
            None => 0,
        }
    }
}
