use super::*;

const LIMITS: DriverLimits = DriverLimits {
    extended_state: EXTENDED_STATE,
    unsupported: Features::empty(),
};
const CONTROL: ControlRegisters = ControlRegisters {
    cr0: 0x11,
    cr2: umbra_vcpu::address::Gva::new(0),
    cr3: 0,
    cr4: 0,
    cr8: 0,
    efer: 0,
    xcr0: 1,
};

/// A processor that has everything.
fn everything(leaf: u32, subleaf: u32) -> CpuidResult {
    let all = u32::MAX;
    match (leaf, subleaf) {
        (0, _) => CpuidResult {
            eax: 0x20,
            ebx: u32::from_le_bytes(*b"Genu"),
            edx: u32::from_le_bytes(*b"ineI"),
            ecx: u32::from_le_bytes(*b"ntel"),
        },
        (0xd, 2) => CpuidResult {
            eax: 256,
            ebx: 576,
            ecx: 0,
            edx: 0,
        },
        (0xd, 5) => CpuidResult {
            eax: 64,
            ebx: 1088,
            ecx: 0,
            edx: 0,
        },
        (0xd, 6) => CpuidResult {
            eax: 512,
            ebx: 1152,
            ecx: 0,
            edx: 0,
        },
        (0xd, 7) => CpuidResult {
            eax: 1024,
            ebx: 1664,
            ecx: 2,
            edx: 0,
        },
        (0x8000_0000, _) => CpuidResult {
            eax: 0x8000_0028,
            ..NOTHING
        },
        (0x8000_0008, _) => CpuidResult {
            eax: 0x3934,
            ebx: all,
            ecx: all,
            edx: all,
        },
        _ => CpuidResult {
            eax: all,
            ebx: all,
            ecx: all,
            edx: all,
        },
    }
}

fn query(leaf: u32, subleaf: u32) -> CpuidResult {
    let policy = CpuidPolicy::new(&everything, &LIMITS);
    policy.query(&everything, leaf, subleaf, &|| CONTROL, &Identity::alone())
}

#[test]
fn what_is_not_virtualized_is_hidden() {
    let leaf_1 = query(1, 0);
    for bit in [2, 3, 4, 5, 6, 7, 8, 14, 15, 17, 18, 27] {
        assert_eq!(leaf_1.ecx & (1 << bit), 0, "leaf 1 ECX bit {bit}");
    }
    assert_eq!(leaf_1.edx & (1 << 28), 0, "one logical processor");
    assert_eq!(leaf_1.ebx >> 24, 0, "APIC ID");
    let leaf_7 = query(7, 0);
    for bit in [2, 4, 10, 11, 12, 14, 15, 22, 25] {
        assert_eq!(leaf_7.ebx & (1 << bit), 0, "leaf 7 EBX bit {bit}");
    }
    for bit in [4, 5, 7, 16, 23, 30, 31] {
        assert_eq!(leaf_7.ecx & (1 << bit), 0, "leaf 7 ECX bit {bit}");
    }
    for bit in [20, 24, 25, 26, 27, 28, 29, 30, 31] {
        assert_eq!(leaf_7.edx & (1 << bit), 0, "leaf 7 EDX bit {bit}");
    }
    assert_eq!(query(0x8000_0001, 0).ecx & (1 << 2), 0, "SVM");
    for leaf in [
        3,
        5,
        8,
        9,
        0xa,
        0xc,
        0xe,
        0x14,
        0x4000_0002,
        0x8000_000a,
        0xffff_ffff,
    ] {
        assert_eq!(query(leaf, 0), NOTHING, "leaf {leaf:#x}");
    }
}

fn amd(leaf: u32, subleaf: u32) -> CpuidResult {
    match leaf {
        0 => CpuidResult {
            eax: 0xd,
            ebx: u32::from_le_bytes(*b"Auth"),
            edx: u32::from_le_bytes(*b"enti"),
            ecx: u32::from_le_bytes(*b"cAMD"),
        },
        _ => everything(leaf, subleaf),
    }
}

type Host = fn(u32, u32) -> CpuidResult;

/// What the processor with the highest number of `processors` finds.
fn last_of(processors: u8, host: Host) -> impl Fn(u32, u32) -> CpuidResult {
    let policy = CpuidPolicy::new(&host, &LIMITS);
    let number = ProcessorNumber::new(processors - 1).expect("there are as many");
    let identity = Identity {
        number,
        processors,
        apic_base: ApicBase::new(number),
    };
    move |leaf, subleaf| policy.query(&host, leaf, subleaf, &|| CONTROL, &identity)
}

#[test]
fn processors_are_cores_of_one_package() {
    for host in [everything as Host, amd] {
        for (processors, ids, bits) in [(1, 1, 0), (2, 2, 1), (3, 4, 2), (4, 4, 2)] {
            let query = last_of(processors, host);
            let id = u32::from(processors) - 1;
            let leaf_1 = query(1, 0);
            assert_eq!(leaf_1.ebx >> 24, id);
            assert_eq!(leaf_1.ebx >> 16 & 0xff, ids);
            assert_eq!(leaf_1.edx & LEAF_1_EDX_HTT != 0, processors > 1);
            for (subleaf, expected) in [
                (0, [0, 1, 0x100]),
                (1, [bits, u32::from(processors), 0x201]),
                (2, [0, 0, 2]),
                (0x105, [0, 0, 5]),
            ] {
                let leaf = query(0xb, subleaf);
                assert_eq!([leaf.eax, leaf.ebx, leaf.ecx], expected, "{subleaf}");
                assert_eq!(leaf.edx, id, "every level says who asks");
            }
        }
    }
}

#[test]
fn vendors_count_cores_in_their_own_leaves() {
    let (intel, amd) = (last_of(3, everything), last_of(3, amd));
    assert_eq!(amd(0x8000_0008, 0).ecx, 2 << 12 | 2);
    assert_eq!(intel(0x8000_0008, 0).ecx, 0);
    let legacy_cores = |leaf: CpuidResult| leaf.ecx & EXTENDED_1_ECX_LEGACY_CORES != 0;
    assert!(legacy_cores(amd(0x8000_0001, 0)) && !legacy_cores(intel(0x8000_0001, 0)));
    assert!(!legacy_cores(last_of(1, self::amd)(0x8000_0001, 0)));
}

#[test]
fn cores_share_the_outer_caches() {
    const FIRST_LEVEL_DATA: u32 = 0x121;
    const THIRD_LEVEL: u32 = 0x163;
    fn host(leaf: u32, subleaf: u32) -> CpuidResult {
        match (leaf, subleaf) {
            (4, 0) => CpuidResult {
                eax: 0xfc00_4000 | FIRST_LEVEL_DATA,
                ..NOTHING
            },
            (4, 1) => CpuidResult {
                eax: 0xfc01_c000 | THIRD_LEVEL,
                ..NOTHING
            },
            (4, _) => NOTHING,
            _ => everything(leaf, subleaf),
        }
    }
    for (processors, others) in [(1, 0), (2, 1), (3, 3)] {
        let query = last_of(processors, host);
        assert_eq!(query(4, 0).eax, others << 26 | FIRST_LEVEL_DATA);
        assert_eq!(query(4, 1).eax, others << 26 | others << 14 | THIRD_LEVEL);
        assert_eq!(query(4, 2), NOTHING);
    }
}

#[test]
fn a_hypervisor_says_who_it_is() {
    assert_ne!(query(1, 0).ecx & (1 << 31), 0);
    let leaf = query(HYPERVISOR_LEAF, 0);
    let mut signature = [0; 12];
    signature[..4].copy_from_slice(&leaf.ebx.to_le_bytes());
    signature[4..8].copy_from_slice(&leaf.ecx.to_le_bytes());
    signature[8..].copy_from_slice(&leaf.edx.to_le_bytes());
    assert_eq!(&signature, b"UmbraUmbra  ");
}

#[test]
fn osxsave_ospke_and_apic_follow_the_guests_registers() {
    let policy = CpuidPolicy::new(&everything, &LIMITS);
    let control = ControlRegisters {
        cr4: 1 << 18 | 1 << 22,
        ..CONTROL
    };
    let ospke = |control: &ControlRegisters, subleaf| {
        let leaf = policy.query(&everything, 7, subleaf, &|| *control, &Identity::alone());
        leaf.ecx & LEAF_7_ECX_OSPKE != 0
    };
    assert!(ospke(&control, 0) && !ospke(&control, 1) && !ospke(&CONTROL, 0));
    let leaf = policy.query(&everything, 1, 0, &|| control, &Identity::alone());
    assert_ne!(leaf.ecx & LEAF_1_ECX_OSXSAVE, 0);
    assert_ne!(leaf.edx & LEAF_1_EDX_APIC, 0);
    let disabled = Identity {
        apic_base: Identity::alone().apic_base.disabled(),
        ..Identity::alone()
    };
    let leaf = policy.query(&everything, 1, 0, &|| CONTROL, &disabled);
    assert_eq!(leaf.edx & LEAF_1_EDX_APIC, 0);
}

#[test]
fn features_say_what_cpuid_shows() {
    let policy = CpuidPolicy::new(&everything, &LIMITS);
    let features = policy.features();
    let hidden = Features::PCID | Features::LA57;
    assert_eq!(features.features, Features::all() - hidden);
    assert_eq!(features.physical_address_bits, 40);
    assert_eq!(features.reserved_address_bits(), !((1 << 40) - 1));
    assert_eq!(query(0x8000_0008, 0).eax, 0x3028);
}

#[test]
fn the_driver_can_take_features_away() {
    let limits = DriverLimits {
        extended_state: 0,
        unsupported: Features::RDTSCP | Features::PKU | Features::UMIP,
    };
    let policy = CpuidPolicy::new(&everything, &limits);
    let query =
        |leaf, subleaf| policy.query(&everything, leaf, subleaf, &|| CONTROL, &Identity::alone());
    assert!(!policy.features().has(Features::RDTSCP));
    assert!(!policy.features().has(Features::XSAVE));
    assert_eq!(query(0x8000_0001, 0).edx & EXTENDED_1_EDX_RDTSCP, 0);
    let keys_and_umip = LEAF_7_ECX_PKU | LEAF_7_ECX_UMIP;
    assert_eq!(query(7, 0).ecx & (LEAF_7_ECX_RDPID | keys_and_umip), 0);
    assert_eq!(query(1, 0).ecx & (LEAF_1_ECX_AVX | LEAF_1_ECX_XSAVE), 0);
    assert_eq!(query(7, 0).ebx & (LEAF_7_EBX_AVX | LEAF_7_EBX_AVX512), 0);
    assert_eq!(query(0xd, 0), NOTHING);
}

#[test]
fn extended_state_sizes_follow_xcr0() {
    let policy = CpuidPolicy::new(&everything, &LIMITS);
    let sizes = |xcr0| {
        let control = ControlRegisters { xcr0, ..CONTROL };
        let leaf =
            |subleaf| policy.query(&everything, 0xd, subleaf, &|| control, &Identity::alone());
        (leaf(0).ebx, leaf(0).ecx, leaf(1).ebx)
    };
    assert_eq!(query(0xd, 0).eax, 0xe7);
    assert_eq!(sizes(1), (576, 2688, 576));
    assert_eq!(sizes(7), (832, 2688, 832));
    assert_eq!(sizes(0xe7), (2688, 2688, 576 + 256 + 64 + 512 + 1024));
    assert_eq!(query(0xd, 9), NOTHING, "no PKRU");
}

#[test]
fn an_old_processor_stays_old() {
    let old = |leaf: u32, _: u32| match leaf {
        0 => CpuidResult {
            eax: 1,
            ..everything(0, 0)
        },
        1 => CpuidResult {
            eax: 0x633,
            ebx: 0,
            ecx: 0,
            edx: 0x0080_f9ff,
        },
        _ => NOTHING,
    };
    let policy = CpuidPolicy::new(&old, &LIMITS);
    assert!(policy.features().has(Features::PAE | Features::PSE));
    assert!(!policy.features().has(Features::NX));
    assert!(!policy.features().has(Features::LONG_MODE));
    assert!(!policy.features().has(Features::SYSCALL));
    let answer = policy.query(&old, 0x8000_0000, 0, &|| CONTROL, &Identity::alone());
    assert_eq!(answer, NOTHING);
}
