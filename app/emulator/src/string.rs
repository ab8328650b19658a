//! MOVS, STOS, LODS, CMPS, SCAS, INS and OUTS, with and without a repeat prefix.

use umbra_vcpu::exit::IoWidth;
use umbra_vcpu::instruction::iced_x86::{Instruction, Mnemonic, OpKind, Register};
use umbra_vcpu::registers::{CodeWidth, Gpr, SegmentRegister};
use x86_64::registers::rflags::RFlags;

use crate::Progress;
use crate::address::{self, Operand, part, segment_register, set_part};
use crate::alu::Binary;
use crate::environment::{Environment, Intent, Stop};
use crate::operand::{read_memory, register_value, set_register};
use crate::size::Size;

/// The most elements of a repeated instruction that one call carries out.
pub const BATCH: u32 = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    Input,
    Output,
}

/// When a repeated instruction ends besides at a count of zero.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Never,
    Count,
    WhileEqual,
    WhileNotEqual,
}

/// One string instruction.
struct StringInstruction {
    operation: Operation,
    size: Size,
    repeat: Repeat,
    address_width: CodeWidth,
    source: SegmentRegister,
}

/// Whether this is a string instruction; MOVSD and CMPSD name an SSE instruction, too.
pub fn is_string(instruction: &Instruction) -> bool {
    instruction.is_string_instruction()
}

const fn operation(mnemonic: Mnemonic) -> Option<(Operation, Size)> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Movsb => (Operation::Move, Size::Byte),
        M::Movsw => (Operation::Move, Size::Word),
        M::Movsd => (Operation::Move, Size::DoubleWord),
        M::Movsq => (Operation::Move, Size::QuadWord),
        M::Stosb => (Operation::Store, Size::Byte),
        M::Stosw => (Operation::Store, Size::Word),
        M::Stosd => (Operation::Store, Size::DoubleWord),
        M::Stosq => (Operation::Store, Size::QuadWord),
        M::Lodsb => (Operation::Load, Size::Byte),
        M::Lodsw => (Operation::Load, Size::Word),
        M::Lodsd => (Operation::Load, Size::DoubleWord),
        M::Lodsq => (Operation::Load, Size::QuadWord),
        M::Cmpsb => (Operation::Compare, Size::Byte),
        M::Cmpsw => (Operation::Compare, Size::Word),
        M::Cmpsd => (Operation::Compare, Size::DoubleWord),
        M::Cmpsq => (Operation::Compare, Size::QuadWord),
        M::Scasb => (Operation::Scan, Size::Byte),
        M::Scasw => (Operation::Scan, Size::Word),
        M::Scasd => (Operation::Scan, Size::DoubleWord),
        M::Scasq => (Operation::Scan, Size::QuadWord),
        M::Insb => (Operation::Input, Size::Byte),
        M::Insw => (Operation::Input, Size::Word),
        M::Insd => (Operation::Input, Size::DoubleWord),
        M::Outsb => (Operation::Output, Size::Byte),
        M::Outsw => (Operation::Output, Size::Word),
        M::Outsd => (Operation::Output, Size::DoubleWord),
        _ => return None,
    })
}

impl StringInstruction {
    fn of(instruction: &Instruction) -> Option<Self> {
        let (operation, size) = operation(instruction.mnemonic())?;
        let (equal, not_equal) = (
            instruction.has_repe_prefix(),
            instruction.has_repne_prefix(),
        );
        let compares = matches!(operation, Operation::Compare | Operation::Scan);
        let repeat = match (equal, not_equal, compares) {
            (false, false, _) => Repeat::Never,
            (true, _, true) => Repeat::WhileEqual,
            (false, true, true) => Repeat::WhileNotEqual,
            (_, _, false) => Repeat::Count,
        };
        Some(Self {
            operation,
            size,
            repeat,
            address_width: address_width(instruction)?,
            source: segment_register(instruction.memory_segment())?,
        })
    }

    fn source<E: Environment>(&self, environment: &E) -> Operand {
        Operand {
            segment: self.source,
            offset: part(environment, Gpr::Rsi, self.address_width),
        }
    }

    fn destination<E: Environment>(&self, environment: &E) -> Operand {
        Operand {
            segment: SegmentRegister::Es,
            offset: part(environment, Gpr::Rdi, self.address_width),
        }
    }

    /// Carries out one element and moves the index registers on.
    fn element<E: Environment>(&self, environment: &mut E) -> Result<(), Stop<E::Failure>> {
        let (size, bytes) = (self.size, self.size.bytes());
        let accumulator = accumulator(size);
        let mut uses = (false, false);
        match self.operation {
            Operation::Move => {
                let source = self.source(environment);
                let source = address::resolve(environment, source, bytes, Intent::Read)?;
                let target = self.destination(environment);
                let target = address::resolve(environment, target, bytes, Intent::Write)?;
                let value = read_memory(environment, &source, size)?;
                address::store(environment, &target, &value.to_le_bytes()[..bytes])?;
                uses = (true, true);
            }
            Operation::Store => {
                let value = register_value(environment, accumulator);
                let target = self.destination(environment);
                let target = address::resolve(environment, target, bytes, Intent::Write)?;
                address::store(environment, &target, &value.to_le_bytes()[..bytes])?;
                uses.1 = true;
            }
            Operation::Load => {
                let source = self.source(environment);
                let source = address::resolve(environment, source, bytes, Intent::Read)?;
                let value = read_memory(environment, &source, size)?;
                set_register(environment, accumulator, value);
                uses.0 = true;
            }
            Operation::Compare => {
                let left = self.source(environment);
                let left = address::resolve(environment, left, bytes, Intent::Read)?;
                let right = self.destination(environment);
                let right = address::resolve(environment, right, bytes, Intent::Read)?;
                let left = read_memory(environment, &left, size)?;
                let right = read_memory(environment, &right, size)?;
                self.compare(environment, left, right);
                uses = (true, true);
            }
            Operation::Scan => {
                let right = self.destination(environment);
                let right = address::resolve(environment, right, bytes, Intent::Read)?;
                let right = read_memory(environment, &right, size)?;
                let left = register_value(environment, accumulator);
                self.compare(environment, left, right);
                uses.1 = true;
            }
            Operation::Input => {
                // The destination comes first: what a device has given cannot be asked for twice.
                let target = self.destination(environment);
                let target = address::resolve(environment, target, bytes, Intent::Write)?;
                let (port, width) = self.port(environment);
                let value = environment.read_port(port, width);
                address::store(environment, &target, &value.to_le_bytes()[..bytes])?;
                uses.1 = true;
            }
            Operation::Output => {
                let source = self.source(environment);
                let source = address::resolve(environment, source, bytes, Intent::Read)?;
                let value = read_memory(environment, &source, size)?;
                let (port, width) = self.port(environment);
                environment.write_port(port, width, value as u32);
                uses.0 = true;
            }
        }
        self.advance(environment, uses);
        Ok(())
    }

    fn compare<E: Environment>(&self, environment: &mut E, left: u64, right: u64) {
        let (_, flags) = Binary::Subtract.compute(self.size, left, right, 0);
        let registers = environment.registers_mut();
        registers.rflags = flags.apply(registers.rflags);
    }

    fn port<E: Environment>(&self, environment: &E) -> (u16, IoWidth) {
        let width = match self.size {
            Size::Byte => IoWidth::Byte,
            Size::Word => IoWidth::Word,
            Size::DoubleWord | Size::QuadWord => IoWidth::DoubleWord,
        };
        (environment.registers().get(Gpr::Rdx) as u16, width)
    }

    /// Moves rSI and rDI, as far as they are used, to the next element.
    fn advance<E: Environment>(&self, environment: &mut E, (source, destination): (bool, bool)) {
        let backwards = environment.registers().rflags & RFlags::DIRECTION_FLAG.bits() != 0;
        let bytes = self.size.bytes() as u64;
        let step = if backwards {
            bytes.wrapping_neg()
        } else {
            bytes
        };
        for register in [source.then_some(Gpr::Rsi), destination.then_some(Gpr::Rdi)]
            .into_iter()
            .flatten()
        {
            let next = part(environment, register, self.address_width).wrapping_add(step);
            set_part(environment, register, self.address_width, next);
        }
    }

    fn is_over<E: Environment>(&self, environment: &E) -> bool {
        let equal = environment.registers().rflags & RFlags::ZERO_FLAG.bits() != 0;
        let by_flags = match self.repeat {
            Repeat::Never => true,
            Repeat::Count => false,
            Repeat::WhileEqual => !equal,
            Repeat::WhileNotEqual => equal,
        };
        by_flags || part(environment, Gpr::Rcx, self.address_width) == 0
    }
}

/// Carries out a string instruction, or a batch of a repeated one. A guest that traps single steps
/// traps after each element.
pub fn execute<E: Environment>(
    environment: &mut E,
    instruction: &Instruction,
) -> Result<Progress, Stop<E::Failure>> {
    let string = StringInstruction::of(instruction).ok_or(Stop::Unsupported)?;
    let done = Progress::Done {
        next_rip: instruction.next_ip(),
    };
    let traps = environment.registers().rflags & RFlags::TRAP_FLAG.bits() != 0;
    let batch = if traps { 1 } else { BATCH };
    if string.repeat != Repeat::Never && part(environment, Gpr::Rcx, string.address_width) == 0 {
        return Ok(done);
    }
    for _ in 0..batch {
        string.element(environment)?;
        if string.repeat != Repeat::Never {
            let left = part(environment, Gpr::Rcx, string.address_width).wrapping_sub(1);
            set_part(environment, Gpr::Rcx, string.address_width, left);
        }
        if string.is_over(environment) {
            return Ok(done);
        }
    }
    Ok(Progress::Repeating)
}

const fn accumulator(size: Size) -> Register {
    match size {
        Size::Byte => Register::AL,
        Size::Word => Register::AX,
        Size::DoubleWord => Register::EAX,
        Size::QuadWord => Register::RAX,
    }
}

/// How wide rSI, rDI and rCX are.
fn address_width(instruction: &Instruction) -> Option<CodeWidth> {
    (0..instruction.op_count()).find_map(|index| match instruction.op_kind(index) {
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(CodeWidth::Bits16),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(CodeWidth::Bits32),
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(CodeWidth::Bits64),
        _ => None,
    })
}
