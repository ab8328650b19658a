//! Why a guest stopped, in one enum that means the same on Intel and AMD processors.
//!
//! The driver has decoded operands and lengths: whoever handles an exit never looks at a
//! vendor's fields. RIP still points at the instruction; [`crate::Vcpu::skip_instruction`] moves it
//! on once the instruction has been carried out.

use x86_64::structures::idt::PageFaultErrorCode;

use crate::address::Gva;
use crate::event::Exception;
use crate::registers::Gpr;

/// Why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The processor met a page fault while it walked the shadow tables.
    PageFault {
        /// The faulting linear address.
        address: Gva,
        /// The processor's error code; it speaks of the shadow tables, not of the guest's.
        error_code: PageFaultErrorCode,
    },
    /// An intercepted exception other than a page fault.
    Exception(Exception),
    /// The guest has met breakpoints of a debugger's.
    Breakpoint {
        /// A bit for each of [`crate::debug::Debugging::breakpoints`].
        hits: u8,
        /// The guest's own #DB at the same place; DR6 says why.
        exception: Option<Exception>,
    },
    /// The host has an interrupt; it was taken before this exit was returned.
    HostInterrupt,
    /// The host had a non-maskable interrupt.
    HostNmi,
    /// The guest can now take a maskable interrupt that waits.
    InterruptWindow,
    /// The guest can now take a non-maskable interrupt.
    NmiWindow,
    /// CPUID with the leaf in EAX and the subleaf in ECX.
    Cpuid,
    /// HLT.
    Halt,
    /// PAUSE, or a loop of them.
    Pause,
    /// VMCALL or VMMCALL, with its arguments in the general registers.
    Hypercall,
    /// An access to an I/O port.
    Io(IoAccess),
    /// RDMSR of the register whose number this is.
    ReadMsr(u32),
    /// WRMSR.
    WriteMsr {
        /// The register's number.
        index: u32,
        /// The new value.
        value: u64,
    },
    /// A read of a control register into a general register.
    ReadControlRegister {
        /// What is read.
        register: ControlRegister,
        /// Where the value goes.
        target: Gpr,
    },
    /// A write of a control register; LMSW and CLTS come as writes of CR0.
    WriteControlRegister {
        /// What is written.
        register: ControlRegister,
        /// The value that the guest wants, as wide as the guest's mode makes it.
        value: u64,
    },
    /// MOV to or from a debug register, before any of its checks but that it is a register's name.
    MoveDebugRegister {
        /// 0 to 7.
        number: u8,
        /// The general register.
        general: Gpr,
        /// Which of the two is written.
        direction: MoveDirection,
    },
    /// INVLPG.
    InvalidatePage(Gva),
    /// INVPCID.
    InvalidatePcid {
        /// The kind of invalidation, 0 to 3 (SDM vol. 2A, INVPCID).
        kind: u64,
        /// Where the 128-bit descriptor is.
        descriptor: Gva,
    },
    /// INVD or WBINVD.
    InvalidateCaches,
    /// RDTSC or RDTSCP, if they were asked to exit.
    ReadTsc,
    /// RDPMC.
    ReadPerformanceCounter,
    /// MONITOR.
    Monitor,
    /// MWAIT.
    MonitorWait,
    /// XSETBV.
    SetExtendedControlRegister {
        /// The register's number.
        index: u32,
        /// The new value.
        value: u64,
    },
    /// An instruction of the processor's own virtualization extension: #UD for a guest that has
    /// none.
    VirtualizationInstruction,
    /// A task switch through a task gate or a far transfer to a TSS, which hardware leaves to
    /// software.
    TaskSwitch {
        /// The selector of the new task-state segment.
        selector: u16,
        /// What asked for it.
        source: TaskSwitchSource,
        /// The error code that the new task must find on its stack.
        error_code: Option<u32>,
        /// Where the old task goes on.
        resume_rip: u64,
    },
    /// The guest shut down: a third fault, or SHUTDOWN.
    TripleFault,
    /// The slice that [`crate::Vcpu::set_time_slice`] gave has ended.
    TimeSliceEnd,
    /// The hardware cannot enter the guest's state, or cannot deliver the event that is due: nothing
    /// ran, and the next instruction or the delivery must be carried out in its place.
    NotEnterable,
    /// An exit that the driver knows nothing of.
    Unknown {
        /// The vendor's number of the exit reason.
        reason: u64,
        /// The vendor's first information word.
        information: u64,
    },
}

/// Where and why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// The guest's instruction pointer.
    pub rip: u64,
    /// Why it stopped.
    pub exit: Exit,
}

/// What asks for a task switch (SDM vol. 3A 8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSwitchSource {
    /// CALL: the new task is nested in the old one.
    Call,
    /// IRET with RFLAGS.NT: back to the task that the old one is nested in.
    InterruptReturn,
    /// JMP.
    Jump,
    /// An interrupt or exception through a task gate: nested as by CALL.
    Gate,
}

/// The control registers whose access can exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ControlRegister {
    /// CR0.
    Cr0,
    /// CR2.
    Cr2,
    /// CR3.
    Cr3,
    /// CR4.
    Cr4,
    /// CR8.
    Cr8,
}

/// Which way MOV goes between a general and a special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MoveDirection {
    /// The special register is written.
    Write,
    /// The special register is read.
    Read,
}

/// IN, OUT, INS or OUTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// The first port.
    pub port: u16,
    /// How many bytes each transfer moves.
    pub width: IoWidth,
    /// To or from the guest.
    pub direction: IoDirection,
    /// What the other operand is.
    pub operand: IoOperand,
}

/// The size of an I/O transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoWidth {
    /// One byte.
    Byte,
    /// Two bytes.
    Word,
    /// Four bytes.
    DoubleWord,
}

impl IoWidth {
    /// The number of bytes: 1, 2 or 4.
    pub const fn bytes(self) -> u8 {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::DoubleWord => 4,
        }
    }

    /// A value with the low bits of this width set.
    pub const fn mask(self) -> u32 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::DoubleWord => 0xffff_ffff,
        }
    }
}

/// The direction of an I/O transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoDirection {
    /// IN, INS: from the device to the guest.
    In,
    /// OUT, OUTS: from the guest to the device.
    Out,
}

/// The operand of an I/O instruction besides the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOperand {
    /// AL, AX or EAX.
    Accumulator,
    /// Memory at DS:rSI (OUTS) or ES:rDI (INS).
    String {
        /// The linear address of the first element.
        address: Gva,
        /// Once, or as often as rCX says.
        repeat: Repeat,
        /// How wide rSI, rDI and rCX are.
        address_width: crate::registers::CodeWidth,
    },
}

/// The REP prefix of a string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// No prefix: one element.
    Once,
    /// REP: as many elements as rCX counts, which may be none.
    Count,
}
