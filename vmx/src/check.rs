//! The processor's checks on guest state at VM entry, by our own hand, so that a failure names the
//! field and the rule (SDM vol. 3C 27.3.1).
//!
//! [`check`] is pure. It covers the rules that apply to protected-mode and long-mode guests without
//! unrestricted guest; the fields that Umbra never changes (link pointer, debug control, activity
//! state) are checked as far as a caller could reach them.
#![deny(unsafe_code)]

use umbra_vcpu::EntryFailure;
use umbra_vcpu::registers::{DescriptorTable, Segment, SegmentAttributes, SegmentRegister};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::model_specific::EferFlags;
use x86_64::registers::rflags::RFlags;

use crate::capabilities::FixedBits;
use crate::controls::EntryControls;
use crate::msr::is_canonical;

bitflags::bitflags! {
    /// Interruptibility state (SDM vol. 3C table 25-3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interruptibility: u32 {
        /// Blocking by STI.
        const STI = 1 << 0;
        /// Blocking by MOV SS.
        const MOV_SS = 1 << 1;
        /// Blocking by SMI.
        const SMI = 1 << 2;
        /// Blocking by NMI.
        const NMI = 1 << 3;
    }
}

/// The bits of RFLAGS that are always 1.
pub const FIXED_FLAGS: u64 = 1 << 1;

/// The guest state that VM entry checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// VM-entry controls.
    pub entry: EntryControls,
    /// Guest CR0.
    pub cr0: u64,
    /// Guest CR3.
    pub cr3: u64,
    /// Guest CR4.
    pub cr4: u64,
    /// Guest IA32_EFER.
    pub efer: u64,
    /// Guest DR7.
    pub dr7: u64,
    /// Guest IA32_DEBUGCTL.
    pub debugctl: u64,
    /// Guest IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// Guest IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// The segment registers in the order of [`SegmentRegister::ALL`].
    pub segments: [Segment; 8],
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Activity state.
    pub activity: u32,
    /// Interruptibility state.
    pub interruptibility: Interruptibility,
    /// Pending debug exceptions.
    pub pending_debug: u64,
    /// VM-entry interruption information.
    pub injection: u32,
}

/// What the rules depend on besides the guest.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The fixed bits of CR0.
    pub cr0: FixedBits,
    /// The fixed bits of CR4.
    pub cr4: FixedBits,
    /// The width of physical addresses.
    pub physical_bits: u32,
    /// The width of linear addresses.
    pub linear_bits: u32,
}

type Check = Result<(), EntryFailure>;

/// Checks the guest state as VM entry does.
///
/// # Errors
/// [`EntryFailure`] with the first field that breaks a rule.
pub fn check(state: &GuestState, rules: &Rules) -> Check {
    check_control_registers(state, rules)?;
    check_all_segments(state, rules)?;
    check_descriptor_tables(state, rules)?;
    check_rip_and_rflags(state, rules)?;
    check_non_register_state(state)
}

/// Checks the segment registers alone: guests on their way between real and protected mode have some
/// that no VM entry loads.
///
/// # Errors
/// [`EntryFailure`] with the first field that breaks a rule.
pub fn check_all_segments(state: &GuestState, rules: &Rules) -> Check {
    if state.rflags & RFlags::VIRTUAL_8086_MODE.bits() == 0 {
        check_segments(state, rules)?;
    } else {
        check_virtual_8086_segments(state)?;
    }
    check_system_segments(state, rules)
}

fn require(holds: bool, field: &'static str, value: u64, rule: &'static str) -> Check {
    if holds {
        Ok(())
    } else {
        Err(EntryFailure { field, rule, value })
    }
}

fn is_long(state: &GuestState) -> bool {
    state.entry.contains(EntryControls::IA32E_MODE_GUEST)
}

/// SDM vol. 3C 27.3.1.1.
fn check_control_registers(state: &GuestState, rules: &Rules) -> Check {
    let has = |bit: Cr0Flags| state.cr0 & bit.bits() != 0;
    let has4 = |bit: Cr4Flags| state.cr4 & bit.bits() != 0;
    // CD and NW are not checked.
    let ignored = (Cr0Flags::CACHE_DISABLE | Cr0Flags::NOT_WRITE_THROUGH).bits();
    require(
        has(Cr0Flags::PROTECTED_MODE_ENABLE),
        "CR0",
        state.cr0,
        "PE must be 1: without unrestricted guest there is no real mode (27.3.1.1)",
    )?;
    require(
        rules
            .cr0
            .accepts(state.cr0 & !ignored | ignored & rules.cr0.ones),
        "CR0",
        state.cr0,
        "a bit that VMX operation fixes has the other value (27.3.1.1)",
    )?;
    require(
        !has(Cr0Flags::PAGING) || has(Cr0Flags::PROTECTED_MODE_ENABLE),
        "CR0",
        state.cr0,
        "PG needs PE (27.3.1.1)",
    )?;
    require(
        rules.cr4.accepts(state.cr4),
        "CR4",
        state.cr4,
        "a bit that VMX operation fixes, or that the processor lacks, has the other value (27.3.1.1)",
    )?;
    let long = is_long(state);
    require(
        !long || has(Cr0Flags::PAGING) && has4(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION),
        "CR4",
        state.cr4,
        "\"IA-32e mode guest\" needs CR0.PG and CR4.PAE (27.3.1.1)",
    )?;
    require(
        long || !has4(Cr4Flags::PCID),
        "CR4",
        state.cr4,
        "PCIDE must be 0 outside IA-32e mode (27.3.1.1)",
    )?;
    require(
        rules.physical_bits >= 64 || state.cr3 >> rules.physical_bits == 0,
        "CR3",
        state.cr3,
        "bits beyond the physical-address width must be 0 (27.3.1.1)",
    )?;
    require(
        state.dr7 >> 32 == 0,
        "DR7",
        state.dr7,
        "bits 63:32 must be 0 (27.3.1.1)",
    )?;
    require(
        state.debugctl & !0xffc3 == 0,
        "IA32_DEBUGCTL",
        state.debugctl,
        "reserved bits must be 0 (27.3.1.1)",
    )?;
    for (field, value) in [
        ("IA32_SYSENTER_ESP", state.sysenter_esp),
        ("IA32_SYSENTER_EIP", state.sysenter_eip),
    ] {
        require(
            is_canonical(value, rules.linear_bits),
            field,
            value,
            "must be canonical (27.3.1.1)",
        )?;
    }
    let efer = EferFlags::from_bits_truncate(state.efer);
    require(
        efer.contains(EferFlags::LONG_MODE_ACTIVE) == long,
        "IA32_EFER",
        state.efer,
        "LMA must equal \"IA-32e mode guest\" (27.3.1.1)",
    )?;
    require(
        !has(Cr0Flags::PAGING) || efer.contains(EferFlags::LONG_MODE_ENABLE) == long,
        "IA32_EFER",
        state.efer,
        "LME must equal LMA while CR0.PG is 1 (27.3.1.1)",
    )
}

/// The names of a segment register's fields.
struct Names {
    base: &'static str,
    limit: &'static str,
    rights: &'static str,
}

macro_rules! names {
    ($register:literal) => {
        Names {
            base: concat!($register, " base address"),
            limit: concat!($register, " limit"),
            rights: concat!($register, " access rights"),
        }
    };
}

/// In the order of [`SegmentRegister::ALL`].
const NAMES: [Names; 8] = [
    names!("ES"),
    names!("CS"),
    names!("SS"),
    names!("DS"),
    names!("FS"),
    names!("GS"),
    names!("LDTR"),
    names!("TR"),
];

const DATA_AND_CODE: [SegmentRegister; 6] = [
    SegmentRegister::Es,
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
];

fn segment_of(state: &GuestState, register: SegmentRegister) -> Segment {
    state.segments[register as usize]
}

/// CS, SS, DS, ES, FS and GS in virtual-8086 mode (SDM vol. 3C 27.3.1.2).
fn check_virtual_8086_segments(state: &GuestState) -> Check {
    for register in DATA_AND_CODE {
        let segment = segment_of(state, register);
        let names = &NAMES[register as usize];
        let base = segment.base.as_u64();
        require(
            base == u64::from(segment.selector) << 4,
            names.base,
            base,
            "must be the selector times 16 in virtual-8086 mode (27.3.1.2)",
        )?;
        require(
            segment.limit == 0xffff,
            names.limit,
            u64::from(segment.limit),
            "must be 0xffff in virtual-8086 mode (27.3.1.2)",
        )?;
        require(
            segment.attributes.bits() == 0xf3,
            names.rights,
            u64::from(segment.attributes.bits()),
            "must be 0xf3 in virtual-8086 mode (27.3.1.2)",
        )?;
    }
    Ok(())
}

/// CS, SS, DS, ES, FS and GS outside virtual-8086 mode (SDM vol. 3C 27.3.1.2).
fn check_segments(state: &GuestState, rules: &Rules) -> Check {
    let code = segment_of(state, SegmentRegister::Cs);
    let stack = segment_of(state, SegmentRegister::Ss);
    require(
        code.attributes.contains(SegmentAttributes::UNUSABLE)
            || stack.attributes.contains(SegmentAttributes::UNUSABLE)
            || stack.selector & 3 == code.selector & 3,
        "SS selector",
        u64::from(stack.selector),
        "RPL must equal that of CS (27.3.1.2)",
    )?;
    for register in DATA_AND_CODE {
        let segment = segment_of(state, register);
        check_base(state, register, rules)?;
        if register == SegmentRegister::Cs {
            check_code_segment(state, &code, &stack)?;
        } else if !segment.attributes.contains(SegmentAttributes::UNUSABLE) {
            check_data_segment(register, &segment)?;
        }
        if register == SegmentRegister::Cs
            || !segment.attributes.contains(SegmentAttributes::UNUSABLE)
        {
            check_common_rights(register, &segment)?;
        }
    }
    check_stack_level(state, &code, &stack)
}

fn check_base(state: &GuestState, register: SegmentRegister, rules: &Rules) -> Check {
    let segment = segment_of(state, register);
    let base = segment.base.as_u64();
    let names = &NAMES[register as usize];
    let usable = !segment.attributes.contains(SegmentAttributes::UNUSABLE);
    match register {
        SegmentRegister::Fs | SegmentRegister::Gs => require(
            is_canonical(base, rules.linear_bits),
            names.base,
            base,
            "must be canonical (27.3.1.2)",
        ),
        SegmentRegister::Cs => require(
            base >> 32 == 0,
            names.base,
            base,
            "bits 63:32 must be 0 (27.3.1.2)",
        ),
        _ => require(
            !usable || base >> 32 == 0,
            names.base,
            base,
            "bits 63:32 must be 0 in a usable register (27.3.1.2)",
        ),
    }
}

fn type_of(segment: &Segment) -> u32 {
    segment.attributes.bits() & 0xf
}

fn check_code_segment(state: &GuestState, code: &Segment, stack: &Segment) -> Check {
    let rights = u64::from(code.attributes.bits());
    let field = "CS access rights";
    let (level, stack_level) = (code.privilege_level(), stack.privilege_level());
    match type_of(code) {
        9 | 11 => require(
            level == stack_level,
            field,
            rights,
            "a non-conforming segment's DPL must equal that of SS (27.3.1.2)",
        )?,
        13 | 15 => require(
            level <= stack_level,
            field,
            rights,
            "a conforming segment's DPL cannot exceed that of SS (27.3.1.2)",
        )?,
        _ => {
            return require(
                false,
                field,
                rights,
                "the type must be 9, 11, 13 or 15: an accessed code segment (27.3.1.2)",
            );
        }
    }
    require(
        !(is_long(state)
            && code
                .attributes
                .contains(SegmentAttributes::LONG | SegmentAttributes::DEFAULT_32)),
        field,
        rights,
        "D/B must be 0 in a 64-bit code segment (27.3.1.2)",
    )
}

fn check_data_segment(register: SegmentRegister, segment: &Segment) -> Check {
    let rights = u64::from(segment.attributes.bits());
    let field = NAMES[register as usize].rights;
    if register == SegmentRegister::Ss {
        return require(
            matches!(type_of(segment), 3 | 7),
            field,
            rights,
            "the type must be 3 or 7: an accessed writable data segment (27.3.1.2)",
        );
    }
    let is_code = segment.attributes.contains(SegmentAttributes::CODE);
    require(
        segment.attributes.contains(SegmentAttributes::ACCESSED),
        field,
        rights,
        "the type must have its accessed bit set (27.3.1.2)",
    )?;
    require(
        !is_code || segment.attributes.contains(SegmentAttributes::READ_WRITE),
        field,
        rights,
        "a code segment must be readable (27.3.1.2)",
    )?;
    require(
        type_of(segment) > 11 || segment.privilege_level() >= (segment.selector & 3) as u8,
        field,
        rights,
        "DPL cannot be below the selector's RPL (27.3.1.2)",
    )
}

fn check_common_rights(register: SegmentRegister, segment: &Segment) -> Check {
    let rights = u64::from(segment.attributes.bits());
    let field = NAMES[register as usize].rights;
    require(
        segment.attributes.contains(SegmentAttributes::CODE_OR_DATA),
        field,
        rights,
        "S must be 1 (27.3.1.2)",
    )?;
    check_present_and_granular(register, segment)
}

fn check_present_and_granular(register: SegmentRegister, segment: &Segment) -> Check {
    const RESERVED: u64 = 0xfffe_0f00;
    let rights = u64::from(segment.attributes.bits());
    let field = NAMES[register as usize].rights;
    require(
        segment.attributes.contains(SegmentAttributes::PRESENT),
        field,
        rights,
        "P must be 1 (27.3.1.2)",
    )?;
    require(
        rights & RESERVED == 0,
        field,
        rights,
        "reserved bits must be 0 (27.3.1.2)",
    )?;
    let granular = segment.attributes.contains(SegmentAttributes::GRANULARITY);
    require(
        segment.limit & 0xfff == 0xfff || !granular,
        field,
        rights,
        "G must be 0 if a low bit of the limit is 0 (27.3.1.2)",
    )?;
    require(
        segment.limit >> 20 == 0 || granular,
        field,
        rights,
        "G must be 1 if a high bit of the limit is 1 (27.3.1.2)",
    )
}

fn check_stack_level(state: &GuestState, code: &Segment, stack: &Segment) -> Check {
    let rights = u64::from(stack.attributes.bits());
    require(
        stack.privilege_level() == (stack.selector & 3) as u8,
        "SS access rights",
        rights,
        "DPL must equal the selector's RPL (27.3.1.2)",
    )?;
    require(
        state.cr0 & Cr0Flags::PROTECTED_MODE_ENABLE.bits() != 0 && type_of(code) != 3
            || stack.privilege_level() == 0,
        "SS access rights",
        rights,
        "DPL must be 0 in real mode (27.3.1.2)",
    )
}

/// TR and LDTR (SDM vol. 3C 27.3.1.2).
fn check_system_segments(state: &GuestState, rules: &Rules) -> Check {
    const IN_LDT: u16 = 1 << 2;
    let task = segment_of(state, SegmentRegister::Tr);
    let rights = u64::from(task.attributes.bits());
    require(
        task.selector & IN_LDT == 0,
        "TR selector",
        u64::from(task.selector),
        "TI must be 0 (27.3.1.2)",
    )?;
    require(
        is_canonical(task.base.as_u64(), rules.linear_bits),
        "TR base address",
        task.base.as_u64(),
        "must be canonical (27.3.1.2)",
    )?;
    require(
        !task.attributes.contains(SegmentAttributes::UNUSABLE),
        "TR access rights",
        rights,
        "must be usable (27.3.1.2)",
    )?;
    let allowed = if is_long(state) {
        type_of(&task) == 11
    } else {
        matches!(type_of(&task), 3 | 11)
    };
    require(
        allowed,
        "TR access rights",
        rights,
        "the type must be that of a busy TSS: 11, or 3 outside IA-32e mode (27.3.1.2)",
    )?;
    check_system_rights(SegmentRegister::Tr, &task)?;
    let local = segment_of(state, SegmentRegister::Ldtr);
    if local.attributes.contains(SegmentAttributes::UNUSABLE) {
        return Ok(());
    }
    require(
        local.selector & IN_LDT == 0,
        "LDTR selector",
        u64::from(local.selector),
        "TI must be 0 (27.3.1.2)",
    )?;
    require(
        is_canonical(local.base.as_u64(), rules.linear_bits),
        "LDTR base address",
        local.base.as_u64(),
        "must be canonical (27.3.1.2)",
    )?;
    require(
        type_of(&local) == 2,
        "LDTR access rights",
        u64::from(local.attributes.bits()),
        "the type must be 2: an LDT (27.3.1.2)",
    )?;
    check_system_rights(SegmentRegister::Ldtr, &local)
}

fn check_system_rights(register: SegmentRegister, segment: &Segment) -> Check {
    require(
        !segment.attributes.contains(SegmentAttributes::CODE_OR_DATA),
        NAMES[register as usize].rights,
        u64::from(segment.attributes.bits()),
        "S must be 0 (27.3.1.2)",
    )?;
    check_present_and_granular(register, segment)
}

/// SDM vol. 3C 27.3.1.3; the limits are 16 bits wide by their type.
fn check_descriptor_tables(state: &GuestState, rules: &Rules) -> Check {
    for (field, table) in [
        ("GDTR base address", state.gdtr),
        ("IDTR base address", state.idtr),
    ] {
        require(
            is_canonical(table.base.as_u64(), rules.linear_bits),
            field,
            table.base.as_u64(),
            "must be canonical (27.3.1.3)",
        )?;
    }
    Ok(())
}

/// SDM vol. 3C 27.3.1.4.
fn check_rip_and_rflags(state: &GuestState, rules: &Rules) -> Check {
    const EXTERNAL_INTERRUPT: u32 = 1 << 31;
    const VALID_AND_KIND: u32 = 1 << 31 | 7 << 8;
    /// Bits 63:22, 15, 5 and 3.
    const RESERVED: u64 = !0x3f_ffff | 1 << 15 | 1 << 5 | 1 << 3;
    let code = segment_of(state, SegmentRegister::Cs);
    if is_long(state) && code.attributes.contains(SegmentAttributes::LONG) {
        require(
            is_canonical(state.rip, rules.linear_bits),
            "RIP",
            state.rip,
            "must be canonical in 64-bit mode (27.3.1.4)",
        )?;
    } else {
        require(
            state.rip >> 32 == 0,
            "RIP",
            state.rip,
            "bits 63:32 must be 0 outside 64-bit mode (27.3.1.4)",
        )?;
    }
    require(
        state.rflags & RESERVED == 0 && state.rflags & FIXED_FLAGS != 0,
        "RFLAGS",
        state.rflags,
        "bits 63:22, 15, 5 and 3 must be 0, bit 1 must be 1 (27.3.1.4)",
    )?;
    let virtual_8086 = state.rflags & RFlags::VIRTUAL_8086_MODE.bits() != 0;
    require(
        !virtual_8086 || !is_long(state),
        "RFLAGS",
        state.rflags,
        "VM must be 0 in IA-32e mode (27.3.1.4)",
    )?;
    require(
        state.injection & VALID_AND_KIND != EXTERNAL_INTERRUPT
            || state.rflags & RFlags::INTERRUPT_FLAG.bits() != 0,
        "RFLAGS",
        state.rflags,
        "IF must be 1 when an external interrupt is injected (27.3.1.4)",
    )
}

/// SDM vol. 3C 27.3.1.5.
fn check_non_register_state(state: &GuestState) -> Check {
    const SINGLE_STEP: u64 = 1 << 14;
    const BRANCH_STEP: u64 = 1 << 1;
    /// Bits 3:0, 12, 14 and 16 exist.
    const PENDING_RESERVED: u64 = !(0xf | 1 << 12 | 1 << 14 | 1 << 16);
    let interruptibility = state.interruptibility;
    let value = u64::from(interruptibility.bits());
    let field = "interruptibility state";
    let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
    require(
        state.activity == 0,
        "activity state",
        u64::from(state.activity),
        "Umbra enters active guests only (27.3.1.5)",
    )?;
    require(
        interruptibility.bits() & !0xf == 0,
        field,
        value,
        "bits 31:4 must be 0 (27.3.1.5)",
    )?;
    require(
        !interruptibility.contains(shadow),
        field,
        value,
        "blocking by STI and by MOV SS exclude each other (27.3.1.5)",
    )?;
    require(
        !interruptibility.contains(Interruptibility::STI)
            || state.rflags & RFlags::INTERRUPT_FLAG.bits() != 0,
        field,
        value,
        "blocking by STI needs RFLAGS.IF (27.3.1.5)",
    )?;
    require(
        !interruptibility.contains(Interruptibility::SMI),
        field,
        value,
        "blocking by SMI must be 0 outside SMM (27.3.1.5)",
    )?;
    check_injection(state)?;
    require(
        state.pending_debug & PENDING_RESERVED == 0,
        "pending debug exceptions",
        state.pending_debug,
        "reserved bits must be 0 (27.3.1.5)",
    )?;
    let steps = state.rflags & RFlags::TRAP_FLAG.bits() != 0 && state.debugctl & BRANCH_STEP == 0;
    require(
        !interruptibility.intersects(shadow) || (state.pending_debug & SINGLE_STEP != 0) == steps,
        "pending debug exceptions",
        state.pending_debug,
        "in a shadow BS must tell whether RFLAGS.TF steps (27.3.1.5)",
    )
}

fn check_injection(state: &GuestState) -> Check {
    const EXTERNAL_INTERRUPT: u32 = 0;
    const NMI: u32 = 2;
    if state.injection >> 31 == 0 {
        return Ok(());
    }
    let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
    let forbidden = match (state.injection >> 8) & 7 {
        EXTERNAL_INTERRUPT => shadow,
        NMI => shadow | Interruptibility::NMI,
        _ => Interruptibility::empty(),
    };
    require(
        !state.interruptibility.intersects(forbidden),
        "interruptibility state",
        u64::from(state.interruptibility.bits()),
        "the injected interrupt is blocked (27.3.1.5)",
    )
}

/// The failure that a refused VMLAUNCH or VMRESUME reports in the VM-instruction error field
/// (SDM vol. 3C 31.4).
pub fn describe_instruction_error(number: u32) -> EntryFailure {
    EntryFailure {
        field: "VM-instruction error",
        rule: match number {
            4 => "VMLAUNCH with a VMCS that is not clear (31.4)",
            5 => "VMRESUME with a VMCS that was not launched (31.4)",
            6 => "VMRESUME after VMXOFF (31.4)",
            7 => "VM entry with invalid control fields (31.4)",
            8 => "VM entry with invalid host-state fields (31.4)",
            26 => "VM entry with events blocked by MOV SS (31.4)",
            _ => "the processor gives no known reason (31.4)",
        },
        value: u64::from(number),
    }
}

/// The failure that exit reasons 33, 34 and 41 report (SDM vol. 3C 27.8).
pub fn describe_entry_failure(reason: u16, qualification: u64) -> EntryFailure {
    use crate::exit::reason as number;
    let (field, rule) = match (reason, qualification) {
        (number::INVALID_GUEST_STATE, 2) => (
            "PDPTE",
            "a page-directory-pointer entry sets reserved bits (27.3.1.6)",
        ),
        (number::INVALID_GUEST_STATE, 3) => (
            "interruptibility state",
            "an NMI is injected into an STI shadow (27.8)",
        ),
        (number::INVALID_GUEST_STATE, 4) => ("VMCS link pointer", "the pointer is invalid (27.8)"),
        (number::INVALID_GUEST_STATE, _) => (
            "guest state",
            "the processor found a broken rule that Umbra's checker does not know (27.3.1)",
        ),
        (number::MSR_LOADING, _) => (
            "VM-entry MSR-load area",
            "the entry with this number cannot be loaded (27.4)",
        ),
        (number::MACHINE_CHECK_DURING_ENTRY, _) => (
            "machine check",
            "a machine check interrupted the entry (27.9)",
        ),
        _ => (
            "exit reason",
            "the entry failed for an unknown reason (27.8)",
        ),
    };
    EntryFailure {
        field,
        rule,
        value: qualification,
    }
}

#[cfg(test)]
mod tests;
