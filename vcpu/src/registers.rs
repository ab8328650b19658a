//! The guest's registers in the form that drivers, emulation and reports share.

use crate::address::Gva;

/// The sixteen general registers by their encoding in instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Gpr {
    /// RAX, encoding 0.
    Rax,
    /// RCX, encoding 1.
    Rcx,
    /// RDX, encoding 2.
    Rdx,
    /// RBX, encoding 3.
    Rbx,
    /// RSP, encoding 4.
    Rsp,
    /// RBP, encoding 5.
    Rbp,
    /// RSI, encoding 6.
    Rsi,
    /// RDI, encoding 7.
    Rdi,
    /// R8, encoding 8.
    R8,
    /// R9, encoding 9.
    R9,
    /// R10, encoding 10.
    R10,
    /// R11, encoding 11.
    R11,
    /// R12, encoding 12.
    R12,
    /// R13, encoding 13.
    R13,
    /// R14, encoding 14.
    R14,
    /// R15, encoding 15.
    R15,
}

impl Gpr {
    /// All sixteen, in the order of their encoding.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The register that the low four bits of `encoding` name.
    pub const fn from_encoding(encoding: u8) -> Self {
        Self::ALL[(encoding & 15) as usize]
    }
}

/// The general registers in the order of their encoding, with RIP and RFLAGS.
///
/// The layout is fixed because the drivers' entry stubs save and load it by offset: register `n`
/// stands at byte `8 * n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    general: [u64; 16],
    /// The instruction pointer.
    pub rip: u64,
    /// The flags register; bit 1 is always set.
    pub rflags: u64,
}

impl Registers {
    /// The full 64-bit value of `register`.
    #[inline]
    pub const fn get(&self, register: Gpr) -> u64 {
        self.general[register as usize]
    }

    /// Sets all 64 bits of `register`.
    #[inline]
    pub const fn set(&mut self, register: Gpr, value: u64) {
        self.general[register as usize] = value;
    }

    /// Sets `register` as a 32-bit operation does in 64-bit mode: the upper half becomes zero.
    #[inline]
    pub const fn set_u32(&mut self, register: Gpr, value: u32) {
        self.general[register as usize] = value as u64;
    }

    /// EDX:EAX as one value, as WRMSR and XSETBV take it.
    #[inline]
    pub const fn edx_eax(&self) -> u64 {
        (self.get(Gpr::Rdx) << 32) | (self.get(Gpr::Rax) & 0xffff_ffff)
    }

    /// Puts `value` into EDX:EAX, as RDMSR and RDTSC do.
    #[inline]
    pub const fn set_edx_eax(&mut self, value: u64) {
        self.set(Gpr::Rax, value & 0xffff_ffff);
        self.set(Gpr::Rdx, value >> 32);
    }
}

/// The eight segment registers that hold a hidden descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SegmentRegister {
    /// ES, encoding 0.
    Es,
    /// CS, encoding 1.
    Cs,
    /// SS, encoding 2.
    Ss,
    /// DS, encoding 3.
    Ds,
    /// FS, encoding 4.
    Fs,
    /// GS, encoding 5.
    Gs,
    /// The local descriptor table register.
    Ldtr,
    /// The task register.
    Tr,
}

impl SegmentRegister {
    /// All eight.
    pub const ALL: [Self; 8] = [
        Self::Es,
        Self::Cs,
        Self::Ss,
        Self::Ds,
        Self::Fs,
        Self::Gs,
        Self::Ldtr,
        Self::Tr,
    ];
}

bitflags::bitflags! {
    /// Segment attributes in the layout of a descriptor's second double word shifted right by 8
    /// (SDM vol. 3A 3.4.5), which is also VMX's access-rights layout; bit 16 is VMX's "unusable".
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct SegmentAttributes: u32 {
        /// The accessed bit of a code or data segment's type.
        const ACCESSED = 1 << 0;
        /// Writable for data, readable for code.
        const READ_WRITE = 1 << 1;
        /// Expand-down for data, conforming for code.
        const EXPAND_DOWN_OR_CONFORMING = 1 << 2;
        /// A code segment.
        const CODE = 1 << 3;
        /// A code or data segment, not a system segment (the S bit).
        const CODE_OR_DATA = 1 << 4;
        /// The lower bit of the descriptor privilege level.
        const DPL_LOW = 1 << 5;
        /// The upper bit of the descriptor privilege level.
        const DPL_HIGH = 1 << 6;
        /// Present.
        const PRESENT = 1 << 7;
        /// Available for software.
        const AVAILABLE = 1 << 12;
        /// 64-bit code segment (L).
        const LONG = 1 << 13;
        /// 32-bit default operand size (D/B).
        const DEFAULT_32 = 1 << 14;
        /// The limit counts 4 KiB units (G).
        const GRANULARITY = 1 << 15;
        /// The register holds a null selector or was never loaded.
        const UNUSABLE = 1 << 16;
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// The linear base address.
    pub base: Gva,
    /// The last valid offset in bytes.
    pub limit: u32,
    /// Type, privilege and size.
    pub attributes: SegmentAttributes,
}

impl Segment {
    /// A register that holds the null selector.
    pub const UNUSABLE: Self = Self {
        selector: 0,
        base: Gva::new(0),
        limit: 0,
        attributes: SegmentAttributes::UNUSABLE,
    };

    /// A flat 4 GiB 32-bit code segment with selector `selector`, privilege 0.
    pub const fn flat_code32(selector: u16) -> Self {
        Self::flat(selector, 0xc09b)
    }

    /// A flat 4 GiB data segment with selector `selector`, privilege 0.
    pub const fn flat_data32(selector: u16) -> Self {
        Self::flat(selector, 0xc093)
    }

    /// A flat 64-bit code segment with selector `selector`, privilege 0.
    pub const fn flat_code64(selector: u16) -> Self {
        Self::flat(selector, 0xa09b)
    }

    /// A busy 32-bit (in long mode: 64-bit) task-state segment, as the task register needs it for
    /// a VM entry.
    pub const fn busy_tss(selector: u16, limit: u32) -> Self {
        Self {
            selector,
            base: Gva::new(0),
            limit,
            attributes: SegmentAttributes::from_bits_retain(0x008b),
        }
    }

    const fn flat(selector: u16, attributes: u32) -> Self {
        Self {
            selector,
            base: Gva::new(0),
            limit: u32::MAX,
            attributes: SegmentAttributes::from_bits_retain(attributes),
        }
    }

    /// The descriptor privilege level, 0 to 3.
    pub const fn privilege_level(&self) -> u8 {
        ((self.attributes.bits() >> 5) & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// The linear base address.
    pub base: Gva,
    /// The last valid byte offset.
    pub limit: u16,
}

/// What the guest sees in its control registers, EFER and XCR0: never what the hardware holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlRegisters {
    /// CR0, in the bits of [`x86_64::registers::control::Cr0Flags`].
    pub cr0: u64,
    /// CR2: the address of the last page fault.
    pub cr2: Gva,
    /// CR3 with its flag and PCID bits.
    pub cr3: u64,
    /// CR4, in the bits of [`x86_64::registers::control::Cr4Flags`].
    pub cr4: u64,
    /// CR8: the task priority, 0 to 15.
    pub cr8: u64,
    /// The extended feature enable register.
    pub efer: u64,
    /// Extended control register 0.
    pub xcr0: u64,
}

/// The width of addresses and operands that code in the current code segment has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeWidth {
    /// Real mode, virtual-8086 mode or a 16-bit segment.
    Bits16,
    /// A 32-bit code segment.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeWidth {
    /// The number of bits: 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_what_the_entry_stubs_expect() {
        assert_eq!(core::mem::offset_of!(Registers, general), 0);
        assert_eq!(core::mem::offset_of!(Registers, rip), 128);
        assert_eq!(core::mem::offset_of!(Registers, rflags), 136);
        for (index, register) in Gpr::ALL.into_iter().enumerate() {
            assert_eq!(register as usize, index);
        }
    }

    #[test]
    fn edx_eax_uses_the_low_halves_only() {
        let mut registers = Registers::default();
        registers.set(Gpr::Rax, 0xaaaa_aaaa_1111_1111);
        registers.set(Gpr::Rdx, 0xbbbb_bbbb_2222_2222);
        assert_eq!(registers.edx_eax(), 0x2222_2222_1111_1111);
        registers.set_edx_eax(0x3333_3333_4444_4444);
        assert_eq!(registers.get(Gpr::Rax), 0x4444_4444);
        assert_eq!(registers.get(Gpr::Rdx), 0x3333_3333);
    }
}
