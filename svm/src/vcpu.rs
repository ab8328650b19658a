//! One guest processor: its VMCB, and the guest's own view of what the hardware holds otherwise.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ptr::NonNull;

use umbra_vcpu::address::{Gva, Hpa};
use umbra_vcpu::debug::{DR6_BS, DR6_RESET, DR6_WRITABLE, DR7_RESET, DR7_WRITABLE, Debugging};
use umbra_vcpu::event::{Blocking, Event, EventQueue, Exception, Window, Windows, vector};
use umbra_vcpu::exit::ExitRecord;
use umbra_vcpu::extended_state::ExtendedState;
use umbra_vcpu::host::{HostMemory, PageBlock};
use umbra_vcpu::registers::{
    CodeWidth, ControlRegisters, DescriptorTable, Registers, Segment, SegmentAttributes,
    SegmentRegister,
};
use umbra_vcpu::{
    CodeReader, EntryFailure, Flush, MsrError, PauseExits, PrivilegeLevel, ShadowMode,
    ShadowPaging, TimeSlice, Vcpu,
};
use x86_64::instructions::interrupts;
use x86_64::registers::rflags::RFlags;

use crate::capability::{Capabilities, Control, Features, efer};
use crate::core_state::{Asid, Core, EnableError};
use crate::debug::Debug;
use crate::permission::{ADDRESS_MSRS, msr};
use crate::vmcb::{
    INTERRUPT_SHADOW, Intercepts3, Intercepts4, Intercepts5, InterruptControl, SegmentField,
    TlbControl, Vmcb,
};

const CR0_PE: u64 = 1 << 0;
const CR0_TS: u64 = 1 << 3;
const CR0_ET: u64 = 1 << 4;
const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
/// The bits of CR0 that nothing else is derived from and no rule combines with anything.
const CR0_SIMPLE: u64 = CR0_TS | CR0_WP;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
/// The bits of CR4 that nothing else is derived from and no rule combines with anything.
const CR4_SIMPLE: u64 = CR4_PGE;
const CR4_LA57: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const CR4_CET: u64 = 1 << 23;

/// Exceptions that always exit. #PF belongs to the MMU, #MC to the host; a guest whose #DB or #AC
/// handler raises the same again would otherwise never leave the processor's microcode
/// (CVE-2015-5307, CVE-2015-8104).
const EXCEPTIONS: u32 = 1 << vector::DEBUG
    | 1 << vector::PAGE_FAULT
    | 1 << vector::ALIGNMENT_CHECK
    | 1 << vector::MACHINE_CHECK;

/// One guest processor under SVM.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct SvmVcpu {
    pub(crate) core: Arc<Core>,
    block: PageBlock,
    pub(crate) registers: Registers,
    pub(crate) control: ControlRegisters,
    pub(crate) debug: Debug,
    pub(crate) events: EventQueue,
    pub(crate) extended_state: NonNull<ExtendedState>,
    pub(crate) paging: ShadowPaging,
    pub(crate) tsc_aux: u64,
    pub(crate) asid: Asid,
    pub(crate) flush: PendingFlush,
    /// Whether state that the processor checks changed from outside since the last check.
    pub(crate) unchecked: bool,
    /// The hardware's control registers that have passed the check.
    checked: CheckedControl,
    /// Whether something that the core's guests take turns with must be loaded again.
    pub(crate) reload: bool,
    /// Whether nothing waits for the guest and no window is wanted, and the VMCB says so. Whatever
    /// changes that makes it false, and the next entry finds out.
    pub(crate) usual_events: bool,
    /// Whether the guest has CR4.OSXSAVE set, so that its XCR0 counts.
    pub(crate) uses_xsave: bool,
    pub(crate) window_requested: bool,
    pub(crate) nmi_masked: bool,
    pub(crate) step: Option<Step>,
    /// What the last entry injected, until the exit says whether it was delivered.
    pub(crate) injected: Option<Event>,
    /// Whether exits say where the instruction ends.
    pub(crate) saves_next_rip: bool,
    /// Where the instruction that exited ends, if it is known.
    pub(crate) next_rip: Option<u64>,
}

// SAFETY: the VMCB and the extended state belong to this value alone; the core is shared by a lock.
unsafe impl Send for SvmVcpu {}

/// Control registers that the processor has been found to accept.
#[derive(Clone, Copy, Debug, Default)]
struct CheckedControl {
    /// All bits that were ever set.
    cr0_bits: u64,
    /// All bits that were ever set.
    cr4_bits: u64,
    /// Those that the rules combine, of the last value.
    combined: (u64, u64, u64),
}

impl CheckedControl {
    /// Takes over new values, and tells whether they must be checked: most changes only set and
    /// clear what was set before.
    fn is_news(&mut self, cr0: u64, cr4: u64, efer: u64) -> bool {
        let combined = (cr0 & (CR0_PE | CR0_PG), cr4 & CR4_PAE, efer);
        let is_known = combined == self.combined;
        self.combined = combined;
        self.has_new_bits(cr0, cr4) || !is_known
    }

    /// Takes over bits that no rule combines with others, and tells whether any was never set.
    fn has_new_bits(&mut self, cr0: u64, cr4: u64) -> bool {
        let is_known = cr0 & !self.cr0_bits == 0 && cr4 & !self.cr4_bits == 0;
        self.cr0_bits |= cr0;
        self.cr4_bits |= cr4;
        !is_known
    }
}

/// Translations to drop before the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PendingFlush {
    Nothing,
    Pages {
        pages: [Gva; PAGE_FLUSHES],
        count: u8,
    },
    All,
}

/// More single pages than this are flushed as a whole.
const PAGE_FLUSHES: usize = 8;

/// The driver lets the guest carry out one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub reason: StepReason,
    /// Where the instruction is.
    pub rip: u64,
    /// Whether the guest traps single steps itself.
    pub guest_traps: bool,
    /// The guest's DR6.
    pub dr6: u64,
}

/// Why the guest is stepped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepReason {
    /// IRET ends the blocking of NMIs, and the exit comes before it.
    NmiReturn,
    /// An NMI waits for the end of an interrupt shadow.
    InterruptShadow,
    /// SMSW reads bits of CR0 that the hardware has like the guest.
    StoreMachineStatus,
}

/// What the hardware has in CR0.
const fn hardware_cr0(guest: u64) -> u64 {
    (guest | CR0_ET | CR0_WP | CR0_PG) & !(CR0_CD | CR0_NW)
}

impl SvmVcpu {
    /// A processor in the state after reset (APM vol. 2 table 14-1), with its flags in
    /// [`ControlRegisters`] as the guest sees them.
    ///
    /// # Errors
    /// [`EnableError`] if the host has no memory for it.
    pub fn new(core: Arc<Core>, memory: &dyn HostMemory) -> Result<Self, EnableError> {
        let block = PageBlock::new(1, memory)?;
        let extended_state = NonNull::from(Box::leak(ExtendedState::allocate()?));
        let saves_next_rip = core.capabilities().features.contains(Features::NRIP_SAVE);
        let mut vcpu = Self {
            core,
            block,
            registers: Registers::default(),
            control: ControlRegisters {
                cr0: CR0_ET | CR0_CD | CR0_NW,
                cr2: Gva::new(0),
                cr3: 0,
                cr4: 0,
                cr8: 0,
                efer: 0,
                xcr0: 1,
            },
            debug: Debug::new(),
            events: EventQueue::new(),
            extended_state,
            paging: ShadowPaging {
                root: Hpa::new(0),
                mode: ShadowMode::Pae,
            },
            tsc_aux: 0,
            asid: Asid::NONE,
            flush: PendingFlush::All,
            unchecked: true,
            checked: CheckedControl::default(),
            reload: true,
            usual_events: false,
            uses_xsave: false,
            window_requested: false,
            nmi_masked: false,
            step: None,
            injected: None,
            saves_next_rip,
            next_rip: None,
        };
        vcpu.registers.rip = 0xfff0;
        vcpu.registers.rflags = 2;
        vcpu.reset_vmcb()?;
        Ok(vcpu)
    }

    fn reset_vmcb(&mut self) -> Result<(), EnableError> {
        let core = Arc::clone(&self.core);
        let capabilities = core.capabilities();
        let (intercepts4, intercepts5) = intercepts(capabilities)?;
        let vmcb = self.vmcb_mut();
        let control = &mut vmcb.control;
        // DR0 to DR7, and CR8; the others as the guest's view asks for them.
        control.intercept_dr_reads = 0xff;
        control.intercept_dr_writes = 0xff;
        control.intercept_exceptions = EXCEPTIONS;
        control.intercepts3 = Intercepts3::INTR
            | Intercepts3::NMI
            | Intercepts3::INIT
            | Intercepts3::RDPMC
            | Intercepts3::CPUID
            | Intercepts3::RSM
            | Intercepts3::INVD
            | Intercepts3::HLT
            | Intercepts3::INVLPG
            | Intercepts3::INVLPGA
            | Intercepts3::IOIO_PROT
            | Intercepts3::MSR_PROT
            | Intercepts3::TASK_SWITCH
            | Intercepts3::FERR_FREEZE
            | Intercepts3::SHUTDOWN;
        control.intercepts4 = intercepts4;
        control.intercepts5 = intercepts5;
        control.iopm_base = core.maps.io.physical_address().as_u64();
        control.msrpm_base = core.maps.msr.physical_address().as_u64();
        control.interrupt_control = InterruptControl::V_INTR_MASKING;
        let data = SegmentField {
            attributes: 0x93,
            limit: 0xffff,
            ..SegmentField::default()
        };
        let save = &mut vmcb.save;
        for segment in [
            &mut save.es,
            &mut save.ss,
            &mut save.ds,
            &mut save.fs,
            &mut save.gs,
        ] {
            *segment = data;
        }
        save.cs = SegmentField {
            selector: 0xf000,
            attributes: 0x9b,
            limit: 0xffff,
            base: 0xffff_0000,
        };
        save.gdtr.limit = 0xffff;
        save.idtr.limit = 0xffff;
        save.ldtr = SegmentField {
            attributes: 0x82,
            ..data
        };
        save.tr = SegmentField {
            attributes: 0x8b,
            ..data
        };
        save.dr6 = DR6_RESET;
        save.dr7 = DR7_RESET;
        save.g_pat = 0x0007_0406_0007_0406;
        self.update_control_registers();
        Ok(())
    }

    pub(crate) fn vmcb(&self) -> &Vmcb {
        // SAFETY: the block is one page, aligned and initialized, which only this value and, while
        // `run` is inside the guest, the processor use. Every bit pattern is a valid VMCB.
        unsafe { self.block.pointer().cast::<Vmcb>().as_ref() }
    }

    pub(crate) fn vmcb_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as for `vmcb`, and the exclusive borrow makes this the only reference.
        unsafe { self.block.pointer().cast::<Vmcb>().as_mut() }
    }

    pub(crate) const fn vmcb_address(&self) -> Hpa {
        self.block.physical_address()
    }

    pub(crate) fn has_feature(&self, feature: Features) -> bool {
        self.core.capabilities.features.contains(feature)
    }

    /// How wide the code is that runs now, straight from the VMCB.
    pub(crate) fn width(&self) -> CodeWidth {
        let code_segment = self.vmcb().save.cs.attributes;
        // Long mode has neither real nor virtual-8086 mode.
        if self.control.efer & efer::LMA != 0 && code_segment & SegmentField::LONG != 0 {
            CodeWidth::Bits64
        } else if self.control.cr0 & CR0_PE == 0
            || self.registers.rflags & RFlags::VIRTUAL_8086_MODE.bits() != 0
        {
            CodeWidth::Bits16
        } else if code_segment & SegmentField::DEFAULT_32 != 0 {
            CodeWidth::Bits32
        } else {
            CodeWidth::Bits16
        }
    }

    /// The exceptions that exit now. The hardware has CR4.PKE clear, so that RDPKRU and WRPKRU raise
    /// #UD; a guest that has it set wants them carried out.
    pub(crate) const fn intercepted_exceptions(&self) -> u32 {
        let exceptions = EXCEPTIONS | self.debug.exceptions().bitmap();
        if self.control.cr4 & CR4_PKE == 0 {
            exceptions
        } else {
            exceptions | 1 << vector::INVALID_OPCODE
        }
    }

    pub(crate) fn in_interrupt_shadow(&self) -> bool {
        self.vmcb().control.interrupt_shadow & INTERRUPT_SHADOW != 0
    }

    /// Derives the hardware's control registers, and which accesses to them exit, from the guest's
    /// view and the shadow paging.
    fn update_control_registers(&mut self) {
        let guest = self.control;
        let paging = self.paging;
        let efer_bits = self.core.capabilities.efer_bits;
        let cr0 = hardware_cr0(guest.cr0);
        let mut cr4 =
            (guest.cr4 | CR4_PAE) & !(CR4_LA57 | CR4_PCIDE | CR4_VMXE | CR4_PKE | CR4_CET);
        if paging.mode == ShadowMode::FiveLevel {
            cr4 |= CR4_LA57;
        }
        if guest.cr0 & CR0_PG == 0 {
            // Without paging of its own the guest has no user pages, but the shadow tables do.
            cr4 &= !(CR4_SMEP | CR4_SMAP);
        }
        let mut efer = (guest.efer & efer_bits) | efer::SVME | efer::NXE;
        if paging.mode != ShadowMode::Pae && guest.efer & efer::LMA != 0 {
            efer |= efer::LME | efer::LMA;
        }
        // Everything but CR2 exits when written, and CR0 and CR4 when read if the hardware's value
        // would show.
        let mut reads = 0b1_0000_1000_u16;
        if cr0 != guest.cr0 {
            reads |= 1;
        }
        if cr4 != guest.cr4 {
            reads |= 1 << 4;
        }
        let vmcb = self.vmcb_mut();
        vmcb.save.cr0 = cr0;
        vmcb.save.cr3 = paging.root.as_u64();
        vmcb.save.cr4 = cr4;
        vmcb.save.efer = efer;
        vmcb.save.cr2 = guest.cr2.as_u64();
        vmcb.control.intercept_cr_reads = reads;
        vmcb.control.intercept_cr_writes = !(1 << 2);
        self.uses_xsave = cr4 & CR4_OSXSAVE != 0;
        if self.checked.is_news(cr0, cr4, efer) {
            self.unchecked = true;
        }
        let intercepted = self.vmcb().control.intercept_exceptions;
        let invalid_opcode = 1 << vector::INVALID_OPCODE;
        if (intercepted ^ self.intercepted_exceptions()) & invalid_opcode != 0 {
            self.usual_events = false;
        }
    }

    /// The same after a change of nothing but [`CR0_SIMPLE`].
    fn update_cr0(&mut self) {
        let guest = self.control.cr0;
        let cr0 = hardware_cr0(guest);
        let vmcb = self.vmcb_mut();
        vmcb.save.cr0 = cr0;
        let reads = &mut vmcb.control.intercept_cr_reads;
        *reads = *reads & !1 | u16::from(cr0 != guest);
        if self.checked.has_new_bits(cr0, 0) {
            self.unchecked = true;
        }
    }

    /// The same after a change of nothing but [`CR4_SIMPLE`], which the hardware gets as it is.
    fn update_cr4(&mut self) {
        let simple = self.control.cr4 & CR4_SIMPLE;
        let cr4 = &mut self.vmcb_mut().save.cr4;
        *cr4 = *cr4 & !CR4_SIMPLE | simple;
        if self.checked.has_new_bits(0, simple) {
            self.unchecked = true;
        }
    }

    fn segment_field(&self, register: SegmentRegister) -> SegmentField {
        let save = &self.vmcb().save;
        match register {
            SegmentRegister::Es => save.es,
            SegmentRegister::Cs => save.cs,
            SegmentRegister::Ss => save.ss,
            SegmentRegister::Ds => save.ds,
            SegmentRegister::Fs => save.fs,
            SegmentRegister::Gs => save.gs,
            SegmentRegister::Ldtr => save.ldtr,
            SegmentRegister::Tr => save.tr,
        }
    }

    /// The events that wait, to be changed.
    pub(crate) fn changing_events(&mut self) -> &mut EventQueue {
        self.usual_events = false;
        &mut self.events
    }

    /// The processor ends an instruction that it did not carry out itself.
    #[inline]
    pub(crate) fn complete(&mut self, next_rip: u64) {
        // Only code that is about to cross 4 GiB has to know how wide it is.
        let crosses = (next_rip ^ self.registers.rip) >> 32 != 0;
        self.registers.rip = if crosses && self.width() != CodeWidth::Bits64 {
            next_rip & 0xffff_ffff
        } else {
            next_rip
        };
        self.registers.rflags &= !RFlags::RESUME_FLAG.bits();
        self.vmcb_mut().control.interrupt_shadow = 0;
        if self.registers.rflags & RFlags::TRAP_FLAG.bits() != 0 && self.step.is_none() {
            self.vmcb_mut().save.dr6 |= DR6_BS;
            // A trap after an instruction follows no fault, so nothing can combine with it.
            let _ = self.changing_events().raise(Exception::new(vector::DEBUG));
        }
    }
}

/// The intercepts at offsets 0x010 and 0x014 that this processor has.
fn intercepts(capabilities: &Capabilities) -> Result<(Intercepts4, Intercepts5), EnableError> {
    use crate::capability::Instructions;
    let mut four = Intercepts4::VMRUN
        | Intercepts4::VMMCALL
        | Intercepts4::VMLOAD
        | Intercepts4::VMSAVE
        | Intercepts4::STGI
        | Intercepts4::CLGI
        | Intercepts4::SKINIT
        | Intercepts4::ICEBP
        | Intercepts4::WBINVD
        | Intercepts4::MONITOR
        | Intercepts4::MWAIT;
    let mut five = Intercepts5::empty();
    let optional = [
        (
            Instructions::XSAVE,
            Control::Intercept4(Intercepts4::XSETBV),
        ),
        (Instructions::RDPRU, Control::Intercept4(Intercepts4::RDPRU)),
        (
            Instructions::INVPCID,
            Control::Intercept5(Intercepts5::INVPCID),
        ),
        (
            Instructions::MCOMMIT,
            Control::Intercept5(Intercepts5::MCOMMIT),
        ),
        (
            Instructions::INVLPGB,
            Control::Intercept5(Intercepts5::INVLPGB.union(Intercepts5::TLBSYNC)),
        ),
    ];
    for (instruction, control) in optional {
        if capabilities.instructions.contains(instruction) {
            match capabilities.control(control)? {
                Control::Intercept4(bit) => four |= bit,
                Control::Intercept5(bit) => five |= bit,
                Control::Tlb(_) => {}
            }
        }
    }
    Ok((four, five))
}

impl Drop for SvmVcpu {
    fn drop(&mut self) {
        self.core.release(self.extended_state);
        // SAFETY: the pointer came from a leaked box, and no core refers to it any more.
        drop(unsafe { Box::from_raw(self.extended_state.as_ptr()) });
    }
}

/// Whether `value` is a canonical address with 48 or, with LA57, 57 bits.
const fn is_canonical(value: u64, cr4: u64) -> bool {
    let shift = if cr4 & CR4_LA57 != 0 { 7 } else { 16 };
    ((value << shift).cast_signed() >> shift).cast_unsigned() == value
}

impl Vcpu for SvmVcpu {
    fn registers(&self) -> &Registers {
        &self.registers
    }

    fn registers_mut(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        let mut segment = self.segment_field(register).to_segment();
        if register == SegmentRegister::Ss {
            // The processor keeps the privilege level apart, and a null SS has none.
            let level = u32::from(self.vmcb().save.cpl & 3) << 5;
            let mask = SegmentAttributes::DPL_LOW | SegmentAttributes::DPL_HIGH;
            segment.attributes =
                (segment.attributes - mask) | SegmentAttributes::from_bits_retain(level);
        }
        segment
    }

    fn set_segment(&mut self, register: SegmentRegister, segment: Segment) {
        let field = SegmentField::from_segment(&segment);
        let save = &mut self.vmcb_mut().save;
        match register {
            SegmentRegister::Es => save.es = field,
            SegmentRegister::Cs => save.cs = field,
            SegmentRegister::Ss => {
                save.ss = field;
                save.cpl = segment.privilege_level();
            }
            SegmentRegister::Ds => save.ds = field,
            SegmentRegister::Fs => save.fs = field,
            SegmentRegister::Gs => save.gs = field,
            SegmentRegister::Ldtr => save.ldtr = field,
            SegmentRegister::Tr => save.tr = field,
        }
        self.unchecked = true;
    }

    fn gdtr(&self) -> DescriptorTable {
        table(self.vmcb().save.gdtr)
    }

    fn set_gdtr(&mut self, table: DescriptorTable) {
        self.vmcb_mut().save.gdtr = table_field(table);
    }

    fn idtr(&self) -> DescriptorTable {
        table(self.vmcb().save.idtr)
    }

    fn set_idtr(&mut self, table: DescriptorTable) {
        self.vmcb_mut().save.idtr = table_field(table);
    }

    fn privilege_level(&self) -> PrivilegeLevel {
        PrivilegeLevel::from_bits(self.vmcb().save.cpl)
    }

    fn code_width(&self) -> CodeWidth {
        self.width()
    }

    fn control_registers(&self) -> ControlRegisters {
        ControlRegisters {
            cr2: Gva::new(self.vmcb().save.cr2),
            ..self.control
        }
    }

    fn set_control_registers(&mut self, registers: ControlRegisters) {
        let old = core::mem::replace(&mut self.control, registers);
        let cr0 = old.cr0 ^ registers.cr0;
        let cr4 = old.cr4 ^ registers.cr4;
        if (cr0 & !CR0_SIMPLE) | (cr4 & !CR4_SIMPLE) | (old.efer ^ registers.efer) != 0 {
            self.update_control_registers();
            return;
        }
        if cr0 != 0 {
            self.update_cr0();
        }
        if cr4 != 0 {
            self.update_cr4();
        }
        self.vmcb_mut().save.cr2 = registers.cr2.as_u64();
    }

    fn set_shadow_paging(&mut self, paging: ShadowPaging) {
        if self.paging == paging {
            return;
        }
        // VMRUN with another CR3 keeps the translations of the identifier (APM vol. 2 15.16).
        self.flush(Flush::All);
        let old = core::mem::replace(&mut self.paging, paging);
        if old.mode == paging.mode {
            self.vmcb_mut().save.cr3 = paging.root.as_u64();
        } else {
            self.control.cr2 = Gva::new(self.vmcb().save.cr2);
            self.update_control_registers();
        }
    }

    fn hardware_msr(&self, index: u32) -> Option<u64> {
        let save = &self.vmcb().save;
        Some(match index {
            msr::FS_BASE => save.fs.base,
            msr::GS_BASE => save.gs.base,
            msr::KERNEL_GS_BASE => save.kernel_gs_base,
            msr::STAR => save.star,
            msr::LSTAR => save.lstar,
            msr::CSTAR => save.cstar,
            msr::SFMASK => save.sfmask,
            msr::SYSENTER_CS => save.sysenter_cs,
            msr::SYSENTER_ESP => save.sysenter_esp,
            msr::SYSENTER_EIP => save.sysenter_eip,
            msr::TSC_AUX => self.tsc_aux,
            _ => return None,
        })
    }

    fn set_hardware_msr(&mut self, index: u32, value: u64) -> Result<(), MsrError> {
        if ADDRESS_MSRS.contains(&index) && !is_canonical(value, self.control.cr4) {
            return Err(MsrError::InvalidValue);
        }
        let save = &mut self.vmcb_mut().save;
        match index {
            msr::FS_BASE => save.fs.base = value,
            msr::GS_BASE => save.gs.base = value,
            msr::KERNEL_GS_BASE => save.kernel_gs_base = value,
            msr::STAR => save.star = value,
            msr::LSTAR => save.lstar = value,
            msr::CSTAR => save.cstar = value,
            msr::SFMASK => save.sfmask = value & 0xffff_ffff,
            msr::SYSENTER_CS => save.sysenter_cs = value & 0xffff,
            msr::SYSENTER_ESP => save.sysenter_esp = value,
            msr::SYSENTER_EIP => save.sysenter_eip = value,
            msr::TSC_AUX if value >> 32 != 0 => return Err(MsrError::InvalidValue),
            msr::TSC_AUX => {
                self.tsc_aux = value;
                self.reload = true;
            }
            _ => return Err(MsrError::Unknown),
        }
        Ok(())
    }

    fn set_tsc_offset(&mut self, offset: i64) {
        self.vmcb_mut().control.tsc_offset = offset.cast_unsigned();
    }

    fn set_time_slice(&mut self, _ticks: Option<u64>) -> TimeSlice {
        TimeSlice::HostTimer
    }

    fn set_pause_exits(&mut self, exits: PauseExits) {
        let intercepts = &mut self.vmcb_mut().control.intercepts3;
        intercepts.set(Intercepts3::PAUSE, exits == PauseExits::On);
    }

    fn events(&self) -> &EventQueue {
        &self.events
    }

    fn events_mut(&mut self) -> &mut EventQueue {
        self.changing_events()
    }

    fn windows(&self) -> Windows {
        // SVM has one shadow for STI and MOV SS, so it keeps NMIs away too.
        let shadow = self.in_interrupt_shadow();
        let enabled = self.registers.rflags & RFlags::INTERRUPT_FLAG.bits() != 0;
        let window = |open| if open { Window::Open } else { Window::Closed };
        Windows {
            interrupt: window(enabled && !shadow),
            nmi: window(!self.nmi_masked && !shadow),
        }
    }

    fn request_interrupt_window(&mut self) {
        self.window_requested = true;
        self.usual_events = false;
    }

    fn flush(&mut self, flush: Flush) {
        self.reload = true;
        if flush == Flush::All {
            self.flush = PendingFlush::All;
            return;
        }
        self.flush = match (flush, self.flush) {
            (Flush::All, _) | (_, PendingFlush::All) => PendingFlush::All,
            (Flush::Page(page), PendingFlush::Nothing) => PendingFlush::Pages {
                pages: [page; PAGE_FLUSHES],
                count: 1,
            },
            (Flush::Page(page), PendingFlush::Pages { mut pages, count }) => {
                match pages.get_mut(usize::from(count)) {
                    Some(slot) => {
                        *slot = page;
                        PendingFlush::Pages {
                            pages,
                            count: count + 1,
                        }
                    }
                    None => PendingFlush::All,
                }
            }
        };
    }

    fn skip_instruction(&mut self) {
        debug_assert!(
            self.next_rip.is_some(),
            "the last exit was not caused by an instruction"
        );
        if let Some(next_rip) = self.next_rip.take() {
            self.complete(next_rip);
        }
    }

    fn finish_instruction(&mut self, next_rip: u64) {
        self.next_rip = None;
        self.complete(next_rip);
    }

    fn set_instruction_end(&mut self, next_rip: u64) {
        self.next_rip = Some(next_rip);
    }

    fn block_interrupts(&mut self, blocking: Blocking) {
        match blocking {
            Blocking::Sti | Blocking::MovSs => {
                self.vmcb_mut().control.interrupt_shadow = INTERRUPT_SHADOW;
            }
            Blocking::Nmi => self.nmi_masked = true,
        }
        self.usual_events = false;
    }

    fn unblock_nmis(&mut self) {
        self.nmi_masked = false;
        self.usual_events = false;
    }

    fn debug_register(&mut self, number: u8) -> u64 {
        match number {
            6 => self.dr6(),
            7 => self.debug.guest().dr7,
            _ => self.debug.guest().addresses[usize::from(number & 3)],
        }
    }

    fn set_debug_register(&mut self, number: u8, value: u64) {
        if number == 6 {
            self.set_dr6(value & DR6_WRITABLE | DR6_RESET);
            return;
        }
        self.change_debug_registers(|registers| match number {
            7 => registers.dr7 = value & DR7_WRITABLE | DR7_RESET,
            _ => registers.addresses[usize::from(number & 3)] = value,
        });
    }

    fn set_debugging(&mut self, debugging: &Debugging) {
        self.change_debugging(debugging);
    }

    fn is_enterable(&mut self) -> bool {
        // Real mode is a guest state like any other (APM vol. 2 15.19).
        true
    }

    fn extended_state_mut(&mut self) -> &mut ExtendedState {
        self.reload = true;
        // SAFETY: interrupts are off, this core has the driver's record, and the state lives as long
        // as this value.
        interrupts::without_interrupts(|| unsafe {
            self.core
                .shared
                .lock()
                .suspend_extended_state(self.extended_state);
        });
        // SAFETY: the state is this value's own, and the processor does not hold it now.
        unsafe { self.extended_state.as_mut() }
    }

    fn run(
        &mut self,
        code: &mut dyn CodeReader,
        stop: &mut ExitRecord,
    ) -> Result<(), EntryFailure> {
        self.run_until_exit(code, stop)
    }
}

const fn table(field: SegmentField) -> DescriptorTable {
    DescriptorTable {
        base: Gva::new(field.base),
        limit: field.limit as u16,
    }
}

fn table_field(table: DescriptorTable) -> SegmentField {
    SegmentField {
        base: table.base.as_u64(),
        limit: table.limit.into(),
        ..SegmentField::default()
    }
}

/// The TLB control that flushes this guest's translations, if the processor has it.
pub(crate) fn flush_guest(capabilities: &Capabilities) -> Option<TlbControl> {
    capabilities
        .control(Control::Tlb(TlbControl::FlushGuest))
        .is_ok()
        .then_some(TlbControl::FlushGuest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_news_are_checked() {
        let mut checked = CheckedControl::default();
        assert!(checked.is_news(CR0_PE | CR0_PG, CR4_PAE, efer::LMA));
        assert!(!checked.is_news(CR0_PE | CR0_PG, CR4_PAE, efer::LMA));
        assert!(
            checked.is_news(CR0_PE | CR0_PG, CR4_PAE | CR4_SMEP, efer::LMA),
            "a new bit"
        );
        assert!(!checked.is_news(CR0_PE | CR0_PG, CR4_PAE, efer::LMA));
        assert!(!checked.is_news(CR0_PE | CR0_PG, CR4_PAE | CR4_SMEP, efer::LMA));
        assert!(
            checked.is_news(CR0_PE, CR4_PAE, efer::LMA),
            "another combination"
        );
        assert!(checked.is_news(CR0_PE | CR0_PG, CR4_PAE, efer::LMA));
        assert!(checked.is_news(CR0_PE | CR0_PG, CR4_PAE, efer::LMA | efer::LME));
        assert!(checked.is_news(CR0_PE | CR0_PG, 0, efer::LMA | efer::LME));
    }

    #[test]
    fn canonical_addresses() {
        for (value, four, five) in [
            (0, true, true),
            (0x7fff_ffff_ffff, true, true),
            (0x8000_0000_0000, false, true),
            (0xffff_8000_0000_0000, true, true),
            (0x0100_0000_0000_0000, false, false),
        ] {
            assert_eq!(is_canonical(value, 0), four, "{value:#x}");
            assert_eq!(is_canonical(value, CR4_LA57), five, "{value:#x}");
        }
    }
}
