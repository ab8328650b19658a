//! A guest processor's registers, copied, and as text.

use core::fmt;

use umbra_vcpu::address::Gva;
use umbra_vcpu::registers::{
    CodeWidth, ControlRegisters, DescriptorTable, Gpr, Registers, Segment, SegmentAttributes,
    SegmentRegister,
};
use umbra_vcpu::{PrivilegeLevel, Vcpu};
use x86_64::registers::control::EferFlags;

use crate::exits::register_name;
use crate::flags::{CR0, CR4, EFER, RFLAGS};

/// The registers that say what a processor does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessorState {
    /// The general registers, RIP and RFLAGS.
    pub registers: Registers,
    /// The control registers.
    pub control: ControlRegisters,
    /// The segment registers, in the order of [`SegmentRegister::ALL`].
    pub segments: [Segment; 8],
    /// The global descriptor table.
    pub gdtr: DescriptorTable,
    /// The interrupt descriptor table.
    pub idtr: DescriptorTable,
}

impl ProcessorState {
    /// The state of a processor that does not run now.
    pub fn of(vcpu: &(impl Vcpu + ?Sized)) -> Self {
        Self {
            registers: *vcpu.registers(),
            control: vcpu.control_registers(),
            segments: SegmentRegister::ALL.map(|register| vcpu.segment(register)),
            gdtr: vcpu.gdtr(),
            idtr: vcpu.idtr(),
        }
    }

    /// A segment register.
    pub const fn segment(&self, register: SegmentRegister) -> &Segment {
        &self.segments[register as usize]
    }

    /// The current privilege level.
    pub const fn privilege_level(&self) -> PrivilegeLevel {
        PrivilegeLevel::from_bits(self.segment(SegmentRegister::Ss).privilege_level())
    }

    /// How wide the code is that runs now.
    pub fn code_width(&self) -> CodeWidth {
        umbra_vcpu::instruction::code_width(
            &self.control,
            self.registers.rflags,
            self.segment(SegmentRegister::Cs),
        )
    }

    /// Whether the processor is in long mode, with whatever width of code.
    pub(crate) const fn is_long_mode(&self) -> bool {
        self.control.efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0
    }

    /// The linear address of an offset in a segment.
    pub fn linear(&self, register: SegmentRegister, offset: u64) -> Gva {
        match self.code_width() {
            CodeWidth::Bits64 => Gva::new(offset),
            CodeWidth::Bits32 | CodeWidth::Bits16 => {
                let base = self.segment(register).base;
                Gva::new(base.wrapping_add(offset).as_u64() & 0xffff_ffff)
            }
        }
    }

    /// The linear address of the next instruction.
    pub fn code_address(&self) -> Gva {
        self.linear(SegmentRegister::Cs, self.registers.rip)
    }

    /// The linear address of the top of the stack.
    pub fn stack_address(&self) -> Gva {
        let pointer = self.registers.get(Gpr::Rsp);
        let wide = self.segment(SegmentRegister::Ss).attributes;
        let pointer = match self.code_width() {
            CodeWidth::Bits64 => pointer,
            _ if wide.contains(SegmentAttributes::DEFAULT_32) => pointer & 0xffff_ffff,
            _ => pointer & 0xffff,
        };
        self.linear(SegmentRegister::Ss, pointer)
    }
}

impl fmt::Display for ProcessorState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in Gpr::ALL.chunks(4) {
            for (place, &register) in row.iter().enumerate() {
                let separator = if place == 0 { "  " } else { " " };
                let value = self.registers.get(register);
                write!(f, "{separator}{:<3} {value:016x}", register_name(register))?;
            }
            writeln!(f)?;
        }
        let control = &self.control;
        writeln!(
            f,
            "  rip {:016x} rflags {}, {}-bit code at privilege level {}",
            self.registers.rip,
            Flags(self.registers.rflags, RFLAGS),
            self.code_width().bits(),
            self.privilege_level() as u8,
        )?;
        writeln!(f, "  cr0 {}", Flags(control.cr0, CR0))?;
        writeln!(
            f,
            "  cr2 {:x} cr3 {:x} cr8 {:x} xcr0 {:x}",
            control.cr2, control.cr3, control.cr8, control.xcr0
        )?;
        writeln!(f, "  cr4 {}", Flags(control.cr4, CR4))?;
        writeln!(f, "  efer {}", Flags(control.efer, EFER))?;
        for (register, segment) in SegmentRegister::ALL.iter().zip(&self.segments) {
            let name = match register {
                SegmentRegister::Es => "es",
                SegmentRegister::Cs => "cs",
                SegmentRegister::Ss => "ss",
                SegmentRegister::Ds => "ds",
                SegmentRegister::Fs => "fs",
                SegmentRegister::Gs => "gs",
                SegmentRegister::Ldtr => "ldtr",
                SegmentRegister::Tr => "tr",
            };
            writeln!(
                f,
                "  {name:<4} {:04x} base {:016x} limit {:08x} attributes {:05x}",
                segment.selector,
                segment.base,
                segment.limit,
                segment.attributes.bits()
            )?;
        }
        writeln!(
            f,
            "  gdtr base {:016x} limit {:04x}, idtr base {:016x} limit {:04x}",
            self.gdtr.base, self.gdtr.limit, self.idtr.base, self.idtr.limit
        )
    }
}

/// The names of the bits that are set, as the manual has them.
struct Flags<'a>(u64, &'a [(u32, &'a str)]);

impl fmt::Display for Flags<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(value, names) = self;
        write!(f, "{value:x} (")?;
        let set = names.iter().filter(|(bit, _)| value >> bit & 1 != 0);
        for (place, (_, name)) in set.enumerate() {
            let separator = if place == 0 { "" } else { " " };
            write!(f, "{separator}{name}")?;
        }
        f.write_str(")")
    }
}
