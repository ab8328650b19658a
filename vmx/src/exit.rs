//! From the VMCS's exit fields to a semantic [`Exit`].
//!
//! [`RawExit::read`] reads only the fields that a reason defines (SDM vol. 3C 28.2); [`decode`] is
//! pure. Numbers of exit reasons: SDM vol. 3D appendix C.

use umbra_vcpu::address::Gva;
use umbra_vcpu::event::vector;
use umbra_vcpu::exit::{
    ControlRegister, Exit, IoAccess, IoDirection, IoOperand, IoWidth, MoveDirection, Repeat,
    TaskSwitchSource,
};
use umbra_vcpu::registers::{CodeWidth, Gpr, Registers, SegmentRegister};
use x86_64::structures::idt::PageFaultErrorCode;

use crate::event::Report;
use crate::fields;
use crate::instructions::CurrentVmcs;

/// Basic exit reasons.
#[allow(missing_docs, reason = "the manual's table is the documentation")]
pub mod reason {
    pub const EXCEPTION_OR_NMI: u16 = 0;
    pub const EXTERNAL_INTERRUPT: u16 = 1;
    pub const TRIPLE_FAULT: u16 = 2;
    pub const INTERRUPT_WINDOW: u16 = 7;
    pub const NMI_WINDOW: u16 = 8;
    pub const TASK_SWITCH: u16 = 9;
    pub const CPUID: u16 = 10;
    pub const GETSEC: u16 = 11;
    pub const HLT: u16 = 12;
    pub const INVD: u16 = 13;
    pub const INVLPG: u16 = 14;
    pub const RDPMC: u16 = 15;
    pub const RDTSC: u16 = 16;
    pub const VMCALL: u16 = 18;
    pub const VMCLEAR: u16 = 19;
    pub const VMXON: u16 = 27;
    pub const CONTROL_REGISTER: u16 = 28;
    pub const MOV_DR: u16 = 29;
    pub const IO: u16 = 30;
    pub const RDMSR: u16 = 31;
    pub const WRMSR: u16 = 32;
    pub const INVALID_GUEST_STATE: u16 = 33;
    pub const MSR_LOADING: u16 = 34;
    pub const MWAIT: u16 = 36;
    pub const MONITOR: u16 = 39;
    pub const PAUSE: u16 = 40;
    pub const MACHINE_CHECK_DURING_ENTRY: u16 = 41;
    pub const INVEPT: u16 = 50;
    pub const RDTSCP: u16 = 51;
    pub const PREEMPTION_TIMER: u16 = 52;
    pub const INVVPID: u16 = 53;
    pub const WBINVD: u16 = 54;
    pub const XSETBV: u16 = 55;
    pub const INVPCID: u16 = 58;
    pub const VMFUNC: u16 = 59;
}

/// Bit 31 of the exit reason: the entry failed, nothing ran.
const ENTRY_FAILURE: u32 = 1 << 31;

/// Whether the processor refused to enter the guest, by the exit reason with its flags.
pub const fn is_entry_failure(reason: u32) -> bool {
    reason & ENTRY_FAILURE != 0
}

/// In the exit qualification of I/O: a string instruction (SDM vol. 3C table 28-5).
const STRING_IO: u64 = 1 << 4;

/// What the processor recorded of an exit; fields that the reason does not define are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawExit {
    /// The exit reason with its flag bits.
    pub reason: u32,
    /// Exit qualification.
    pub qualification: u64,
    /// VM-exit interruption information, for exceptions and NMIs.
    pub interruption: Report,
    /// IDT-vectoring information: the event whose delivery the exit interrupted.
    pub vectoring: Report,
    /// VM-exit instruction information.
    pub instruction_information: u32,
    /// Guest-linear address.
    pub linear_address: u64,
    /// VM-exit instruction length, for task switches.
    pub instruction_length: u32,
}

impl RawExit {
    /// Reads the fields of the exit that has just happened for `reason`.
    #[inline]
    pub fn read(vmcs: &CurrentVmcs, reason: u32) -> Self {
        let mut exit = Self {
            reason,
            ..Self::default()
        };
        match exit.basic_reason() {
            reason::EXCEPTION_OR_NMI => {
                exit.qualification = vmcs.read(fields::EXIT_QUALIFICATION);
                exit.interruption = Report {
                    information: vmcs.read(fields::EXIT_INTERRUPTION_INFORMATION),
                    error_code: vmcs.read(fields::EXIT_INTERRUPTION_ERROR_CODE),
                    instruction_length: 0,
                };
                if exit.interruption.is_software_trap() {
                    exit.interruption.instruction_length =
                        vmcs.read(fields::EXIT_INSTRUCTION_LENGTH);
                }
                exit.vectoring = read_vectoring(vmcs);
            }
            reason::IO => {
                exit.qualification = vmcs.read(fields::EXIT_QUALIFICATION);
                if exit.qualification & STRING_IO != 0 {
                    exit.instruction_information = vmcs.read(fields::EXIT_INSTRUCTION_INFORMATION);
                    exit.linear_address = vmcs.read(fields::GUEST_LINEAR_ADDRESS);
                }
            }
            reason::INVPCID => {
                exit.qualification = vmcs.read(fields::EXIT_QUALIFICATION);
                exit.instruction_information = vmcs.read(fields::EXIT_INSTRUCTION_INFORMATION);
            }
            reason::CONTROL_REGISTER | reason::INVLPG | reason::MOV_DR => {
                exit.qualification = vmcs.read(fields::EXIT_QUALIFICATION);
            }
            reason::TASK_SWITCH => {
                exit.qualification = vmcs.read(fields::EXIT_QUALIFICATION);
                exit.vectoring = read_vectoring(vmcs);
                exit.instruction_length = vmcs.read(fields::EXIT_INSTRUCTION_LENGTH);
            }
            _ => {
                exit.qualification = vmcs.read(fields::EXIT_QUALIFICATION);
                exit.vectoring = read_vectoring(vmcs);
            }
        }
        exit
    }

    /// The reason without its flags.
    pub const fn basic_reason(&self) -> u16 {
        self.reason as u16
    }

    /// The length of the instruction that asked for a task switch; 0 if none did, but an interrupt or
    /// an exception (SDM vol. 3C 28.2.5).
    const fn task_instruction_length(&self) -> u64 {
        let by_instruction =
            !self.vectoring.is_valid() || self.vectoring.is_raised_by_instruction();
        if by_instruction {
            self.instruction_length as u64
        } else {
            0
        }
    }

    /// The event to deliver again. A task switch through a task gate is itself the delivery of its
    /// event and leaves none.
    pub const fn interrupted(&self) -> Report {
        const FROM_IDT: u64 = 3;
        if self.basic_reason() == reason::TASK_SWITCH && self.qualification >> 30 & 3 == FROM_IDT {
            return Report {
                information: 0,
                error_code: 0,
                instruction_length: 0,
            };
        }
        self.vectoring
    }
}

fn read_vectoring(vmcs: &CurrentVmcs) -> Report {
    let information = vmcs.read(fields::IDT_VECTORING_INFORMATION);
    let mut report = Report {
        information,
        ..Report::default()
    };
    if report.is_valid() {
        report.error_code = vmcs.read(fields::IDT_VECTORING_ERROR_CODE);
        report.instruction_length = vmcs.read(fields::EXIT_INSTRUCTION_LENGTH);
    }
    report
}

/// What decoding needs to know of the guest; asked for only where the reason needs it.
pub trait GuestView {
    /// CR0 as the guest sees it.
    fn cr0(&self) -> u64;
    /// The width of the running code.
    fn code_width(&self) -> CodeWidth;
    /// The base of a segment register.
    fn segment_base(&self, register: SegmentRegister) -> u64;
    /// The width of addresses in the I/O instruction at the instruction pointer.
    fn io_address_width(&mut self, information: u32) -> CodeWidth;
}

/// Decodes an exit that is not a failed entry.
pub fn decode(raw: &RawExit, registers: &Registers, guest: &mut impl GuestView) -> Exit {
    let ecx = registers.get(Gpr::Rcx) as u32;
    match raw.basic_reason() {
        reason::EXCEPTION_OR_NMI => decode_exception(raw),
        reason::TRIPLE_FAULT => Exit::TripleFault,
        reason::NMI_WINDOW => Exit::NmiWindow,
        reason::TASK_SWITCH => Exit::TaskSwitch {
            selector: raw.qualification as u16,
            source: task_switch_source(raw.qualification),
            error_code: raw
                .vectoring
                .is_valid()
                .then(|| raw.vectoring.exception(None).error_code)
                .flatten(),
            resume_rip: registers.rip.wrapping_add(raw.task_instruction_length()),
        },
        reason::INVD | reason::WBINVD => Exit::InvalidateCaches,
        reason::INVLPG => Exit::InvalidatePage(Gva::new(raw.qualification)),
        reason::RDPMC => Exit::ReadPerformanceCounter,
        reason::RDTSC | reason::RDTSCP => Exit::ReadTsc,
        reason::GETSEC
        | reason::VMCLEAR..=reason::VMXON
        | reason::INVEPT
        | reason::INVVPID
        | reason::VMFUNC => Exit::VirtualizationInstruction,
        reason::CONTROL_REGISTER => decode_control_register(raw, registers, guest),
        reason::MOV_DR => decode_debug_register(raw.qualification),
        reason::IO => decode_io(raw, guest),
        reason::MWAIT => Exit::MonitorWait,
        reason::MONITOR => Exit::Monitor,
        reason::PAUSE => Exit::Pause,
        reason::XSETBV => Exit::SetExtendedControlRegister {
            index: ecx,
            value: registers.edx_eax(),
        },
        reason::INVPCID => decode_invpcid(raw, registers, guest),
        _ => decode_plain(raw.reason, registers).unwrap_or(unknown(raw)),
    }
}

/// SDM vol. 3C table 28-2.
const fn task_switch_source(qualification: u64) -> TaskSwitchSource {
    match qualification >> 30 & 3 {
        0 => TaskSwitchSource::Call,
        1 => TaskSwitchSource::InterruptReturn,
        2 => TaskSwitchSource::Jump,
        _ => TaskSwitchSource::Gate,
    }
}

/// Decodes the most frequent exits, which are over with at most the exit qualification and cannot
/// interrupt the delivery of an event: the fast way through the driver. [`decode`] knows all.
#[inline]
pub fn decode_quickly(
    reason: u32,
    registers: &Registers,
    qualification: impl FnOnce() -> u64,
) -> Option<Exit> {
    match u16::try_from(reason).ok()? {
        reason::IO => {
            let qualification = qualification();
            (qualification & STRING_IO == 0)
                .then(|| Exit::Io(io_access(qualification, IoOperand::Accumulator)))
        }
        reason::CONTROL_REGISTER => quick_control_register(qualification(), registers),
        reason::INVLPG => Some(Exit::InvalidatePage(Gva::new(qualification()))),
        _ => decode_plain(reason, registers),
    }
}

/// Whether an exit of this reason comes before an instruction, which then has a length.
#[inline]
pub const fn is_before_instruction(reason: u32) -> bool {
    !matches!(
        reason as u16,
        reason::EXTERNAL_INTERRUPT | reason::INTERRUPT_WINDOW | reason::PREEMPTION_TIMER
    )
}

/// MOV to and from a control register, but for values whose upper half counts in 64-bit code only.
fn quick_control_register(qualification: u64, registers: &Registers) -> Option<Exit> {
    let register = control_register(qualification)?;
    let gpr = Gpr::from_encoding((qualification >> 8) as u8);
    match (qualification >> 4) & 3 {
        0 => {
            let value = registers.get(gpr);
            (value >> 32 == 0).then_some(Exit::WriteControlRegister { register, value })
        }
        1 => Some(Exit::ReadControlRegister {
            register,
            target: gpr,
        }),
        _ => None,
    }
}

/// The register that an exit for an access to control registers names.
const fn control_register(qualification: u64) -> Option<ControlRegister> {
    Some(match qualification & 0xf {
        0 => ControlRegister::Cr0,
        3 => ControlRegister::Cr3,
        4 => ControlRegister::Cr4,
        8 => ControlRegister::Cr8,
        _ => return None,
    })
}

/// Decodes the exits that have no other fields.
#[inline]
pub fn decode_plain(reason: u32, registers: &Registers) -> Option<Exit> {
    let ecx = registers.get(Gpr::Rcx) as u32;
    // With a flag bit set, the number is no plain reason.
    Some(match u16::try_from(reason).ok()? {
        reason::CPUID => Exit::Cpuid,
        reason::VMCALL => Exit::Hypercall,
        reason::HLT => Exit::Halt,
        reason::RDMSR => Exit::ReadMsr(ecx),
        reason::WRMSR => Exit::WriteMsr {
            index: ecx,
            value: registers.edx_eax(),
        },
        reason::EXTERNAL_INTERRUPT => Exit::HostInterrupt,
        reason::INTERRUPT_WINDOW => Exit::InterruptWindow,
        reason::PREEMPTION_TIMER => Exit::TimeSliceEnd,
        _ => return None,
    })
}

const fn unknown(raw: &RawExit) -> Exit {
    Exit::Unknown {
        reason: raw.reason as u64,
        information: raw.qualification,
    }
}

fn decode_exception(raw: &RawExit) -> Exit {
    if raw.interruption.is_nmi() {
        return Exit::HostNmi;
    }
    if raw.interruption.vector() == vector::PAGE_FAULT {
        return Exit::PageFault {
            address: Gva::new(raw.qualification),
            error_code: PageFaultErrorCode::from_bits_truncate(u64::from(
                raw.interruption.error_code,
            )),
        };
    }
    Exit::Exception(raw.interruption.exception(None))
}

/// SDM vol. 3C table 28-3.
fn decode_control_register(raw: &RawExit, registers: &Registers, guest: &impl GuestView) -> Exit {
    const TASK_SWITCHED: u64 = 1 << 3;
    /// MP, EM and TS: LMSW loads them; PE it can only set.
    const LMSW_LOADS: u64 = 0b1110;
    const LMSW_SOURCE: u64 = 0b1111;
    let Some(register) = control_register(raw.qualification) else {
        return unknown(raw);
    };
    let gpr = Gpr::from_encoding((raw.qualification >> 8) as u8);
    match (raw.qualification >> 4) & 3 {
        0 => {
            let value = registers.get(gpr);
            Exit::WriteControlRegister {
                register,
                value: match guest.code_width() {
                    CodeWidth::Bits64 => value,
                    CodeWidth::Bits32 | CodeWidth::Bits16 => value & 0xffff_ffff,
                },
            }
        }
        1 => Exit::ReadControlRegister {
            register,
            target: gpr,
        },
        2 => Exit::WriteControlRegister {
            register: ControlRegister::Cr0,
            value: guest.cr0() & !TASK_SWITCHED,
        },
        _ => {
            let source = (raw.qualification >> 16) & LMSW_SOURCE;
            Exit::WriteControlRegister {
                register: ControlRegister::Cr0,
                value: guest.cr0() & !LMSW_LOADS | source,
            }
        }
    }
}

/// SDM vol. 3C table 28-4.
const fn decode_debug_register(qualification: u64) -> Exit {
    const FROM_DEBUG_REGISTER: u64 = 1 << 4;
    Exit::MoveDebugRegister {
        number: (qualification & 7) as u8,
        general: Gpr::from_encoding((qualification >> 8) as u8),
        direction: if qualification & FROM_DEBUG_REGISTER == 0 {
            MoveDirection::Write
        } else {
            MoveDirection::Read
        },
    }
}

/// SDM vol. 3C table 28-5.
fn decode_io(raw: &RawExit, guest: &mut impl GuestView) -> Exit {
    const REP: u64 = 1 << 5;
    let operand = if raw.qualification & STRING_IO == 0 {
        IoOperand::Accumulator
    } else {
        IoOperand::String {
            address: Gva::new(raw.linear_address),
            repeat: if raw.qualification & REP == 0 {
                Repeat::Once
            } else {
                Repeat::Count
            },
            address_width: guest.io_address_width(raw.instruction_information),
        }
    };
    Exit::Io(io_access(raw.qualification, operand))
}

#[inline]
const fn io_access(qualification: u64, operand: IoOperand) -> IoAccess {
    const IN: u64 = 1 << 3;
    IoAccess {
        port: (qualification >> 16) as u16,
        width: match qualification & 7 {
            0 => IoWidth::Byte,
            1 => IoWidth::Word,
            _ => IoWidth::DoubleWord,
        },
        direction: if qualification & IN == 0 {
            IoDirection::Out
        } else {
            IoDirection::In
        },
        operand,
    }
}

/// The address size in bits 9:7 of the instruction information of INS and OUTS
/// (SDM vol. 3C table 28-8).
pub const fn string_address_width(information: u32) -> CodeWidth {
    match (information >> 7) & 7 {
        0 => CodeWidth::Bits16,
        1 => CodeWidth::Bits32,
        _ => CodeWidth::Bits64,
    }
}

/// SDM vol. 3C table 28-11; the qualification is the displacement.
fn decode_invpcid(raw: &RawExit, registers: &Registers, guest: &impl GuestView) -> Exit {
    const NO_INDEX: u32 = 1 << 22;
    const NO_BASE: u32 = 1 << 27;
    let information = raw.instruction_information;
    let register = |shift: u32| registers.get(Gpr::from_encoding((information >> shift) as u8));
    let mut offset = raw.qualification;
    if information & NO_BASE == 0 {
        offset = offset.wrapping_add(register(23));
    }
    if information & NO_INDEX == 0 {
        offset = offset.wrapping_add(register(18) << (information & 3));
    }
    let offset = match (information >> 7) & 7 {
        0 => offset & 0xffff,
        1 => offset & 0xffff_ffff,
        _ => offset,
    };
    let segment = SegmentRegister::ALL[((information >> 15) & 7).min(5) as usize];
    let wide = guest.code_width() == CodeWidth::Bits64;
    // Bases of ES, CS, SS and DS do not count in 64-bit mode (SDM vol. 3A 3.2.4).
    let base = if wide && !matches!(segment, SegmentRegister::Fs | SegmentRegister::Gs) {
        0
    } else {
        guest.segment_base(segment)
    };
    let linear = base.wrapping_add(offset);
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    Exit::InvalidatePcid {
        kind: register(28) & mask,
        descriptor: Gva::new(linear & mask),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_vcpu::event::Exception;

    struct Guest {
        width: CodeWidth,
    }

    impl GuestView for Guest {
        fn cr0(&self) -> u64 {
            0x8000_003b
        }

        fn code_width(&self) -> CodeWidth {
            self.width
        }

        fn segment_base(&self, register: SegmentRegister) -> u64 {
            0x1000 * (register as u64 + 1)
        }

        fn io_address_width(&mut self, information: u32) -> CodeWidth {
            string_address_width(information)
        }
    }

    fn decode_in(width: CodeWidth, raw: RawExit) -> Exit {
        let mut registers = Registers::default();
        for register in Gpr::ALL {
            registers.set(register, 0xffff_ffff_0000_0000 | register as u64);
        }
        decode(&raw, &registers, &mut Guest { width })
    }

    fn control_register(qualification: u64) -> RawExit {
        RawExit {
            reason: u32::from(reason::CONTROL_REGISTER),
            qualification,
            ..RawExit::default()
        }
    }

    #[test]
    fn mov_to_a_control_register_has_the_modes_width() {
        // mov cr4, rbx
        let raw = control_register(4 | 3 << 8);
        let exit = |value| Exit::WriteControlRegister {
            register: ControlRegister::Cr4,
            value,
        };
        assert_eq!(
            decode_in(CodeWidth::Bits64, raw),
            exit(0xffff_ffff_0000_0003)
        );
        assert_eq!(decode_in(CodeWidth::Bits32, raw), exit(3));
    }

    #[test]
    fn mov_from_cr3_names_the_target() {
        assert_eq!(
            decode_in(CodeWidth::Bits64, control_register(3 | 1 << 4 | 9 << 8)),
            Exit::ReadControlRegister {
                register: ControlRegister::Cr3,
                target: Gpr::R9
            }
        );
    }

    #[test]
    fn clts_and_lmsw_are_writes_of_cr0() {
        let write = |value| Exit::WriteControlRegister {
            register: ControlRegister::Cr0,
            value,
        };
        assert_eq!(
            decode_in(CodeWidth::Bits32, control_register(2 << 4)),
            write(0x8000_0033)
        );
        // LMSW with 4 sets EM, clears MP and TS, and keeps PE.
        assert_eq!(
            decode_in(CodeWidth::Bits32, control_register(3 << 4 | 4 << 16)),
            write(0x8000_0035)
        );
    }

    #[test]
    fn io_in_all_shapes() {
        let io = |qualification| RawExit {
            reason: u32::from(reason::IO),
            qualification,
            instruction_information: 1 << 7,
            linear_address: 0x5000,
            ..RawExit::default()
        };
        assert_eq!(
            decode_in(CodeWidth::Bits64, io(0x3f8 << 16)),
            Exit::Io(IoAccess {
                port: 0x3f8,
                width: IoWidth::Byte,
                direction: IoDirection::Out,
                operand: IoOperand::Accumulator
            })
        );
        assert_eq!(
            decode_in(
                CodeWidth::Bits64,
                io(0x1f0 << 16 | 1 << 5 | 1 << 4 | 1 << 3 | 3)
            ),
            Exit::Io(IoAccess {
                port: 0x1f0,
                width: IoWidth::DoubleWord,
                direction: IoDirection::In,
                operand: IoOperand::String {
                    address: Gva::new(0x5000),
                    repeat: Repeat::Count,
                    address_width: CodeWidth::Bits32
                }
            })
        );
    }

    #[test]
    fn exceptions_page_faults_and_nmis_differ() {
        let exception = |information, error_code| RawExit {
            reason: u32::from(reason::EXCEPTION_OR_NMI),
            qualification: 0x1234,
            interruption: Report {
                information,
                error_code,
                instruction_length: 0,
            },
            ..RawExit::default()
        };
        assert_eq!(
            decode_in(CodeWidth::Bits64, exception(0x8000_0b0e, 6)),
            Exit::PageFault {
                address: Gva::new(0x1234),
                error_code: PageFaultErrorCode::CAUSED_BY_WRITE | PageFaultErrorCode::USER_MODE
            }
        );
        assert_eq!(
            decode_in(CodeWidth::Bits64, exception(0x8000_0202, 0)),
            Exit::HostNmi
        );
        assert_eq!(
            decode_in(CodeWidth::Bits64, exception(0x8000_0b11, 0)),
            Exit::Exception(Exception::with_error_code(vector::ALIGNMENT_CHECK, 0))
        );
    }

    #[test]
    fn invpcid_adds_up_its_operand() {
        // invpcid r10, fs:[rcx + rdx * 4 + 0x20]
        let information = 2 | 2 << 7 | 4 << 15 | 2 << 18 | 1 << 23 | 10 << 28;
        let raw = RawExit {
            reason: u32::from(reason::INVPCID),
            qualification: 0x20,
            instruction_information: information,
            ..RawExit::default()
        };
        let rcx = 0xffff_ffff_0000_0001_u64;
        let rdx = 0xffff_ffff_0000_0002_u64;
        assert_eq!(
            decode_in(CodeWidth::Bits64, raw),
            Exit::InvalidatePcid {
                kind: 0xffff_ffff_0000_000a,
                descriptor: Gva::new(
                    0x5000_u64
                        .wrapping_add(0x20)
                        .wrapping_add(rcx)
                        .wrapping_add(rdx << 2)
                )
            }
        );
    }

    #[test]
    fn a_task_gate_leaves_no_event_behind() {
        let mut raw = RawExit {
            reason: u32::from(reason::TASK_SWITCH),
            qualification: 3 << 30 | 0x28,
            vectoring: Report {
                information: 0x8000_0b0d,
                error_code: 0x10,
                instruction_length: 0,
            },
            ..RawExit::default()
        };
        assert!(!raw.interrupted().is_valid());
        assert_eq!(
            decode_in(CodeWidth::Bits32, raw),
            Exit::TaskSwitch {
                selector: 0x28,
                source: TaskSwitchSource::Gate,
                error_code: Some(0x10),
                resume_rip: 0,
            }
        );
        raw.qualification = 0x28;
        assert!(raw.interrupted().is_valid());
    }

    #[test]
    fn instructions_that_switch_tasks_end_before_the_old_task_goes_on() {
        let switch = |source: u64, vectoring: u32| RawExit {
            reason: u32::from(reason::TASK_SWITCH),
            qualification: source << 30 | 0x30,
            vectoring: Report {
                information: vectoring,
                ..Report::default()
            },
            instruction_length: 5,
            ..RawExit::default()
        };
        for (source, vectoring, expected, resume_rip) in [
            (0, 0, TaskSwitchSource::Call, 5),
            (1, 0, TaskSwitchSource::InterruptReturn, 5),
            (2, 0, TaskSwitchSource::Jump, 5),
            (3, 0x8000_0480, TaskSwitchSource::Gate, 5),
            (3, 0x8000_0603, TaskSwitchSource::Gate, 5),
            (3, 0x8000_0020, TaskSwitchSource::Gate, 0),
            (3, 0x8000_0300, TaskSwitchSource::Gate, 0),
        ] {
            assert_eq!(
                decode_in(CodeWidth::Bits32, switch(source, vectoring)),
                Exit::TaskSwitch {
                    selector: 0x30,
                    source: expected,
                    error_code: None,
                    resume_rip,
                }
            );
        }
    }

    #[test]
    fn plain_exits_are_decoded_both_ways() {
        let registers = Registers::default();
        for (number, expected) in [
            (1, Exit::HostInterrupt),
            (7, Exit::InterruptWindow),
            (10, Exit::Cpuid),
            (12, Exit::Halt),
            (18, Exit::Hypercall),
            (31, Exit::ReadMsr(0)),
            (52, Exit::TimeSliceEnd),
        ] {
            assert_eq!(decode_plain(number, &registers), Some(expected));
            let raw = RawExit {
                reason: number,
                ..RawExit::default()
            };
            let mut guest = Guest {
                width: CodeWidth::Bits64,
            };
            assert_eq!(decode(&raw, &registers, &mut guest), expected);
        }
        assert_eq!(decode_plain(ENTRY_FAILURE | 0xa, &registers), None);
        assert_eq!(decode_plain(28, &registers), None);
    }

    #[test]
    fn quick_decoding_says_what_the_other_says_or_nothing() {
        let mut registers = Registers::default();
        registers.set(Gpr::Rbx, 0x8005_0033);
        registers.set(Gpr::R9, 1 << 32);
        for number in [0, 1, 10, 14, 18, 28, 30, 32, ENTRY_FAILURE | 0x1c] {
            for low in 0..0x1000_u64 {
                let qualification = 0x3f8 << 16 | low;
                let raw = RawExit {
                    reason: number,
                    qualification,
                    ..RawExit::default()
                };
                let quick = decode_quickly(number, &registers, || qualification);
                let wide = Gpr::R9 as u64;
                let may_be_left = number & ENTRY_FAILURE != 0
                    || number == 0
                    || number == 30 && low & STRING_IO != 0
                    || number == 28
                        && (super::control_register(low).is_none()
                            || low >> 5 & 1 != 0
                            || low & 0x30 == 0 && low >> 8 == wide);
                assert_eq!(quick.is_none(), may_be_left, "{number} {low:#x}");
                if let Some(quick) = quick {
                    let mut guest = Guest {
                        width: CodeWidth::Bits32,
                    };
                    assert_eq!(quick, decode(&raw, &registers, &mut guest));
                }
            }
        }
    }

    #[test]
    fn instructions_of_vmx_are_told_apart_from_hypercalls() {
        for reason in [11, 19, 20, 21, 22, 23, 24, 25, 26, 27, 50, 53, 59] {
            let raw = RawExit {
                reason,
                ..RawExit::default()
            };
            assert_eq!(
                decode_in(CodeWidth::Bits64, raw),
                Exit::VirtualizationInstruction
            );
        }
        let raw = RawExit {
            reason: 18,
            ..RawExit::default()
        };
        assert_eq!(decode_in(CodeWidth::Bits64, raw), Exit::Hypercall);
    }
}
