//! A processor's registers as GDB has them: the description that GDB asks for, and their values in its
//! order.
//!
//! Protocol: [`Layout`] is chosen when a session begins, and stays: GDB reads the description once. The
//! program counter is a linear address, because GDB knows no segments; all other registers are as they are.

use core::fmt::{self, Write};

use gdbstub::arch::Arch;
use umbra_inspect::{ProcessorState, flags};
use umbra_vcpu::Vcpu;
use umbra_vcpu::address::Gva;
use umbra_vcpu::extended_state::{ExtendedState, LEGACY_SIZE};
use umbra_vcpu::registers::{CodeWidth, ControlRegisters, Gpr, SegmentRegister};
use x86_64::registers::rflags::RFlags;

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// x86 with registers that a [`Layout`] describes.
pub enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Values;
    type BreakpointKind = usize;
    type RegId = ();
}

/// More bytes than the registers of any layout take.
const LONGEST: usize = 1024;

/// Registers' values, one after the other in the layout's order.
#[derive(Clone)]
pub struct Values {
    bytes: [u8; LONGEST],
    length: usize,
    program_counter: u64,
}

impl Default for Values {
    fn default() -> Self {
        Self {
            bytes: [0; LONGEST],
            length: 0,
            program_counter: 0,
        }
    }
}

impl PartialEq for Values {
    fn eq(&self, other: &Self) -> bool {
        self.bytes[..self.length] == other.bytes[..other.length]
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x?}", &self.bytes[..self.length])
    }
}

impl Values {
    fn push(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }
}

impl gdbstub::arch::Registers for Values {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.program_counter
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for &byte in &self.bytes[..self.length] {
            write_byte(Some(byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.length = 0;
        if bytes.len() > LONGEST {
            return Err(());
        }
        self.push(bytes);
        Ok(())
    }
}

/// Which registers there are, and how wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Those of 32-bit code: `i386`.
    Bits32,
    /// Those of 64-bit code: `i386:x86-64`.
    Bits64,
}

/// One of GDB's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    General(Gpr),
    ProgramCounter,
    Flags,
    Selector(SegmentRegister),
    /// ST0 to ST7.
    Stack(u8),
    /// One of [`X87_NAMES`].
    X87(u8),
    Xmm(u8),
    Mxcsr,
    /// A segment's base, by its model-specific register.
    Base(u32),
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Efer,
}

/// The general registers in GDB's order.
const WIDE_ORDER: [Gpr; 16] = [
    Gpr::Rax,
    Gpr::Rbx,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rsi,
    Gpr::Rdi,
    Gpr::Rbp,
    Gpr::Rsp,
    Gpr::R8,
    Gpr::R9,
    Gpr::R10,
    Gpr::R11,
    Gpr::R12,
    Gpr::R13,
    Gpr::R14,
    Gpr::R15,
];
/// GDB's names of the general registers, in the order of their encoding.
const WIDE_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const NARROW_NAMES: [&str; 8] = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"];
const SELECTORS: [(SegmentRegister, &str); 6] = [
    (SegmentRegister::Cs, "cs"),
    (SegmentRegister::Ss, "ss"),
    (SegmentRegister::Ds, "ds"),
    (SegmentRegister::Es, "es"),
    (SegmentRegister::Fs, "fs"),
    (SegmentRegister::Gs, "gs"),
];
const STACK_NAMES: [&str; 8] = ["st0", "st1", "st2", "st3", "st4", "st5", "st6", "st7"];
const X87_NAMES: [&str; 8] = [
    "fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop",
];
const XMM_NAMES: [&str; 16] = [
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
    "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
];

/// The types that the registers have besides GDB's own.
const VECTOR_TYPES: &str = "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
    <vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\
    <vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\
    <vector id=\"v8i16\" type=\"int16\" count=\"8\"/>\
    <vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\
    <vector id=\"v2i64\" type=\"int64\" count=\"2\"/>\
    <union id=\"vec128\">\
    <field name=\"v4_float\" type=\"v4f\"/><field name=\"v2_double\" type=\"v2d\"/>\
    <field name=\"v16_int8\" type=\"v16i8\"/><field name=\"v8_int16\" type=\"v8i16\"/>\
    <field name=\"v4_int32\" type=\"v4i32\"/><field name=\"v2_int64\" type=\"v2i64\"/>\
    <field name=\"uint128\" type=\"uint128\"/></union>";

impl Layout {
    /// Calls `each` with each register and its name, feature by feature.
    fn for_each(self, mut each: impl FnMut(Feature, Register, &'static str)) {
        let is_wide = self == Self::Bits64;
        let narrow = Gpr::ALL.iter().zip(NARROW_NAMES);
        let wide = WIDE_ORDER
            .iter()
            .map(|register| (register, WIDE_NAMES[*register as usize]));
        let count = if is_wide { 16 } else { 8 };
        if is_wide {
            wide.for_each(|(register, name)| {
                each(Feature::Core, Register::General(*register), name);
            });
        } else {
            narrow.for_each(|(register, name)| {
                each(Feature::Core, Register::General(*register), name);
            });
        }
        let counter = if is_wide { "rip" } else { "eip" };
        each(Feature::Core, Register::ProgramCounter, counter);
        each(Feature::Core, Register::Flags, "eflags");
        for (register, name) in SELECTORS {
            each(Feature::Core, Register::Selector(register), name);
        }
        for (index, name) in (0..).zip(STACK_NAMES) {
            each(Feature::Core, Register::Stack(index), name);
        }
        for (index, name) in (0..).zip(X87_NAMES) {
            each(Feature::Core, Register::X87(index), name);
        }
        for (index, name) in (0..).zip(XMM_NAMES).take(count) {
            each(Feature::Sse, Register::Xmm(index), name);
        }
        each(Feature::Sse, Register::Mxcsr, "mxcsr");
        if is_wide {
            each(Feature::Segments, Register::Base(FS_BASE), "fs_base");
            each(Feature::Segments, Register::Base(GS_BASE), "gs_base");
            each(
                Feature::Control,
                Register::Base(KERNEL_GS_BASE),
                "k_gs_base",
            );
        }
        for (register, name) in [
            (Register::Cr0, "cr0"),
            (Register::Cr2, "cr2"),
            (Register::Cr3, "cr3"),
            (Register::Cr4, "cr4"),
            (Register::Cr8, "cr8"),
            (Register::Efer, "efer"),
        ] {
            each(Feature::Control, register, name);
        }
    }

    const fn bits(self) -> usize {
        match self {
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    const fn register_bits(self, register: Register) -> usize {
        match register {
            Register::Flags | Register::Selector(_) | Register::X87(_) | Register::Mxcsr => 32,
            Register::Stack(_) => 80,
            Register::Xmm(_) => 128,
            Register::Base(_) | Register::Efer => 64,
            _ => self.bits(),
        }
    }

    /// Writes the description that GDB asks for, in the format of its manual's appendix G.
    pub fn describe(self, xml: &mut impl Write) -> fmt::Result {
        let architecture = match self {
            Self::Bits32 => "i386",
            Self::Bits64 => "i386:x86-64",
        };
        write!(
            xml,
            "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\">\
             <target version=\"1.0\"><architecture>{architecture}</architecture>"
        )?;
        let mut current = None;
        let mut result = Ok(());
        self.for_each(|feature, register, name| {
            result = result.and_then(|()| {
                if current != Some(feature) {
                    if current.is_some() {
                        xml.write_str("</feature>")?;
                    }
                    current = Some(feature);
                    write!(xml, "<feature name=\"{}\">", feature.name())?;
                    self.describe_types(feature, xml)?;
                }
                self.describe_register(register, name, xml)
            });
        });
        result?;
        xml.write_str("</feature></target>")
    }

    fn describe_types(self, feature: Feature, xml: &mut impl Write) -> fmt::Result {
        let bytes = self.bits() / 8;
        match feature {
            Feature::Core => describe_flags(xml, "i386_eflags", 4, flags::RFLAGS),
            Feature::Sse => xml.write_str(VECTOR_TYPES),
            Feature::Segments => Ok(()),
            Feature::Control => {
                describe_flags(xml, "cr0_flags", bytes, flags::CR0)?;
                describe_flags(xml, "cr4_flags", bytes, flags::CR4)?;
                describe_flags(xml, "efer_flags", 8, flags::EFER)
            }
        }
    }

    fn describe_register(
        self,
        register: Register,
        name: &str,
        xml: &mut impl Write,
    ) -> fmt::Result {
        let bits = self.register_bits(register);
        let (kind, group) = match register {
            Register::ProgramCounter => ("code_ptr", None),
            Register::General(Gpr::Rsp | Gpr::Rbp) => ("data_ptr", None),
            Register::General(_) if self == Self::Bits64 => ("int64", None),
            Register::General(_) | Register::Selector(_) => ("int32", None),
            Register::Flags => ("i386_eflags", None),
            Register::Stack(_) => ("i387_ext", None),
            Register::X87(_) => ("int32", Some("float")),
            Register::Xmm(_) => ("vec128", None),
            Register::Mxcsr => ("int32", Some("vector")),
            Register::Base(_) => ("int64", None),
            Register::Cr0 => ("cr0_flags", None),
            Register::Cr4 => ("cr4_flags", None),
            Register::Efer => ("efer_flags", None),
            Register::Cr2 => ("data_ptr", None),
            Register::Cr3 | Register::Cr8 if self == Self::Bits64 => ("int64", None),
            Register::Cr3 | Register::Cr8 => ("int32", None),
        };
        write!(
            xml,
            "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\""
        )?;
        if let Some(group) = group {
            write!(xml, " group=\"{group}\"")?;
        }
        xml.write_str("/>")
    }

    /// A processor's values.
    pub fn read(self, vcpu: &mut dyn Vcpu, values: &mut Values) {
        let state = ProcessorState::of(vcpu);
        let legacy = vcpu.extended_state_mut().legacy_region();
        values.length = 0;
        values.program_counter = state.code_address().as_u64();
        self.for_each(|_, register, _| {
            let bytes = value(vcpu, &state, &legacy, register);
            values.push(&bytes[..self.register_bits(register) / 8]);
        });
    }

    /// Gives a processor these values. Selectors and control registers have no place to go to: they must be
    /// what they are.
    ///
    /// # Errors
    /// [`Unchangeable`], and nothing has changed.
    pub fn write(self, vcpu: &mut dyn Vcpu, values: &Values) -> Result<(), Unchangeable> {
        let state = ProcessorState::of(vcpu);
        let mut registers = state.registers;
        let mut legacy = vcpu.extended_state_mut().legacy_region();
        let old_legacy = legacy;
        let mut xmm = [None; 16];
        let mut bases = [(FS_BASE, None), (GS_BASE, None), (KERNEL_GS_BASE, None)];
        let mut rest = &values.bytes[..values.length];
        let mut result = Ok(());
        self.for_each(|_, register, _| {
            let Some((bytes, after)) = rest.split_at_checked(self.register_bits(register) / 8)
            else {
                result = Err(Unchangeable);
                return;
            };
            rest = after;
            let old = value(vcpu, &state, &old_legacy, register);
            if old[..bytes.len()] == *bytes {
                return;
            }
            let mut wide = [0; 16];
            wide[..bytes.len()].copy_from_slice(bytes);
            let number = u128::from_le_bytes(wide) as u64;
            match register {
                Register::General(register) => registers.set(register, number),
                Register::ProgramCounter => match instruction_pointer(&state, number) {
                    Some(rip) => registers.rip = rip,
                    None => result = Err(Unchangeable),
                },
                Register::Flags => {
                    registers.rflags = registers.rflags & !CHANGEABLE | number & CHANGEABLE;
                }
                Register::Stack(index) => {
                    let at = STACK + 16 * usize::from(index);
                    legacy[at..at + 10].copy_from_slice(bytes);
                }
                Register::X87(index) => set_x87(&mut legacy, index, number as u32),
                Register::Xmm(index) => xmm[usize::from(index)] = Some(u128::from_le_bytes(wide)),
                Register::Mxcsr => {
                    let allowed = number as u32 & MXCSR_BITS;
                    legacy[MXCSR..MXCSR + 4].copy_from_slice(&allowed.to_le_bytes());
                }
                Register::Base(msr) => {
                    for (other, base) in &mut bases {
                        if *other == msr {
                            *base = Some(number);
                        }
                    }
                }
                Register::Selector(_)
                | Register::Cr0
                | Register::Cr2
                | Register::Cr3
                | Register::Cr4
                | Register::Cr8
                | Register::Efer => result = Err(Unchangeable),
            }
        });
        result?;
        for (msr, base) in bases {
            if let Some(base) = base {
                vcpu.set_hardware_msr(msr, base).map_err(|_| Unchangeable)?;
            }
        }
        *vcpu.registers_mut() = registers;
        let extended = vcpu.extended_state_mut();
        if legacy != old_legacy {
            extended.set_legacy_region(&legacy);
        }
        set_xmm(extended, &xmm);
        Ok(())
    }
}

/// A value that a register cannot get.
pub struct Unchangeable;

/// A part of the description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feature {
    Core,
    Sse,
    Segments,
    Control,
}

impl Feature {
    const fn name(self) -> &'static str {
        match self {
            Self::Core => "org.gnu.gdb.i386.core",
            Self::Sse => "org.gnu.gdb.i386.sse",
            Self::Segments => "org.gnu.gdb.i386.segments",
            Self::Control => "umbra.control",
        }
    }
}

fn describe_flags(
    xml: &mut impl Write,
    name: &str,
    bytes: usize,
    bits: &[(u32, &str)],
) -> fmt::Result {
    write!(xml, "<flags id=\"{name}\" size=\"{bytes}\">")?;
    for (bit, name) in bits {
        write!(
            xml,
            "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>"
        )?;
    }
    xml.write_str("</flags>")
}

/// The flags that a debugger may change: not the processor's mode, and not what stepping uses.
const CHANGEABLE: u64 = {
    let kept = RFlags::TRAP_FLAG
        .union(RFlags::VIRTUAL_8086_MODE)
        .union(RFlags::VIRTUAL_INTERRUPT)
        .union(RFlags::VIRTUAL_INTERRUPT_PENDING);
    RFlags::all().bits() & !kept.bits()
};

/// In the legacy region (SDM vol. 1 table 10-2): where MXCSR stands.
const MXCSR: usize = 24;
/// The bits of MXCSR that every processor with SSE2 has.
const MXCSR_BITS: u32 = 0xffff;
/// Where ST0 stands.
const STACK: usize = 32;

/// A register's value, least significant byte first.
fn value(
    vcpu: &mut dyn Vcpu,
    state: &ProcessorState,
    legacy: &[u8; LEGACY_SIZE],
    register: Register,
) -> [u8; 16] {
    let ControlRegisters {
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        ..
    } = state.control;
    let number = match register {
        Register::General(register) => state.registers.get(register),
        Register::ProgramCounter => state.code_address().as_u64(),
        Register::Flags => state.registers.rflags,
        Register::Selector(register) => u64::from(state.segment(register).selector),
        Register::Stack(index) => {
            let mut bytes = [0; 16];
            let at = STACK + 16 * usize::from(index);
            bytes[..10].copy_from_slice(&legacy[at..at + 10]);
            return bytes;
        }
        Register::X87(index) => u64::from(x87(legacy, index)),
        Register::Xmm(index) => return vcpu.extended_state_mut().xmm(index).to_le_bytes(),
        Register::Mxcsr => u64::from(double_word(legacy, MXCSR)),
        Register::Base(msr) => vcpu.hardware_msr(msr).unwrap_or_default(),
        Register::Cr0 => cr0,
        Register::Cr2 => cr2.as_u64(),
        Register::Cr3 => cr3,
        Register::Cr4 => cr4,
        Register::Cr8 => cr8,
        Register::Efer => efer,
    };
    u128::from(number).to_le_bytes()
}

/// The instruction pointer for a linear address, if code can be there.
fn instruction_pointer(state: &ProcessorState, address: u64) -> Option<u64> {
    const UNUSED_BITS: u32 = 16;
    if state.code_width() == CodeWidth::Bits64 {
        // Without looking at CR4.LA57: no debugger jumps there.
        let canonical = (address << UNUSED_BITS).cast_signed() >> UNUSED_BITS;
        return (canonical.cast_unsigned() == address).then_some(address);
    }
    let base = state.segment(SegmentRegister::Cs).base;
    let offset = Gva::new(address).as_u64().wrapping_sub(base.as_u64()) & 0xffff_ffff;
    let is_reached = offset <= u64::from(state.segment(SegmentRegister::Cs).limit);
    is_reached.then_some(offset)
}

fn set_xmm(extended: &mut ExtendedState, values: &[Option<u128>; 16]) {
    for (index, value) in (0..).zip(values) {
        if let Some(value) = value {
            extended.set_xmm(index, *value);
        }
    }
}

fn word(legacy: &[u8; LEGACY_SIZE], at: usize) -> u16 {
    u16::from_le_bytes([legacy[at], legacy[at + 1]])
}

fn double_word(legacy: &[u8; LEGACY_SIZE], at: usize) -> u32 {
    u32::from(word(legacy, at)) | u32::from(word(legacy, at + 2)) << 16
}

/// One of [`X87_NAMES`], from the region's 64-bit format: pointers have no selectors.
fn x87(legacy: &[u8; LEGACY_SIZE], index: u8) -> u32 {
    const EMPTY: u32 = 0b11;
    match index {
        0 => u32::from(word(legacy, 0)),
        1 => u32::from(word(legacy, 2)),
        // The region says only which registers are in use; GDB looks at their values itself.
        2 => (0..8)
            .filter(|register| legacy[4] >> register & 1 == 0)
            .fold(0, |tags, register| tags | EMPTY << (2 * register)),
        3 => double_word(legacy, 12) & 0xffff,
        4 => double_word(legacy, 8),
        5 => double_word(legacy, 20) & 0xffff,
        6 => double_word(legacy, 16),
        _ => u32::from(word(legacy, 6)) & 0x7ff,
    }
}

fn set_x87(legacy: &mut [u8; LEGACY_SIZE], index: u8, value: u32) {
    let bytes = value.to_le_bytes();
    match index {
        0 => legacy[0..2].copy_from_slice(&bytes[..2]),
        1 => legacy[2..4].copy_from_slice(&bytes[..2]),
        2 => {
            let in_use = (0..8).filter(|register| value >> (2 * register) & 0b11 != 0b11);
            legacy[4] = in_use.fold(0, |tags, register| tags | 1 << register);
        }
        3 => legacy[12..14].copy_from_slice(&bytes[..2]),
        4 => legacy[8..12].copy_from_slice(&bytes),
        5 => legacy[20..22].copy_from_slice(&bytes[..2]),
        6 => legacy[16..20].copy_from_slice(&bytes),
        _ => legacy[6..8].copy_from_slice(&bytes[..2]),
    }
}
