//! Each rule is broken once, and the failure must name the field.

use super::*;
use umbra_vcpu::address::Gva;

const RULES: Rules = Rules {
    cr0: FixedBits {
        ones: 0x8000_0021,
        allowed: 0xffff_ffff,
    },
    cr4: FixedBits {
        ones: 0x2000,
        allowed: 0x37_67ff,
    },
    physical_bits: 40,
    linear_bits: 48,
};

fn attributes(bits: u32) -> SegmentAttributes {
    SegmentAttributes::from_bits_retain(bits)
}

fn protected() -> GuestState {
    let data = Segment::flat_data32(0x10);
    GuestState {
        entry: EntryControls::LOAD_DEBUG_CONTROLS,
        cr0: 0x8001_0031,
        cr3: 0x1000,
        cr4: 0x2060,
        efer: 0x800,
        dr7: 0x400,
        debugctl: 0,
        sysenter_esp: 0,
        sysenter_eip: 0,
        segments: [
            data,
            Segment::flat_code32(8),
            data,
            data,
            data,
            data,
            Segment::UNUSABLE,
            Segment::busy_tss(0x18, 0x67),
        ],
        gdtr: DescriptorTable::default(),
        idtr: DescriptorTable::default(),
        rip: 0x10_0000,
        rflags: 2,
        activity: 0,
        interruptibility: Interruptibility::empty(),
        pending_debug: 0,
        injection: 0,
    }
}

fn long() -> GuestState {
    let mut state = protected();
    state.entry |= EntryControls::IA32E_MODE_GUEST;
    state.efer = 0xd00;
    state.segments[SegmentRegister::Cs as usize] = Segment::flat_code64(8);
    state.rip = 0xffff_8000_0000_0000;
    state
}

/// Changes a good state and returns the field and rule that the checker names.
fn broken(
    mut state: GuestState,
    change: impl FnOnce(&mut GuestState),
) -> (&'static str, &'static str) {
    assert_eq!(check(&state, &RULES), Ok(()), "good before the change");
    change(&mut state);
    let failure = check(&state, &RULES).expect_err("a rule is broken");
    (failure.field, failure.rule)
}

fn segment(state: &mut GuestState, register: SegmentRegister) -> &mut Segment {
    &mut state.segments[register as usize]
}

#[test]
fn control_register_rules() {
    type Change = fn(&mut GuestState);
    let cases: [(Change, &str, &str); 14] = [
        (|state| state.cr0 &= !1, "CR0", "real mode"),
        (|state| state.cr0 &= !(1 << 5), "CR0", "fixes"),
        (|state| state.cr0 &= !(1 << 31), "CR0", "fixes"),
        (|state| state.cr0 |= 1 << 40, "CR0", "fixes"),
        (|state| state.cr4 &= !(1 << 13), "CR4", "fixes"),
        (|state| state.cr4 |= 1 << 23, "CR4", "lacks"),
        (|state| state.cr4 |= 1 << 17, "CR4", "PCIDE"),
        (|state| state.cr3 |= 1 << 40, "CR3", "width"),
        (|state| state.dr7 |= 1 << 32, "DR7", "63:32"),
        (|state| state.debugctl = 4, "IA32_DEBUGCTL", "reserved"),
        (
            |state| state.sysenter_esp = 1 << 47,
            "IA32_SYSENTER_ESP",
            "canonical",
        ),
        (
            |state| state.sysenter_eip = 1 << 47,
            "IA32_SYSENTER_EIP",
            "canonical",
        ),
        (|state| state.efer |= 0x400, "IA32_EFER", "LMA"),
        (|state| state.efer |= 0x100, "IA32_EFER", "LME"),
    ];
    for (change, field, rule) in cases {
        let failure = broken(protected(), change);
        assert_eq!(failure.0, field);
        assert!(
            failure.1.contains(rule),
            "{failure:?} should speak of {rule}"
        );
    }
    assert_eq!(broken(long(), |state| state.cr4 &= !0x20).0, "CR4");
    assert_eq!(broken(long(), |state| state.efer = 0x800).0, "IA32_EFER");
}

#[test]
fn code_segment_rules() {
    type Change = fn(&mut Segment);
    let cases: [(Change, &str, &str); 9] = [
        (|cs| cs.base = Gva::new(1 << 32), "CS base address", "63:32"),
        (
            |cs| cs.attributes = attributes(0xc093),
            "CS access rights",
            "9, 11, 13 or 15",
        ),
        (
            |cs| cs.attributes = attributes(0xc09a),
            "CS access rights",
            "accessed",
        ),
        (
            |cs| cs.attributes = attributes(0xc0fb),
            "CS access rights",
            "equal that of SS",
        ),
        (
            |cs| cs.attributes = attributes(0xc0ff),
            "CS access rights",
            "exceed",
        ),
        (
            |cs| cs.attributes = attributes(0xc08b),
            "CS access rights",
            "S must be 1",
        ),
        (
            |cs| cs.attributes = attributes(0xc01b),
            "CS access rights",
            "P must be 1",
        ),
        (
            |cs| cs.attributes = attributes(0x409b),
            "CS access rights",
            "G must be 1",
        ),
        (
            |cs| cs.limit = 0xfff0_0000,
            "CS access rights",
            "G must be 0",
        ),
    ];
    for (change, field, rule) in cases {
        let failure = broken(protected(), |state| {
            change(segment(state, SegmentRegister::Cs));
        });
        assert_eq!(failure.0, field);
        assert!(
            failure.1.contains(rule),
            "{failure:?} should speak of {rule}"
        );
    }
    let failure = broken(long(), |state| {
        segment(state, SegmentRegister::Cs).attributes = attributes(0xe09b);
    });
    assert!(failure.1.contains("D/B"));
}

#[test]
fn stack_and_data_segment_rules() {
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Ss).selector = 0x13;
    });
    assert_eq!(failure.0, "SS selector");
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Ss).attributes = attributes(0xc09b);
    });
    assert!(failure.1.contains("3 or 7"));
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Ss).selector = 0x13;
        segment(state, SegmentRegister::Cs).selector = 0xb;
    });
    assert!(
        failure.1.contains("equal the selector's RPL"),
        "{failure:?}"
    );
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Ds).attributes = attributes(0xc092);
    });
    assert!(failure.1.contains("accessed"));
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Es).attributes = attributes(0xc099);
    });
    assert!(failure.1.contains("readable"));
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Gs).selector = 0x13;
    });
    assert_eq!(failure.0, "GS access rights");
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Fs).base = Gva::new(1 << 47);
    });
    assert_eq!(failure.0, "FS base address");
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Ds).base = Gva::new(1 << 32);
    });
    assert_eq!(failure.0, "DS base address");
    let failure = broken(protected(), |state| {
        segment(state, SegmentRegister::Ds).attributes = attributes(0xc193);
    });
    assert!(failure.1.contains("reserved"));
}

#[test]
fn unusable_data_segments_are_free() {
    let mut state = long();
    for register in [
        SegmentRegister::Ds,
        SegmentRegister::Es,
        SegmentRegister::Fs,
        SegmentRegister::Gs,
    ] {
        *segment(&mut state, register) = Segment {
            selector: 3,
            base: Gva::new(0),
            limit: 0x1234_5678,
            attributes: attributes(0x1_0f00),
        };
    }
    assert_eq!(check(&state, &RULES), Ok(()));
}

#[test]
fn virtual_8086_rules() {
    let mut state = protected();
    state.rflags |= RFlags::VIRTUAL_8086_MODE.bits();
    for register in DATA_AND_CODE {
        *segment(&mut state, register) = Segment {
            selector: 0x100,
            base: Gva::new(0x1000),
            limit: 0xffff,
            attributes: attributes(0xf3),
        };
    }
    let change = |change: fn(&mut Segment)| {
        broken(state, |state| change(segment(state, SegmentRegister::Ds))).0
    };
    assert_eq!(change(|ds| ds.base = Gva::new(0)), "DS base address");
    assert_eq!(change(|ds| ds.limit = u32::MAX), "DS limit");
    assert_eq!(
        change(|ds| ds.attributes = attributes(0x93)),
        "DS access rights"
    );
}

#[test]
fn system_segment_rules() {
    let task = |change: fn(&mut Segment)| {
        broken(long(), |state| change(segment(state, SegmentRegister::Tr))).0
    };
    assert_eq!(task(|tr| tr.selector = 0x1c), "TR selector");
    assert_eq!(task(|tr| tr.base = Gva::new(1 << 50)), "TR base address");
    assert_eq!(task(|tr| *tr = Segment::UNUSABLE), "TR access rights");
    assert_eq!(
        task(|tr| tr.attributes = attributes(0x83)),
        "TR access rights"
    );
    assert_eq!(
        task(|tr| tr.attributes = attributes(0x9b)),
        "TR access rights"
    );
    let local = |change: fn(&mut Segment)| {
        broken(long(), |state| {
            let ldtr = segment(state, SegmentRegister::Ldtr);
            *ldtr = Segment {
                selector: 0x20,
                base: Gva::new(0),
                limit: 0xff,
                attributes: attributes(0x82),
            };
            change(ldtr);
        })
        .0
    };
    assert_eq!(local(|ldtr| ldtr.selector = 0x24), "LDTR selector");
    assert_eq!(
        local(|ldtr| ldtr.base = Gva::new(1 << 50)),
        "LDTR base address"
    );
    assert_eq!(
        local(|ldtr| ldtr.attributes = attributes(0x8b)),
        "LDTR access rights"
    );
    assert_eq!(
        local(|ldtr| ldtr.attributes = attributes(0x02)),
        "LDTR access rights"
    );
}

#[test]
fn table_pointer_and_flag_rules() {
    let base = Gva::new(1 << 47);
    assert_eq!(
        broken(protected(), |state| state.gdtr.base = base).0,
        "GDTR base address"
    );
    assert_eq!(
        broken(protected(), |state| state.idtr.base = base).0,
        "IDTR base address"
    );
    assert_eq!(broken(protected(), |state| state.rip = 1 << 32).0, "RIP");
    assert_eq!(broken(long(), |state| state.rip = 1 << 47).0, "RIP");
    assert_eq!(broken(protected(), |state| state.rflags = 0).0, "RFLAGS");
    assert_eq!(broken(protected(), |state| state.rflags |= 8).0, "RFLAGS");
    let failure = broken(protected(), |state| state.injection = 0x8000_0020);
    assert!(failure.1.contains("IF must be 1"));
}

#[test]
fn non_register_rules() {
    let field = |change: fn(&mut GuestState)| broken(protected(), change).0;
    assert_eq!(field(|state| state.activity = 1), "activity state");
    let shadow = |bits| Interruptibility::from_bits_retain(bits);
    for bits in [0x10, 3, 4] {
        let failure = broken(protected(), |state| {
            state.rflags |= 0x200;
            state.interruptibility = shadow(bits);
        });
        assert_eq!(failure.0, "interruptibility state");
    }
    assert_eq!(
        field(|state| state.interruptibility = Interruptibility::STI),
        "interruptibility state",
        "IF is clear"
    );
    assert_eq!(
        field(|state| {
            state.injection = 0x8000_0202;
            state.interruptibility = Interruptibility::NMI;
        }),
        "interruptibility state"
    );
    assert_eq!(
        field(|state| {
            state.rflags |= 0x200;
            state.injection = 0x8000_0020;
            state.interruptibility = Interruptibility::STI;
        }),
        "interruptibility state"
    );
    assert_eq!(
        field(|state| state.pending_debug = 1 << 4),
        "pending debug exceptions"
    );
    assert_eq!(
        field(|state| {
            state.rflags |= 0x100;
            state.interruptibility = Interruptibility::MOV_SS;
        }),
        "pending debug exceptions"
    );
}

#[test]
fn the_processors_own_reasons_have_texts() {
    assert!(
        describe_instruction_error(7)
            .rule
            .contains("control fields")
    );
    assert_eq!(describe_entry_failure(33, 2).field, "PDPTE");
    assert_eq!(
        describe_entry_failure(34, 1).field,
        "VM-entry MSR-load area"
    );
    assert_eq!(describe_entry_failure(34, 1).value, 1);
}
