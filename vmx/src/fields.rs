//! VMCS fields, typed by width and access (SDM vol. 3D appendix B).
#![deny(unsafe_code)]

use core::marker::PhantomData;

/// A width of VMCS field and the integer that holds its value.
pub trait Width {
    /// The integer type.
    type Value: Copy;
    /// Bits 14:13 of the encoding (SDM vol. 3C table 25-21).
    const ENCODING: u32;
    /// The value as the 64-bit operand of VMWRITE.
    fn widen(value: Self::Value) -> u64;
    /// The value in the 64-bit operand of VMREAD.
    fn narrow(operand: u64) -> Self::Value;
}

macro_rules! width {
    ($(#[$doc:meta])* $name:ident, $value:ty, $encoding:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl Width for $name {
            type Value = $value;
            const ENCODING: u32 = $encoding;

            #[inline]
            fn widen(value: $value) -> u64 {
                u64::from(value)
            }

            #[inline]
            fn narrow(operand: u64) -> $value {
                operand as $value
            }
        }
    };
}

width! {
    /// 16 bits.
    Bits16, u16, 0
}
width! {
    /// 64 bits in every mode.
    Bits64, u64, 1
}
width! {
    /// 32 bits.
    Bits32, u32, 2
}
width! {
    /// As wide as a general register: 64 bits here.
    Natural, u64, 3
}

/// Software may write the field.
#[derive(Clone, Copy, Debug)]
pub struct ReadWrite;
/// Only the processor writes the field.
#[derive(Clone, Copy, Debug)]
pub struct ReadOnly;

/// Who may write a field.
pub trait Access {
    /// Whether the type in bits 11:10 of the encoding fits this access.
    const READ_ONLY: bool;
}

impl Access for ReadWrite {
    const READ_ONLY: bool = false;
}

impl Access for ReadOnly {
    const READ_ONLY: bool = true;
}

/// A VMCS field.
#[derive(Debug)]
pub struct Field<W, A = ReadWrite> {
    encoding: u32,
    kind: PhantomData<(W, A)>,
}

impl<W, A> Clone for Field<W, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W, A> Copy for Field<W, A> {}

impl<W: Width, A: Access> Field<W, A> {
    /// The field with this encoding; a constant that contradicts the type does not compile.
    const fn new(encoding: u32) -> Self {
        assert!((encoding >> 13) & 3 == W::ENCODING, "the width differs");
        assert!(
            ((encoding >> 10) & 3 == 1) == A::READ_ONLY,
            "the access differs"
        );
        Self {
            encoding,
            kind: PhantomData,
        }
    }

    /// The operand that names the field.
    #[inline]
    pub const fn encoding(self) -> u64 {
        self.encoding as u64
    }
}

/// The four fields of one guest segment register.
#[derive(Clone, Copy, Debug)]
pub struct SegmentFields {
    /// The selector.
    pub selector: Field<Bits16>,
    /// The base address.
    pub base: Field<Natural>,
    /// The limit.
    pub limit: Field<Bits32>,
    /// The access rights.
    pub access_rights: Field<Bits32>,
}

/// The fields of the guest segment register with index `register` in
/// [`umbra_vcpu::registers::SegmentRegister`], whose order is that of the encodings.
#[inline]
pub const fn guest_segment(register: umbra_vcpu::registers::SegmentRegister) -> SegmentFields {
    let offset = register as u32 * 2;
    SegmentFields {
        selector: Field::new(0x0800 + offset),
        base: Field::new(0x6806 + offset),
        limit: Field::new(0x4800 + offset),
        access_rights: Field::new(0x4814 + offset),
    }
}

macro_rules! fields {
    ($($name:ident: $width:ty $(, $access:ty)? = $encoding:literal;)*) => {
        $(
            #[allow(missing_docs, reason = "the manual's table is the documentation")]
            pub const $name: Field<$width $(, $access)?> = Field::new($encoding);
        )*
    };
}

fields! {
    VPID: Bits16 = 0x0000;
    HOST_ES_SELECTOR: Bits16 = 0x0c00;
    HOST_CS_SELECTOR: Bits16 = 0x0c02;
    HOST_SS_SELECTOR: Bits16 = 0x0c04;
    HOST_DS_SELECTOR: Bits16 = 0x0c06;
    HOST_FS_SELECTOR: Bits16 = 0x0c08;
    HOST_GS_SELECTOR: Bits16 = 0x0c0a;
    HOST_TR_SELECTOR: Bits16 = 0x0c0c;

    MSR_BITMAPS: Bits64 = 0x2004;
    EXIT_MSR_LOAD_ADDRESS: Bits64 = 0x2008;
    ENTRY_MSR_LOAD_ADDRESS: Bits64 = 0x200a;
    TSC_OFFSET: Bits64 = 0x2010;
    VMCS_LINK_POINTER: Bits64 = 0x2800;
    GUEST_DEBUGCTL: Bits64 = 0x2802;
    GUEST_EFER: Bits64 = 0x2806;
    HOST_EFER: Bits64 = 0x2c02;

    PIN_CONTROLS: Bits32 = 0x4000;
    PRIMARY_CONTROLS: Bits32 = 0x4002;
    EXCEPTION_BITMAP: Bits32 = 0x4004;
    PAGE_FAULT_ERROR_CODE_MASK: Bits32 = 0x4006;
    PAGE_FAULT_ERROR_CODE_MATCH: Bits32 = 0x4008;
    CR3_TARGET_COUNT: Bits32 = 0x400a;
    EXIT_CONTROLS: Bits32 = 0x400c;
    EXIT_MSR_STORE_COUNT: Bits32 = 0x400e;
    EXIT_MSR_LOAD_COUNT: Bits32 = 0x4010;
    ENTRY_CONTROLS: Bits32 = 0x4012;
    ENTRY_MSR_LOAD_COUNT: Bits32 = 0x4014;
    ENTRY_INTERRUPTION_INFORMATION: Bits32 = 0x4016;
    ENTRY_EXCEPTION_ERROR_CODE: Bits32 = 0x4018;
    ENTRY_INSTRUCTION_LENGTH: Bits32 = 0x401a;
    SECONDARY_CONTROLS: Bits32 = 0x401e;
    PLE_GAP: Bits32 = 0x4020;
    PLE_WINDOW: Bits32 = 0x4022;
    INSTRUCTION_ERROR: Bits32, ReadOnly = 0x4400;
    EXIT_REASON: Bits32, ReadOnly = 0x4402;
    EXIT_INTERRUPTION_INFORMATION: Bits32, ReadOnly = 0x4404;
    EXIT_INTERRUPTION_ERROR_CODE: Bits32, ReadOnly = 0x4406;
    IDT_VECTORING_INFORMATION: Bits32, ReadOnly = 0x4408;
    IDT_VECTORING_ERROR_CODE: Bits32, ReadOnly = 0x440a;
    EXIT_INSTRUCTION_LENGTH: Bits32, ReadOnly = 0x440c;
    EXIT_INSTRUCTION_INFORMATION: Bits32, ReadOnly = 0x440e;
    GUEST_GDTR_LIMIT: Bits32 = 0x4810;
    GUEST_IDTR_LIMIT: Bits32 = 0x4812;
    GUEST_INTERRUPTIBILITY: Bits32 = 0x4824;
    GUEST_ACTIVITY_STATE: Bits32 = 0x4826;
    GUEST_SYSENTER_CS: Bits32 = 0x482a;
    PREEMPTION_TIMER_VALUE: Bits32 = 0x482e;
    HOST_SYSENTER_CS: Bits32 = 0x4c00;

    CR0_MASK: Natural = 0x6000;
    CR4_MASK: Natural = 0x6002;
    CR0_READ_SHADOW: Natural = 0x6004;
    CR4_READ_SHADOW: Natural = 0x6006;
    EXIT_QUALIFICATION: Natural, ReadOnly = 0x6400;
    GUEST_LINEAR_ADDRESS: Natural, ReadOnly = 0x640a;
    GUEST_CR0: Natural = 0x6800;
    GUEST_CR3: Natural = 0x6802;
    GUEST_CR4: Natural = 0x6804;
    GUEST_GDTR_BASE: Natural = 0x6816;
    GUEST_IDTR_BASE: Natural = 0x6818;
    GUEST_DR7: Natural = 0x681a;
    GUEST_RSP: Natural = 0x681c;
    GUEST_RIP: Natural = 0x681e;
    GUEST_RFLAGS: Natural = 0x6820;
    GUEST_PENDING_DEBUG_EXCEPTIONS: Natural = 0x6822;
    GUEST_SYSENTER_ESP: Natural = 0x6824;
    GUEST_SYSENTER_EIP: Natural = 0x6826;
    HOST_CR0: Natural = 0x6c00;
    HOST_CR3: Natural = 0x6c02;
    HOST_CR4: Natural = 0x6c04;
    HOST_FS_BASE: Natural = 0x6c06;
    HOST_GS_BASE: Natural = 0x6c08;
    HOST_TR_BASE: Natural = 0x6c0a;
    HOST_GDTR_BASE: Natural = 0x6c0c;
    HOST_IDTR_BASE: Natural = 0x6c0e;
    HOST_SYSENTER_ESP: Natural = 0x6c10;
    HOST_SYSENTER_EIP: Natural = 0x6c12;
    HOST_RIP: Natural = 0x6c16;
}

/// HOST_RSP, which the entry stub writes itself.
pub const HOST_RSP_ENCODING: u32 = 0x6c14;

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_vcpu::registers::SegmentRegister;

    #[test]
    fn segment_fields_have_the_manuals_encodings() {
        let tr = guest_segment(SegmentRegister::Tr);
        assert_eq!(tr.selector.encoding(), 0x080e);
        assert_eq!(tr.base.encoding(), 0x6814);
        assert_eq!(tr.limit.encoding(), 0x480e);
        assert_eq!(tr.access_rights.encoding(), 0x4822);
        let es = guest_segment(SegmentRegister::Es);
        assert_eq!(es.selector.encoding(), 0x0800);
        assert_eq!(es.base.encoding(), 0x6806);
    }
}
