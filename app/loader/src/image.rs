//! Reads an image file into the segments to load and the way to enter them.

use alloc::vec::Vec;

use elf::abi;
use umbra_vcpu::address::Gpa;

use crate::boot_sector;
use crate::elf_file::{ElfFile, NumberedSegment};
use crate::hermit::Application;
use crate::linux::BzImage;
use crate::multiboot::{self, Header};
use crate::{GuestRam, LoadError, MemoryMap};

/// A file of a known format.
pub enum Image<'a> {
    /// With a Multiboot header; the ELF file is there unless address fields take its place.
    Multiboot(Executable<'a>, Option<ElfFile<'a>>),
    /// With a PVH entry note.
    Pvh(Executable<'a>),
    /// A Linux bzImage.
    Linux(BzImage<'a>),
    /// A Hermit application.
    Hermit(Application<'a>),
    /// A boot sector, or the one of a disk image.
    BootSector(&'a [u8; 512]),
}

/// What to put into memory, and where to begin.
#[derive(Debug)]
pub struct Executable<'a> {
    /// The pieces, in the order of their addresses. They do not overlap and are not empty.
    segments: Vec<Segment<'a>>,
    /// The physical address of the first instruction.
    entry: u32,
}

/// A piece of the image.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Its number, for messages.
    pub number: usize,
    /// Its bytes in the file, at most `length`.
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
        if BzImage::is_bz_image(file) {
            return Ok(Self::Linux(BzImage::parse(file)?));
        }
        let header = Header::find(file)?;
        if let Some((offset, addresses)) = header
            .as_ref()
            .and_then(|header| Some((header.offset, header.addresses.as_ref()?)))
        {
            return Ok(Self::Multiboot(addresses.executable(file, offset)?, None));
        }
        if header.is_none()
            && let Some(sector) = boot_sector::find(file)
        {
            return Ok(Self::BootSector(sector));
        }
        if !ElfFile::is_elf(file) {
            return Err(match header {
                Some(header) => LoadError::MultibootNoAddresses {
                    offset: header.offset as u64,
                },
                None => LoadError::UnknownFormat(Hint::of(file)),
            });
        }
        let elf = ElfFile::parse(file)?;
        if header.is_some() && elf.is_32_bit() {
            return Ok(Self::Multiboot(
                Executable::of_elf(&elf, file, None)?,
                Some(elf),
            ));
        }
        if let Some(application) = Application::parse(&elf, file)? {
            return Ok(Self::Hermit(application));
        }
        if let Some(entry) = elf.pvh_entry()? {
            return Ok(Self::Pvh(Executable::of_elf(&elf, file, Some(entry))?));
        }
        if header.is_some() {
            return Ok(Self::Multiboot(
                Executable::of_elf(&elf, file, None)?,
                Some(elf),
            ));
        }
        Err(LoadError::UnknownFormat(Hint::of(file)))
    }
}

impl<'a> Executable<'a> {
    /// Segments and entry point, which must lie in one of them.
    ///
    /// # Errors
    /// [`LoadError`] if there is nothing to load, segments overlap, or the entry is elsewhere.
    pub fn new(mut segments: Vec<Segment<'a>>, entry: u64) -> Result<Self, LoadError> {
        segments.retain(|segment| segment.length != 0);
        if segments.is_empty() {
            return Err(LoadError::NoSegments);
        }
        segments.sort_by_key(|segment| segment.start);
        for pair in segments.windows(2) {
            if pair[0].end().is_none_or(|end| end > pair[1].start) {
                return Err(LoadError::SegmentsOverlap {
                    first: pair[0].number,
                    second: pair[1].number,
                    at: pair[1].start,
                });
            }
        }
        let at = Gpa::new(entry);
        let inside =
            |segment: &Segment<'_>| at >= segment.start && segment.end().is_none_or(|end| at < end);
        match u32::try_from(entry) {
            Ok(entry) if segments.iter().any(inside) => Ok(Self { segments, entry }),
            _ => Err(LoadError::Entry(entry)),
        }
    }

    /// What the program headers say; the entry point is the ELF header's if there is no `entry`.
    fn of_elf(elf: &ElfFile<'a>, file: &'a [u8], entry: Option<u32>) -> Result<Self, LoadError> {
        let loaded = || {
            elf.segments()
                .filter(|segment| segment.header.p_type == abi::PT_LOAD)
        };
        let segments = loaded()
            .map(|segment| Segment::of_elf(&segment, file))
            .collect::<Result<_, _>>()?;
        // The header's entry point is a virtual address; the segment that holds it says where that
        // lies in physical memory. Some images give the physical address itself.
        let entry = entry.map_or_else(
            || {
                loaded()
                    .find_map(|NumberedSegment { header, .. }| {
                        let offset = elf.entry().checked_sub(header.p_vaddr)?;
                        (offset < header.p_memsz).then(|| header.p_paddr.checked_add(offset))?
                    })
                    .unwrap_or(elf.entry())
            },
            u64::from,
        );
        Self::new(segments, entry)
    }

    /// What the program headers say when all of their virtual addresses are moved by `base`.
    ///
    /// # Errors
    /// As [`Executable::new`].
    pub fn at_base(elf: &ElfFile<'a>, file: &'a [u8], base: u64) -> Result<Self, LoadError> {
        let segments = elf
            .segments()
            .filter(|segment| segment.header.p_type == abi::PT_LOAD)
            .map(|segment| {
                let start = Gpa::new(base.saturating_add(segment.header.p_vaddr));
                Ok(Segment {
                    start,
                    ..Segment::of_elf(&segment, file)?
                })
            })
            .collect::<Result<_, LoadError>>()?;
        Self::new(segments, base.saturating_add(elf.entry()))
    }

    /// The first address of all segments, and the one behind the last.
    pub fn range(&self) -> (u64, u64) {
        let first = self.occupied().next().map_or(0, |(start, _)| start);
        let last = self.occupied().last().map_or(0, |(_, end)| end);
        (first, last)
    }

    /// Whether one segment has all of these bytes.
    pub fn holds(&self, at: Gpa, length: u64) -> bool {
        let following = self.segments.partition_point(|segment| segment.start <= at);
        let segment = following
            .checked_sub(1)
            .and_then(|index| self.segments.get(index));
        segment.is_some_and(|segment| {
            let offset = at.as_u64() - segment.start.as_u64();
            offset
                .checked_add(length)
                .is_some_and(|end| end <= segment.length)
        })
    }

    /// The physical address of the first instruction.
    pub fn entry(&self) -> u32 {
        self.entry
    }

    /// Checks that all of it goes to RAM.
    ///
    /// # Errors
    /// [`LoadError`] for the first segment that does not.
    pub fn check_ram(&self, map: &MemoryMap) -> Result<(), LoadError> {
        let misplaced = self
            .segments
            .iter()
            .find(|segment| !map.is_usable(segment.start, segment.length));
        match misplaced {
            None => Ok(()),
            Some(&Segment {
                number,
                start,
                length,
                ..
            }) => {
                let memory = map.size_for(start, length);
                Err(LoadError::NotInRam {
                    segment: number,
                    start,
                    length,
                    memory,
                })
            }
        }
    }

    /// Start and end of each piece in memory, in the order of their addresses.
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
            let stored = segment.bytes.len() as u64;
            ram.write(segment.start, segment.bytes)?;
            ram.zero(
                segment.start.wrapping_add(stored),
                segment.length.saturating_sub(stored),
            )?;
        }
        Ok(())
    }
}

impl<'a> Segment<'a> {
    fn of_elf(segment: &NumberedSegment, file: &'a [u8]) -> Result<Self, LoadError> {
        let header = &segment.header;
        let bytes = segment.bytes(file)?;
        if header.p_filesz > header.p_memsz {
            return Err(LoadError::SegmentShrinks {
                segment: segment.number,
                header: segment.offset,
                file: header.p_filesz,
                memory: header.p_memsz,
            });
        }
        let start = Gpa::new(header.p_paddr);
        Ok(Self {
            number: segment.number,
            bytes,
            start,
            length: header.p_memsz,
        })
    }

    /// The first address behind it; `None` past the end of the address space.
    fn end(&self) -> Option<Gpa> {
        self.start.checked_add(self.length)
    }
}

/// What a file of no known format may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Nothing known.
    None,
    /// It has no bytes.
    Empty,
    /// An ELF file that lacks what makes it a guest.
    Elf,
    /// Something compressed.
    Compressed,
    /// It has a Multiboot header but for its checksum.
    MultibootChecksum {
        /// Where the header is in the file.
        offset: u64,
    },
    /// It has a header of Multiboot's second version.
    Multiboot2,
}

impl Hint {
    const GZIP: &'static [u8] = &[0x1f, 0x8b];
    const XZ: &'static [u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
    const ZSTD: &'static [u8] = &[0x28, 0xb5, 0x2f, 0xfd];

    fn of(file: &[u8]) -> Self {
        if file.is_empty() {
            Self::Empty
        } else if let Some(offset) = multiboot::header_without_checksum(file) {
            Self::MultibootChecksum { offset }
        } else if multiboot::has_second_version(file) {
            Self::Multiboot2
        } else if ElfFile::is_elf(file) {
            Self::Elf
        } else if [Self::GZIP, Self::XZ, Self::ZSTD]
            .iter()
            .any(|magic| file.starts_with(magic))
        {
            Self::Compressed
        } else {
            Self::None
        }
    }
}
