//! A guest's last exits.

use core::fmt;

use umbra_vcpu::exit::{Exit, ExitRecord, IoDirection, IoOperand, MoveDirection};
use umbra_vcpu::registers::Gpr;

/// How many exits are remembered; a power of two.
const REMEMBERED: usize = 32;

/// The last exits of a guest, in a ring.
#[derive(Clone, Debug)]
pub struct ExitLog {
    records: [ExitRecord; REMEMBERED],
    /// How many were ever recorded; wraps around.
    total: usize,
}

impl Default for ExitLog {
    fn default() -> Self {
        let nothing = ExitRecord {
            rip: 0,
            exit: Exit::HostInterrupt,
        };
        Self {
            records: [nothing; REMEMBERED],
            total: 0,
        }
    }
}

impl ExitLog {
    /// The place of the oldest exit, for the next one, which counts as remembered already.
    #[inline]
    pub const fn next_record(&mut self) -> &mut ExitRecord {
        let record = &mut self.records[self.total % REMEMBERED];
        self.total = self.total.wrapping_add(1);
        record
    }

    /// Takes [`ExitLog::next_record`] back: nothing was written there.
    pub const fn forget_next_record(&mut self) {
        self.total = self.total.wrapping_sub(1);
    }

    /// The exits that are remembered, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &ExitRecord> + ExactSizeIterator {
        let count = self.total.min(REMEMBERED);
        (0..count).map(move |step| &self.records[(self.total - count + step) % REMEMBERED])
    }
}

impl fmt::Display for ExitLog {
    /// One line an exit, the last one last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter()
            .try_for_each(|record| writeln!(f, "  {:016x} {}", record.rip, ExitText(&record.exit)))
    }
}

/// An exit in words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitText<'a>(pub &'a Exit);

impl fmt::Display for ExitText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self.0 {
            Exit::PageFault {
                address,
                error_code,
            } => write!(
                f,
                "page fault at {address}, error code {:#x}",
                error_code.bits()
            ),
            Exit::Exception(exception) => {
                write!(f, "exception {}", exception.vector)?;
                match exception.error_code {
                    Some(code) => write!(f, ", error code {code:#x}"),
                    None => Ok(()),
                }
            }
            Exit::Breakpoint { .. } => f.write_str("breakpoint of the debugger's"),
            Exit::HostInterrupt => f.write_str("host interrupt"),
            Exit::HostNmi => f.write_str("host NMI"),
            Exit::InterruptWindow => f.write_str("interrupt window"),
            Exit::NmiWindow => f.write_str("NMI window"),
            Exit::Cpuid => f.write_str("CPUID"),
            Exit::Halt => f.write_str("HLT"),
            Exit::Pause => f.write_str("PAUSE"),
            Exit::Hypercall => f.write_str("hypercall"),
            Exit::Io(access) => {
                let bits = 8 * access.width.bytes();
                let string = match access.operand {
                    IoOperand::Accumulator => "",
                    IoOperand::String { .. } => ", string",
                };
                let direction = match access.direction {
                    IoDirection::In => "IN",
                    IoDirection::Out => "OUT",
                };
                write!(
                    f,
                    "{direction} port {:#x}, {bits} bits{string}",
                    access.port
                )
            }
            Exit::ReadMsr(index) => write!(f, "RDMSR {index:#x}"),
            Exit::WriteMsr { index, value } => write!(f, "WRMSR {index:#x} = {value:#x}"),
            Exit::ReadControlRegister { register, target } => {
                write!(f, "{} = {register:?}", register_name(target))
            }
            Exit::WriteControlRegister { register, value } => {
                write!(f, "{register:?} = {value:#x}")
            }
            Exit::MoveDebugRegister {
                number,
                general,
                direction,
            } => {
                let general = register_name(general);
                match direction {
                    MoveDirection::Write => write!(f, "DR{number} = {general}"),
                    MoveDirection::Read => write!(f, "{general} = DR{number}"),
                }
            }
            Exit::InvalidatePage(address) => write!(f, "INVLPG {address}"),
            Exit::InvalidatePcid { kind, descriptor } => {
                write!(f, "INVPCID of kind {kind}, descriptor at {descriptor}")
            }
            Exit::InvalidateCaches => f.write_str("WBINVD or INVD"),
            Exit::ReadTsc => f.write_str("RDTSC"),
            Exit::ReadPerformanceCounter => f.write_str("RDPMC"),
            Exit::Monitor => f.write_str("MONITOR"),
            Exit::MonitorWait => f.write_str("MWAIT"),
            Exit::SetExtendedControlRegister { index, value } => {
                write!(f, "XSETBV {index} = {value:#x}")
            }
            Exit::VirtualizationInstruction => f.write_str("virtualization instruction"),
            Exit::TaskSwitch { selector, .. } => write!(f, "task switch to {selector:#x}"),
            Exit::TripleFault => f.write_str("triple fault"),
            Exit::TimeSliceEnd => f.write_str("end of time slice"),
            Exit::NotEnterable => f.write_str("state that the processor cannot enter"),
            Exit::Unknown {
                reason,
                information,
            } => write!(f, "unknown exit {reason:#x}, information {information:#x}"),
        }
    }
}

/// A general register's name.
pub(crate) const fn register_name(register: Gpr) -> &'static str {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    NAMES[register as usize]
}
