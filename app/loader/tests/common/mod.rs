//! Images built in the test, and RAM that checks every write against the memory map.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;

use umbra_loader::{
    BootClock, GuestRam, LoadError, LoadRequest, Loaded, MemoryMap, Module, OutOfRam, load,
};
use umbra_vcpu::address::Gpa;

pub const MEMORY: u64 = 8 << 20;
pub const ACPI_ROOT: Gpa = Gpa::new(0xe_0000);
pub const CLOCK: BootClock = BootClock {
    tsc_khz: 2_400_000,
    unix_nanoseconds: 1_800_000_000_123_456_789,
};
const PAGE: u64 = 4096;

/// Guest RAM of which only written pages exist. A write outside of usable RAM fails the test.
pub struct Ram {
    map: MemoryMap,
    pages: BTreeMap<u64, Vec<u8>>,
    pub written: u64,
}

impl Ram {
    pub fn new(map: &MemoryMap) -> Self {
        Self {
            map: map.clone(),
            pages: BTreeMap::new(),
            written: 0,
        }
    }

    fn check(&mut self, at: Gpa, length: u64) {
        assert!(
            self.map.is_usable(at, length),
            "{length:#x} bytes at {at} are not RAM"
        );
        self.written += length;
    }

    pub fn byte(&self, at: u64) -> u8 {
        self.pages
            .get(&(at / PAGE))
            .map_or(0, |page| page[(at % PAGE) as usize])
    }

    pub fn bytes(&self, at: u64, length: u64) -> Vec<u8> {
        (at..at + length).map(|at| self.byte(at)).collect()
    }

    pub fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at, 4).try_into().unwrap())
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at, 8).try_into().unwrap())
    }

    pub fn text(&self, at: u64) -> String {
        let end = (at..at + PAGE)
            .find(|&at| self.byte(at) == 0)
            .expect("the text ends");
        let bytes = self.bytes(at, end - at);
        String::from_utf8(bytes).unwrap()
    }
}

impl GuestRam for Ram {
    fn write(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), OutOfRam> {
        self.check(at, bytes.len() as u64);
        for (at, &byte) in (at.as_u64()..).zip(bytes) {
            let page = self
                .pages
                .entry(at / PAGE)
                .or_insert_with(|| vec![0; PAGE as usize]);
            page[(at % PAGE) as usize] = byte;
        }
        Ok(())
    }

    fn zero(&mut self, at: Gpa, length: u64) -> Result<(), OutOfRam> {
        self.check(at, length);
        let (start, end) = (at.as_u64(), at.as_u64() + length);
        for (number, page) in self.pages.range_mut(start / PAGE..end.div_ceil(PAGE)) {
            let base = number * PAGE;
            let from = start.max(base) - base;
            let to = end.min(base + PAGE) - base;
            page[from as usize..to as usize].fill(0);
        }
        Ok(())
    }
}

pub const MODULES: [Module<'static>; 2] = [
    Module {
        name: "first a=b",
        data: b"the first module",
    },
    Module {
        name: "second",
        data: b"",
    },
];

/// Loads with a command line and two modules.
pub fn load_into(image: &[u8], map: &MemoryMap, ram: &mut Ram) -> Result<Loaded, LoadError> {
    load_with(image, &MODULES, map, ram)
}

fn load_with(
    image: &[u8],
    modules: &[Module<'_>],
    map: &MemoryMap,
    ram: &mut Ram,
) -> Result<Loaded, LoadError> {
    let request = LoadRequest {
        linux_entry: umbra_loader::LinuxEntry::Kernel,
        name: "guest",
        command_line: "one two",
        modules,
        memory_map: map,
        acpi_root: Some(ACPI_ROOT),
        clock: CLOCK,
    };
    load(image, &request, ram)
}

pub fn try_load(image: &[u8]) -> (Result<Loaded, LoadError>, Ram) {
    let map = MemoryMap::new(MEMORY);
    let mut ram = Ram::new(&map);
    (load_into(image, &map, &mut ram), ram)
}

/// What every image must lead to: RAM is written only where there is some (`Ram` checks that), at
/// most once (but for small boot information), and a refusal has written nothing and is one line.
/// The result is that of a load with two modules; Linux takes one at most.
pub fn assert_loads_or_refuses(image: &[u8]) -> Result<Loaded, LoadError> {
    let _ = assert_loads_or_refuses_with(image, &MODULES[..1]);
    assert_loads_or_refuses_with(image, &MODULES)
}

fn assert_loads_or_refuses_with(image: &[u8], modules: &[Module<'_>]) -> Result<Loaded, LoadError> {
    let map = MemoryMap::new(MEMORY);
    let mut ram = Ram::new(&map);
    let result = load_with(image, modules, &map, &mut ram);
    match &result {
        Ok(_) => assert!(ram.written <= MEMORY, "{} bytes were written", ram.written),
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.starts_with("guest image: ") && text.len() < 250,
                "{text:?}"
            );
            assert!(!text.contains(['\n', '\r']), "{text:?}");
            assert_eq!(ram.written, 0, "{text}");
        }
    }
    result
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Elf32,
    Elf64,
}

#[derive(Clone, Debug)]
pub struct Load {
    pub virtual_address: u64,
    pub physical_address: u64,
    pub bytes: Vec<u8>,
    pub memory_size: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoteIn {
    Segment,
    Section,
}

/// Builds ELF files: header, program headers, contents, notes, section headers.
#[derive(Clone, Debug)]
pub struct Elf {
    pub class: Class,
    pub entry: u64,
    pub loads: Vec<Load>,
    pub note: Option<(NoteIn, Vec<u8>)>,
    /// A symbol table and the sections' names.
    pub has_sections: bool,
}

pub const SYMBOLS: &[u8] = b"these are symbols";
pub const NAMES: &[u8] = b"\0.symtab\0.shstrtab\0";

impl Elf {
    pub fn build(&self) -> Vec<u8> {
        let wide = self.class == Class::Elf64;
        let (header_size, ph_size, sh_size) = if wide { (64, 56, 64) } else { (52, 32, 40) };
        let note_segment = matches!(self.note, Some((NoteIn::Segment, _)));
        let ph_count = self.loads.len() + usize::from(note_segment);
        let mut offset = header_size + ph_size * ph_count;
        let mut contents = Vec::new();
        let mut place = |bytes: &[u8]| {
            let at = offset;
            contents.extend_from_slice(bytes);
            let padding = bytes.len().next_multiple_of(8) - bytes.len();
            contents.extend(vec![0; padding]);
            offset += bytes.len() + padding;
            at as u64
        };
        let mut segments = Vec::new();
        for load in &self.loads {
            let at = place(&load.bytes);
            let addresses = (load.virtual_address, load.physical_address);
            segments.push((
                1_u32,
                at,
                addresses,
                load.bytes.len() as u64,
                load.memory_size,
            ));
        }
        // Type, flags, offset, size, alignment.
        let mut sections = vec![(0_u32, 0_u64, 0_u64, 0_u64)];
        if let Some((place_of_note, note)) = &self.note {
            let (at, size) = (place(note), note.len() as u64);
            match place_of_note {
                NoteIn::Segment => segments.push((4, at, (0, 0), size, size)),
                NoteIn::Section => sections.push((7, at, size, 4)),
            }
        }
        if self.has_sections {
            sections.push((2, place(SYMBOLS), SYMBOLS.len() as u64, 16));
            sections.push((3, place(NAMES), NAMES.len() as u64, 1));
        }
        let sh_count = if sections.len() > 1 {
            sections.len()
        } else {
            0
        };
        let sh_offset = if sh_count == 0 { 0 } else { offset as u64 };

        let mut file = Vec::new();
        file.extend([0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1, 0]);
        file.extend([0; 8]);
        put(&mut file, 2, 2); // executable
        put(&mut file, 2, if wide { 62 } else { 3 });
        put(&mut file, 4, 1);
        let word = if wide { 8 } else { 4 };
        put(&mut file, word, self.entry);
        put(
            &mut file,
            word,
            if ph_count == 0 { 0 } else { header_size as u64 },
        );
        put(&mut file, word, sh_offset);
        put(&mut file, 4, 0);
        for half in [
            header_size,
            ph_size,
            ph_count,
            sh_size,
            sh_count,
            sh_count.max(1) - 1,
        ] {
            put(&mut file, 2, half as u64);
        }
        for (kind, at, (virtual_address, physical_address), stored, memory) in segments {
            put(&mut file, 4, u64::from(kind));
            if wide {
                put(&mut file, 4, 7);
            }
            for field in [at, virtual_address, physical_address, stored, memory] {
                put(&mut file, word, field);
            }
            if !wide {
                put(&mut file, 4, 7);
            }
            put(&mut file, word, 4);
        }
        file.extend(contents);
        if sh_count != 0 {
            for (kind, at, size, alignment) in sections {
                put(&mut file, 4, 0);
                put(&mut file, 4, u64::from(kind));
                for field in [0, 0, at, size] {
                    put(&mut file, word, field);
                }
                put(&mut file, 4, 0);
                put(&mut file, 4, 0);
                put(&mut file, word, alignment);
                put(&mut file, word, 0);
            }
        }
        file
    }
}

fn put(file: &mut Vec<u8>, width: usize, value: u64) {
    file.extend_from_slice(&value.to_le_bytes()[..width]);
}

/// A Multiboot header with a right checksum; address fields follow if `flags` say so.
pub fn multiboot_header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    let checksum = 0_u32.wrapping_sub(MAGIC).wrapping_sub(flags);
    let mut words = vec![MAGIC, flags, checksum];
    words.extend(addresses);
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

pub fn xen_note(description: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    // Another note comes first, as in real files.
    for (name, kind, description) in [
        (&b"GNU\0"[..], 3_u32, &b"build-identifier"[..]),
        (&b"Xen\0"[..], 18, description),
    ] {
        for word in [name.len() as u32, description.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        note.extend(name);
        note.extend(description);
        note.extend(vec![
            0;
            description.len().next_multiple_of(4)
                - description.len()
        ]);
    }
    note
}

const CODE: &[u8] = b"\xfa\xf4 code that follows the header";

/// An ELF file with a Multiboot header in the first of two segments, the second linked high.
pub fn multiboot_elf(class: Class) -> Elf {
    let mut first = multiboot_header(3, [0; 5]);
    first.extend(CODE);
    Elf {
        class,
        entry: 0xc020_0002,
        loads: vec![
            Load {
                virtual_address: 0x10_0000,
                physical_address: 0x10_0000,
                memory_size: first.len() as u64,
                bytes: first,
            },
            Load {
                virtual_address: 0xc020_0000,
                physical_address: 0x20_0000,
                bytes: CODE.to_vec(),
                memory_size: 0x3210,
            },
        ],
        note: None,
        has_sections: true,
    }
}

/// An ELF file with a PVH note.
pub fn pvh_elf(class: Class, place: NoteIn) -> Elf {
    let entry = 0x10_0004_u64.to_le_bytes();
    let entry = if class == Class::Elf64 {
        &entry[..]
    } else {
        &entry[..4]
    };
    Elf {
        class,
        entry: 0xffff_ffff,
        loads: vec![Load {
            virtual_address: 0x8000_0000,
            physical_address: 0x10_0000,
            bytes: CODE.to_vec(),
            memory_size: 0x2000,
        }],
        note: Some((place, xen_note(entry))),
        has_sections: false,
    }
}

/// A file that is no ELF: some text, the header, code; loaded from behind the text.
pub fn multiboot_flat() -> Vec<u8> {
    let mut file = b"sixteen bytes...".to_vec();
    file.extend(multiboot_header(
        0x1_0003,
        [0x7_0000, 0x7_0000, 0, 0x7_1000, 0x7_0020],
    ));
    file.extend(CODE);
    file
}

/// A relocatable bzImage of boot protocol 2.15 that prefers 2 MiB and needs 1 MiB there.
pub fn bz_image() -> Vec<u8> {
    let mut file = vec![0; 2 * 512];
    for (offset, bytes) in [
        (0x1f1, &[1][..]),
        (0x1f4, &[4, 0, 0, 0]),
        (0x1fe, &[0x55, 0xaa]),
        (0x200, &[0xeb, 0x6a]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 0x02]),
        (0x211, &[1]),
        (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
        (0x230, &[0, 0x10, 0, 0]),
        (0x234, &[1]),
        (0x236, &[0x7f, 0]),
        (0x238, &[0xff, 0x07, 0, 0]),
        (0x258, &[0, 0, 0x20, 0, 0, 0, 0, 0]),
        (0x260, &[0, 0, 0x10, 0]),
    ] {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    file.extend(BZ_IMAGE_SYSTEM);
    file
}

/// The part of [`bz_image`] that goes to memory.
pub const BZ_IMAGE_SYSTEM: [u8; 64] = [0x5a; 64];

/// One good image of each kind that takes any number of modules.
pub fn good_images() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("Multiboot ELF32", multiboot_elf(Class::Elf32).build()),
        ("Multiboot ELF64", multiboot_elf(Class::Elf64).build()),
        ("Multiboot addresses", multiboot_flat()),
        ("PVH ELF32", pvh_elf(Class::Elf32, NoteIn::Segment).build()),
        ("PVH ELF64", pvh_elf(Class::Elf64, NoteIn::Segment).build()),
        (
            "PVH ELF64, note in a section",
            pvh_elf(Class::Elf64, NoteIn::Section).build(),
        ),
    ]
}
