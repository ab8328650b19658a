//! What an instruction works on: the processor's registers, memory and ports.

use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::event::{Blocking, Exception};
use umbra_vcpu::exit::IoWidth;
use umbra_vcpu::registers::{
    CodeWidth, ControlRegisters, DescriptorTable, Registers, Segment, SegmentRegister,
};

/// Why an instruction was not carried out. Nothing of it has happened then, but for the elements of
/// a string instruction that came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop<F> {
    /// The guest gets this exception, with RIP at the instruction.
    Exception(Exception),
    /// The emulator does not know the instruction.
    Unsupported,
    /// The environment cannot go on.
    Failed(F),
}

impl<F> From<Exception> for Stop<F> {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

/// What an access to memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Only reading.
    Read,
    /// Writing, or reading in order to write.
    Write,
}

/// A register that holds a descriptor table's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableRegister {
    /// GDTR.
    Global,
    /// IDTR.
    Interrupt,
}

/// The processor's registers.
pub trait Processor {
    /// The general registers, RIP and RFLAGS.
    fn registers(&self) -> &Registers;

    /// The general registers and RFLAGS, to be changed. The emulator never changes RIP.
    fn registers_mut(&mut self) -> &mut Registers;

    /// A segment register with its hidden part.
    fn segment(&self, register: SegmentRegister) -> Segment;

    /// Loads a segment register with its hidden part, which has passed every check.
    fn set_segment(&mut self, register: SegmentRegister, segment: Segment);

    /// GDTR or IDTR.
    fn table(&self, register: TableRegister) -> DescriptorTable;

    /// Loads GDTR or IDTR.
    fn set_table(&mut self, register: TableRegister, table: DescriptorTable);

    /// Keeps interrupts away until the end of the instruction after this one.
    fn block_interrupts(&mut self, blocking: Blocking);

    /// DR0 to DR3, DR6 or DR7, by their numbers.
    fn debug_register(&mut self, number: u8) -> u64;

    /// Sets DR0 to DR3, DR6 or DR7, whose reserved bits do not count.
    fn set_debug_register(&mut self, number: u8, value: u64);

    /// IRET ends the blocking of non-maskable interrupts.
    fn unblock_nmis(&mut self);

    /// What the guest sees in its control registers.
    fn control_registers(&self) -> ControlRegisters;

    /// The width of the code that runs.
    fn code_width(&self) -> CodeWidth;

    /// XMM register `index`, 0 to 15.
    fn vector_register(&mut self, index: u8) -> u128;

    /// Sets the low 128 bits of vector register `index`, 0 to 15, and keeps the rest.
    fn set_vector_register(&mut self, index: u8, value: u128);

    /// The x87 control word and status word.
    fn x87_words(&mut self) -> (u16, u16);

    /// FNINIT.
    fn reset_x87(&mut self);

    /// MMX register `index`, 0 to 7.
    fn mmx_register(&mut self, index: u8) -> u64;

    /// Sets MMX register `index`, 0 to 7, and marks the x87 stack as full of MMX registers.
    fn set_mmx_register(&mut self, index: u8, value: u64);
}

/// Memory as the current instruction sees it.
///
/// Protocol: every page of every operand is translated before the first byte is read or written, so
/// a device never sees half of an instruction that faults.
pub trait Memory {
    /// Why the environment cannot go on.
    type Failure;

    /// Translates an address and checks the rights of the guest's current privilege level.
    ///
    /// # Errors
    /// [`Stop::Exception`] with the page fault that the guest must see.
    fn translate(&mut self, address: Gva, intent: Intent) -> Result<Gpa, Stop<Self::Failure>>;

    /// Translates an address of a descriptor table, a task-state segment or the interrupt vectors,
    /// which the processor itself accesses as a supervisor.
    ///
    /// # Errors
    /// [`Stop::Exception`] with the page fault that the guest must see.
    fn translate_system(
        &mut self,
        address: Gva,
        intent: Intent,
    ) -> Result<Gpa, Stop<Self::Failure>>;

    /// Loads CR3 as a task switch does, and what follows is translated by it.
    ///
    /// # Errors
    /// [`Stop::Exception`] if the value is refused.
    fn load_page_table(&mut self, cr3: u64) -> Result<(), Stop<Self::Failure>>;

    /// Sets CR0.TS.
    fn set_task_switched(&mut self);

    /// Reads RAM or a device. All bytes lie in one page.
    ///
    /// # Errors
    /// [`Stop::Failed`] only.
    fn read(&mut self, address: Gpa, bytes: &mut [u8]) -> Result<(), Stop<Self::Failure>>;

    /// Writes RAM or a device. All bytes lie in one page.
    ///
    /// # Errors
    /// [`Stop::Failed`] only.
    fn write(&mut self, address: Gpa, bytes: &[u8]) -> Result<(), Stop<Self::Failure>>;
}

/// Ports, to which the guest's right was checked before.
pub trait Ports {
    /// IN.
    fn read_port(&mut self, port: u16, width: IoWidth) -> u32;

    /// OUT.
    fn write_port(&mut self, port: u16, width: IoWidth, value: u32);
}

/// All that an instruction works on.
pub trait Environment: Processor + Memory + Ports {}

impl<T: Processor + Memory + Ports> Environment for T {}
