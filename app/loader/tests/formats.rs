//! Good images: what is where after loading.

mod common;

use common::{
    ACPI_ROOT, CLOCK, Class, Load, MEMORY, MODULES, NAMES, NoteIn, Ram, SYMBOLS, good_images,
    load_into, multiboot_elf, multiboot_flat, multiboot_header, pvh_elf, try_load,
};
use umbra_loader::{Bios, EntryState, Format, LoadRequest, Loaded, MemoryMap, Module, load};

fn good(image: &[u8]) -> (Loaded, Ram) {
    let (result, ram) = try_load(image);
    (result.unwrap_or_else(|error| panic!("{error}")), ram)
}

fn registers(loaded: &Loaded) -> (u32, u32, u64) {
    let EntryState::Protected32 { eip, eax, ebx } = loaded.entry else {
        panic!("{loaded:?}");
    };
    (eip, eax, u64::from(ebx))
}

/// Reads the Multiboot information back as a kernel does.
fn check_multiboot_information(ram: &Ram, info: u64, has_sections: bool) {
    assert!((0x1000..0x9_fc00).contains(&info));
    let flags = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9 | u32::from(has_sections) << 5;
    assert_eq!(ram.u32(info), flags);
    assert_eq!(ram.u32(info + 4), 639);
    assert_eq!(u64::from(ram.u32(info + 8)), (MEMORY - (1 << 20)) / 1024);
    assert_eq!(ram.text(ram.u32(info + 16).into()), "guest one two");
    assert_eq!(ram.text(ram.u32(info + 64).into()), "Umbra");

    assert_eq!(ram.u32(info + 20), 2);
    let table = u64::from(ram.u32(info + 24));
    for (index, module) in (0..).zip(MODULES) {
        let entry = table + 16 * index;
        let (start, end) = (u64::from(ram.u32(entry)), u64::from(ram.u32(entry + 4)));
        assert_eq!(start % 4096, 0);
        assert_eq!(ram.bytes(start, end - start), module.data);
        assert_eq!(ram.text(ram.u32(entry + 8).into()), module.name);
    }

    let (length, map) = (u64::from(ram.u32(info + 44)), u64::from(ram.u32(info + 48)));
    let ranges: Vec<_> = (0..length / 24)
        .map(|index| map + 24 * index)
        .inspect(|&entry| assert_eq!(ram.u32(entry), 20))
        .map(|entry| (ram.u64(entry + 4), ram.u64(entry + 12), ram.u32(entry + 20)))
        .collect();
    let expected = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0x6_0400, 2),
        (0x10_0000, MEMORY - 0x10_0000, 1),
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn multiboot_elf_is_loaded_by_its_segments() {
    for (class, entry_size, address) in [(Class::Elf32, 40, 12), (Class::Elf64, 64, 16)] {
        let image = multiboot_elf(class);
        let (loaded, ram) = good(&image.build());
        assert_eq!(loaded.format, Format::Multiboot);
        let (eip, eax, info) = registers(&loaded);
        assert_eq!((eip, eax), (0x20_0002, 0x2bad_b002));
        for load in &image.loads {
            let size = load.bytes.len() as u64;
            assert_eq!(ram.bytes(load.physical_address, size), load.bytes);
        }
        check_multiboot_information(&ram, info, true);

        assert_eq!((ram.u32(info + 28), ram.u32(info + 32)), (3, entry_size));
        assert_eq!(ram.u32(info + 40), 2);
        let table = u64::from(ram.u32(info + 36));
        for (index, content) in [(1, SYMBOLS), (2, NAMES)] {
            let entry = table + u64::from(entry_size) * index;
            let at = u64::from(ram.u32(entry + address));
            assert_eq!(ram.bytes(at, content.len() as u64), content);
        }
    }
}

#[test]
fn multiboot_addresses_replace_elf() {
    let image = multiboot_flat();
    let (loaded, ram) = good(&image);
    let (eip, eax, info) = registers(&loaded);
    assert_eq!(
        (loaded.format, eip, eax),
        (Format::Multiboot, 0x7_0020, 0x2bad_b002)
    );
    assert_eq!(ram.bytes(0x7_0000, image.len() as u64 - 16), image[16..]);
    assert!(!(0x7_0000..0x7_1000).contains(&info));
    check_multiboot_information(&ram, info, false);
}

#[test]
fn pvh_start_information_is_complete() {
    for class in [Class::Elf32, Class::Elf64] {
        for place in [NoteIn::Segment, NoteIn::Section] {
            let (loaded, ram) = good(&pvh_elf(class, place).build());
            let (eip, _, info) = registers(&loaded);
            assert_eq!((loaded.format, eip), (Format::Pvh, 0x10_0004));
            assert_eq!((ram.u32(info), ram.u32(info + 4)), (0x336e_c578, 1));
            assert_eq!(ram.text(ram.u64(info + 24)), "one two");
            assert_eq!(ram.u64(info + 32), ACPI_ROOT.as_u64());
            assert_eq!(ram.u32(info + 12), 2);
            for (index, module) in (0..).zip(MODULES) {
                let entry = ram.u64(info + 16) + 32 * index;
                assert_eq!(ram.bytes(ram.u64(entry), ram.u64(entry + 8)), module.data);
                assert_eq!(ram.text(ram.u64(entry + 16)), module.name);
            }
            assert_eq!(ram.u32(info + 48), 3);
            let last = ram.u64(info + 40) + 48;
            assert_eq!(
                (ram.u64(last), ram.u64(last + 8)),
                (0x10_0000, MEMORY - 0x10_0000)
            );
            assert_eq!(ram.u32(last + 16), 1);
        }
    }
}

#[test]
fn bss_is_cleared() {
    let map = MemoryMap::new(MEMORY);
    let image = multiboot_elf(Class::Elf32);
    let mut ram = Ram::new(&map);
    umbra_loader::GuestRam::write(
        &mut ram,
        umbra_vcpu::address::Gpa::new(0x20_0000),
        &[7; 0x4000],
    )
    .unwrap();
    load_into(&image.build(), &map, &mut ram).unwrap();
    let load = &image.loads[1];
    let end = load.physical_address + load.memory_size;
    let stored = load.physical_address + load.bytes.len() as u64;
    assert!(
        ram.bytes(stored, end - stored)
            .iter()
            .all(|&byte| byte == 0)
    );
    assert_eq!(ram.byte(end), 7);
}

#[test]
fn nothing_overlaps_an_image_that_takes_low_memory() {
    let mut image = multiboot_elf(Class::Elf32);
    for (physical_address, memory_size) in [(0x1000, 0x9_e000), (0, 0x9_fc00)] {
        image.loads[1].physical_address = physical_address;
        image.loads[1].memory_size = memory_size;
        let (loaded, ram) = good(&image.build());
        let (_, _, info) = registers(&loaded);
        let end = physical_address + memory_size;
        assert!(!(physical_address..end).contains(&info), "{info:#x}");
        let size = image.loads[1].bytes.len() as u64;
        assert_eq!(ram.bytes(physical_address, size), image.loads[1].bytes);
        assert_eq!(ram.text(ram.u32(info + 16).into()), "guest one two");
        let module = u64::from(ram.u32(u64::from(ram.u32(info + 24))));
        assert_eq!(
            ram.bytes(module, MODULES[0].data.len() as u64),
            MODULES[0].data
        );
    }
}

#[test]
fn a_physical_entry_point_is_taken_as_it_is() {
    let mut image = multiboot_elf(Class::Elf32);
    image.entry = 0x20_0004;
    let (loaded, _) = good(&image.build());
    assert_eq!(registers(&loaded).0, 0x20_0004);
}

#[test]
fn pvh_wins_over_multiboot_in_64_bit_files_only() {
    for (class, format) in [
        (Class::Elf32, Format::Multiboot),
        (Class::Elf64, Format::Pvh),
    ] {
        let mut image = multiboot_elf(class);
        image.note = pvh_elf(class, NoteIn::Segment).note;
        assert_eq!(good(&image.build()).0.format, format);
    }
}

#[test]
fn a_video_mode_is_not_given_but_does_not_stop_the_guest() {
    let mut image = multiboot_elf(Class::Elf32);
    image.loads[0]
        .bytes
        .splice(..32, multiboot_header(7, [0; 5]));
    let (loaded, ram) = good(&image.build());
    assert_eq!(ram.u32(registers(&loaded).2) & (1 << 11 | 1 << 12), 0);
}

#[test]
fn symbols_without_room_are_left_out() {
    let mut image = multiboot_elf(Class::Elf32);
    // All of the memory above 1 MiB is taken, but for what the modules need.
    image.loads.push(Load {
        virtual_address: 0x30_0000,
        physical_address: 0x30_0000,
        bytes: Vec::new(),
        memory_size: MEMORY - 0x30_0000,
    });
    image.loads[1].physical_address = 0x10_3000;
    image.loads[1].memory_size = 0x1f_d000;
    let (loaded, ram) = good(&image.build());
    check_multiboot_information(&ram, registers(&loaded).2, false);
}

#[test]
fn modules_that_do_not_fit_are_refused_before_anything_is_written() {
    let map = MemoryMap::new(MEMORY);
    let data = vec![1; MEMORY as usize];
    for (_, image) in good_images() {
        let modules = [Module {
            name: "large",
            data: &data,
        }];
        let request = LoadRequest {
            linux_entry: umbra_loader::LinuxEntry::Kernel,
            name: "guest",
            command_line: "x",
            modules: &modules,
            memory_map: &map,
            acpi_root: Some(ACPI_ROOT),
            clock: CLOCK,
        };
        let mut ram = Ram::new(&map);
        let error = load(&image, &request, &mut ram).unwrap_err().to_string();
        assert!(
            error.contains("no room for 0x800000 bytes of a module"),
            "{error}"
        );
        assert!(error.contains("--memory"), "{error}");
        assert_eq!(ram.written, 0);
    }
}

#[test]
fn a_boot_sector_is_told_by_its_signature() {
    let map = MemoryMap::new(MEMORY);
    let mut disk = vec![0x90; 3 * 512];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512] = 0x77;
    let try_load = |image: &[u8], modules: &[Module<'_>]| {
        let request = LoadRequest {
            linux_entry: umbra_loader::LinuxEntry::Kernel,
            name: "guest",
            command_line: "",
            modules,
            memory_map: &map,
            acpi_root: Some(ACPI_ROOT),
            clock: CLOCK,
        };
        let mut ram = Ram::new(&map);
        (load(image, &request, &mut ram), ram)
    };
    for length in [512, disk.len()] {
        let (result, ram) = try_load(&disk[..length], &[]);
        let loaded = result.unwrap();
        assert_eq!(loaded.format, Format::BootSector);
        assert_eq!(loaded.bios, Bios::Present);
        let EntryState::Real { cs, ip, dx, .. } = loaded.entry else {
            panic!("{:?}", loaded.entry);
        };
        assert_eq!((cs, ip, dx), (0, 0x7c00, 0x80));
        assert_eq!(ram.bytes(0x7c00, 512), &disk[..512]);
        assert_eq!(ram.written, 512, "the rest stays on the disk");
    }
    for image in [&disk[..511], &disk[..513], &disk[512..1024]] {
        assert!(try_load(image, &[]).0.is_err());
    }
    let initrd = Module {
        name: "initrd",
        data: &[],
    };
    let error = try_load(&disk, &[initrd]).0.unwrap_err().to_string();
    assert!(error.contains("takes no initrd"), "{error}");
}

#[test]
fn texts_with_zero_bytes_are_refused() {
    let map = MemoryMap::new(MEMORY);
    for (_, image) in good_images() {
        for (command_line, name) in [("a\0b", "name"), ("a", "na\0me")] {
            let modules = [Module { name, data: &[] }];
            let request = LoadRequest {
                linux_entry: umbra_loader::LinuxEntry::Kernel,
                name: "guest",
                command_line,
                modules: &modules,
                memory_map: &map,
                acpi_root: Some(ACPI_ROOT),
                clock: CLOCK,
            };
            let mut ram = Ram::new(&map);
            let error = load(&image, &request, &mut ram).unwrap_err().to_string();
            assert!(error.ends_with("holds a zero byte"), "{error}");
        }
    }
}
