//! Reads an image file into the segments to load and the way to enter them.

use alloc::vec::Vec;

use elf::ElfBytes;
use elf::abi;
use elf::endian::LittleEndian;
use elf::note::Note;
use elf::segment::ProgramHeader;
use umbra_vcpu::address::Gpa;

use crate::multiboot::Header;
use crate::{GuestRam, LoadError, MemoryMap};

/// The note that holds a PVH entry point (Xen's public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u64 = 18;

/// A file of a known format.
pub enum Image<'a> {
    /// With a Multiboot header.
    Multiboot(Executable<'a>),
    /// With a PVH entry note.
    Pvh(Executable<'a>),
}

/// What to put into memory, and where to begin.
pub struct Executable<'a> {
    /// The pieces; later ones win where they overlap.
    pub segments: Vec<Segment<'a>>,
    /// The physical address of the first instruction.
    pub entry: u32,
}

/// A piece of the image.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Its bytes in the file.
    pub bytes: &'a [u8],
    /// Where it goes.
    pub start: Gpa,
    /// Its size in memory; what the file lacks is zero.
    pub length: u64,
}

impl<'a> Image<'a> {
    /// Tells the format and reads what it says.
    ///
    /// # Errors
    /// [`LoadError`] if the format is unknown or what it says is wrong.
    pub fn parse(file: &'a [u8]) -> Result<Self, LoadError> {
        const CLASS: usize = 4;
        let is_elf = file.starts_with(&abi::ELFMAGIC);
        let is_elf32 = is_elf && file.get(CLASS) == Some(&abi::ELFCLASS32);
        let header = Header::find(file)?;
        if let Some(header) = &header {
            if let Some(addresses) = &header.addresses {
                return addresses
                    .executable(file, header.offset)
                    .map(Self::Multiboot);
            }
            if is_elf32 {
                return Executable::of_elf(&parse_elf(file)?, file).map(Self::Multiboot);
            }
        }
        if is_elf {
            let elf = parse_elf(file)?;
            if let Some(entry) = pvh_entry(&elf)? {
                let executable = Executable {
                    entry,
                    ..Executable::of_elf(&elf, file)?
                };
                executable.check_entry(u64::from(entry))?;
                return Ok(Self::Pvh(executable));
            }
            if header.is_some() {
                return Executable::of_elf(&elf, file).map(Self::Multiboot);
            }
        }
        Err(LoadError::UnknownFormat { size: file.len() })
    }
}

impl<'a> Executable<'a> {
    fn of_elf(elf: &ElfBytes<'a, LittleEndian>, file: &'a [u8]) -> Result<Self, LoadError> {
        let headers = || elf.segments().into_iter().flatten();
        let mut segments = Vec::new();
        for (number, header) in headers().enumerate() {
            if header.p_type == abi::PT_LOAD && header.p_memsz != 0 {
                segments.push(Segment::of_elf(number, &header, file)?);
            }
        }
        if segments.is_empty() {
            return Err(LoadError::NoSegments);
        }
        // The entry point is a virtual address; the segment that holds it says where that lies.
        let virtual_entry = elf.ehdr.e_entry;
        let entry = headers()
            .filter(|header| header.p_type == abi::PT_LOAD)
            .find_map(|header| {
                let offset = virtual_entry.checked_sub(header.p_vaddr)?;
                (offset < header.p_memsz).then(|| header.p_paddr.checked_add(offset))?
            })
            .unwrap_or(virtual_entry);
        let executable = Self {
            segments,
            entry: entry as u32,
        };
        executable.check_entry(entry)?;
        Ok(executable)
    }

    fn check_entry(&self, entry: u64) -> Result<(), LoadError> {
        let reachable = u32::try_from(entry).is_ok()
            && self.segments.iter().any(|segment| {
                entry
                    .checked_sub(segment.start.as_u64())
                    .is_some_and(|at| at < segment.length)
            });
        if reachable {
            Ok(())
        } else {
            Err(LoadError::Entry(entry))
        }
    }

    /// Checks that all of it goes to RAM.
    ///
    /// # Errors
    /// [`LoadError::NotInRam`] for the first segment that does not.
    pub fn check_ram(&self, map: &MemoryMap) -> Result<(), LoadError> {
        for segment in &self.segments {
            if !map.is_usable(segment.start, segment.length) {
                return Err(LoadError::NotInRam {
                    what: "a segment",
                    start: segment.start,
                    length: segment.length,
                });
            }
        }
        Ok(())
    }

    /// Start and end of each piece in memory.
    pub fn occupied(&self) -> impl Iterator<Item = (u64, u64)> {
        self.segments.iter().map(|segment| {
            let start = segment.start.as_u64();
            (start, start.saturating_add(segment.length))
        })
    }

    /// Puts it into memory that [`Executable::check_ram`] has found to be RAM.
    ///
    /// # Errors
    /// [`LoadError::HostMemory`] if the host has none for it.
    pub fn write(&self, ram: &mut dyn GuestRam) -> Result<(), LoadError> {
        for segment in &self.segments {
            let rest = segment.length - segment.bytes.len() as u64;
            ram.write(segment.start, segment.bytes)
                .and_then(|()| ram.zero(segment.start.wrapping_add(segment.length - rest), rest))
                .map_err(|_| LoadError::HostMemory)?;
        }
        Ok(())
    }
}

impl<'a> Segment<'a> {
    fn of_elf(number: usize, header: &ProgramHeader, file: &'a [u8]) -> Result<Self, LoadError> {
        let end = header.p_offset.saturating_add(header.p_filesz);
        let bytes = usize::try_from(header.p_offset)
            .ok()
            .zip(usize::try_from(end).ok())
            .and_then(|(start, end)| file.get(start..end))
            .ok_or(LoadError::SegmentPastEnd {
                segment: number,
                end,
                size: file.len() as u64,
            })?;
        if header.p_filesz > header.p_memsz {
            return Err(LoadError::SegmentShrinks {
                segment: number,
                file: header.p_filesz,
                memory: header.p_memsz,
            });
        }
        Ok(Self {
            bytes,
            start: Gpa::new(header.p_paddr),
            length: header.p_memsz,
        })
    }
}

fn parse_elf(file: &[u8]) -> Result<ElfBytes<'_, LittleEndian>, LoadError> {
    let elf = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|_| LoadError::Elf {
        part: "header or a table that it points to",
    })?;
    match elf.ehdr.e_machine {
        abi::EM_386 | abi::EM_X86_64 => Ok(elf),
        other => Err(LoadError::Machine(other)),
    }
}

fn pvh_entry(elf: &ElfBytes<'_, LittleEndian>) -> Result<Option<u32>, LoadError> {
    let unreadable = |_| LoadError::Elf { part: "notes" };
    for header in elf.segments().into_iter().flatten() {
        if header.p_type != abi::PT_NOTE {
            continue;
        }
        for note in elf.segment_data_as_notes(&header).map_err(unreadable)? {
            if let Note::Unknown(note) = note
                && note.n_type == XEN_ELFNOTE_PHYS32_ENTRY
                && note.name_str().is_ok_and(|name| name == "Xen")
            {
                // Both 4 and 8 bytes are in use; the entry is a 32-bit address in either case.
                let low = note
                    .desc
                    .first_chunk()
                    .ok_or(LoadError::Elf { part: "entry note" })?;
                return Ok(Some(u32::from_le_bytes(*low)));
            }
        }
    }
    Ok(None)
}
