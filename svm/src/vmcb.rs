//! The virtual-machine control block as the processor lays it out (APM vol. 2 appendix B).
//!
//! The processor reads and writes the block between VMRUN and #VMEXIT, and by VMSAVE and VMLOAD;
//! at all other times it belongs to the driver.

use core::mem::offset_of;

use bitflags::bitflags;
use umbra_vcpu::address::Gva;
use umbra_vcpu::registers::{Segment, SegmentAttributes};

bitflags! {
    /// The intercepts at offset 0x00C (APM vol. 2 table B-1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Intercepts3: u32 {
        /// Physical interrupt.
        const INTR = 1 << 0;
        /// Non-maskable interrupt.
        const NMI = 1 << 1;
        /// INIT.
        const INIT = 1 << 3;
        /// Virtual interrupt: the window that V_IRQ asks for.
        const VINTR = 1 << 4;
        /// RDPMC.
        const RDPMC = 1 << 15;
        /// CPUID.
        const CPUID = 1 << 18;
        /// RSM.
        const RSM = 1 << 19;
        /// IRET.
        const IRET = 1 << 20;
        /// INT n.
        const INTN = 1 << 21;
        /// INVD.
        const INVD = 1 << 22;
        /// PAUSE.
        const PAUSE = 1 << 23;
        /// HLT.
        const HLT = 1 << 24;
        /// INVLPG.
        const INVLPG = 1 << 25;
        /// INVLPGA.
        const INVLPGA = 1 << 26;
        /// I/O by the permission map.
        const IOIO_PROT = 1 << 27;
        /// RDMSR and WRMSR by the permission map.
        const MSR_PROT = 1 << 28;
        /// Task switches.
        const TASK_SWITCH = 1 << 29;
        /// Processor freezing for legacy floating-point errors.
        const FERR_FREEZE = 1 << 30;
        /// Shutdown: a fault during the delivery of a double fault.
        const SHUTDOWN = 1 << 31;
    }
}

bitflags! {
    /// The intercepts at offset 0x010 (APM vol. 2 table B-1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Intercepts4: u32 {
        /// VMRUN; must be set.
        const VMRUN = 1 << 0;
        /// VMMCALL.
        const VMMCALL = 1 << 1;
        /// VMLOAD.
        const VMLOAD = 1 << 2;
        /// VMSAVE.
        const VMSAVE = 1 << 3;
        /// STGI.
        const STGI = 1 << 4;
        /// CLGI.
        const CLGI = 1 << 5;
        /// SKINIT.
        const SKINIT = 1 << 6;
        /// ICEBP, also called INT1.
        const ICEBP = 1 << 8;
        /// WBINVD.
        const WBINVD = 1 << 9;
        /// MONITOR.
        const MONITOR = 1 << 10;
        /// MWAIT.
        const MWAIT = 1 << 11;
        /// XSETBV.
        const XSETBV = 1 << 13;
        /// RDPRU.
        const RDPRU = 1 << 14;
    }
}

bitflags! {
    /// The intercepts at offset 0x014 (APM vol. 2 table B-1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Intercepts5: u32 {
        /// INVLPGB.
        const INVLPGB = 1 << 0;
        /// INVPCID.
        const INVPCID = 1 << 2;
        /// MCOMMIT.
        const MCOMMIT = 1 << 3;
        /// TLBSYNC.
        const TLBSYNC = 1 << 4;
    }
}

bitflags! {
    /// The virtual interrupt control at offset 0x060, without priority and vector.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct InterruptControl: u64 {
        /// A virtual interrupt is pending.
        const V_IRQ = 1 << 8;
        /// The highest virtual priority.
        const V_INTR_PRIO = 0xf << 16;
        /// The virtual interrupt ignores the task priority.
        const V_IGN_TPR = 1 << 20;
        /// RFLAGS.IF and CR8 of the guest have no effect on physical interrupts.
        const V_INTR_MASKING = 1 << 24;
        /// The virtual interrupt's task priority field.
        const V_TPR = 0xff;
        const _ = !0;
    }
}

/// Bit 0 of the interrupt shadow field at offset 0x068.
pub const INTERRUPT_SHADOW: u64 = 1;

/// What VMRUN does to the TLB (APM vol. 2 15.16.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TlbControl {
    /// Nothing.
    DoNothing = 0,
    /// Flushes the translations of every address-space identifier.
    FlushAll = 1,
    /// Flushes the guest's translations (needs FlushByAsid).
    FlushGuest = 3,
}

/// A segment register in the state-save area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SegmentField {
    /// The selector.
    pub selector: u16,
    /// The attributes: bits 55:52 and 47:40 of the descriptor.
    pub attributes: u16,
    /// The limit in bytes.
    pub limit: u32,
    /// The base.
    pub base: u64,
}

impl SegmentField {
    /// The attribute L: 64-bit code.
    pub const LONG: u16 = 1 << 9;
    /// The attribute D/B: 32-bit operands.
    pub const DEFAULT_32: u16 = 1 << 10;

    /// The field that holds `segment`.
    pub fn from_segment(segment: &Segment) -> Self {
        let bits = segment.attributes.bits();
        let mut attributes = (bits & 0xff) | ((bits >> 4) & 0xf00);
        if segment.attributes.contains(SegmentAttributes::UNUSABLE) {
            attributes &= !SegmentAttributes::PRESENT.bits();
        }
        Self {
            selector: segment.selector,
            attributes: attributes as u16,
            limit: segment.limit,
            base: segment.base.as_u64(),
        }
    }

    /// The segment that the field holds. One that is not present is unusable.
    pub fn to_segment(self) -> Segment {
        let bits = u32::from(self.attributes);
        let mut attributes =
            SegmentAttributes::from_bits_retain((bits & 0xff) | ((bits & 0xf00) << 4));
        if !attributes.contains(SegmentAttributes::PRESENT) {
            attributes |= SegmentAttributes::UNUSABLE;
        }
        Segment {
            selector: self.selector,
            base: Gva::new(self.base),
            limit: self.limit,
            attributes,
        }
    }
}

/// The virtual-machine control block.
#[repr(C, align(4096))]
pub struct Vmcb {
    /// The control area.
    pub control: ControlArea,
    /// The state-save area.
    pub save: SaveArea,
    reserved: [u8; 0x1000 - 0x400 - 0x270],
}

/// The control area of the VMCB.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ControlArea {
    /// Reads of CR0 to CR15 that exit, one bit each.
    pub intercept_cr_reads: u16,
    /// Writes of CR0 to CR15 that exit.
    pub intercept_cr_writes: u16,
    /// Reads of DR0 to DR15 that exit.
    pub intercept_dr_reads: u16,
    /// Writes of DR0 to DR15 that exit.
    pub intercept_dr_writes: u16,
    /// Exceptions that exit, one bit for each vector.
    pub intercept_exceptions: u32,
    /// Other intercepts.
    pub intercepts3: Intercepts3,
    /// Other intercepts.
    pub intercepts4: Intercepts4,
    /// Other intercepts.
    pub intercepts5: Intercepts5,
    reserved_018: [u8; 0x40 - 0x18],
    /// The physical address of the I/O permission map.
    pub iopm_base: u64,
    /// The physical address of the MSR permission map.
    pub msrpm_base: u64,
    /// What the guest's time-stamp counter is ahead of the host's.
    pub tsc_offset: u64,
    /// The guest's address-space identifier; not 0.
    pub asid: u32,
    /// A [`TlbControl`].
    pub tlb_control: u32,
    /// The virtual interrupt control.
    pub interrupt_control: InterruptControl,
    /// [`INTERRUPT_SHADOW`].
    pub interrupt_shadow: u64,
    /// Why the guest exited.
    pub exit_code: u64,
    /// The first information word.
    pub exit_info_1: u64,
    /// The second information word.
    pub exit_info_2: u64,
    /// The event whose delivery the exit interrupted, in EVENTINJ's layout.
    pub exit_interrupt_info: u64,
    /// Nested paging and memory encryption: always 0.
    pub nested_control: u64,
    reserved_098: [u8; 0xa8 - 0x98],
    /// The event to inject.
    pub event_injection: u64,
    reserved_0b0: [u8; 0xc0 - 0xb0],
    /// Fields that the processor may take from its cache; 0 reloads everything.
    pub clean_bits: u64,
    /// The next sequential instruction, with the NRIPS feature.
    pub next_rip: u64,
    reserved_0d0: [u8; 0x400 - 0xd0],
}

/// The state-save area of the VMCB.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SaveArea {
    /// ES.
    pub es: SegmentField,
    /// CS.
    pub cs: SegmentField,
    /// SS.
    pub ss: SegmentField,
    /// DS.
    pub ds: SegmentField,
    /// FS.
    pub fs: SegmentField,
    /// GS.
    pub gs: SegmentField,
    /// The global descriptor table register: limit and base.
    pub gdtr: SegmentField,
    /// The local descriptor table register.
    pub ldtr: SegmentField,
    /// The interrupt descriptor table register: limit and base.
    pub idtr: SegmentField,
    /// The task register.
    pub tr: SegmentField,
    reserved_0a0: [u8; 0xcb - 0xa0],
    /// The current privilege level.
    pub cpl: u8,
    reserved_0cc: [u8; 4],
    /// EFER.
    pub efer: u64,
    reserved_0d8: [u8; 0x148 - 0xd8],
    /// CR4.
    pub cr4: u64,
    /// CR3: the shadow root.
    pub cr3: u64,
    /// CR0.
    pub cr0: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6.
    pub dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    reserved_180: [u8; 0x1d8 - 0x180],
    /// RSP.
    pub rsp: u64,
    reserved_1e0: [u8; 0x1f8 - 0x1e0],
    /// RAX.
    pub rax: u64,
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KernelGSBase.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS.
    pub sysenter_cs: u64,
    /// SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// CR2.
    pub cr2: u64,
    reserved_248: [u8; 0x268 - 0x248],
    /// The guest's page attribute table; used with nested paging only.
    pub g_pat: u64,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 0x1000);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(ControlArea, intercepts5) == 0x14);
    assert!(offset_of!(ControlArea, iopm_base) == 0x40);
    assert!(offset_of!(ControlArea, asid) == 0x58);
    assert!(offset_of!(ControlArea, interrupt_control) == 0x60);
    assert!(offset_of!(ControlArea, exit_code) == 0x70);
    assert!(offset_of!(ControlArea, exit_interrupt_info) == 0x88);
    assert!(offset_of!(ControlArea, event_injection) == 0xa8);
    assert!(offset_of!(ControlArea, clean_bits) == 0xc0);
    assert!(offset_of!(ControlArea, next_rip) == 0xc8);
    assert!(offset_of!(SaveArea, tr) == 0x90);
    assert!(offset_of!(SaveArea, cpl) == 0xcb);
    assert!(offset_of!(SaveArea, efer) == 0xd0);
    assert!(offset_of!(SaveArea, cr4) == 0x148);
    assert!(offset_of!(SaveArea, dr6) == 0x168);
    assert!(offset_of!(SaveArea, rip) == 0x178);
    assert!(offset_of!(SaveArea, rsp) == 0x1d8);
    assert!(offset_of!(SaveArea, rax) == 0x1f8);
    assert!(offset_of!(SaveArea, cr2) == 0x240);
    assert!(offset_of!(SaveArea, g_pat) == 0x268);
};

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_vcpu::registers::Segment;

    #[test]
    fn segments_survive_the_round_trip() {
        for segment in [
            Segment::flat_code32(8),
            Segment::flat_code64(8),
            Segment::flat_data32(16),
            Segment::busy_tss(24, 0x67),
            Segment::UNUSABLE,
        ] {
            assert_eq!(SegmentField::from_segment(&segment).to_segment(), segment);
        }
    }

    #[test]
    fn attributes_are_packed_into_twelve_bits() {
        let field = SegmentField::from_segment(&Segment::flat_code64(8));
        assert_eq!(field.attributes, 0xa9b);
    }
}
