//! Single instructions: port I/O, control registers, MSRs, TLB.
//!
//! What may raise an exception on a sound machine is called inside [`crate::trap::catch`].

use core::arch::asm;

use crate::memory::{PhysAddr, VirtAddr};

/// CR0 bits (SDM vol. 3, 2.5).
pub mod cr0 {
    #![allow(missing_docs)]
    pub const PE: usize = 1 << 0;
    pub const MP: usize = 1 << 1;
    pub const EM: usize = 1 << 2;
    pub const TS: usize = 1 << 3;
    pub const NE: usize = 1 << 5;
    pub const WP: usize = 1 << 16;
    pub const AM: usize = 1 << 18;
    pub const PG: usize = 1 << 31;
}

/// CR4 bits (SDM vol. 3, 2.5).
pub mod cr4 {
    #![allow(missing_docs)]
    pub const TSD: usize = 1 << 2;
    pub const DE: usize = 1 << 3;
    pub const PSE: usize = 1 << 4;
    pub const PAE: usize = 1 << 5;
    pub const PGE: usize = 1 << 7;
    pub const OSFXSR: usize = 1 << 9;
    pub const OSXMMEXCPT: usize = 1 << 10;
    pub const UMIP: usize = 1 << 11;
    pub const FSGSBASE: usize = 1 << 16;
    pub const PCIDE: usize = 1 << 17;
    pub const OSXSAVE: usize = 1 << 18;
    pub const SMEP: usize = 1 << 20;
    pub const SMAP: usize = 1 << 21;
    pub const PKE: usize = 1 << 22;
}

/// RFLAGS bits.
pub mod flags {
    #![allow(missing_docs)]
    pub const TF: usize = 1 << 8;
    pub const IF: usize = 1 << 9;
    pub const NT: usize = 1 << 14;
    pub const RF: usize = 1 << 16;
    pub const AC: usize = 1 << 18;
}

/// MSR numbers (SDM vol. 4).
pub mod msr {
    #![allow(missing_docs)]
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const PAT: u32 = 0x277;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// EFER bits (APM vol. 2, 3.1.7).
pub mod efer {
    #![allow(missing_docs)]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

macro_rules! port_io {
    ($read:ident, $write:ident, $type:ty, $register:tt, $bits:literal) => {
        #[doc = concat!("Reads ", $bits, " bits from `port`.")]
        pub fn $read(port: u16) -> $type {
            let value: $type;
            // SAFETY: port I/O does not touch memory that Rust knows of.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port,
                    options(nomem, nostack, preserves_flags));
            }
            value
        }

        #[doc = concat!("Writes ", $bits, " bits to `port`.")]
        pub fn $write(port: u16, value: $type) {
            // SAFETY: as for the read.
            unsafe {
                asm!(concat!("out dx, ", $register), in($register) value, in("dx") port,
                    options(nomem, nostack, preserves_flags));
            }
        }
    };
}

port_io!(inb, outb, u8, "al", "8");
port_io!(inw, outw, u16, "ax", "16");
port_io!(inl, outl, u32, "eax", "32");

/// Ends the guest through `isa-debug-exit`: 0 is success.
pub fn exit(code: u32) -> ! {
    outl(0xf4, code);
    loop {
        // SAFETY: nothing is left to do; a machine without that device stops here.
        unsafe { asm!("cli", "hlt") };
    }
}

macro_rules! register {
    ($read:ident, $write:ident, $register:literal) => {
        #[doc = concat!("Reads ", $register, ".")]
        pub fn $read() -> usize {
            let value: usize;
            // SAFETY: reading the register has no side effect.
            unsafe { asm!(concat!("mov {}, ", $register), out(reg) value, options(nostack)) };
            value
        }

        #[doc = concat!("Writes ", $register, ", ordered with all memory accesses.")]
        pub fn $write(value: usize) {
            // SAFETY: the crate's facts 2 and 3: our code stays mapped, exceptions are caught.
            unsafe { asm!(concat!("mov ", $register, ", {}"), in(reg) value, options(nostack)) };
        }
    };
}

register!(read_cr0, write_cr0, "cr0");
register!(read_cr2, write_cr2, "cr2");
register!(read_cr3, write_cr3, "cr3");
register!(read_cr4, write_cr4, "cr4");
register!(read_dr0, write_dr0, "dr0");
register!(read_dr1, write_dr1, "dr1");
register!(read_dr2, write_dr2, "dr2");
register!(read_dr3, write_dr3, "dr3");
register!(read_dr6, write_dr6, "dr6");
register!(read_dr7, write_dr7, "dr7");

/// Sets `bits` in CR0.
pub fn set_cr0(bits: usize) {
    write_cr0(read_cr0() | bits);
}

/// Clears `bits` in CR0.
pub fn clear_cr0(bits: usize) {
    write_cr0(read_cr0() & !bits);
}

/// Sets `bits` in CR4.
pub fn set_cr4(bits: usize) {
    write_cr4(read_cr4() | bits);
}

/// Clears `bits` in CR4.
pub fn clear_cr4(bits: usize) {
    write_cr4(read_cr4() & !bits);
}

/// Loads CR3, which flushes what is not global.
pub fn load_root(root: PhysAddr) {
    write_cr3(root.0 as usize);
}

/// Flushes the whole TLB but for global pages.
pub fn reload_root() {
    write_cr3(read_cr3());
}

/// INVLPG.
pub fn invlpg(address: VirtAddr) {
    // SAFETY: flushing a translation makes the processor read the tables again, no more.
    unsafe { asm!("invlpg [{}]", in(reg) address.0, options(nostack, preserves_flags)) };
}

/// Kinds of INVPCID (SDM vol. 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Invpcid {
    /// One address in one PCID.
    Address = 0,
    /// One PCID.
    Pcid = 1,
    /// All, global translations too.
    All = 2,
    /// All but global translations.
    AllNonGlobal = 3,
}

/// INVPCID.
pub fn invpcid(kind: Invpcid, pcid: u16, address: VirtAddr) {
    let descriptor = [u64::from(pcid), address.0 as u64];
    // SAFETY: as for `invlpg`; the descriptor is 16 bytes that outlive the instruction.
    unsafe {
        asm!("invpcid {}, [{}]", in(reg) kind as usize, in(reg) &raw const descriptor,
            options(nostack, preserves_flags));
    }
}

/// RDMSR; #GP on an unknown MSR.
pub fn rdmsr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR has no side effect on memory.
    unsafe { asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR; #GP on an unknown MSR or value.
pub fn wrmsr(number: u32, value: u64) {
    // SAFETY: the caller's MSRs are test data (see the crate's facts).
    unsafe {
        asm!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack));
    }
}

/// RDTSC.
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: it reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// RDTSCP: the counter and `TSC_AUX`.
pub fn rdtscp() -> (u64, u32) {
    let (low, high, aux): (u32, u32, u32);
    // SAFETY: it reads a counter.
    unsafe {
        asm!("rdtscp", out("eax") low, out("edx") high, out("ecx") aux, options(nostack));
    }
    (u64::from(high) << 32 | u64::from(low), aux)
}

/// What CPUID returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Cpuid {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> Cpuid {
    let (mut eax, mut ecx) = (leaf, subleaf);
    let (ebx, edx): (usize, u32);
    // SAFETY: it only reads; LLVM keeps (R)BX for itself, so it is exchanged around it.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("mov {saved}, rbx", "cpuid", "xchg {saved}, rbx", saved = out(reg) ebx,
            inout("eax") eax, inout("ecx") ecx, out("edx") edx, options(nostack));
        #[cfg(target_arch = "x86")]
        asm!("mov {saved}, ebx", "cpuid", "xchg {saved}, ebx", saved = out(reg) ebx,
            inout("eax") eax, inout("ecx") ecx, out("edx") edx, options(nostack));
    }
    Cpuid {
        eax,
        ebx: ebx as u32,
        ecx,
        edx,
    }
}

/// CPUID features that checks depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Feature {
    Fpu,
    DebugExtensions,
    Sep,
    Pse,
    Pae,
    Pge,
    Pat,
    Msr,
    Apic,
    X2Apic,
    Pcid,
    Xsave,
    Fxsr,
    Sse,
    FsGsBase,
    Smep,
    Smap,
    Umip,
    Pku,
    OsPke,
    Invpcid,
    Nx,
    Gibibyte,
    Rdtscp,
    LongMode,
    Syscall,
    Avx,
}

/// Whether CPUID announces `feature`.
pub fn has(feature: Feature) -> bool {
    let basic = cpuid(1, 0);
    let structured = if cpuid(0, 0).eax >= 7 {
        cpuid(7, 0)
    } else {
        Cpuid {
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        }
    };
    let extended = cpuid(0x8000_0001, 0);
    let (register, bit) = match feature {
        Feature::Fpu => (basic.edx, 0),
        Feature::DebugExtensions => (basic.edx, 2),
        Feature::Pse => (basic.edx, 3),
        Feature::Msr => (basic.edx, 5),
        Feature::Pae => (basic.edx, 6),
        Feature::Apic => (basic.edx, 9),
        Feature::X2Apic => (basic.ecx, 21),
        Feature::Sep => (basic.edx, 11),
        Feature::Pge => (basic.edx, 13),
        Feature::Pat => (basic.edx, 16),
        Feature::Fxsr => (basic.edx, 24),
        Feature::Sse => (basic.edx, 25),
        Feature::Pcid => (basic.ecx, 17),
        Feature::Xsave => (basic.ecx, 26),
        Feature::Avx => (basic.ecx, 28),
        Feature::FsGsBase => (structured.ebx, 0),
        Feature::Smep => (structured.ebx, 7),
        Feature::Invpcid => (structured.ebx, 10),
        Feature::Smap => (structured.ebx, 20),
        Feature::Umip => (structured.ecx, 2),
        Feature::Pku => (structured.ecx, 3),
        Feature::OsPke => (structured.ecx, 4),
        Feature::Syscall => (extended.edx, 11),
        Feature::Nx => (extended.edx, 20),
        Feature::Gibibyte => (extended.edx, 26),
        Feature::Rdtscp => (extended.edx, 27),
        Feature::LongMode => (extended.edx, 29),
    };
    register >> bit & 1 != 0
}

/// Width of physical addresses in bits (SDM vol. 3, 4.1.4).
pub fn physical_address_bits() -> u32 {
    if cpuid(0x8000_0000, 0).eax >= 0x8000_0008 {
        cpuid(0x8000_0008, 0).eax & 0xff
    } else {
        36
    }
}

/// STAC: suspends SMAP for ring 0's own accesses.
pub fn suspend_access_prevention() {
    // SAFETY: RFLAGS.AC means nothing else in ring 0.
    unsafe { asm!("stac", options(nostack)) };
}

/// CLAC: ends what [`suspend_access_prevention`] began.
pub fn resume_access_prevention() {
    // SAFETY: as for STAC.
    unsafe { asm!("clac", options(nostack)) };
}

/// RDPKRU with this ECX, which must be 0: EDX and EAX.
pub fn rdpkru(ecx: u32) -> (u32, u32) {
    let (eax, edx);
    // SAFETY: it only reads the register.
    unsafe { asm!("rdpkru", in("ecx") ecx, out("eax") eax, out("edx") edx, options(nostack)) };
    (edx, eax)
}

/// WRPKRU with these ECX and EDX, which must be 0.
pub fn wrpkru(ecx: u32, edx: u32, rights: u32) {
    // SAFETY: it narrows what user pages allow, and no Rust object lies in one.
    unsafe {
        asm!("wrpkru", in("ecx") ecx, in("edx") edx, in("eax") rights, options(nostack));
    }
}

/// The instruction that calls a hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hypercall {
    /// VMCALL, on Intel processors.
    Vmcall,
    /// VMMCALL, on AMD processors.
    Vmmcall,
}

impl Hypercall {
    /// The one that this processor has.
    pub fn of_processor() -> Self {
        let vendor = cpuid(0, 0);
        if [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes)
            == [*b"Auth", *b"enti", *b"cAMD"]
        {
            Self::Vmmcall
        } else {
            Self::Vmcall
        }
    }

    /// Calls the hypervisor with this number, without arguments, and returns its answer.
    pub fn call(self, number: usize) -> usize {
        let mut value = number;
        // SAFETY: a call without arguments touches no memory of ours.
        unsafe {
            match self {
                Self::Vmcall => asm!("vmcall", inout("eax") value, options(nostack)),
                Self::Vmmcall => asm!("vmmcall", inout("eax") value, options(nostack)),
            }
        }
        value
    }
}

/// UD2.
pub fn undefined() {
    // SAFETY: it raises #UD and changes nothing.
    unsafe { asm!("ud2", options(nomem, nostack)) };
}

/// Jumps to `address` for good.
pub fn jump(address: VirtAddr) -> ! {
    // SAFETY: whatever happens there, nothing of ours runs afterwards.
    unsafe { asm!("jmp {}", in(reg) address.0, options(noreturn)) }
}

/// Whether maskable interrupts are taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interrupts {
    /// IF = 1.
    On,
    /// IF = 0.
    Off,
}

/// Loops until somebody else ends the guest.
pub fn loop_forever(interrupts: Interrupts) -> ! {
    // SAFETY: nothing runs afterwards; `tables::ignore_interrupts` makes interrupts harmless.
    unsafe {
        match interrupts {
            Interrupts::On => asm!("sti", "2:", "jmp 2b", options(noreturn)),
            Interrupts::Off => asm!("cli", "2:", "jmp 2b", options(noreturn)),
        }
    }
}
