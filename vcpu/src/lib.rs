//! What a processor driver gives the rest of Umbra.
//!
//! A driver (`umbra-vmx`, `umbra-svm`) holds one guest processor and implements [`Vcpu`]: registers
//! as the guest sees them, one blocking [`Vcpu::run`] that returns a semantic [`exit::Exit`], and an
//! [`event::EventQueue`]. Everything that both vendors share lives here: [`address`] types,
//! [`registers`], [`event`] rules, [`instruction`] decoding and [`extended_state`] (FPU) switching.
//!
//! Protocol: one host core runs a vCPU at a time. Between two calls of `run` the guest's
//! registers belong to the caller, who may change any of them; during `run` they belong to the
//! driver. The MMU is no concern of a driver: it is told the shadow root and what to flush.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod address;
pub mod debug;
pub mod event;
pub mod exit;
pub mod extended_state;
pub mod host;
pub mod instruction;
pub mod registers;

use core::fmt;

use address::{Gva, Hpa};
use debug::Debugging;
use event::{Blocking, EventQueue, Windows};
use exit::ExitRecord;
use extended_state::ExtendedState;
use registers::{
    CodeWidth, ControlRegisters, DescriptorTable, Registers, Segment, SegmentRegister,
};

/// One guest processor.
pub trait Vcpu {
    /// The general registers, RIP and RFLAGS.
    fn registers(&self) -> &Registers;

    /// The general registers, RIP and RFLAGS, to be changed.
    fn registers_mut(&mut self) -> &mut Registers;

    /// A segment register with its hidden part.
    fn segment(&self, register: SegmentRegister) -> Segment;

    /// Loads a segment register with its hidden part.
    fn set_segment(&mut self, register: SegmentRegister, segment: Segment);

    /// The global descriptor table register.
    fn gdtr(&self) -> DescriptorTable;

    /// Loads the global descriptor table register.
    fn set_gdtr(&mut self, table: DescriptorTable);

    /// The interrupt descriptor table register.
    fn idtr(&self) -> DescriptorTable;

    /// Loads the interrupt descriptor table register.
    fn set_idtr(&mut self, table: DescriptorTable);

    /// The current privilege level: that of the stack segment (SDM vol. 3A 5.5, and the rule by
    /// which both vendors save it on exits).
    fn privilege_level(&self) -> PrivilegeLevel;

    /// How wide the code is that runs now.
    fn code_width(&self) -> CodeWidth;

    /// What the guest sees in its control registers.
    fn control_registers(&self) -> ControlRegisters;

    /// Changes what the guest sees in its control registers. The values have passed the
    /// architecture's checks; the driver derives the hardware's values from these and from the
    /// shadow paging last set, so call [`Vcpu::set_shadow_paging`] too when paging changed.
    fn set_control_registers(&mut self, registers: ControlRegisters);

    /// Points the hardware at a shadow root.
    fn set_shadow_paging(&mut self, paging: ShadowPaging);

    /// Reads a model-specific register that the hardware holds for the guest: the segment bases,
    /// the SYSCALL and SYSENTER groups, TSC_AUX. `None` for any other.
    fn hardware_msr(&self, index: u32) -> Option<u64>;

    /// Writes a model-specific register that the hardware holds for the guest.
    ///
    /// # Errors
    /// [`MsrError`] if the hardware does not hold it or would refuse the value.
    fn set_hardware_msr(&mut self, index: u32, value: u64) -> Result<(), MsrError>;

    /// Sets what RDTSC in the guest adds to the host's counter, in ticks.
    fn set_tsc_offset(&mut self, offset: i64);

    /// Asks for an [`Exit::TimeSliceEnd`] or [`Exit::HostInterrupt`] after about `ticks` of the
    /// time-stamp counter if the hardware can count them; `None` takes the request back. A driver
    /// whose hardware cannot count says so, and the host's timer must interrupt the guest.
    fn set_time_slice(&mut self, ticks: Option<u64>) -> TimeSlice;

    /// Whether PAUSE exits, where the hardware can make it: for a guest whose processors do not run all
    /// at once. A fresh processor's does not.
    fn set_pause_exits(&mut self, exits: PauseExits);

    /// The events that wait for the guest.
    fn events(&self) -> &EventQueue;

    /// The events that wait for the guest, to be changed.
    fn events_mut(&mut self) -> &mut EventQueue;

    /// Which interrupts the guest can take now.
    fn windows(&self) -> Windows;

    /// Asks for an [`Exit::InterruptWindow`] as soon as the guest can take a maskable interrupt,
    /// though none is in the queue yet.
    fn request_interrupt_window(&mut self);

    /// Drops the guest's translations before the next entry. Requests add up.
    fn flush(&mut self, flush: Flush);

    /// Moves RIP past the instruction that caused the last exit, as if it had been carried out: the
    /// interrupt shadow ends, RF is cleared, and single-stepping traps.
    fn skip_instruction(&mut self);

    /// Ends an instruction that was carried out in the guest's place: the guest goes on at `next_rip`,
    /// the interrupt shadow ends, RF is cleared, and single-stepping traps.
    fn finish_instruction(&mut self, next_rip: u64);

    /// Says where the instruction ends that is about to be carried out by the means for an exit, though
    /// no exit of it has happened: [`Vcpu::skip_instruction`] goes there.
    fn set_instruction_end(&mut self, next_rip: u64);

    /// Blocks interrupts at the current instruction boundary.
    fn block_interrupts(&mut self, blocking: Blocking);

    /// Ends the blocking of non-maskable interrupts.
    fn unblock_nmis(&mut self);

    /// DR0 to DR3, DR6 or DR7, by their numbers.
    fn debug_register(&mut self, number: u8) -> u64;

    /// Sets DR0 to DR3, DR6 or DR7, whose reserved bits do not count.
    fn set_debug_register(&mut self, number: u8, value: u64);

    /// Lets a debugger stop the guest. The guest keeps its own debug registers meanwhile, and as many of
    /// its breakpoints as the processor has room for.
    fn set_debugging(&mut self, debugging: &Debugging);

    /// Whether the hardware can enter the guest's state and deliver what is due. Where it cannot,
    /// [`Vcpu::run`] returns [`Exit::NotEnterable`] at once.
    fn is_enterable(&mut self) -> bool;

    /// The guest's x87, SSE and AVX registers, taken out of the processor; the next entry puts them
    /// back.
    fn extended_state_mut(&mut self) -> &mut ExtendedState;

    /// Runs the guest until it stops, and puts where and why into `stop`: there, because every exit
    /// comes this way and copying it would take long beside what many exits take in all. The caller
    /// has the host's interrupts off; those that arrive meanwhile are handled by the host before this
    /// returns.
    ///
    /// `code` reads the guest's memory at the instruction pointer where the hardware does not say
    /// what the instruction was.
    ///
    /// # Errors
    /// [`EntryFailure`] if the guest's state breaks one of the processor's rules; nothing ran then.
    fn run(&mut self, code: &mut dyn CodeReader, stop: &mut ExitRecord)
    -> Result<(), EntryFailure>;
}

/// Whether PAUSE ends a run, as [`exit::Exit::Pause`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseExits {
    /// Each one does: the guest waits for a processor that does not run.
    On,
    /// None does, or only long loops of them.
    Off,
}

/// The table that the hardware walks while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowPaging {
    /// The root table; for [`ShadowMode::Pae`] the four page-directory-pointer entries, below
    /// 4 GiB and aligned to 32 bytes.
    pub root: Hpa,
    /// The shape of the tables.
    pub mode: ShadowMode,
}

/// The paging mode in which the hardware walks the shadow tables. It always has CR0.PG, CR0.WP,
/// CR4.PAE and EFER.NXE set, whatever the guest's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShadowMode {
    /// Three levels with four root entries, for guests outside long mode.
    Pae,
    /// Four levels.
    FourLevel,
    /// Five levels.
    FiveLevel,
}

/// Translations to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// All of the guest's, global ones too.
    All,
    /// The one of this page, in whichever size it is cached.
    Page(Gva),
}

/// Whether a time slice is counted by the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "without the hardware's help the host's timer must interrupt the guest"]
pub enum TimeSlice {
    /// The hardware will end the slice.
    Hardware,
    /// The hardware has no such timer.
    HostTimer,
}

/// Reads guest memory by linear address, for instruction bytes.
pub trait CodeReader {
    /// Fills `buffer` with code at linear address `address` as privilege level `level` would fetch
    /// it under `control`, and returns how many bytes could be read before a page that faults.
    fn read_code(
        &mut self,
        control: &ControlRegisters,
        level: PrivilegeLevel,
        address: Gva,
        buffer: &mut [u8; instruction::MAX_LENGTH],
    ) -> usize;

    /// The first eight bytes, least significant first, of the instruction that the guest stopped at,
    /// whose linear address this is. `None` says only that they are not at hand at once: ask
    /// [`CodeReader::read_code`] then.
    fn peek_code(&mut self, address: Gva) -> Option<u64> {
        let _ = address;
        None
    }
}

/// The current privilege level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum PrivilegeLevel {
    /// Level 0: supervisor.
    Ring0,
    /// Level 1: supervisor.
    Ring1,
    /// Level 2: supervisor.
    Ring2,
    /// Level 3: user.
    Ring3,
}

impl PrivilegeLevel {
    /// The level in the low two bits of `bits`.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Ring0,
            1 => Self::Ring1,
            2 => Self::Ring2,
            _ => Self::Ring3,
        }
    }

    /// Whether page tables call this level "user".
    pub const fn is_user(self) -> bool {
        matches!(self, Self::Ring3)
    }
}

/// A model-specific register refused an access: the guest gets #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrError {
    /// The hardware does not hold this register for the guest.
    Unknown,
    /// The value is not canonical or sets reserved bits.
    InvalidValue,
}

/// The processor, or our own check before it, refused to enter the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFailure {
    /// The field of the VMCS or VMCB, in the manual's words.
    pub field: &'static str,
    /// The rule that is broken, in the manual's words, with its section.
    pub rule: &'static str,
    /// The field's value.
    pub value: u64,
}

impl fmt::Display for EntryFailure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "VM entry refused: {} = {:#x}: {}",
            self.field, self.value, self.rule
        )
    }
}

impl core::error::Error for EntryFailure {}

/// A driver cannot be used on this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// What is missing, and what to do about it where something can be done.
    pub reason: &'static str,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.reason)
    }
}

impl core::error::Error for Unsupported {}
