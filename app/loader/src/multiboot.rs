//! Multiboot 0.6.96: the header in the image, and the information structure for the kernel.
//!
//! Header flags: modules are always page aligned and memory information is always given, so bits 0
//! and 1 ask for nothing new. Bit 2 asks for a video mode: there is no display, and the information
//! structure says so by leaving its flag clear. Other bits below 16 are refused, as the
//! specification wants (3.1.2).

use alloc::format;
use alloc::vec::Vec;

use elf::abi::SHF_ALLOC;
use umbra_vcpu::address::{Gpa, PAGE_SIZE};

use crate::elf_file::ElfFile;
use crate::image::{Executable, Segment};
use crate::placement::{Place, Placement, terminated};
use crate::{Bios, EntryState, Format, GuestRam, LoadError, LoadRequest, Loaded};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at entry.
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies in this many bytes at the start of the file, 4-byte aligned.
const HEADER_AREA: usize = 8192;
const KNOWN_REQUIREMENTS: u32 = 0b111;
const REQUIREMENTS: u32 = 0xffff;
const HAS_ADDRESSES: u32 = 1 << 16;
/// The second version's header: magic number, and in how many bytes it lies.
const SECOND_MAGIC: u32 = 0xe852_50d6;
const SECOND_HEADER_AREA: usize = 32768;

/// The Multiboot header of an image.
pub struct Header {
    /// Where it is in the file.
    pub offset: usize,
    /// The fields that say where to load, if the header has them.
    pub addresses: Option<Addresses>,
}

/// The header's address fields (3.1.3), for files that are not ELF.
pub struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// The 32-bit word at a file offset.
fn word(file: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*file.get(offset..)?.first_chunk()?))
}

/// Offsets of the 4-byte aligned words with this value in the first `area` bytes.
fn words_equal_to(file: &[u8], area: usize, value: u32) -> impl Iterator<Item = usize> {
    let area = &file[..file.len().min(area)];
    (0..area.len())
        .step_by(4)
        .filter(move |&offset| word(area, offset) == Some(value))
}

/// Where a header is that has everything but the right checksum.
pub fn header_without_checksum(file: &[u8]) -> Option<u64> {
    words_equal_to(file, HEADER_AREA, HEADER_MAGIC)
        .next()
        .map(|offset| offset as u64)
}

/// Whether the file has a header of Multiboot's second version.
pub fn has_second_version(file: &[u8]) -> bool {
    words_equal_to(file, SECOND_HEADER_AREA, SECOND_MAGIC)
        .next()
        .is_some()
}

impl Header {
    /// Finds the header.
    ///
    /// # Errors
    /// [`LoadError::MultibootFlags`] if it requires what is unknown.
    pub fn find(file: &[u8]) -> Result<Option<Self>, LoadError> {
        let area = &file[..file.len().min(HEADER_AREA)];
        for offset in words_equal_to(file, HEADER_AREA, HEADER_MAGIC) {
            let field = |index: usize| word(area, offset + 4 * index);
            let (Some(flags), Some(checksum)) = (field(1), field(2)) else {
                continue;
            };
            if HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) != 0 {
                continue;
            }
            let unknown = flags & REQUIREMENTS & !KNOWN_REQUIREMENTS;
            if unknown != 0 {
                return Err(LoadError::MultibootFlags {
                    offset: offset as u64,
                    unknown,
                });
            }
            let addresses = if flags & HAS_ADDRESSES == 0 {
                None
            } else {
                let (Some(header), Some(load), Some(load_end), Some(bss_end), Some(entry)) =
                    (field(3), field(4), field(5), field(6), field(7))
                else {
                    let reason = "it is cut off";
                    return Err(LoadError::MultibootAddresses {
                        offset: offset as u64,
                        reason,
                    });
                };
                Some(Addresses {
                    header,
                    load,
                    load_end,
                    bss_end,
                    entry,
                })
            };
            return Ok(Some(Self { offset, addresses }));
        }
        Ok(None)
    }
}

impl Addresses {
    /// What these fields say of a file in which the header is at `offset`.
    ///
    /// # Errors
    /// [`LoadError`] if they contradict each other or the file.
    pub fn executable<'a>(
        &self,
        file: &'a [u8],
        offset: usize,
    ) -> Result<Executable<'a>, LoadError> {
        let size = file.len() as u64;
        let offset = offset as u64;
        let wrong = |reason| LoadError::MultibootAddresses { offset, reason };
        let before_header = self
            .header
            .checked_sub(self.load)
            .ok_or(wrong("its load_addr lies above its header_addr"))?;
        let start = offset
            .checked_sub(u64::from(before_header))
            .ok_or(wrong("its load_addr lies before the start of the file"))?;
        let end = match self.load_end {
            0 => size,
            load_end => {
                let length = load_end
                    .checked_sub(self.load)
                    .ok_or(wrong("its load_end_addr lies below its load_addr"))?;
                start.saturating_add(u64::from(length))
            }
        };
        let bytes = file
            .get(start as usize..end as usize)
            .ok_or(LoadError::MultibootPastEnd { offset, end, size })?;
        let stored = bytes.len() as u64;
        let length = match self.bss_end {
            0 => stored,
            bss_end => {
                let length = bss_end
                    .checked_sub(self.load)
                    .ok_or(wrong("its bss_end_addr lies below its load_addr"))?;
                // A bss_end_addr within the file's bytes clears nothing.
                u64::from(length).max(stored)
            }
        };
        let start = Gpa::new(u64::from(self.load));
        Executable::new(
            Vec::from([Segment {
                number: 0,
                bytes,
                start,
                length,
            }]),
            self.entry.into(),
        )
    }
}

/// Loads an image and builds the information structure (3.3).
pub fn load(
    image: &Executable<'_>,
    elf: Option<&ElfFile<'_>>,
    request: &LoadRequest<'_>,
    ram: &mut dyn GuestRam,
) -> Result<Loaded, LoadError> {
    const MEMORY: u32 = 1 << 0;
    const COMMAND_LINE: u32 = 1 << 2;
    const MODULES: u32 = 1 << 3;
    const SECTIONS: u32 = 1 << 5;
    const MEMORY_MAP: u32 = 1 << 6;
    const LOADER_NAME: u32 = 1 << 9;
    const INFORMATION_SIZE: usize = 116;

    let map = request.memory_map;
    image.check_ram(map)?;
    let command_line = format!("{} {}", request.name, request.command_line);
    let command_line = terminated("the command line", command_line.trim_end())?;
    let ranges: Vec<u8> = map.ranges().iter().flat_map(memory_map_entry).collect();
    let ranges_length = ranges.len() as u32;

    let mut placement = Placement::new(map, image.occupied());
    let mut modules = Vec::new();
    for module in request.modules {
        let name = terminated("a module's command line", module.name)?;
        let start = placement.put("a module", Place::High, module.data)?;
        let name_at = placement.put("a module's command line", Place::Low, name)?;
        for field in [
            start,
            start.saturating_add(module.data.len() as u32),
            name_at,
            0,
        ] {
            modules.extend_from_slice(&field.to_le_bytes());
        }
    }
    let modules_at = placement.put("the list of modules", Place::Low, modules)?;
    let map_at = placement.put("the memory map", Place::Low, ranges)?;
    let command_line_at = placement.put("the command line", Place::Low, command_line)?;
    let name_at = placement.put("the loader's name", Place::Low, &b"Umbra\0"[..])?;
    let sections = match elf {
        Some(elf) => place_sections(elf, &mut placement)?,
        None => None,
    };

    let mut information = [0; INFORMATION_SIZE];
    let mut set = |offset: usize, value: u32| {
        information[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    };
    let mut flags = MEMORY | COMMAND_LINE | MODULES | MEMORY_MAP | LOADER_NAME;
    set(4, u32::try_from(map.below_1m() >> 10).unwrap_or(u32::MAX));
    set(8, u32::try_from(map.above_1m() >> 10).unwrap_or(u32::MAX));
    set(16, command_line_at);
    set(20, request.modules.len() as u32);
    set(24, modules_at);
    if let Some(fields) = sections {
        flags |= SECTIONS;
        for (offset, value) in (28..).step_by(4).zip(fields) {
            set(offset, value);
        }
    }
    set(44, ranges_length);
    set(48, map_at);
    set(64, name_at);
    set(0, flags);
    let ebx = placement.put(
        "the information structure",
        Place::Low,
        Vec::from(information),
    )?;
    image.write(ram)?;
    placement.write(ram)?;
    // What the image lays over the vectors and the data area is its own.
    let owns_first_page = image.occupied().any(|(start, _)| start < PAGE_SIZE);
    Ok(Loaded {
        format: Format::Multiboot,
        entry: EntryState::Protected32 {
            eip: image.entry(),
            eax: LOADER_MAGIC,
            ebx,
        },
        bios: if owns_first_page {
            Bios::Absent
        } else {
            Bios::Present
        },
    })
}

/// Places the section header table and, as GRUB does, the sections that no segment loads (symbols,
/// strings, debug information), and returns the information structure's four fields: number and
/// size of entries, address, and index of the names. Symbols are a courtesy: where RAM has no room
/// for them, they are left out.
fn place_sections<'a>(
    elf: &ElfFile<'a>,
    placement: &mut Placement<'a>,
) -> Result<Option<[u32; 4]>, LoadError> {
    const WHAT: &str = "sections";
    let Some(sections) = elf.sections()? else {
        return Ok(None);
    };
    let mut unloaded = Vec::new();
    let mut length: u64 = 0;
    for (number, section) in sections.headers.iter().enumerate() {
        let bytes = elf.section_bytes(number, &section)?;
        let allocated = section.sh_flags & u64::from(SHF_ALLOC) != 0;
        if section.sh_addr == 0 && !allocated && !bytes.is_empty() {
            let alignment = match section.sh_addralign {
                alignment if alignment.is_power_of_two() => alignment.min(PAGE_SIZE),
                _ => 1,
            };
            let offset = length.next_multiple_of(alignment);
            length = offset.saturating_add(bytes.len() as u64);
            unloaded.push((number, offset, bytes));
        }
    }
    let Ok(base) = placement.reserve(WHAT, Place::High, length) else {
        return Ok(None);
    };
    let mut table = Vec::from(sections.table);
    let (field, width) = sections.address_field;
    for (number, offset, bytes) in unloaded {
        // Everything lies below 4 GiB, because the whole block does.
        let at = base + offset as u32;
        let entry = number * sections.entry_size + field;
        table[entry..entry + width].copy_from_slice(&u64::from(at).to_le_bytes()[..width]);
        placement.fill(at, bytes);
    }
    let count = (table.len() / sections.entry_size) as u32;
    match placement.put(WHAT, Place::High, table) {
        Ok(at) => Ok(Some([
            count,
            sections.entry_size as u32,
            at,
            sections.names,
        ])),
        Err(_) => Ok(None),
    }
}

/// One entry of the memory map: its size without that field, start, length and kind.
fn memory_map_entry(range: &crate::MemoryRange) -> [u8; 24] {
    let mut entry = [0; 24];
    entry[0..4].copy_from_slice(&20_u32.to_le_bytes());
    entry[4..12].copy_from_slice(&range.start.as_u64().to_le_bytes());
    entry[12..20].copy_from_slice(&range.length.to_le_bytes());
    entry[20..24].copy_from_slice(&(range.kind as u32).to_le_bytes());
    entry
}
