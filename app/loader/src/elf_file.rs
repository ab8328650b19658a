//! Reads ELF files, 32-bit and 64-bit, by the rules of the System V ABI's chapters 4 and 5.
//!
//! Protocol: [`ElfFile::parse`] checks the header and the program header table; what these point to
//! is checked where it is used. Nothing takes longer than linear time in the size of the file.

use elf::abi;
use elf::dynamic::DynamicTable;
use elf::endian::LittleEndian;
use elf::file::{Class, ELF32_EHDR_TAILSIZE, ELF64_EHDR_TAILSIZE, FileHeader, parse_ident};
use elf::note::{Note, NoteIterator};
use elf::parse::{ParseError, ParsingIterator};
use elf::relocation::RelaIterator;
use elf::section::{SectionHeader, SectionHeaderTable};
use elf::segment::{ProgramHeader, SegmentTable};
use elf::symbol::{Symbol, SymbolTable};

use crate::LoadError;
use crate::error::Table;
use crate::hermit::HermitError;

/// The note that holds a PVH entry point (Xen's public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u64 = 18;
const XEN_NOTE_NAME: &[u8] = b"Xen\0";

/// An ELF file for x86 whose header and program header table are in the file.
pub struct ElfFile<'a> {
    file: &'a [u8],
    header: FileHeader<LittleEndian>,
    segments: SegmentTable<'a, LittleEndian>,
}

/// One entry of the program header table.
pub struct NumberedSegment {
    /// Its index.
    pub number: usize,
    /// Where it is in the file.
    pub offset: u64,
    /// What it says.
    pub header: ProgramHeader,
}

/// The section header table.
pub struct Sections<'a> {
    /// Its bytes in the file.
    pub table: &'a [u8],
    /// The size of one entry in bytes.
    pub entry_size: usize,
    /// Where the address is in an entry, and how many bytes it has.
    pub address_field: (usize, usize),
    /// The index of the section that holds the sections' names.
    pub names: u32,
    /// What it says.
    pub headers: SectionHeaderTable<'a, LittleEndian>,
}

impl<'a> ElfFile<'a> {
    /// Whether the file claims to be ELF.
    pub fn is_elf(file: &[u8]) -> bool {
        file.starts_with(&abi::ELFMAGIC)
    }

    /// Reads the header and finds the program header table.
    ///
    /// # Errors
    /// [`LoadError`] for the first thing that is wrong with either.
    pub fn parse(file: &'a [u8]) -> Result<Self, LoadError> {
        let size = file.len() as u64;
        let truncated = |needed: usize| LoadError::ElfTruncated {
            size,
            needed: needed as u64,
        };
        let identity = file
            .get(..abi::EI_NIDENT)
            .ok_or(truncated(abi::EI_NIDENT))?;
        let identity =
            parse_ident::<LittleEndian>(identity).map_err(|error| identity_error(&error))?;
        let end = abi::EI_NIDENT
            + match identity.1 {
                Class::ELF32 => ELF32_EHDR_TAILSIZE,
                Class::ELF64 => ELF64_EHDR_TAILSIZE,
            };
        let tail = file.get(abi::EI_NIDENT..end).ok_or(truncated(end))?;
        let header = FileHeader::parse_tail(identity, tail).map_err(|_| truncated(end))?;
        if !matches!(header.e_machine, abi::EM_386 | abi::EM_X86_64) {
            return Err(LoadError::ElfMachine(header.e_machine));
        }
        if !matches!(header.e_type, abi::ET_EXEC | abi::ET_DYN) {
            return Err(LoadError::ElfType(header.e_type));
        }
        let entry_size = match header.class {
            Class::ELF32 => 32,
            Class::ELF64 => 56,
        };
        let found = (u64::from(header.e_phentsize), u64::from(header.e_phnum));
        let table = table(
            file,
            Table::ProgramHeaders,
            header.e_phoff,
            found,
            entry_size,
        )?;
        let segments = SegmentTable::new(header.endianness, header.class, table);
        Ok(Self {
            file,
            header,
            segments,
        })
    }

    /// Whether it is a 32-bit file.
    pub fn is_32_bit(&self) -> bool {
        self.header.class == Class::ELF32
    }

    /// The virtual address of the entry point.
    pub fn entry(&self) -> u64 {
        self.header.e_entry
    }

    /// The program headers.
    pub fn segments(&self) -> impl Iterator<Item = NumberedSegment> {
        let (start, size) = (self.header.e_phoff, u64::from(self.header.e_phentsize));
        self.segments
            .iter()
            .enumerate()
            .map(move |(number, header)| NumberedSegment {
                number,
                offset: start + size * number as u64,
                header,
            })
    }

    /// The section header table, if the file has one.
    ///
    /// # Errors
    /// [`LoadError`] if it is not all in the file or has entries of a wrong size.
    pub fn sections(&self) -> Result<Option<Sections<'a>>, LoadError> {
        let header = &self.header;
        if header.e_shoff == 0 || header.e_shnum == 0 {
            // More than 65279 sections are counted elsewhere (e_shnum is 0): no guest needs them.
            return Ok(None);
        }
        let (entry_size, address_field) = match header.class {
            Class::ELF32 => (40, (12, 4)),
            Class::ELF64 => (64, (16, 8)),
        };
        let found = (u64::from(header.e_shentsize), u64::from(header.e_shnum));
        let table = table(
            self.file,
            Table::SectionHeaders,
            header.e_shoff,
            found,
            entry_size,
        )?;
        Ok(Some(Sections {
            table,
            entry_size: entry_size as usize,
            address_field,
            names: u32::from(header.e_shstrndx),
            headers: SectionHeaderTable::new(header.endianness, header.class, table),
        }))
    }

    /// A section's bytes: none if it has none in the file.
    ///
    /// # Errors
    /// [`LoadError::SectionPastEnd`] if they are not all in the file.
    pub fn section_bytes(
        &self,
        number: usize,
        section: &SectionHeader,
    ) -> Result<&'a [u8], LoadError> {
        if matches!(section.sh_type, abi::SHT_NULL | abi::SHT_NOBITS) {
            return Ok(&[]);
        }
        let end = section.sh_offset.saturating_add(section.sh_size);
        range(self.file, section.sh_offset, end).ok_or(LoadError::SectionPastEnd {
            section: number,
            end,
            size: self.file.len() as u64,
        })
    }

    /// The entry point that a PVH note in a segment or a section holds.
    ///
    /// # Errors
    /// [`LoadError`] if notes are not in the file, or the note is malformed.
    pub fn pvh_entry(&self) -> Result<Option<u32>, LoadError> {
        match self.note(XEN_NOTE_NAME, XEN_ELFNOTE_PHYS32_ENTRY)? {
            None => Ok(None),
            // Both 4 and 8 bytes are in use; the entry is a 32-bit address in either case.
            Some(&([a, b, c, d] | [a, b, c, d, 0, 0, 0, 0])) => {
                Ok(Some(u32::from_le_bytes([a, b, c, d])))
            }
            Some(note) => Err(LoadError::PvhNote { length: note.len() }),
        }
    }

    /// What the first note of a name and type holds, in a segment or a section.
    ///
    /// # Errors
    /// [`LoadError`] if notes are not in the file.
    pub fn note(&self, name: &[u8], kind: u64) -> Result<Option<&'a [u8]>, LoadError> {
        // Notes do not overlap, so they have no more bytes than the file. This bounds the search.
        let mut unread = self.file.len();
        let mut has_segments = false;
        for segment in self
            .segments()
            .filter(|segment| segment.header.p_type == abi::PT_NOTE)
        {
            has_segments = true;
            let notes = segment.bytes(self.file)?;
            unread = unread
                .checked_sub(notes.len())
                .ok_or(LoadError::NotesOverlap)?;
            let found = self.note_among(notes, segment.header.p_align, (name, kind));
            if found.is_some() {
                return Ok(found);
            }
        }
        if has_segments {
            return Ok(None);
        }
        let Some(sections) = self.sections()? else {
            return Ok(None);
        };
        for (number, section) in sections.headers.iter().enumerate() {
            if section.sh_type == abi::SHT_NOTE {
                let notes = self.section_bytes(number, &section)?;
                unread = unread
                    .checked_sub(notes.len())
                    .ok_or(LoadError::NotesOverlap)?;
                let found = self.note_among(notes, section.sh_addralign, (name, kind));
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
        Ok(None)
    }

    fn note_among(
        &self,
        notes: &'a [u8],
        alignment: u64,
        (name, kind): (&[u8], u64),
    ) -> Option<&'a [u8]> {
        // Linkers give note segments all kinds of alignment; the notes themselves know two.
        let alignment = if alignment == 8 { 8 } else { 4 };
        let notes = NoteIterator::new(self.header.endianness, self.header.class, alignment, notes);
        notes.into_iter().find_map(|note| match note {
            Note::Unknown(note) if note.n_type == kind && note.name == name => Some(note.desc),
            _ => None,
        })
    }

    /// Whether it is a 64-bit file for x86-64.
    pub fn is_x86_64(&self) -> bool {
        self.header.class == Class::ELF64 && self.header.e_machine == abi::EM_X86_64
    }

    /// Whether it may be loaded anywhere.
    pub fn is_relocatable(&self) -> bool {
        self.header.e_type == abi::ET_DYN
    }

    /// What the dynamic section says, if there is one. Its relocations are those with addends.
    ///
    /// # Errors
    /// [`LoadError`] if what it points to is not in the file.
    pub fn dynamic(&self) -> Result<Option<Dynamic<'a>>, LoadError> {
        let Some(segment) = self
            .segments()
            .find(|segment| segment.header.p_type == abi::PT_DYNAMIC)
        else {
            return Ok(None);
        };
        let bytes = segment.bytes(self.file)?;
        let (mut needs_libraries, mut symbols) = (false, None);
        let (mut relocations, mut relocations_size) = (0, 0);
        let entries = DynamicTable::new(self.header.endianness, self.header.class, bytes);
        for entry in entries
            .iter()
            .take_while(|entry| entry.d_tag != abi::DT_NULL)
        {
            match entry.d_tag {
                abi::DT_NEEDED => needs_libraries = true,
                abi::DT_SYMTAB => symbols = Some(entry.d_ptr()),
                abi::DT_RELA => relocations = entry.d_ptr(),
                abi::DT_RELASZ => relocations_size = entry.d_val(),
                _ => {}
            }
        }
        let table = match relocations_size {
            0 => &[],
            size => self
                .bytes_at(relocations)
                .and_then(|bytes| bytes.get(..usize::try_from(size).ok()?))
                .ok_or(HermitError::Dynamic)?,
        };
        Ok(Some(Dynamic {
            needs_libraries,
            relocations: ParsingIterator::new(self.header.endianness, self.header.class, table),
            symbols: symbols.and_then(|at| self.bytes_at(at)).unwrap_or(&[]),
        }))
    }

    /// A symbol by its index in the bytes of [`Dynamic::symbols`].
    pub fn symbol(&self, symbols: &'a [u8], index: u32) -> Option<Symbol> {
        let table = SymbolTable::new(self.header.endianness, self.header.class, symbols);
        table.get(index as usize).ok()
    }

    /// The file's bytes for a virtual address, to the end of the segment's.
    fn bytes_at(&self, address: u64) -> Option<&'a [u8]> {
        let mut loaded = self
            .segments()
            .filter(|segment| segment.header.p_type == abi::PT_LOAD);
        loaded.find_map(|segment| {
            let header = &segment.header;
            let skipped = address.checked_sub(header.p_vaddr)?;
            let bytes = segment.bytes(self.file).ok()?;
            bytes.get(usize::try_from(skipped).ok()?..)
        })
    }
}

/// What a dynamic section says.
pub struct Dynamic<'a> {
    /// Whether the file wants others to be loaded with it.
    pub needs_libraries: bool,
    /// The relocations.
    pub relocations: RelaIterator<'a, LittleEndian>,
    /// The symbol table's bytes, and what follows them.
    pub symbols: &'a [u8],
}

impl NumberedSegment {
    /// Its bytes in the file.
    ///
    /// # Errors
    /// [`LoadError::SegmentPastEnd`] if they are not all there.
    pub fn bytes<'a>(&self, file: &'a [u8]) -> Result<&'a [u8], LoadError> {
        let end = self.header.p_offset.saturating_add(self.header.p_filesz);
        range(file, self.header.p_offset, end).ok_or(LoadError::SegmentPastEnd {
            segment: self.number,
            header: self.offset,
            end,
            size: file.len() as u64,
        })
    }
}

/// The bytes of a table whose header says `found` (entry size and count).
fn table(
    file: &[u8],
    table: Table,
    start: u64,
    found: (u64, u64),
    entry_size: u64,
) -> Result<&[u8], LoadError> {
    let (found_size, count) = found;
    if count == 0 {
        return Ok(&[]);
    }
    if found_size != entry_size {
        return Err(LoadError::TableEntrySize {
            table,
            found: found_size,
            expected: entry_size,
        });
    }
    let end = start.saturating_add(count.saturating_mul(entry_size));
    range(file, start, end).ok_or(LoadError::TablePastEnd {
        table,
        start,
        end,
        size: file.len() as u64,
    })
}

fn range(file: &[u8], start: u64, end: u64) -> Option<&[u8]> {
    file.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

fn identity_error(error: &ParseError) -> LoadError {
    match error {
        ParseError::UnsupportedElfClass(class) => LoadError::ElfClass(*class),
        ParseError::UnsupportedElfEndianness(order) => LoadError::ElfByteOrder(*order),
        _ => LoadError::ElfVersion,
    }
}
