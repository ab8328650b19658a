//! From exit codes to [`Exit`].

use umbra_vcpu::address::Gva;
use umbra_vcpu::event::{Event, Exception, vector};
use umbra_vcpu::exit::{
    ControlRegister, Exit, IoAccess, IoDirection, IoOperand, IoWidth, MoveDirection, Repeat,
    TaskSwitchSource,
};
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic, Register};
use umbra_vcpu::instruction::{decode, memory_operand};
use umbra_vcpu::registers::{CodeWidth, ControlRegisters, Gpr, SegmentRegister};
use umbra_vcpu::{CodeReader, PrivilegeLevel, Vcpu};
use x86_64::structures::idt::PageFaultErrorCode;

use crate::capability::{Features, efer};
use crate::decode::{
    self, CPUID, ControlAccess, MAX_LENGTH, Plain, RDMSR, VMMCALL, WRMSR, control_access,
    debug_access, exit_code, load_machine_status, string_operand,
};
use crate::injection;
use crate::vcpu::{StepReason, SvmVcpu};

const CR4_SMEP: u64 = 1 << 20;

/// What `run` does with an exit.
pub(crate) enum Outcome {
    /// The caller sees it.
    Exit(Exit),
    /// The driver has dealt with it.
    Resume,
}

/// The instruction bytes could not be used.
enum CodeError {
    /// The page that holds them is not there any more: the guest faults as if it fetched now.
    Fetch(Gva),
    /// Another instruction stands there than the one that exited.
    Mismatch,
}

impl SvmVcpu {
    /// Puts the most frequent exits into `stop`, where the instruction stands in the plainest way:
    /// `None` leaves them and all others to [`SvmVcpu::decode_exit`].
    #[allow(clippy::inline_always, reason = "the way of every exit")]
    #[inline(always)]
    pub(crate) fn decode_plain(
        &mut self,
        exit: u64,
        code: &mut dyn CodeReader,
        stop: &mut Exit,
    ) -> Option<()> {
        let control = &self.vmcb().control;
        let information = control.exit_info_1;
        if exit == exit_code::IOIO {
            if information & IO_STRING != 0 {
                return None;
            }
            self.next_rip = Some(control.exit_info_2);
            *stop = Exit::Io(io_access(information));
            return Some(());
        }
        match exit {
            exit_code::CPUID | exit_code::VMMCALL | exit_code::MSR => {}
            exit_code::CR0_WRITE..=exit_code::CR15_WRITE => {
                return self.decode_plain_write(exit, code, stop);
            }
            _ => return None,
        }
        let next_rip = self.saved_next_rip();
        let code = match next_rip {
            Some(_) => 0,
            None => code.peek_code(self.code_address())?,
        };
        let index = self.registers.get(Gpr::Rcx) as u32;
        let length = match exit {
            exit_code::CPUID => {
                *stop = Exit::Cpuid;
                CPUID.usual_length(code)
            }
            exit_code::VMMCALL => {
                *stop = Exit::Hypercall;
                VMMCALL.usual_length(code)
            }
            _ if information & 1 == 0 => {
                *stop = Exit::ReadMsr(index);
                RDMSR.usual_length(code)
            }
            _ => {
                let value = self.registers.edx_eax();
                *stop = Exit::WriteMsr { index, value };
                WRMSR.usual_length(code)
            }
        };
        self.next_rip = Some(match next_rip {
            Some(next_rip) => next_rip,
            None => self.registers.rip.wrapping_add(length?),
        });
        Some(())
    }

    /// The same for writes of control registers.
    #[inline(never)]
    fn decode_plain_write(
        &mut self,
        exit: u64,
        code: &mut dyn CodeReader,
        stop: &mut Exit,
    ) -> Option<()> {
        let register = control_register(exit)?;
        let ControlAccess::Write(value) = self.peeked_access(true, code)? else {
            return None;
        };
        *stop = Exit::WriteControlRegister { register, value };
        Some(())
    }

    #[inline(never)]
    pub(crate) fn decode_exit(&mut self, exit: u64, code: &mut dyn CodeReader) -> Outcome {
        match self.try_decode(exit, code) {
            Ok(outcome) => outcome,
            Err(CodeError::Fetch(address)) => {
                let mut error_code = PageFaultErrorCode::INSTRUCTION_FETCH;
                if self.privilege_level().is_user() {
                    error_code |= PageFaultErrorCode::USER_MODE;
                }
                Outcome::Exit(Exit::PageFault {
                    address,
                    error_code,
                })
            }
            Err(CodeError::Mismatch) => Outcome::Exit(Exit::Exception(Exception::INVALID_OPCODE)),
        }
    }

    fn try_decode(&mut self, exit: u64, code: &mut dyn CodeReader) -> Result<Outcome, CodeError> {
        let control = &self.vmcb().control;
        let (first, second) = (control.exit_info_1, control.exit_info_2);
        if let Some(plain) = Plain::of_exit(exit, first) {
            self.plain_instruction(plain, code)?;
            return Ok(self.plain_exit(exit, first));
        }
        Ok(Outcome::Exit(match exit {
            exit_code::CR0_READ..=exit_code::CR15_READ
            | exit_code::CR0_WRITE..=exit_code::CR15_WRITE => {
                return self.control_register_exit(exit, first, code);
            }
            exit_code::DR0_READ..=exit_code::DR15_WRITE => self.debug_register_exit(code)?,
            exit_code::EXCEPTION_1 => self.debug_exception(),
            exit_code::INTN => return self.software_interrupt_exit(code),
            exit_code::EXCEPTION_0..=exit_code::EXCEPTION_31 => {
                return Ok(Self::exception_exit(
                    (exit - exit_code::EXCEPTION_0) as u8,
                    first,
                    second,
                ));
            }
            exit_code::INTR | exit_code::INIT => Exit::HostInterrupt,
            exit_code::NMI => Exit::HostNmi,
            exit_code::VINTR => {
                self.window_requested = false;
                Exit::InterruptWindow
            }
            exit_code::IRET => {
                self.begin_step(StepReason::NmiReturn);
                return Ok(Outcome::Resume);
            }
            exit_code::INVLPG => self.invalidate_page_exit(first, code)?,
            exit_code::IOIO => self.io_exit(first, second, code)?,
            exit_code::TASK_SWITCH => self.task_switch_exit(first, second, code)?,
            exit_code::SHUTDOWN => Exit::TripleFault,
            exit_code::INVPCID => self.invalidate_pcid_exit(code)?,
            exit_code::RSM
            | exit_code::INVLPGA
            | exit_code::VMRUN
            | exit_code::VMLOAD..=exit_code::SKINIT
            | exit_code::RDPRU
            | exit_code::INVLPGB
            | exit_code::INVPCID..=exit_code::TLBSYNC => Exit::VirtualizationInstruction,
            _ => Exit::Unknown {
                reason: exit,
                information: first,
            },
        }))
    }

    /// A task switch (APM vol. 2 15.14.1). The processor does not say where an instruction that asked for
    /// it ends.
    fn task_switch_exit(
        &mut self,
        first: u64,
        second: u64,
        code: &mut dyn CodeReader,
    ) -> Result<Exit, CodeError> {
        const BY_RETURN: u64 = 1 << 36;
        const BY_JUMP: u64 = 1 << 38;
        const HAS_ERROR_CODE: u64 = 1 << 44;
        let interrupted = self.vmcb().control.exit_interrupt_info;
        let source = if second & BY_RETURN != 0 {
            TaskSwitchSource::InterruptReturn
        } else if second & BY_JUMP != 0 {
            TaskSwitchSource::Jump
        } else if injection::is_valid(interrupted) {
            TaskSwitchSource::Gate
        } else {
            TaskSwitchSource::Call
        };
        let by_instruction =
            source != TaskSwitchSource::Gate || injection::is_raised_by_instruction(interrupted);
        let resume_rip = if by_instruction {
            self.instruction(code)?.next_ip()
        } else {
            self.registers.rip
        };
        Ok(Exit::TaskSwitch {
            selector: first as u16,
            source,
            error_code: (second & HAS_ERROR_CODE != 0).then_some(second as u32),
            resume_rip,
        })
    }

    /// Instructions whose operands are fixed registers.
    fn plain_exit(&mut self, exit: u64, information: u64) -> Outcome {
        let index = self.registers.get(Gpr::Rcx) as u32;
        Outcome::Exit(match exit {
            exit_code::CPUID => Exit::Cpuid,
            exit_code::HLT => Exit::Halt,
            exit_code::PAUSE => Exit::Pause,
            exit_code::VMMCALL => Exit::Hypercall,
            exit_code::MSR if information & 1 == 0 => Exit::ReadMsr(index),
            exit_code::MSR => Exit::WriteMsr {
                index,
                value: self.registers.edx_eax(),
            },
            exit_code::RDPMC => Exit::ReadPerformanceCounter,
            exit_code::INVD | exit_code::WBINVD => Exit::InvalidateCaches,
            exit_code::MONITOR => Exit::Monitor,
            exit_code::MWAIT => Exit::MonitorWait,
            exit_code::XSETBV => Exit::SetExtendedControlRegister {
                index,
                value: self.registers.edx_eax(),
            },
            _ => {
                // ICEBP is a trap: its handler returns past it, and it leaves DR6 alone.
                let next = self.registers.rip.wrapping_add(1);
                self.registers.rip = self.next_rip.unwrap_or(next);
                Exit::Exception(Exception::new(vector::DEBUG))
            }
        })
    }

    /// INT n, and on some emulators INT3 and INTO, while a debugger wants #BP to exit.
    fn software_interrupt_exit(&mut self, code: &mut dyn CodeReader) -> Result<Outcome, CodeError> {
        let instruction = self.instruction(code)?;
        let instruction_length = instruction.len() as u8;
        let event = match instruction.mnemonic() {
            Mnemonic::Int3 => {
                self.next_rip = None;
                let exception = Exception::new(vector::BREAKPOINT);
                return Ok(Outcome::Exit(Exit::Exception(exception)));
            }
            Mnemonic::Into => Event::SoftwareException {
                vector: vector::OVERFLOW,
                instruction_length,
            },
            Mnemonic::Int => Event::SoftwareInterrupt {
                vector: instruction.immediate8(),
                instruction_length,
            },
            _ => return Err(CodeError::Mismatch),
        };
        self.next_rip = None;
        self.changing_events().restore(event);
        Ok(Outcome::Resume)
    }

    fn exception_exit(number: u8, first: u64, second: u64) -> Outcome {
        Outcome::Exit(match number {
            vector::PAGE_FAULT => Exit::PageFault {
                address: Gva::new(second),
                error_code: PageFaultErrorCode::from_bits_truncate(first),
            },
            // The host has taken it.
            vector::MACHINE_CHECK => Exit::HostInterrupt,
            _ => Exit::Exception(Exception {
                vector: number,
                error_code: Exception::has_error_code(number).then_some(first as u32),
                address: None,
            }),
        })
    }

    /// Finds the end of an instruction without operands.
    fn plain_instruction(
        &mut self,
        plain: Plain,
        code: &mut dyn CodeReader,
    ) -> Result<(), CodeError> {
        if let Some(next_rip) = self.saved_next_rip() {
            self.next_rip = Some(next_rip);
            return Ok(());
        }
        let mut bytes = [0; MAX_LENGTH];
        let count = self.read_code(code, &mut bytes)?;
        let width = self.width();
        let length = plain
            .length(&bytes[..count], width)
            .ok_or_else(|| self.code_error(count))?;
        self.next_rip = Some(self.registers.rip.wrapping_add(length.into()));
        Ok(())
    }

    /// Reads the bytes at the instruction pointer, and returns how many there are.
    fn read_code(
        &self,
        code: &mut dyn CodeReader,
        bytes: &mut [u8; MAX_LENGTH],
    ) -> Result<usize, CodeError> {
        let address = self.code_address();
        let level = PrivilegeLevel::from_bits(self.vmcb().save.cpl);
        // The kept CR2 may be an older one, but no fetch depends on it.
        match code.read_code(&self.control, level, address, bytes) {
            0 => Err(CodeError::Fetch(address)),
            count => Ok(count.min(MAX_LENGTH)),
        }
    }

    fn code_address(&self) -> Gva {
        match self.width() {
            CodeWidth::Bits64 => Gva::new(self.registers.rip),
            CodeWidth::Bits32 | CodeWidth::Bits16 => {
                let base = self.vmcb().save.cs.base;
                Gva::new(base.wrapping_add(self.registers.rip) & 0xffff_ffff)
            }
        }
    }

    /// Why `count` bytes hold no instruction that could have exited.
    fn code_error(&self, count: usize) -> CodeError {
        if count < MAX_LENGTH {
            CodeError::Fetch(self.code_address().wrapping_add(count as u64))
        } else {
            CodeError::Mismatch
        }
    }

    /// Decodes the instruction at the instruction pointer and notes where it ends.
    fn instruction(&mut self, code: &mut dyn CodeReader) -> Result<Instruction, CodeError> {
        let mut bytes = [0; MAX_LENGTH];
        let count = self.read_code(code, &mut bytes)?;
        let instruction = decode(&bytes[..count], self.width(), self.registers.rip)
            .ok_or_else(|| self.code_error(count))?;
        self.next_rip = Some(instruction.next_ip());
        Ok(instruction)
    }

    fn operand_address(&self, instruction: &Instruction) -> Option<Gva> {
        memory_operand(instruction, &self.registers, self.width(), |register| {
            self.segment(register)
        })
    }

    fn control_register_exit(
        &mut self,
        exit: u64,
        information: u64,
        code: &mut dyn CodeReader,
    ) -> Result<Outcome, CodeError> {
        let Some(register) = control_register(exit) else {
            return Ok(Outcome::Exit(Exit::Exception(Exception::INVALID_OPCODE)));
        };
        let is_write = exit >= exit_code::CR0_WRITE;
        let assisted = self.assisted_access(is_write, information);
        let access = if let Some(access) = assisted.or_else(|| self.peeked_access(is_write, code)) {
            access
        } else {
            let instruction = self.instruction(code)?;
            let (registers, cr0, width) = (self.registers, self.control.cr0, self.width());
            control_access(&instruction, &registers, cr0, width, || {
                self.operand_address(&instruction)
            })
            .ok_or(CodeError::Mismatch)?
        };
        Ok(Outcome::Exit(match access {
            ControlAccess::Read(target) if !is_write => {
                Exit::ReadControlRegister { register, target }
            }
            ControlAccess::Write(value) if is_write => {
                Exit::WriteControlRegister { register, value }
            }
            ControlAccess::LoadLowHalf(address) if is_write => {
                let source = self.read_word(address, code)?;
                Exit::WriteControlRegister {
                    register,
                    value: load_machine_status(self.control.cr0, source.into()),
                }
            }
            ControlAccess::StoreLowHalf if !is_write => {
                self.next_rip = None;
                self.vmcb_mut().control.intercept_cr_reads &= !1;
                self.begin_step(StepReason::StoreMachineStatus);
                return Ok(Outcome::Resume);
            }
            _ => return Err(CodeError::Mismatch),
        }))
    }

    /// MOV CR with decode assists (APM vol. 2 15.33.1).
    fn assisted_access(&mut self, is_write: bool, information: u64) -> Option<ControlAccess> {
        if !self.has_feature(Features::DECODE_ASSISTS) || information & (1 << 63) == 0 {
            return None;
        }
        self.next_rip = Some(self.saved_next_rip()?);
        let register = Gpr::from_encoding(information as u8);
        Some(self.general_access(is_write, register))
    }

    /// MOV CR in 64-bit code, in its usual encoding.
    fn peeked_access(
        &mut self,
        is_write: bool,
        code: &mut dyn CodeReader,
    ) -> Option<ControlAccess> {
        if self.width() != CodeWidth::Bits64 {
            return None;
        }
        let code = code.peek_code(Gva::new(self.registers.rip))?;
        let (register, length) = decode::move_control(code, is_write)?;
        self.next_rip = Some(self.registers.rip.wrapping_add(length));
        Some(if is_write {
            ControlAccess::Write(self.registers.get(register))
        } else {
            ControlAccess::Read(register)
        })
    }

    fn general_access(&self, is_write: bool, register: Gpr) -> ControlAccess {
        if !is_write {
            return ControlAccess::Read(register);
        }
        let value = self.registers.get(register);
        ControlAccess::Write(match self.width() {
            CodeWidth::Bits64 => value,
            CodeWidth::Bits32 | CodeWidth::Bits16 => value & 0xffff_ffff,
        })
    }

    /// LMSW's operand, which is data: the right to execute it does not matter.
    fn read_word(&self, address: Gva, code: &mut dyn CodeReader) -> Result<u16, CodeError> {
        let mut bytes = [0; MAX_LENGTH];
        let control = self.control_registers();
        let data = ControlRegisters {
            efer: control.efer & !efer::NXE,
            cr4: control.cr4 & !CR4_SMEP,
            ..control
        };
        if code.read_code(&data, PrivilegeLevel::Ring0, address, &mut bytes) < 2 {
            return Err(CodeError::Fetch(address));
        }
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn debug_register_exit(&mut self, code: &mut dyn CodeReader) -> Result<Exit, CodeError> {
        let instruction = self.instruction(code)?;
        let (general, register) = debug_access(&instruction).ok_or(CodeError::Mismatch)?;
        Ok(Exit::MoveDebugRegister {
            number: register as u8 - Register::DR0 as u8,
            general,
            direction: if instruction.op0_register().is_dr() {
                MoveDirection::Write
            } else {
                MoveDirection::Read
            },
        })
    }

    fn invalidate_page_exit(
        &mut self,
        information: u64,
        code: &mut dyn CodeReader,
    ) -> Result<Exit, CodeError> {
        if self.has_feature(Features::DECODE_ASSISTS)
            && let Some(next_rip) = self.saved_next_rip()
        {
            self.next_rip = Some(next_rip);
            return Ok(Exit::InvalidatePage(Gva::new(information)));
        }
        if self.width() == CodeWidth::Bits64
            && let Some(code) = code.peek_code(Gva::new(self.registers.rip))
            && let Some((base, displacement, length)) = decode::invalidate_page(code)
        {
            self.next_rip = Some(self.registers.rip.wrapping_add(length));
            let address = self.registers.get(base).wrapping_add_signed(displacement);
            return Ok(Exit::InvalidatePage(Gva::new(address)));
        }
        let instruction = self.instruction(code)?;
        if instruction.mnemonic() != Mnemonic::Invlpg {
            return Err(CodeError::Mismatch);
        }
        self.operand_address(&instruction)
            .map(Exit::InvalidatePage)
            .ok_or(CodeError::Mismatch)
    }

    fn invalidate_pcid_exit(&mut self, code: &mut dyn CodeReader) -> Result<Exit, CodeError> {
        let instruction = self.instruction(code)?;
        if instruction.mnemonic() != Mnemonic::Invpcid {
            return Err(CodeError::Mismatch);
        }
        let descriptor = self
            .operand_address(&instruction)
            .ok_or(CodeError::Mismatch)?;
        let register = umbra_vcpu::instruction::general_register(instruction.op0_register())
            .ok_or(CodeError::Mismatch)?;
        let kind = self.registers.get(register);
        Ok(Exit::InvalidatePcid {
            kind: match self.width() {
                CodeWidth::Bits64 => kind,
                CodeWidth::Bits32 | CodeWidth::Bits16 => kind & 0xffff_ffff,
            },
            descriptor,
        })
    }

    fn io_exit(
        &mut self,
        information: u64,
        next_rip: u64,
        code: &mut dyn CodeReader,
    ) -> Result<Exit, CodeError> {
        let access = io_access(information);
        if information & IO_STRING == 0 {
            self.next_rip = Some(next_rip);
            return Ok(Exit::Io(access));
        }
        let instruction = self.instruction(code)?;
        let (segment, address_width) = string_operand(&instruction).ok_or(CodeError::Mismatch)?;
        let index = match access.direction {
            IoDirection::In => Gpr::Rdi,
            IoDirection::Out => Gpr::Rsi,
        };
        let offset = self.registers.get(index) & width_mask(address_width);
        let base = segment_register(segment).map_or(0, |register| {
            // In 64-bit mode only FS and GS have a base.
            let flat = self.width() == CodeWidth::Bits64
                && !matches!(register, SegmentRegister::Fs | SegmentRegister::Gs);
            if flat {
                0
            } else {
                self.segment(register).base.as_u64()
            }
        });
        let linear_mask = width_mask(match self.width() {
            CodeWidth::Bits64 => CodeWidth::Bits64,
            CodeWidth::Bits32 | CodeWidth::Bits16 => CodeWidth::Bits32,
        });
        Ok(Exit::Io(IoAccess {
            operand: IoOperand::String {
                address: Gva::new(base.wrapping_add(offset) & linear_mask),
                repeat: if information & IO_REPEAT == 0 {
                    Repeat::Once
                } else {
                    Repeat::Count
                },
                address_width,
            },
            ..access
        }))
    }
}

/// The control register that an exit code speaks of.
const fn control_register(exit: u64) -> Option<ControlRegister> {
    Some(match exit & 0xf {
        0 => ControlRegister::Cr0,
        2 => ControlRegister::Cr2,
        3 => ControlRegister::Cr3,
        4 => ControlRegister::Cr4,
        8 => ControlRegister::Cr8,
        _ => return None,
    })
}

const IO_IN: u64 = 1 << 0;
const IO_STRING: u64 = 1 << 2;
const IO_REPEAT: u64 = 1 << 3;

/// Port, width and direction of EXITINFO1 (APM vol. 2 figure 15-2).
const fn io_access(information: u64) -> IoAccess {
    IoAccess {
        port: (information >> 16) as u16,
        width: match (information >> 4) & 7 {
            1 => IoWidth::Byte,
            2 => IoWidth::Word,
            _ => IoWidth::DoubleWord,
        },
        direction: if information & IO_IN != 0 {
            IoDirection::In
        } else {
            IoDirection::Out
        },
        operand: IoOperand::Accumulator,
    }
}

const fn width_mask(width: CodeWidth) -> u64 {
    match width {
        CodeWidth::Bits16 => 0xffff,
        CodeWidth::Bits32 => 0xffff_ffff,
        CodeWidth::Bits64 => u64::MAX,
    }
}

const fn segment_register(register: Register) -> Option<SegmentRegister> {
    Some(match register {
        Register::ES => SegmentRegister::Es,
        Register::CS => SegmentRegister::Cs,
        Register::SS => SegmentRegister::Ss,
        Register::DS => SegmentRegister::Ds,
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_information_of_each_kind() {
        for (information, port, width, direction) in [
            (0x03f8_0010, 0x3f8, IoWidth::Byte, IoDirection::Out),
            (0x0060_0011, 0x60, IoWidth::Byte, IoDirection::In),
            (0x01f0_0021, 0x1f0, IoWidth::Word, IoDirection::In),
            (0xffff_0040, 0xffff, IoWidth::DoubleWord, IoDirection::Out),
        ] {
            let access = io_access(information);
            assert_eq!(access.port, port);
            assert_eq!(access.width, width);
            assert_eq!(access.direction, direction);
            assert_eq!(access.operand, IoOperand::Accumulator);
        }
    }
}
