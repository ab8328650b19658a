//! Bad images: whatever the bytes are, the image is loaded or refused in one line, nothing panics,
//! and nothing outside of guest RAM is written.

mod common;

use common::{
    Class, Elf, Load, NoteIn, assert_loads_or_refuses, good_images, multiboot_elf, multiboot_flat,
    multiboot_header, pvh_elf, xen_note,
};
use proptest::prelude::*;

fn refusal(image: &[u8]) -> String {
    assert_loads_or_refuses(image).unwrap_err().to_string()
}

fn assert_refused(image: &[u8], reason: &str) {
    let text = refusal(image);
    assert!(text.contains(reason), "{text:?} does not say {reason:?}");
}

fn patched(mut image: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn files_of_other_formats_are_named() {
    assert_refused(b"", "the file is empty");
    assert_refused(
        b"just text\n",
        "of no known format; known formats are Multiboot",
    );
    assert_refused(&[0x1f, 0x8b, 8, 0], "compressed; unpack it");
    assert_refused(
        &patched(vec![0; 0x400], 0x10, &0xe852_50d6_u32.to_le_bytes()),
        "Multiboot2",
    );
    let mut elf = multiboot_elf(Class::Elf64);
    elf.loads[0].bytes[0] = 0;
    assert_refused(
        &elf.build(),
        "it is ELF, but without a Multiboot header and without a PVH note",
    );
}

#[test]
fn elf_headers_are_checked() {
    let good = multiboot_elf(Class::Elf32).build();
    for (offset, bytes, reason) in [
        (4, &[3][..], "ELF class 3"),
        (5, &[2], "byte order 2 is not 1"),
        (6, &[9], "the ELF version is not 1"),
        (16, &[1], "ELF type 1 is no executable"),
        (18, &[40], "ELF machine 40, not x86"),
        (
            24,
            &[0, 0, 0, 0x50],
            "entry point 0x50000000 lies in no loaded segment",
        ),
        (
            28,
            &[0xff, 0xff, 0, 0],
            "program header table at file offset 0xffff ends at 0x1003f",
        ),
        (
            42,
            &[56],
            "program header table has entries of 56 bytes instead of 32",
        ),
        (44, &[0], "it has no bytes to load"),
        (
            32,
            &[0xff, 0xff, 0, 0],
            "section header table at file offset 0xffff",
        ),
        (
            46,
            &[64],
            "section header table has entries of 64 bytes instead of 40",
        ),
    ] {
        assert_refused(&patched(good.clone(), offset, bytes), reason);
    }
    // Without its program headers, the Multiboot header is still in the first 8 KiB.
    assert_refused(
        &good[..40],
        "the ELF header has 0x34 bytes, but the file only 0x28",
    );
}

#[test]
fn segments_are_checked() {
    let good = multiboot_elf(Class::Elf32).build();
    let second = 52 + 32;
    let size = good.len();
    assert_refused(
        &patched(good.clone(), second + 16, &[0, 0, 1]),
        &format!(
            "ELF program header 1 at file offset 0x54: segment ends at 0x100b4, beyond the file's \
             {size:#x} bytes"
        ),
    );
    assert_refused(
        &patched(good.clone(), second + 20, &[1, 0]),
        "ELF program header 1 at file offset 0x54: segment has 0x1f bytes in the file but only 0x1 \
         in memory",
    );

    let with = |physical_address, memory_size| {
        let mut elf = multiboot_elf(Class::Elf64);
        elf.loads[1].physical_address = physical_address;
        elf.loads[1].memory_size = memory_size;
        elf.build()
    };
    assert_refused(&with(0x10_0000, 0x1000), "overlap in memory at 0x100000");
    assert_refused(&with(0xf_f000, 0x2000), "overlap in memory");
    assert_refused(
        &with(0x9_f000, 0x1000),
        "0x1000 bytes at 0x9f000, where a PC has no usable",
    );
    assert_refused(&with(0xf_0000, 0x1000), "where a PC has no usable RAM");
    assert_refused(
        &with(0x7f_f000, 0x2000),
        "where the guest has no RAM: it needs --memory 9M",
    );
    assert_refused(&with(0x20_0000, 0x3000_0000), "it needs --memory 770M");
    assert_refused(&with(0xfee0_0000, 0x1000), "where a PC has no usable RAM");
    assert_refused(&with(0x1_0000_0000, 0x1000), "entry point 0x100000002");
    assert_refused(&with(u64::MAX - 0x100, 0x1000), "entry point");
    assert_refused(&with(0x20_0000, u64::MAX), "where a PC has no usable RAM");
}

#[test]
fn multiboot_headers_are_checked() {
    let with = |flags, addresses| {
        let mut image = multiboot_header(flags, addresses);
        image.resize(0x100, 0x90);
        image
    };
    let kludge = |addresses| with(1 << 16, addresses);
    assert_refused(
        &with(3, [0; 5]),
        "has no addresses (flag bit 16), and the file is not ELF",
    );
    assert_refused(
        &with(0x28, [0; 5]),
        "requires features that Umbra does not have (flags 0x28)",
    );
    assert_refused(
        &kludge([1 << 20, 2 << 20, 0, 0, 2 << 20]),
        "load_addr lies above its header",
    );
    assert_refused(
        &kludge([2 << 20, 1 << 20, 0, 0, 2 << 20]),
        "before the start of the file",
    );
    assert_refused(
        &kludge([1 << 20, 1 << 20, 1, 0, 1 << 20]),
        "load_end_addr lies below",
    );
    assert_refused(
        &kludge([1 << 20, 1 << 20, 0, 1, 1 << 20]),
        "bss_end_addr lies below",
    );
    assert_refused(
        &kludge([1 << 20, 1 << 20, 0x10_0101, 0, 1 << 20]),
        "the bytes to load end at 0x101, beyond the file's 0x100 bytes",
    );
    assert_refused(
        &kludge([1 << 20, 1 << 20, 0, 0, 0x10_0100]),
        "entry point 0x100100",
    );
    assert_refused(
        &kludge([1 << 20, 1 << 20, 0, u32::MAX, 1 << 20]),
        "no usable RAM",
    );
    let cut_off = &kludge([1 << 20, 1 << 20, 0, 0, 1 << 20])[..30];
    assert_refused(cut_off, "it is cut off");

    let good = multiboot_flat();
    assert_refused(
        &patched(good.clone(), 24, &[1]),
        "at file offset 0x10 has a bad checksum",
    );
    let mut late = vec![0; 8180];
    late.extend_from_slice(&good[16..]);
    assert_refused(&late, "it is cut off");
    late.splice(..0, [0; 16]);
    assert_refused(&late, "of no known format");
}

#[test]
fn pvh_notes_are_checked() {
    let with = |place, note| {
        let mut elf = pvh_elf(Class::Elf64, place);
        elf.note = Some((place, note));
        elf.build()
    };
    for place in [NoteIn::Segment, NoteIn::Section] {
        assert_refused(
            &with(place, xen_note(&[1, 2])),
            "holds 2 bytes that are no 32-bit address",
        );
        let wide = 0x1_0010_0000_u64.to_le_bytes();
        assert_refused(&with(place, xen_note(&wide)), "no 32-bit address");
        let outside = 0x70_0000_u64.to_le_bytes();
        assert_refused(&with(place, xen_note(&outside)), "entry point 0x700000");
        let mut note = xen_note(&0x10_0004_u64.to_le_bytes());
        note.truncate(note.len() - 4);
        assert_refused(&with(place, note), "without a PVH note");
        assert_refused(&with(place, vec![0xff; 64]), "without a PVH note");
    }
}

/// Tables with as many entries as the format allows, all of them large: the work must not grow with
/// the product of count and size.
#[test]
fn large_tables_take_little_time() {
    let megabyte = 1 << 20;
    let many = |kind: u32, count: u16| {
        let mut elf = pvh_elf(Class::Elf64, NoteIn::Segment);
        elf.loads[0].bytes = vec![0; 4 * megabyte];
        elf.loads[0].memory_size = 5 << 20;
        let mut file = elf.build();
        let table = file.len() as u64;
        file[32..40].copy_from_slice(&table.to_le_bytes());
        file[56..58].copy_from_slice(&count.to_le_bytes());
        for index in 0..u64::from(count) {
            file.extend(kind.to_le_bytes());
            file.extend(7_u32.to_le_bytes());
            let at = 0x10_0000 + 64 * index;
            let (stored, memory) = if kind == 1 {
                (32, 48)
            } else {
                (3 << 20, 3 << 20)
            };
            for field in [0, at, at, stored, memory, 4] {
                file.extend(field.to_le_bytes());
            }
        }
        file
    };
    let start = std::time::Instant::now();
    let entry = 0x10_0004_u64.to_le_bytes();
    let mut segments = many(1, u16::MAX);
    segments.extend(xen_note(&entry));
    assert_refused(&segments, "without a PVH note");
    assert_refused(&many(4, u16::MAX), "its ELF notes overlap");
    let flat = patched(segments, 0x1000, &multiboot_header(0, [0; 5]));
    let flat = patched(flat, 24, &0x10_0010_u64.to_le_bytes());
    assert!(assert_loads_or_refuses(&flat).is_ok());
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

#[test]
fn every_truncation_is_loaded_or_refused() {
    for (kind, image) in good_images() {
        assert!(assert_loads_or_refuses(&image).is_ok(), "{kind}");
        let loaded = (0..image.len())
            .filter(|&end| assert_loads_or_refuses(&image[..end]).is_ok())
            .count();
        // Only a flat image can lose bytes at its end without anybody noticing, and ELF's padding.
        let harmless = if kind == "Multiboot addresses" {
            image.len()
        } else {
            8
        };
        assert!(
            loaded < harmless,
            "{kind}: {loaded} truncations of {} load",
            image.len()
        );
    }
}

#[test]
fn every_byte_of_the_headers_may_be_anything() {
    for (_, image) in good_images() {
        for offset in 0..image.len() {
            for value in [
                0,
                1,
                0x7f,
                0x80,
                0xff,
                image[offset] ^ 1,
                image[offset].wrapping_add(1),
            ] {
                let _ = assert_loads_or_refuses(&patched(image.clone(), offset, &[value]));
            }
        }
    }
}

fn any_elf() -> impl Strategy<Value = Elf> {
    let address = || prop_oneof![0..0x100_0000_u64, any::<u64>(), Just(0x10_0000)];
    let load = (
        address(),
        address(),
        prop::collection::vec(any::<u8>(), 0..64),
        address(),
    );
    let class = prop_oneof![Just(Class::Elf32), Just(Class::Elf64)];
    let place = prop_oneof![Just(NoteIn::Segment), Just(NoteIn::Section)];
    let note = prop::option::of((
        place,
        prop_oneof![
            address().prop_map(|entry| xen_note(&entry.to_le_bytes())),
            prop::collection::vec(any::<u8>(), 0..64),
        ],
    ));
    (
        class,
        address(),
        prop::collection::vec(load, 0..6),
        note,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(class, entry, loads, note, has_sections, has_header)| {
            let mut loads: Vec<_> = loads
                .into_iter()
                .map(
                    |(virtual_address, physical_address, bytes, memory_size)| Load {
                        virtual_address,
                        physical_address,
                        bytes,
                        memory_size,
                    },
                )
                .collect();
            if let (true, Some(load)) = (has_header, loads.first_mut()) {
                load.bytes = multiboot_header(entry as u32 & 0x7, [0; 5]);
            }
            Elf {
                class,
                entry,
                loads,
                note,
                has_sections,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes(image in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _ = assert_loads_or_refuses(&image);
    }

    #[test]
    fn arbitrary_bytes_behind_a_good_start(
        (_, image) in prop::sample::select(good_images()),
        start in 4..120_usize,
        rest in prop::collection::vec(any::<u8>(), 0..1024),
    ) {
        let mut image = image[..start.min(image.len())].to_vec();
        image.extend(rest);
        let _ = assert_loads_or_refuses(&image);
    }

    #[test]
    fn arbitrary_multiboot_addresses(
        flags: u16,
        addresses in prop::array::uniform5(prop_oneof![any::<u32>(), 0x10_0000..0x10_0200_u32]),
        size in 0..0x200_usize,
    ) {
        let mut image = multiboot_header(1 << 16 | u32::from(flags & 0xf), addresses);
        image.resize(image.len() + size, 0);
        let _ = assert_loads_or_refuses(&image);
    }

    #[test]
    fn arbitrary_elf_fields(elf in any_elf()) {
        let _ = assert_loads_or_refuses(&elf.build());
    }

    #[test]
    fn flipped_bits_in_good_images(
        (_, image) in prop::sample::select(good_images()),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u32), 1..6),
    ) {
        let mut image = image;
        for (at, bit) in flips {
            let at = at.index(image.len());
            image[at] ^= 1 << bit;
        }
        let _ = assert_loads_or_refuses(&image);
    }
}
