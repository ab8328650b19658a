//! Multiboot 0.6.96: the header in the image, and the information structure for the kernel.
//!
//! Header flags: modules are always page aligned and memory information is always given, so bits 0
//! and 1 ask for nothing new. Bit 2 asks for a video mode: there is no display, and the information
//! structure says so by leaving its flag clear. Other bits below 16 are refused, as the
//! specification wants (3.1.2).

use alloc::vec::Vec;

use umbra_vcpu::address::Gpa;

use crate::image::{Executable, Segment};
use crate::placement::{Place, Placement, terminated};
use crate::{EntryState, Format, GuestRam, LoadError, LoadRequest, Loaded};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at entry.
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies in this many bytes at the start of the file, 4-byte aligned.
const HEADER_AREA: usize = 8192;
const KNOWN_REQUIREMENTS: u32 = 0b111;
const REQUIREMENTS: u32 = 0xffff;
const HAS_ADDRESSES: u32 = 1 << 16;

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

impl Header {
    /// Finds the header.
    ///
    /// # Errors
    /// [`LoadError::MultibootFlags`] if it requires what is unknown.
    pub fn find(file: &[u8]) -> Result<Option<Self>, LoadError> {
        let area = &file[..file.len().min(HEADER_AREA)];
        for offset in (0..area.len()).step_by(4) {
            let field = |index: usize| {
                let bytes = area.get(offset + 4 * index..)?.first_chunk()?;
                Some(u32::from_le_bytes(*bytes))
            };
            let (Some(HEADER_MAGIC), Some(flags), Some(checksum)) = (field(0), field(1), field(2))
            else {
                continue;
            };
            if HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) != 0 {
                continue;
            }
            if flags & REQUIREMENTS & !KNOWN_REQUIREMENTS != 0 {
                return Err(LoadError::MultibootFlags(flags));
            }
            let addresses = if flags & HAS_ADDRESSES == 0 {
                None
            } else {
                let (Some(header), Some(load), Some(load_end), Some(bss_end), Some(entry)) =
                    (field(3), field(4), field(5), field(6), field(7))
                else {
                    return Err(LoadError::MultibootAddresses("the header is cut off"));
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
        let wrong = LoadError::MultibootAddresses;
        let before_header = self
            .header
            .checked_sub(self.load)
            .ok_or(wrong("load_addr lies above header_addr"))?;
        let start = offset
            .checked_sub(before_header as usize)
            .ok_or(wrong("load_addr lies before the start of the file"))?;
        let end = match self.load_end {
            0 => file.len(),
            load_end => {
                let length = load_end
                    .checked_sub(self.load)
                    .ok_or(wrong("load_end_addr lies below load_addr"))?;
                start + length as usize
            }
        };
        let bytes = file.get(start..end).ok_or(LoadError::SegmentPastEnd {
            segment: 0,
            end: end as u64,
            size: file.len() as u64,
        })?;
        let length = match self.bss_end {
            0 => bytes.len() as u64,
            bss_end => {
                let length = bss_end
                    .checked_sub(self.load)
                    .ok_or(wrong("bss_end_addr lies below load_addr"))?;
                u64::from(length).max(bytes.len() as u64)
            }
        };
        if !self
            .entry
            .checked_sub(self.load)
            .is_some_and(|at| u64::from(at) < length)
        {
            return Err(LoadError::Entry(u64::from(self.entry)));
        }
        let start = Gpa::new(u64::from(self.load));
        let segment = Segment {
            bytes,
            start,
            length,
        };
        Ok(Executable {
            segments: Vec::from([segment]),
            entry: self.entry,
        })
    }
}

/// Loads an image and builds the information structure (3.3).
pub fn load(
    image: &Executable<'_>,
    request: &LoadRequest<'_>,
    ram: &mut dyn GuestRam,
) -> Result<Loaded, LoadError> {
    const MEMORY: u32 = 1 << 0;
    const COMMAND_LINE: u32 = 1 << 2;
    const MODULES: u32 = 1 << 3;
    const MEMORY_MAP: u32 = 1 << 6;
    const LOADER_NAME: u32 = 1 << 9;
    const INFORMATION_SIZE: usize = 116;
    const LOWER_KIB: u32 = 639;

    let map = request.memory_map;
    image.check_ram(map)?;
    let command_line = terminated("the command line", request.command_line)?;
    let mut placement = Placement::new(map, image.occupied());
    let mut descriptors = Vec::new();
    let mut names = Vec::new();
    for module in request.modules {
        names.push(terminated("a module's command line", module.name)?);
        let start = placement.reserve("a module", Place::High, module.data.len() as u64)?;
        let end = start + module.data.len() as u32;
        descriptors.push([start, end, 0, 0]);
    }

    image.write(ram)?;
    for ((module, name), descriptor) in request.modules.iter().zip(&names).zip(&mut descriptors) {
        ram.write(Gpa::new(u64::from(descriptor[0])), module.data)
            .map_err(|_| LoadError::HostMemory)?;
        descriptor[2] = placement.put(ram, "a module's command line", Place::Low, name)?;
    }
    let descriptors: Vec<u8> = descriptors
        .iter()
        .flatten()
        .flat_map(|f| f.to_le_bytes())
        .collect();
    let ranges: Vec<u8> = map.ranges().iter().flat_map(memory_map_entry).collect();
    let modules_at = placement.put(ram, "the list of modules", Place::Low, &descriptors)?;
    let map_at = placement.put(ram, "the memory map", Place::Low, &ranges)?;
    let command_line_at = placement.put(ram, "the command line", Place::Low, &command_line)?;
    let name_at = placement.put(ram, "the loader's name", Place::Low, b"Umbra\0")?;

    let mut information = [0; INFORMATION_SIZE];
    let mut set = |offset: usize, value: u32| {
        information[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    };
    set(
        0,
        MEMORY | COMMAND_LINE | MODULES | MEMORY_MAP | LOADER_NAME,
    );
    set(4, LOWER_KIB);
    set(8, u32::try_from(map.above_1m() >> 10).unwrap_or(u32::MAX));
    set(16, command_line_at);
    set(20, request.modules.len() as u32);
    set(24, modules_at);
    set(44, ranges.len() as u32);
    set(48, map_at);
    set(64, name_at);
    let ebx = placement.put(ram, "the information structure", Place::Low, &information)?;
    Ok(Loaded {
        format: Format::Multiboot,
        entry: EntryState::Protected32 {
            eip: image.entry,
            eax: LOADER_MAGIC,
            ebx,
        },
    })
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
