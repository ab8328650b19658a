//! One guest processor on VMX.
//!
//! Protocol: general registers, RIP and RFLAGS are copied out of the VMCS after every exit and back
//! before an entry if they changed. Segments, descriptor tables and the pass-through registers live in
//! the VMCS or in the processor and are read there when asked for. Control registers live here, as the
//! guest sees them; the hardware's values follow before the next entry. For a guest in real mode the
//! segments live here as well, see `real_mode`. Whatever touches the VMCS
//! runs with interrupts off.

use alloc::boxed::Box;
use alloc::rc::Rc;
use core::arch::x86_64::_rdtsc;
use core::cell::Cell;
use core::ptr::NonNull;

use umbra_vcpu::address::Gva;
use umbra_vcpu::debug::{DR6_BS, DR6_RESET, DR6_WRITABLE, DR7_RESET, DR7_WRITABLE, Debugging};
use umbra_vcpu::event::{Blocking, EventQueue, Window, Windows, vector};
use umbra_vcpu::exit::ExitRecord;
use umbra_vcpu::extended_state::ExtendedState;
use umbra_vcpu::host::{HostMemory, PageBlock, PageBlockError};
use umbra_vcpu::instruction;
use umbra_vcpu::registers::{
    CodeWidth, ControlRegisters, DescriptorTable, Registers, Segment, SegmentAttributes,
    SegmentRegister,
};
use umbra_vcpu::{
    CodeReader, EntryFailure, Flush, MsrError, PauseExits, PrivilegeLevel, ShadowPaging, TimeSlice,
    Vcpu,
};
use x86_64::instructions::interrupts;
use x86_64::registers::control::Cr4Flags;
use x86_64::registers::rflags::RFlags;

use crate::bank::Bank;
use crate::check::{self, Interruptibility};
use crate::controls::PrimaryControls;
use crate::entry::EntryKind;
use crate::host::{self, Core, Vmx};
use crate::instructions::{self, CurrentVmcs, Invvpid};
use crate::paging::{self, HardwareControl};
use crate::real_mode::{LOADABLE, RealMode};
use crate::{fields, msr};

mod debug;
mod run;

/// The exceptions that always exit: #PF for shadow paging; #DB and #AC because a guest can make their
/// delivery raise them again for ever (CVE-2015-5307, CVE-2015-8104); #MC is the host's.
const INTERCEPTED_EXCEPTIONS: u32 = 1 << vector::PAGE_FAULT
    | 1 << vector::DEBUG
    | 1 << vector::ALIGNMENT_CHECK
    | 1 << vector::MACHINE_CHECK;

/// The exceptions that exit for a guest with this CR4. The hardware has CR4.PKE clear, so that RDPKRU
/// and WRPKRU raise #UD; a guest that has it set wants them carried out.
const fn intercepted_exceptions(guest_cr4: u64) -> u32 {
    if guest_cr4 & Cr4Flags::PROTECTION_KEY_USER.bits() == 0 {
        INTERCEPTED_EXCEPTIONS
    } else {
        INTERCEPTED_EXCEPTIONS | 1 << vector::INVALID_OPCODE
    }
}

/// The guest runs no longer than this without an exit, in ticks of the time-stamp counter, if there
/// is a preemption timer. Real processors exit for the host's interrupts anyway; Bochs 2.7 holds
/// them back while the guest was entered with RFLAGS.IF clear and has not changed it.
const LONGEST_RUN: u64 = 1 << 22;

/// Where exits save the preemption timer, it is wound up with every so many entries only: what the host
/// does between delays the end of the time slice.
const TIMER_ENTRIES: u8 = 16;

/// In pending debug exceptions, as in DR6: a single step (SDM vol. 3C table 25-4).
const SINGLE_STEP: u64 = DR6_BS;

/// One guest processor.
#[derive(Debug)]
pub struct VmxVcpu {
    registers: Registers,
    events: EventQueue,
    control: ControlRegisters,
    paging: Option<ShadowPaging>,
    interruptibility: Interruptibility,
    pending: Pending,
    /// What the VMCS does not hold while the guest is in real mode.
    real_mode: Option<RealMode>,
    /// The primary controls without requests for windows.
    primary: PrimaryControls,
    /// What a debugger wants.
    debugging: Debugging,
    /// The guest's debug registers, while a debugger has breakpoints.
    kept: Option<debug::Kept>,
    /// Where the instruction ends that is carried out as if it had exited.
    instruction_end: Option<u64>,
    /// When the time slice ends, in ticks of the host's time-stamp counter.
    deadline: Option<u64>,
    /// The guest's CR0 and CR4 in the VMCS, as far as they were read since the last exit.
    hardware: Cell<Option<(u64, u64)>>,
    /// Entries until the preemption timer is wound up anew.
    timer_entries: u8,
    launch: EntryKind,
    written: Written,
    host_rsp: u64,
    vpid: Option<u16>,
    bank: Rc<Bank>,
    extended: NonNull<ExtendedState>,
    efer_area: Option<PageBlock>,
    vmcs: PageBlock,
    core: Rc<Core>,
}

bitflags::bitflags! {
    /// What the next entry has to do first.
    #[derive(Clone, Copy, Debug)]
    struct Pending: u8 {
        /// Derive the hardware's control registers: the guest's or the paging changed.
        const CONTROL = 1 << 0;
        /// Check the state: it was changed from outside.
        const CHECK = 1 << 1;
        /// Drop all translations.
        const FLUSH = 1 << 2;
        /// Ask for an exit when the guest can take an interrupt.
        const WINDOW = 1 << 3;
    }
}

/// What the VMCS holds, so that unchanged fields are not written again.
#[derive(Debug, Default)]
struct Written {
    rip: u64,
    rsp: u64,
    rflags: u64,
    interruptibility: u32,
    control: HardwareControl,
    /// The bits of CR4 that have passed the check.
    checked_cr4: u64,
    primary: u32,
    exceptions: u32,
    entry: u32,
    host_fs_base: u64,
}

impl VmxVcpu {
    /// A processor as a Multiboot loader leaves it: 32-bit protected mode without paging, flat
    /// segments with selectors 8 and 16, interrupts off, RIP 0.
    ///
    /// # Errors
    /// [`PageBlockError`] if the host has no memory for the VMCS.
    pub fn new(vmx: &Vmx, memory: &dyn HostMemory) -> Result<Self, PageBlockError> {
        let core = vmx.core();
        let vmcs = PageBlock::new(1, memory)?;
        // SAFETY: the block is ours and at least four bytes long.
        unsafe {
            vmcs.pointer()
                .cast::<u32>()
                .write(core.capabilities.revision);
        }
        let efer_area = if core.capabilities.has_efer_controls() {
            None
        } else {
            Some(PageBlock::new(1, memory)?)
        };
        let extended = NonNull::from(Box::leak(ExtendedState::allocate()?));
        let vpid = interrupts::without_interrupts(|| {
            // SAFETY: the page is this vCPU's own.
            unsafe { core.clear(vmcs.physical_address()) };
            core.allocate_vpid()
        });
        let mut registers = Registers::default();
        registers.rflags = check::FIXED_FLAGS;
        let mut vcpu = Self {
            registers,
            events: EventQueue::new(),
            control: ControlRegisters {
                cr0: 0x11,
                cr2: Gva::new(0),
                cr3: 0,
                cr4: 0,
                cr8: 0,
                efer: 0,
                xcr0: 1,
            },
            paging: None,
            interruptibility: Interruptibility::empty(),
            pending: Pending::CONTROL | Pending::CHECK,
            real_mode: None,
            primary: core.capabilities.primary,
            debugging: Debugging::default(),
            kept: None,
            instruction_end: None,
            deadline: None,
            hardware: Cell::new(None),
            timer_entries: 0,
            launch: EntryKind::Launch,
            written: Written::default(),
            host_rsp: 0,
            vpid,
            bank: Rc::new(Bank::new()),
            extended,
            efer_area,
            vmcs,
            core,
        };
        vcpu.initialize();
        for register in SegmentRegister::ALL {
            vcpu.set_segment(
                register,
                match register {
                    SegmentRegister::Cs => Segment::flat_code32(8),
                    SegmentRegister::Ldtr => Segment::UNUSABLE,
                    SegmentRegister::Tr => Segment::busy_tss(0x18, 0x67),
                    _ => Segment::flat_data32(0x10),
                },
            );
        }
        Ok(vcpu)
    }

    /// Writes every field that keeps its value, and the first value of those that are cached.
    fn initialize(&mut self) {
        const PLE_GAP: u32 = 128;
        const PLE_WINDOW: u32 = 4096;
        let core = Rc::clone(&self.core);
        let capabilities = &core.capabilities;
        self.written = Written {
            primary: capabilities.primary.bits(),
            entry: capabilities.entry.bits(),
            rflags: self.registers.rflags,
            exceptions: INTERCEPTED_EXCEPTIONS,
            host_fs_base: host::fs_base(),
            ..Written::default()
        };
        let bitmap = core.msr_bitmap.physical_address();
        let written = &self.written;
        self.with_vmcs(|vmcs| {
            vmcs.write(fields::PIN_CONTROLS, capabilities.pin.bits());
            vmcs.write(fields::PRIMARY_CONTROLS, written.primary);
            if let Some(secondary) = capabilities.secondary {
                use crate::controls::SecondaryControls;
                let mut secondary = secondary;
                if self.vpid.is_none() {
                    secondary.remove(SecondaryControls::ENABLE_VPID);
                }
                vmcs.write(fields::SECONDARY_CONTROLS, secondary.bits());
                if secondary.contains(SecondaryControls::PAUSE_LOOP_EXITING) {
                    vmcs.write(fields::PLE_GAP, PLE_GAP);
                    vmcs.write(fields::PLE_WINDOW, PLE_WINDOW);
                }
            }
            vmcs.write(fields::EXIT_CONTROLS, capabilities.exit.bits());
            vmcs.write(fields::ENTRY_CONTROLS, written.entry);
            if let Some(vpid) = self.vpid {
                vmcs.write(fields::VPID, vpid);
            }
            vmcs.write(fields::MSR_BITMAPS, bitmap.as_u64());
            vmcs.write(fields::EXCEPTION_BITMAP, INTERCEPTED_EXCEPTIONS);
            // Every page fault exits, whatever its error code (SDM vol. 3C 26.2).
            vmcs.write(fields::PAGE_FAULT_ERROR_CODE_MASK, 0);
            vmcs.write(fields::PAGE_FAULT_ERROR_CODE_MATCH, 0);
            vmcs.write(fields::CR3_TARGET_COUNT, 0);
            vmcs.write(fields::EXIT_MSR_STORE_COUNT, 0);
            let areas = u32::from(self.efer_area.is_some());
            vmcs.write(fields::EXIT_MSR_LOAD_COUNT, areas);
            vmcs.write(fields::ENTRY_MSR_LOAD_COUNT, areas);
            if let Some(area) = &self.efer_area {
                let address = area.physical_address();
                vmcs.write(fields::ENTRY_MSR_LOAD_ADDRESS, address.as_u64());
                vmcs.write(fields::EXIT_MSR_LOAD_ADDRESS, address.as_u64() + 16);
            }
            vmcs.write(fields::ENTRY_INTERRUPTION_INFORMATION, 0);
            vmcs.write(fields::TSC_OFFSET, 0);
            vmcs.write(fields::VMCS_LINK_POINTER, u64::MAX);
            vmcs.write(fields::CR0_MASK, !paging::CR0_GUEST_OWNED);
            vmcs.write(fields::CR4_MASK, !paging::CR4_GUEST_OWNED);
            vmcs.write(fields::CR0_READ_SHADOW, written.control.cr0_shadow);
            vmcs.write(fields::CR4_READ_SHADOW, written.control.cr4_shadow);
            vmcs.write(fields::GUEST_DEBUGCTL, 0);
            vmcs.write(fields::GUEST_DR7, 0x400);
            vmcs.write(fields::GUEST_ACTIVITY_STATE, 0);
            vmcs.write(fields::GUEST_INTERRUPTIBILITY, 0);
            vmcs.write(fields::GUEST_PENDING_DEBUG_EXCEPTIONS, 0);
            vmcs.write(fields::GUEST_SYSENTER_CS, 0);
            vmcs.write(fields::GUEST_SYSENTER_ESP, 0);
            vmcs.write(fields::GUEST_SYSENTER_EIP, 0);
            vmcs.write(fields::GUEST_RIP, written.rip);
            vmcs.write(fields::GUEST_RSP, written.rsp);
            vmcs.write(fields::GUEST_RFLAGS, written.rflags);
            host::write_constant_host_state(vmcs, capabilities);
            vmcs.write(fields::HOST_FS_BASE, written.host_fs_base);
        });
        if let Some(area) = &self.efer_area {
            write_efer_entry(area, EferSide::Host, host::host_efer());
        }
    }

    fn with_vmcs<R>(&self, access: impl FnOnce(&CurrentVmcs) -> R) -> R {
        interrupts::without_interrupts(|| access(&self.current()))
    }

    /// Makes this vCPU's VMCS current. Interrupts are off as long as the token lives.
    #[inline]
    fn current(&self) -> CurrentVmcs {
        // SAFETY: the VMCS is this live vCPU's own and was cleared when it was made.
        unsafe { self.core.make_current(self.vmcs.physical_address()) }
    }

    /// Moves the segments out of the VMCS when the guest enters real mode, and back when it leaves.
    fn change_mode(&mut self) {
        match (paging::is_real_mode(&self.control), self.real_mode) {
            (true, None) => {
                let state = self.with_vmcs(|vmcs| {
                    let segments =
                        SegmentRegister::ALL.map(|register| read_segment(vmcs, register));
                    let sysenter_cs = vmcs.read(fields::GUEST_SYSENTER_CS);
                    vmcs.write(fields::GUEST_SYSENTER_CS, 0);
                    RealMode::new(segments, sysenter_cs)
                });
                self.real_mode = Some(state);
            }
            (false, Some(state)) => {
                self.real_mode = None;
                self.with_vmcs(|vmcs| {
                    for register in SegmentRegister::ALL {
                        write_segment(vmcs, register, &state.segments[register as usize]);
                    }
                    vmcs.write(fields::GUEST_SYSENTER_CS, state.sysenter_cs);
                });
                self.pending.insert(Pending::CHECK);
            }
            _ => {}
        }
    }

    /// Gives the VMCS what virtual-8086 mode wants.
    fn write_real_mode(&self, vmcs: &CurrentVmcs) {
        let Some(real_mode) = &self.real_mode else {
            return;
        };
        for register in SegmentRegister::ALL {
            write_segment(vmcs, register, &real_mode.hardware(register));
        }
    }

    /// Takes over the selectors that the guest has loaded in real mode.
    fn read_real_mode(&mut self, vmcs: &CurrentVmcs) {
        let Some(real_mode) = &mut self.real_mode else {
            return;
        };
        for register in LOADABLE {
            let fields = fields::guest_segment(register);
            let segment = &mut real_mode.segments[register as usize];
            segment.selector = vmcs.read(fields.selector);
            segment.base = Gva::new(vmcs.read(fields.base));
        }
    }

    /// Whether an entry would deliver an event.
    fn is_event_due(&self) -> bool {
        let mut events = self.events;
        events.next_event(self.windows()).is_some()
    }

    /// The guest's CR0 and CR4 with the bits that it changes without an exit.
    fn refresh(&self, control: &mut ControlRegisters) {
        if self.pending.contains(Pending::CONTROL) || self.real_mode.is_some() {
            // What was set from outside is newer than the VMCS, and in real mode the guest changes
            // nothing itself.
            return;
        }
        let (cr0, cr4) = self.hardware.get().unwrap_or_else(|| {
            let read =
                self.with_vmcs(|vmcs| (vmcs.read(fields::GUEST_CR0), vmcs.read(fields::GUEST_CR4)));
            self.hardware.set(Some(read));
            read
        });
        control.cr0 = merge(control.cr0, cr0, paging::CR0_GUEST_OWNED);
        control.cr4 = merge(control.cr4, cr4, paging::CR4_GUEST_OWNED);
    }
}

/// `base` with the bits in `mask` from `other`.
const fn merge(base: u64, other: u64, mask: u64) -> u64 {
    base & !mask | other & mask
}

/// Which of the two MSR-load areas, 16 bytes each (SDM vol. 3C table 25-15).
#[derive(Clone, Copy)]
enum EferSide {
    Guest,
    Host,
}

fn write_efer_entry(area: &PageBlock, side: EferSide, value: u64) {
    let index = match side {
        EferSide::Guest => 0,
        EferSide::Host => 1,
    };
    // SAFETY: the block is this vCPU's own page; the processor reads it only during entries and exits.
    unsafe {
        area.pointer()
            .cast::<[u64; 2]>()
            .add(index)
            .write_volatile([u64::from(msr::EFER), value]);
    }
}

fn read_segment(vmcs: &CurrentVmcs, register: SegmentRegister) -> Segment {
    let fields = fields::guest_segment(register);
    Segment {
        selector: vmcs.read(fields.selector),
        base: Gva::new(vmcs.read(fields.base)),
        limit: vmcs.read(fields.limit),
        attributes: SegmentAttributes::from_bits_retain(vmcs.read(fields.access_rights)),
    }
}

fn write_segment(vmcs: &CurrentVmcs, register: SegmentRegister, segment: &Segment) {
    let fields = fields::guest_segment(register);
    vmcs.write(fields.selector, segment.selector);
    vmcs.write(fields.base, segment.base.as_u64());
    vmcs.write(fields.limit, segment.limit);
    vmcs.write(fields.access_rights, segment.attributes.bits());
}

fn read_table(
    vmcs: &CurrentVmcs,
    base: fields::Field<fields::Natural>,
    limit: fields::Field<fields::Bits32>,
) -> DescriptorTable {
    DescriptorTable {
        base: Gva::new(vmcs.read(base)),
        limit: vmcs.read(limit) as u16,
    }
}

impl Vcpu for VmxVcpu {
    #[inline]
    fn registers(&self) -> &Registers {
        &self.registers
    }

    #[inline]
    fn registers_mut(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        if let Some(real_mode) = &self.real_mode {
            return real_mode.segments[register as usize];
        }
        self.with_vmcs(|vmcs| read_segment(vmcs, register))
    }

    fn set_segment(&mut self, register: SegmentRegister, segment: Segment) {
        if let Some(real_mode) = &mut self.real_mode {
            real_mode.segments[register as usize] = segment;
            return;
        }
        self.with_vmcs(|vmcs| write_segment(vmcs, register, &segment));
        self.pending.insert(Pending::CHECK);
    }

    fn gdtr(&self) -> DescriptorTable {
        self.with_vmcs(|vmcs| read_table(vmcs, fields::GUEST_GDTR_BASE, fields::GUEST_GDTR_LIMIT))
    }

    fn set_gdtr(&mut self, table: DescriptorTable) {
        self.with_vmcs(|vmcs| {
            vmcs.write(fields::GUEST_GDTR_BASE, table.base.as_u64());
            vmcs.write(fields::GUEST_GDTR_LIMIT, u32::from(table.limit));
        });
        self.pending.insert(Pending::CHECK);
    }

    fn idtr(&self) -> DescriptorTable {
        self.with_vmcs(|vmcs| read_table(vmcs, fields::GUEST_IDTR_BASE, fields::GUEST_IDTR_LIMIT))
    }

    fn set_idtr(&mut self, table: DescriptorTable) {
        self.with_vmcs(|vmcs| {
            vmcs.write(fields::GUEST_IDTR_BASE, table.base.as_u64());
            vmcs.write(fields::GUEST_IDTR_LIMIT, u32::from(table.limit));
        });
        self.pending.insert(Pending::CHECK);
    }

    fn privilege_level(&self) -> PrivilegeLevel {
        let attributes = self.real_mode.map_or_else(
            || {
                self.with_vmcs(|vmcs| {
                    vmcs.read(fields::guest_segment(SegmentRegister::Ss).access_rights)
                })
            },
            |real_mode| {
                real_mode.segments[SegmentRegister::Ss as usize]
                    .attributes
                    .bits()
            },
        );
        PrivilegeLevel::from_bits((attributes >> 5) as u8)
    }

    fn code_width(&self) -> CodeWidth {
        // None of the bits that the guest changes without an exit matters.
        let rflags = self.registers.rflags;
        if self.real_mode.is_some() {
            return instruction::code_width(&self.control, rflags, &Segment::UNUSABLE);
        }
        let attributes = self
            .with_vmcs(|vmcs| vmcs.read(fields::guest_segment(SegmentRegister::Cs).access_rights));
        let code_segment = Segment {
            attributes: SegmentAttributes::from_bits_retain(attributes),
            ..Segment::UNUSABLE
        };
        instruction::code_width(&self.control, rflags, &code_segment)
    }

    fn control_registers(&self) -> ControlRegisters {
        let mut control = self.control;
        self.refresh(&mut control);
        control
    }

    fn set_control_registers(&mut self, registers: ControlRegisters) {
        let old = self.control_registers();
        if (old.cr0, old.cr4, old.efer) != (registers.cr0, registers.cr4, registers.efer) {
            self.pending.insert(Pending::CONTROL);
        }
        self.control = registers;
        self.change_mode();
    }

    fn set_shadow_paging(&mut self, paging: ShadowPaging) {
        let old = self.paging.replace(paging);
        if old == Some(paging) {
            return;
        }
        self.with_vmcs(|vmcs| vmcs.write(fields::GUEST_CR3, paging.root.as_u64()));
        // Translations are tagged with the vCPU, not with the root.
        self.pending.insert(Pending::FLUSH);
        if old.map(|old| old.mode) != Some(paging.mode) {
            // The cached CR0 and CR4 may lack what the guest changed itself.
            let mut control = self.control;
            self.refresh(&mut control);
            self.control = control;
            self.pending.insert(Pending::CONTROL);
            self.pending.insert(Pending::CHECK);
        }
    }

    fn hardware_msr(&self, index: u32) -> Option<u64> {
        let segment_base = |register| self.segment(register).base.as_u64();
        Some(match index {
            msr::FS_BASE => segment_base(SegmentRegister::Fs),
            msr::GS_BASE => segment_base(SegmentRegister::Gs),
            msr::SYSENTER_CS => u64::from(self.real_mode.map_or_else(
                || self.with_vmcs(|vmcs| vmcs.read(fields::GUEST_SYSENTER_CS)),
                |real_mode| real_mode.sysenter_cs,
            )),
            msr::SYSENTER_ESP => self.with_vmcs(|vmcs| vmcs.read(fields::GUEST_SYSENTER_ESP)),
            msr::SYSENTER_EIP => self.with_vmcs(|vmcs| vmcs.read(fields::GUEST_SYSENTER_EIP)),
            _ => interrupts::without_interrupts(|| self.core.bank.read(&self.bank, index))?,
        })
    }

    fn set_hardware_msr(&mut self, index: u32, value: u64) -> Result<(), MsrError> {
        if !msr::PASS_THROUGH.contains(&index) {
            return Err(MsrError::Unknown);
        }
        if !msr::is_valid(index, value, self.core.linear_bits) {
            return Err(MsrError::InvalidValue);
        }
        if let Some(real_mode) = &mut self.real_mode {
            let base = Gva::new(value);
            match index {
                msr::FS_BASE => real_mode.segments[SegmentRegister::Fs as usize].base = base,
                msr::GS_BASE => real_mode.segments[SegmentRegister::Gs as usize].base = base,
                msr::SYSENTER_CS => real_mode.sysenter_cs = value as u32,
                _ => {}
            }
        }
        let write = |field| self.with_vmcs(|vmcs| vmcs.write(field, value));
        match index {
            msr::SYSENTER_CS if self.real_mode.is_some() => {}
            msr::FS_BASE => write(fields::guest_segment(SegmentRegister::Fs).base),
            msr::GS_BASE => write(fields::guest_segment(SegmentRegister::Gs).base),
            msr::SYSENTER_CS => {
                self.with_vmcs(|vmcs| vmcs.write(fields::GUEST_SYSENTER_CS, value as u32));
            }
            msr::SYSENTER_ESP => write(fields::GUEST_SYSENTER_ESP),
            msr::SYSENTER_EIP => write(fields::GUEST_SYSENTER_EIP),
            _ => {
                return interrupts::without_interrupts(|| {
                    self.core.bank.write(&self.bank, index, value)
                })
                .ok_or(MsrError::Unknown);
            }
        }
        Ok(())
    }

    fn set_tsc_offset(&mut self, offset: i64) {
        self.with_vmcs(|vmcs| vmcs.write(fields::TSC_OFFSET, offset.cast_unsigned()));
    }

    fn set_time_slice(&mut self, ticks: Option<u64>) -> TimeSlice {
        if self.core.capabilities.preemption_timer_shift.is_none() {
            return TimeSlice::HostTimer;
        }
        self.timer_entries = 0;
        // SAFETY: every processor with VMX has the counter.
        self.deadline = ticks.map(|ticks| unsafe { _rdtsc() }.saturating_add(ticks));
        TimeSlice::Hardware
    }

    fn set_pause_exits(&mut self, exits: PauseExits) {
        let control = self.core.capabilities.pause_exiting;
        self.primary.set(control, exits == PauseExits::On);
    }

    fn events(&self) -> &EventQueue {
        &self.events
    }

    fn events_mut(&mut self) -> &mut EventQueue {
        &mut self.events
    }

    fn windows(&self) -> Windows {
        let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
        let interrupts_on = self.registers.rflags & RFlags::INTERRUPT_FLAG.bits() != 0;
        let window = |open| if open { Window::Open } else { Window::Closed };
        Windows {
            interrupt: window(interrupts_on && !self.interruptibility.intersects(shadow)),
            // A processor may refuse an NMI in an STI shadow, too (SDM vol. 3C 27.3.1.5).
            nmi: window(
                !self
                    .interruptibility
                    .intersects(shadow | Interruptibility::NMI),
            ),
        }
    }

    fn request_interrupt_window(&mut self) {
        self.pending.insert(Pending::WINDOW);
    }

    fn flush(&mut self, flush: Flush) {
        let Some(vpid) = self.vpid else {
            // Without an identifier every entry starts with no translations (SDM vol. 3C 29.4.3.1).
            return;
        };
        if self.pending.contains(Pending::FLUSH) {
            return;
        }
        let individual = self
            .core
            .capabilities
            .vpid
            .is_some_and(|types| types.individual_address);
        match flush {
            Flush::Page(address)
                if individual && msr::is_canonical(address.as_u64(), self.core.linear_bits) =>
            {
                let what = Invvpid::IndividualAddress(address);
                // SAFETY: the core is in VMX operation and has this type.
                if unsafe { instructions::invvpid(vpid, what) }.is_err() {
                    self.pending.insert(Pending::FLUSH);
                }
            }
            Flush::Page(_) | Flush::All => self.pending.insert(Pending::FLUSH),
        }
    }

    fn skip_instruction(&mut self) {
        let next = self.instruction_end.take().unwrap_or_else(|| {
            let length = self.with_vmcs(|vmcs| vmcs.read(fields::EXIT_INSTRUCTION_LENGTH));
            self.registers.rip.wrapping_add(u64::from(length))
        });
        self.finish_instruction(next);
    }

    fn finish_instruction(&mut self, next_rip: u64) {
        // Only code that is about to cross 4 GiB has to know how wide it is.
        let crossed = (next_rip ^ self.registers.rip) >> 32 != 0;
        self.registers.rip = if crossed && !paging::is_long_mode(&self.control) {
            next_rip & 0xffff_ffff
        } else {
            next_rip
        };
        self.interruptibility
            .remove(Interruptibility::STI | Interruptibility::MOV_SS);
        self.registers.rflags &= !RFlags::RESUME_FLAG.bits();
        if self.registers.rflags & RFlags::TRAP_FLAG.bits() != 0 {
            self.with_vmcs(|vmcs| {
                let pending = vmcs.read(fields::GUEST_PENDING_DEBUG_EXCEPTIONS);
                vmcs.write(
                    fields::GUEST_PENDING_DEBUG_EXCEPTIONS,
                    pending | SINGLE_STEP,
                );
            });
        }
    }

    fn set_instruction_end(&mut self, next_rip: u64) {
        self.instruction_end = Some(next_rip);
    }

    fn block_interrupts(&mut self, blocking: Blocking) {
        let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
        let bit = match blocking {
            Blocking::Sti => Interruptibility::STI,
            Blocking::MovSs => Interruptibility::MOV_SS,
            Blocking::Nmi => Interruptibility::NMI,
        };
        if blocking != Blocking::Nmi {
            self.interruptibility.remove(shadow);
        }
        self.interruptibility.insert(bit);
        self.pending.insert(Pending::CHECK);
    }

    fn unblock_nmis(&mut self) {
        self.interruptibility.remove(Interruptibility::NMI);
    }

    fn debug_register(&mut self, number: u8) -> u64 {
        if let Some(kept) = &self.kept {
            return kept.get(number);
        }
        if number == 7 {
            return self.with_vmcs(|vmcs| vmcs.read(fields::GUEST_DR7));
        }
        interrupts::without_interrupts(|| self.core.bank.debug_register(&self.bank, number))
    }

    fn set_debug_register(&mut self, number: u8, value: u64) {
        let value = match number {
            6 => value & DR6_WRITABLE | DR6_RESET,
            7 => value & DR7_WRITABLE | DR7_RESET,
            _ => value,
        };
        if let Some(kept) = &mut self.kept {
            kept.set(number, value);
            self.share_breakpoints();
            return;
        }
        if number == 7 {
            self.with_vmcs(|vmcs| vmcs.write(fields::GUEST_DR7, value));
            return;
        }
        interrupts::without_interrupts(|| {
            self.core.bank.set_debug_register(&self.bank, number, value);
        });
    }

    fn set_debugging(&mut self, debugging: &Debugging) {
        self.change_debugging(debugging);
    }

    fn is_enterable(&mut self) -> bool {
        if let Some(real_mode) = &self.real_mode {
            return real_mode.fits_virtual_8086() && !self.is_event_due();
        }
        if !self.pending.contains(Pending::CHECK) {
            return true;
        }
        interrupts::without_interrupts(|| {
            let state = self.guest_state(&self.current());
            check::check_all_segments(&state, &self.rules()).is_ok()
        })
    }

    fn extended_state_mut(&mut self) -> &mut ExtendedState {
        // SAFETY: interrupts are off, this core has the driver's record, and the state lives as long
        // as this value.
        interrupts::without_interrupts(|| unsafe {
            self.core.suspend_extended_state(self.extended);
        });
        // SAFETY: the state is this value's own, and the processor does not hold it now.
        unsafe { self.extended.as_mut() }
    }

    fn run(
        &mut self,
        code: &mut dyn CodeReader,
        stop: &mut ExitRecord,
    ) -> Result<(), EntryFailure> {
        self.run_uninterrupted(code, stop)
    }
}

impl Drop for VmxVcpu {
    fn drop(&mut self) {
        interrupts::without_interrupts(|| {
            // SAFETY: the page is this vCPU's own.
            unsafe { self.core.clear(self.vmcs.physical_address()) };
            if let Some(vpid) = self.vpid {
                self.core.free_vpid(vpid);
            }
            self.core.bank.release(&self.bank);
            self.core.release_extended_state(self.extended);
        });
        // SAFETY: the box was leaked in `new` and the core's record has just forgotten it.
        drop(unsafe { Box::from_raw(self.extended.as_ptr()) });
    }
}
