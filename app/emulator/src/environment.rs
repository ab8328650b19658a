//! What an instruction works on: the processor's registers, memory and ports.

use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::event::Exception;
use umbra_vcpu::exit::IoWidth;
use umbra_vcpu::registers::{CodeWidth, ControlRegisters, Registers, Segment, SegmentRegister};

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

/// The processor's registers.
pub trait Processor {
    /// The general registers, RIP and RFLAGS.
    fn registers(&self) -> &Registers;

    /// The general registers and RFLAGS, to be changed. The emulator never changes RIP.
    fn registers_mut(&mut self) -> &mut Registers;

    /// A segment register with its hidden part.
    fn segment(&self, register: SegmentRegister) -> Segment;

    /// What the guest sees in its control registers.
    fn control_registers(&self) -> ControlRegisters;

    /// The width of the code that runs.
    fn code_width(&self) -> CodeWidth;

    /// XMM register `index`, 0 to 15.
    fn vector_register(&mut self, index: u8) -> u128;

    /// Sets the low 128 bits of vector register `index`, 0 to 15, and keeps the rest.
    fn set_vector_register(&mut self, index: u8, value: u128);
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
