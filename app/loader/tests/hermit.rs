//! Hermit applications: what is where after loading, and what is refused.

mod common;

use common::{CLOCK, MEMORY, Ram};
use fdt::Fdt;
use hermit_entry::boot_info::{BootInfo, PlatformInfo, RawBootInfo};
use proptest::prelude::*;
use umbra_loader::{EntryState, Format, LoadError, LoadRequest, Loaded, MemoryMap, Module, load};

/// Where relocatable images go.
const BASE: u64 = 2 << 20;
const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const NOTES: usize = 0x180;
const DYNAMIC: usize = 0x200;
const RELOCATIONS: usize = 0x300;
const SYMBOLS: usize = 0x380;
/// Words that relocation changes.
const DATA: usize = 0x400;
const ENTRY: u64 = 0x410;
const FILE_SIZE: usize = 0x480;
const MEMORY_SIZE: u64 = 0x5000;

const LOAD: u32 = 1;
const DYNAMIC_SEGMENT: u32 = 2;
const NOTE: u32 = 4;
const THREAD_LOCAL: u32 = 7;

const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;

const R_64: u64 = 1;
const R_GLOB_DAT: u64 = 6;
const R_COPY: u64 = 5;
const R_RELATIVE: u64 = 8;

fn set(file: &mut [u8], offset: usize, bytes: &[u8]) {
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, description.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    for part in [name, description] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

fn good_notes() -> Vec<u8> {
    let mut notes = note(b"GNU\0", 3, b"build");
    notes.extend(note(b"HERMIT\0", 0x5a00, &[4]));
    notes.extend(note(b"UHYVEIF\0", 0x5b00, &[0, 0, 0, 1]));
    notes
}

fn set_dynamic(file: &mut [u8], entries: &[(u64, u64)]) {
    for (number, (tag, value)) in entries.iter().enumerate() {
        set(file, DYNAMIC + 16 * number, &tag.to_le_bytes());
        set(file, DYNAMIC + 16 * number + 8, &value.to_le_bytes());
    }
}

const GOOD_DYNAMIC: [(u64, u64); 4] = [
    (DT_SYMTAB, SYMBOLS as u64),
    (DT_RELA, RELOCATIONS as u64),
    (DT_RELASZ, 4 * 24),
    (DT_NULL, 0),
];

fn set_relocation(file: &mut [u8], number: usize, place: u64, kind: u64, addend: i64) {
    let at = RELOCATIONS + 24 * number;
    set(file, at, &place.to_le_bytes());
    set(file, at + 8, &kind.to_le_bytes());
    set(file, at + 16, &addend.to_le_bytes());
}

fn with_symbol(kind: u64, symbol: u64) -> u64 {
    kind | symbol << 32
}

/// One segment that holds the whole file and has more memory, with every kind of relocation.
fn image() -> Vec<u8> {
    let mut file = vec![0; FILE_SIZE];
    set(&mut file, 0, &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0xff]);
    for (offset, half) in [(16, 3_u16), (18, 62), (52, 64), (54, 56), (56, 4)] {
        set(&mut file, offset, &half.to_le_bytes());
    }
    set(&mut file, 20, &1_u32.to_le_bytes());
    set(&mut file, 24, &ENTRY.to_le_bytes());
    set(&mut file, 32, &(HEADER_SIZE as u64).to_le_bytes());
    let segments = [
        (LOAD, 0, FILE_SIZE as u64, MEMORY_SIZE, 0x1000),
        (DYNAMIC_SEGMENT, DYNAMIC, 0x80, 0x80, 8),
        (NOTE, NOTES, good_notes().len() as u64, 0, 4),
        (THREAD_LOCAL, DATA, 0x10, 0x30, 16),
    ];
    for (number, (kind, offset, stored, memory, alignment)) in segments.into_iter().enumerate() {
        let at = HEADER_SIZE + PROGRAM_HEADER_SIZE * number;
        set(&mut file, at, &kind.to_le_bytes());
        let offset = offset as u64;
        let fields = [offset, offset, offset, stored, memory, alignment];
        for (field, value) in fields.into_iter().enumerate() {
            set(&mut file, at + 8 * (field + 1), &value.to_le_bytes());
        }
    }
    set(&mut file, NOTES, &good_notes());
    set_dynamic(&mut file, &GOOD_DYNAMIC);
    set_relocation(&mut file, 0, DATA as u64, R_RELATIVE, 0x123);
    set_relocation(&mut file, 1, DATA as u64 + 8, with_symbol(R_64, 1), 5);
    set_relocation(&mut file, 2, MEMORY_SIZE - 8, with_symbol(R_GLOB_DAT, 1), 0);
    set_relocation(&mut file, 3, DATA as u64 + 24, with_symbol(R_64, 2), 7);
    // Symbol 1 is global and defined, symbol 2 weak and not.
    set(&mut file, SYMBOLS + 24 + 4, &[0x10]);
    set(&mut file, SYMBOLS + 24 + 6, &[1]);
    set(&mut file, SYMBOLS + 24 + 8, &0x1000_u64.to_le_bytes());
    set(&mut file, SYMBOLS + 48 + 4, &[0x20]);
    set(&mut file, DATA + 24, &0xabcd_u64.to_le_bytes());
    file
}

fn load_with(
    image: &[u8],
    memory: u64,
    modules: &[Module<'_>],
) -> (Result<Loaded, LoadError>, Ram) {
    let map = MemoryMap::new(memory);
    let mut ram = Ram::new(&map);
    let request = LoadRequest {
        linux_entry: umbra_loader::LinuxEntry::Kernel,
        name: "guest",
        command_line: "env=A=b -- one two",
        modules,
        memory_map: &map,
        acpi_root: None,
        clock: CLOCK,
    };
    (load(image, &request, &mut ram), ram)
}

fn refusal(image: &[u8]) -> String {
    let (result, ram) = load_with(image, MEMORY, &[]);
    let text = result.unwrap_err().to_string();
    assert_eq!(ram.written, 0, "{text}");
    assert!(text.starts_with("guest image: "), "{text}");
    assert!(!text.contains('\n'), "{text}");
    text
}

type Change<'a> = &'a dyn Fn(&mut Vec<u8>);

/// What the kernel sees when it starts.
fn boot_information(ram: &Ram, at: u64) -> BootInfo {
    const SIZE: usize = size_of::<RawBootInfo>();
    const { assert!(SIZE == 128) };
    let mut bytes = [0; SIZE];
    bytes.copy_from_slice(&ram.bytes(at, SIZE as u64));
    // SAFETY: it has the layout of the structure, which the kernel reads in the same way, and no
    // value of the fields that are checked below is invalid.
    let raw: RawBootInfo = unsafe { std::mem::transmute(bytes) };
    BootInfo::from(raw)
}

#[test]
fn an_application_finds_what_its_kernel_wants() {
    let (loaded, ram) = load_with(&image(), MEMORY, &[]);
    let loaded = loaded.unwrap();
    assert_eq!(loaded.format, Format::Hermit);
    let EntryState::Hermit64 {
        rip,
        rdi,
        rsp,
        cr3,
        gdt,
    } = loaded.entry
    else {
        panic!("entered as {:?}", loaded.entry);
    };
    assert_eq!(rip, BASE + ENTRY);
    assert!(rsp + (32 << 10) <= BASE && rsp % 16 == 0);
    assert!(rdi + 128 <= BASE && rdi % 8 == 0);

    let information = boot_information(&ram, rdi);
    let hardware = information.hardware_info;
    assert_eq!(hardware.phys_addr_range, 0..MEMORY);
    assert_eq!(hardware.serial_port_base.unwrap().get(), 0x800);
    let image_range = information.load_info.kernel_image_addr_range;
    assert_eq!(image_range, BASE..BASE + MEMORY_SIZE);
    let thread_local = information.load_info.tls_info.unwrap();
    assert_eq!(thread_local.start, BASE + DATA as u64);
    assert_eq!((thread_local.filesz, thread_local.memsz), (0x10, 0x30));
    assert_eq!(thread_local.align, 16);
    let PlatformInfo::Uhyve {
        has_pci,
        num_cpus,
        cpu_freq,
        boot_time,
    } = information.platform_info
    else {
        panic!("{:?}", information.platform_info);
    };
    assert!(!has_pci);
    assert_eq!(
        (num_cpus.get(), cpu_freq.unwrap().get()),
        (1, CLOCK.tsc_khz)
    );
    let nanoseconds = i128::from(CLOCK.unix_nanoseconds);
    assert_eq!(boot_time.unix_timestamp_nanos(), nanoseconds);

    let tree = hardware.device_tree.unwrap().get();
    let tree = ram.bytes(tree, 0x1000);
    let tree = Fdt::new(&tree).unwrap();
    assert_eq!(tree.chosen().bootargs(), Some("env=A=b -- one two"));
    let memory: Vec<_> = tree.memory().regions().collect();
    assert_eq!(memory.len(), 1);
    assert_eq!(memory[0].starting_address as u64, 1 << 20);
    assert_eq!(memory[0].size, Some(MEMORY as usize - (1 << 20)));
    let clock = tree.find_node("/hermit,tsc").unwrap();
    let khz = clock.property("khz").unwrap().as_usize();
    assert_eq!(khz, Some(CLOCK.tsc_khz as usize));

    // The first page of the image is mapped onto itself, and its code segment is 64-bit.
    let directory_pointers = ram.u64(cr3.into()) & !0xfff;
    let directory = ram.u64(directory_pointers) & !0xfff;
    assert_eq!(ram.u64(directory + 8), BASE | 0x83);
    assert_eq!(ram.u64(u64::from(gdt) + 0x10), 0x00af_9b00_0000_ffff);
}

#[test]
fn relocations_are_applied() {
    let (loaded, ram) = load_with(&image(), MEMORY, &[]);
    loaded.unwrap();
    let word = |offset: u64| ram.u64(BASE + offset);
    assert_eq!(word(DATA as u64), BASE + 0x123);
    assert_eq!(word(DATA as u64 + 8), BASE + 0x1000 + 5);
    assert_eq!(word(MEMORY_SIZE - 8), BASE + 0x1000);
    assert_eq!(word(DATA as u64 + 24), 0xabcd, "weak and undefined");
    assert_eq!(word(ENTRY + 0x40), 0);
}

#[test]
fn an_application_may_be_linked_to_a_fixed_address() {
    let mut file = image();
    set(&mut file, 16, &2_u16.to_le_bytes());
    let moved = 0x40_0000_u64;
    set(&mut file, 24, &(moved + ENTRY).to_le_bytes());
    set(&mut file, HEADER_SIZE + 16, &moved.to_le_bytes());
    let (loaded, ram) = load_with(&file, MEMORY, &[]);
    let EntryState::Hermit64 { rip, rdi, .. } = loaded.unwrap().entry else {
        panic!("no Hermit application");
    };
    assert_eq!(rip, moved + ENTRY);
    assert_eq!(ram.u64(moved + DATA as u64 + 24), 0xabcd);
    let range = boot_information(&ram, rdi)
        .load_info
        .kernel_image_addr_range;
    assert_eq!(range, moved..moved + MEMORY_SIZE);
}

#[test]
fn other_versions_are_refused() {
    let with_notes = |notes: &[u8]| {
        let mut file = image();
        set(&mut file, NOTES, &[0; DYNAMIC - NOTES]);
        set(&mut file, NOTES, notes);
        let size = HEADER_SIZE + 2 * PROGRAM_HEADER_SIZE + 32;
        set(&mut file, size, &(notes.len() as u64).to_le_bytes());
        refusal(&file)
    };
    let text = with_notes(&note(b"HERMIT\0", 0x5a00, &[3]));
    assert!(
        text.contains("its entry version is 3, and only 4 is known"),
        "{text}"
    );
    let text = with_notes(&note(b"HERMIT\0", 0x5a00, &[4, 0]));
    assert!(text.contains("has 2 bytes"), "{text}");
    let entry = note(b"HERMIT\0", 0x5a00, &[4]);
    let interface = |version: &[u8]| [entry.clone(), note(b"UHYVEIF\0", 0x5b00, version)].concat();
    let text = with_notes(&interface(&[0, 0, 0, 2]));
    assert!(text.contains("version 2 of the uhyve interface"), "{text}");
    let text = with_notes(&interface(&[1]));
    assert!(text.contains("has 1 bytes"), "{text}");
    let text = with_notes(&note(b"GNU\0", 3, b"build"));
    assert!(
        text.contains("without a Multiboot header and without a PVH note"),
        "{text}"
    );
}

#[test]
fn bad_files_are_refused() {
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = image();
        change(&mut file);
        refusal(&file)
    };
    let dynamic =
        |entries: &'static [(u64, u64)]| move |file: &mut Vec<u8>| set_dynamic(file, entries);
    let cases: [(Change<'_>, &str); 9] = [
        (
            &|file| set(file, 18, &[3]),
            "it is not an ELF64 file for x86-64",
        ),
        (
            &dynamic(&[(DT_NEEDED, 1), (DT_NULL, 0)]),
            "link it statically",
        ),
        (
            &dynamic(&[(DT_RELA, 0x300), (DT_RELASZ, 0x10000), (DT_NULL, 0)]),
            "the file ends within its dynamic section",
        ),
        (
            &dynamic(&[(DT_RELA, u64::MAX), (DT_RELASZ, u64::MAX), (DT_NULL, 0)]),
            "the file ends within its dynamic section",
        ),
        (
            &|file| set_relocation(file, 2, 0, R_COPY, 0),
            "relocation 2 is of the unknown kind 5",
        ),
        (
            &|file| set_relocation(file, 1, MEMORY_SIZE - 7, R_RELATIVE, 0),
            "relocation 1 changes 8 bytes at 0x4ff9, which no segment has",
        ),
        (
            &|file| set_relocation(file, 1, 0_u64.wrapping_sub(BASE), R_RELATIVE, 0),
            "which no segment has",
        ),
        (
            &|file| set_relocation(file, 1, 0, with_symbol(R_64, 1000), 0),
            "relocation 1 uses symbol 1000, which the file does not have",
        ),
        (
            &|file| set(file, 24, &MEMORY_SIZE.to_le_bytes()),
            "entry point",
        ),
    ];
    for (change, reason) in cases {
        let text = changed(change);
        assert!(text.contains(reason), "{text:?} does not say {reason:?}");
    }
}

#[test]
fn what_goes_along_must_fit() {
    let module = Module {
        name: "initrd",
        data: b"x",
    };
    let (result, ram) = load_with(&image(), MEMORY, &[module]);
    let text = result.unwrap_err().to_string();
    assert!(text.contains("it takes no initrd"), "{text}");
    assert_eq!(ram.written, 0);
    let (result, ram) = load_with(&image(), BASE, &[]);
    let text = result.unwrap_err().to_string();
    assert!(text.contains("it needs --memory 3M"), "{text}");
    assert_eq!(ram.written, 0);
}

/// RAM is written only where there is some (`Ram` checks that), and a refusal has written nothing
/// and is one line.
fn loads_or_refuses(image: &[u8]) -> bool {
    let (result, ram) = load_with(image, MEMORY, &[]);
    if let Err(error) = &result {
        let text = error.to_string();
        assert!(
            text.starts_with("guest image: ") && !text.contains('\n'),
            "{text}"
        );
        assert_eq!(ram.written, 0, "{text}");
    }
    result.is_ok()
}

#[test]
fn a_truncated_file_is_refused() {
    let image = image();
    assert!(loads_or_refuses(&image));
    for end in 0..image.len() {
        assert!(!loads_or_refuses(&image[..end]), "{end} bytes load");
    }
}

#[test]
fn every_byte_may_be_anything() {
    let image = image();
    for offset in 0..image.len() {
        let byte = image[offset];
        for value in [0, 1, 0x7f, 0x80, 0xff, byte ^ 1, byte.wrapping_add(1)] {
            let mut image = image.clone();
            image[offset] = value;
            loads_or_refuses(&image);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn words_may_be_anything(
        words in prop::collection::vec((4..FILE_SIZE / 8, prop_oneof![any::<u64>(), 0..0x1000_u64]), 1..6),
    ) {
        let mut image = image();
        for (word, value) in words {
            set(&mut image, word * 8, &value.to_le_bytes());
        }
        loads_or_refuses(&image);
    }
}
