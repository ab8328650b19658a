//! Linux bzImages: what is where after loading, and what is refused.

mod common;

use common::{ACPI_ROOT, BZ_IMAGE_SYSTEM, CLOCK, MEMORY, Ram, bz_image};
use proptest::prelude::*;
use umbra_loader::{
    Bios, EntryState, Format, LinuxEntry, LoadError, LoadRequest, Loaded, MemoryMap, Module, load,
};

const INITRD: [u8; 5000] = [7; 5000];

fn load_with(
    image: &[u8],
    memory: u64,
    command_line: &str,
    modules: &[Module<'_>],
) -> (Result<Loaded, LoadError>, Ram) {
    load_at(LinuxEntry::Kernel, image, memory, command_line, modules)
}

fn load_at(
    linux_entry: LinuxEntry,
    image: &[u8],
    memory: u64,
    command_line: &str,
    modules: &[Module<'_>],
) -> (Result<Loaded, LoadError>, Ram) {
    let map = MemoryMap::new(memory);
    let request = LoadRequest {
        linux_entry,
        name: "guest",
        command_line,
        modules,
        memory_map: &map,
        acpi_root: Some(ACPI_ROOT),
        clock: CLOCK,
    };
    let mut ram = Ram::new(&map);
    let result = load(image, &request, &mut ram);
    (result, ram)
}

fn initrd() -> Module<'static> {
    Module {
        name: "initrd",
        data: &INITRD,
    }
}

fn good(image: &[u8]) -> (EntryState, Ram) {
    let (result, ram) = load_with(image, MEMORY, "one two", &[initrd()]);
    let loaded = result.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.format, Format::Linux);
    (loaded.entry, ram)
}

fn refusal(image: &[u8], memory: u64, command_line: &str, modules: &[Module<'_>]) -> String {
    let (result, ram) = load_with(image, memory, command_line, modules);
    let text = result.unwrap_err().to_string();
    assert_eq!(ram.written, 0, "{text}");
    assert!(!text.contains('\n') && text.len() < 250, "{text:?}");
    text
}

fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = bz_image();
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn a_file_may_end_within_its_last_paragraph() {
    let image = bz_image();
    for missing in 0..16 {
        good(&image[..image.len() - missing]);
    }
    let error = refusal(&image[..image.len() - 16], MEMORY, "", &[]);
    assert!(error.contains("the file has only"), "{error}");
}

fn check_parameters(ram: &Ram, at: u64, start: u64) {
    let image = bz_image();
    assert_eq!(at % 4096, 0);
    assert_eq!(ram.bytes(at + 0x1fe, 0x12), image[0x1fe..0x210]);
    assert_eq!(ram.byte(at + 0x210), 0xff, "an unknown loader");
    assert_eq!(ram.byte(at + 0x211), 1);
    assert_eq!(u64::from(ram.u32(at + 0x214)), start);
    assert_eq!(ram.bytes(at + 0x22c, 0x38), image[0x22c..0x264]);
    assert_eq!(ram.u64(at + 0x70), ACPI_ROOT.as_u64());
    assert_eq!(ram.text(ram.u32(at + 0x228).into()), "one two");
    let initrd = u64::from(ram.u32(at + 0x218));
    assert_eq!(initrd, MEMORY - 0x2000, "as high as possible");
    assert_eq!(ram.u32(at + 0x21c) as usize, INITRD.len());
    assert_eq!(ram.bytes(initrd, INITRD.len() as u64), INITRD);

    let ranges: Vec<_> = (0..u64::from(ram.byte(at + 0x1e8)))
        .map(|index| at + 0x2d0 + 20 * index)
        .map(|entry| (ram.u64(entry), ram.u64(entry + 8), ram.u32(entry + 16)))
        .collect();
    let expected = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0x6_0400, 2),
        (0x10_0000, MEMORY - 0x10_0000, 1),
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn a_kernel_with_a_64_bit_entry_starts_in_long_mode() {
    let (entry, ram) = good(&bz_image());
    let EntryState::Long64 { rip, rsi, cr3, gdt } = entry else {
        panic!("{entry:?}");
    };
    assert_eq!(rip, 0x20_0200);
    assert_eq!(ram.bytes(0x20_0000, 64), BZ_IMAGE_SYSTEM);
    check_parameters(&ram, rsi, 0x20_0000);
    assert_eq!(ram.u64(u64::from(gdt) + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(ram.u64(u64::from(gdt) + 0x18), 0x00cf_9300_0000_ffff);

    let entry_of = |table: u64, index: u64| ram.u64((table & !0xfff) + 8 * index);
    for address in [0, 0x20_0000, 0xfee0_0000, 0xffff_ffff] {
        let pointer = entry_of(cr3.into(), 0);
        let directory = entry_of(pointer, address >> 30);
        let page = entry_of(directory, address >> 21 & 0x1ff);
        assert_eq!((pointer & 3, directory & 3), (3, 3));
        assert_eq!(page, address & !0x1f_ffff | 0x83);
    }
    assert_eq!(entry_of(cr3.into(), 1), 0);
}

#[test]
fn a_kernel_without_a_64_bit_entry_starts_in_protected_mode() {
    for image in [patched(0x236, &[0x7e]), patched(0x206, &[0x0b])] {
        let (entry, ram) = good(&image);
        let EntryState::Linux32 { eip, esi, gdt } = entry else {
            panic!("{entry:?}");
        };
        assert_eq!(eip, 0x20_0000);
        assert_eq!(ram.u32(u64::from(esi) + 0x214), 0x20_0000);
        assert_eq!(ram.u64(u64::from(gdt) + 0x10), 0x00cf_9b00_0000_ffff);
    }
}

#[test]
fn the_initrd_keeps_below_its_limit() {
    let image = patched(0x22c, &[0xff, 0xff, 0x4f, 0]);
    let (EntryState::Long64 { rsi, .. }, ram) = good(&image) else {
        panic!("a 64-bit entry");
    };
    assert_eq!(ram.u32(rsi + 0x218), 0x4f_e000);
    // The kernel's own memory ends at 3 MiB.
    let text = refusal(
        &patched(0x22c, &[0xff, 0xff, 0x0f, 0]),
        MEMORY,
        "",
        &[initrd()],
    );
    assert!(
        text.contains("no room for 0x1388 bytes of the initrd"),
        "{text}"
    );
}

#[test]
fn a_kernel_that_prefers_a_hole_goes_above_it_if_it_can_be_moved() {
    let high = 0xc000_0000_u64.to_le_bytes();
    let text = refusal(&patched(0x258, &high), MEMORY, "", &[]);
    assert!(text.contains("at 0xc0000000 or above"), "{text}");

    let hole = 0x9_0000_u64.to_le_bytes();
    let (EntryState::Long64 { rip, .. }, _) = good(&patched(0x258, &hole)) else {
        panic!("a 64-bit entry");
    };
    assert_eq!(rip, 0x10_0200);
    let mut fixed = patched(0x258, &hole);
    fixed[0x234] = 0;
    let text = refusal(&fixed, MEMORY, "", &[]);
    assert!(
        text.contains("needs 0x100000 bytes of RAM at 0x90000"),
        "{text}"
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let image = bz_image();
    let text = refusal(&image, 2 << 20, "", &[]);
    assert!(
        text.ends_with(
            "it needs 0x100000 bytes of RAM at 0x200000: give the guest --memory 3M or more"
        ),
        "{text}"
    );
    let large = vec![1; MEMORY as usize];
    let module = Module {
        name: "initrd",
        data: &large,
    };
    let text = refusal(&image, MEMORY, "", &[module]);
    assert!(
        text.contains(
            "no room for 0x800000 bytes of the initrd: give the guest more with --memory"
        ),
        "{text}"
    );
    let text = refusal(&image, MEMORY, &"x".repeat(0x800), &[]);
    assert!(
        text.contains("the command line has 2048 bytes, but this kernel takes 2047 at most"),
        "{text}"
    );
    assert!(load_with(&image, MEMORY, &"x".repeat(0x7ff), &[]).0.is_ok());
    let text = refusal(&image, MEMORY, "a\0b", &[]);
    assert!(text.contains("zero byte"), "{text}");
    let text = refusal(&image, MEMORY, "", &[initrd(), initrd()]);
    assert!(
        text.contains("one initrd at most, but there are 2"),
        "{text}"
    );
}

#[test]
fn bad_headers_are_refused() {
    for (offset, bytes, reason) in [
        (0x206, &[9, 2][..], "boot protocol 2.09 is older than 2.10"),
        (0x211, &[0], "it is a zImage"),
        (0x201, &[0x10], "setup header has a wrong length (0x10"),
        (0x201, &[0x8f], "setup header has a wrong length (0x8f"),
        (0x230, &[0, 0x30], "alignment 0x3000"),
        (0x230, &[0, 8], "alignment 0x800"),
        (
            0x1f1,
            &[0],
            "its header says 0xa40 bytes, but the file has only 0x440",
        ),
        (
            0x1f4,
            &[5],
            "its header says 0x450 bytes, but the file has only 0x440",
        ),
        (0x1f4, &[0xff; 4], "its header says 0x10000003f0 bytes"),
        (
            0x260,
            &[63, 0, 0],
            "needs 0x3f bytes of memory, but it has 0x40",
        ),
    ] {
        let text = refusal(&patched(offset, bytes), MEMORY, "", &[]);
        assert!(
            text.starts_with("guest image: Linux bzImage: ") && text.contains(reason),
            "{text:?} does not say {reason:?}"
        );
    }
    let text = refusal(&bz_image()[..0x240], MEMORY, "", &[]);
    assert!(text.contains("its header says 0x290 bytes"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_header_is_loaded_or_refused(
        changes in prop::collection::vec((0x1f1..0x290_usize, any::<u8>()), 0..12),
        cut in 0..0x440_usize,
        is_cut: bool,
    ) {
        let mut image = bz_image();
        for (offset, byte) in changes {
            image[offset] = byte;
        }
        if is_cut {
            image.truncate(cut);
        }
        let (result, ram) = load_with(&image, MEMORY, "one two", &[initrd()]);
        match result {
            Ok(_) => prop_assert!(ram.written <= MEMORY),
            Err(error) => {
                let text = error.to_string();
                prop_assert_eq!(ram.written, 0, "{}", text);
                prop_assert!(!text.contains('\n') && text.len() < 250, "{:?}", text);
            }
        }
    }
}

#[test]
fn the_setup_code_finds_what_a_loader_tells_it() {
    let image = bz_image();
    let (result, ram) = load_at(LinuxEntry::RealMode, &image, MEMORY, "one two", &[initrd()]);
    let loaded = result.unwrap();
    assert_eq!(loaded.bios, Bios::Present);
    assert_eq!(
        loaded.entry,
        EntryState::Real {
            cs: 0x1020,
            ip: 0,
            data: 0x1000,
            sp: 0xe000,
            dx: 0,
        }
    );
    let double = |at: u64| {
        let bytes = ram.bytes(0x1_0000 + at, 4);
        u32::from_le_bytes(bytes.try_into().unwrap())
    };
    assert_eq!(ram.bytes(0x1_0202, 4), b"HdrS");
    assert_eq!(ram.bytes(0x1_0210, 2), [0xff, image[0x211] | 0x80]);
    assert_eq!(double(0x228), 0x1_e000);
    assert_eq!(ram.bytes(0x1_e000, 8), b"one two\0");
    assert_eq!(ram.bytes(double(0x218).into(), 5000), INITRD);
    assert_eq!(double(0x21c), 5000);
    let start = u64::from(double(0x214));
    assert_eq!(ram.bytes(start, 4), &BZ_IMAGE_SYSTEM[..4]);
    let long = "x".repeat(0x1000);
    let (result, _) = load_at(LinuxEntry::RealMode, &image, MEMORY, &long, &[]);
    assert!(result.is_err(), "the command line has a page");
}
