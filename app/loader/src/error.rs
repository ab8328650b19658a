//! Why an image is refused, each as one line.

use core::fmt;

use umbra_vcpu::address::Gpa;

use crate::hermit::HermitError;
pub use crate::image::Hint;
use crate::linux::LinuxError;

/// Why an image was not loaded. Its text is one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The content belongs to no known format.
    UnknownFormat(Hint),
    /// A boot sector has an initial RAM disk.
    BootSectorModule,
    /// The file ends within the ELF header.
    ElfTruncated {
        /// The size of the file.
        size: u64,
        /// How many bytes the header has.
        needed: u64,
    },
    /// The ELF class is neither 32-bit nor 64-bit.
    ElfClass(u8),
    /// The ELF file is not little-endian.
    ElfByteOrder(u8),
    /// The ELF header has another version than 1.
    ElfVersion,
    /// The ELF image is for another machine than x86.
    ElfMachine(u16),
    /// The ELF file is no executable.
    ElfType(u16),
    /// The entries of a table have a wrong size.
    TableEntrySize {
        /// The table.
        table: Table,
        /// The size that the header gives.
        found: u64,
        /// The right size.
        expected: u64,
    },
    /// A table is not all in the file.
    TablePastEnd {
        /// The table.
        table: Table,
        /// Where it starts.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The size of the file.
        size: u64,
    },
    /// There is nothing to load.
    NoSegments,
    /// A segment's bytes are not all in the file.
    SegmentPastEnd {
        /// The segment's number.
        segment: usize,
        /// Where its program header is in the file.
        header: u64,
        /// Where its bytes end in the file.
        end: u64,
        /// The size of the file.
        size: u64,
    },
    /// A segment has more bytes in the file than in memory.
    SegmentShrinks {
        /// The segment's number.
        segment: usize,
        /// Where its program header is in the file.
        header: u64,
        /// Bytes in the file.
        file: u64,
        /// Bytes in memory.
        memory: u64,
    },
    /// Two segments want the same memory.
    SegmentsOverlap {
        /// The number of the one.
        first: usize,
        /// The number of the other.
        second: usize,
        /// Where the other starts.
        at: Gpa,
    },
    /// A section's bytes are not all in the file.
    SectionPastEnd {
        /// The section's number.
        section: usize,
        /// Where its bytes end in the file.
        end: u64,
        /// The size of the file.
        size: u64,
    },
    /// Together, the notes have more bytes than the file.
    NotesOverlap,
    /// The PVH note holds no 32-bit address.
    PvhNote {
        /// Bytes that it holds.
        length: usize,
    },
    /// A segment does not fit the guest's RAM.
    NotInRam {
        /// The segment's number.
        segment: usize,
        /// Where it was to go.
        start: Gpa,
        /// Its size in bytes.
        length: u64,
        /// The guest's memory in bytes that would have RAM there; none has, if `None`.
        memory: Option<u64>,
    },
    /// There is no free RAM for something.
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// Its size in bytes.
        length: u64,
    },
    /// The entry point lies in none of the segments.
    Entry(u64),
    /// The Multiboot header asks for a feature that the specification does not name.
    MultibootFlags {
        /// Where the header is in the file.
        offset: u64,
        /// The flags that are unknown.
        unknown: u32,
    },
    /// The Multiboot header's address fields contradict each other or the file.
    MultibootAddresses {
        /// Where the header is in the file.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The Multiboot header has no address fields, and the file isn't ELF.
    MultibootNoAddresses {
        /// Where the header is in the file.
        offset: u64,
    },
    /// The Multiboot header's address fields say that there is more to load than the file has.
    MultibootPastEnd {
        /// Where the header is in the file.
        offset: u64,
        /// Where the bytes to load end in the file.
        end: u64,
        /// The size of the file.
        size: u64,
    },
    /// A Linux bzImage is refused.
    Linux(LinuxError),
    /// A Hermit application is refused.
    Hermit(HermitError),
    /// A text holds a zero byte.
    ZeroByte(&'static str),
    /// The host has no memory for the guest's RAM.
    HostMemory,
}

/// A table of an ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The program header table.
    ProgramHeaders,
    /// The section header table.
    SectionHeaders,
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::ProgramHeaders => "program header table",
            Self::SectionHeaders => "section header table",
        })
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => formatter.write_str("it is of no known format"),
            Self::Empty => formatter.write_str("the file is empty"),
            Self::Elf => formatter
                .write_str("it is ELF, but without a Multiboot header and without a PVH note"),
            Self::Compressed => formatter.write_str("it is compressed; unpack it first"),
            Self::MultibootChecksum { offset } => {
                write!(
                    formatter,
                    "its Multiboot header at file offset {offset:#x} has a bad checksum"
                )
            }
            Self::Multiboot2 => formatter.write_str("it has a Multiboot2 header only"),
        }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("guest image: ")?;
        match self {
            Self::MultibootFlags { .. }
            | Self::MultibootAddresses { .. }
            | Self::MultibootNoAddresses { .. }
            | Self::MultibootPastEnd { .. } => self.fmt_multiboot(formatter),
            Self::NotInRam { .. } | Self::NoRoom { .. } | Self::HostMemory => {
                self.fmt_memory(formatter)
            }
            Self::BootSectorModule => formatter
                .write_str("a boot sector takes no initrd: put it on the disk image behind it"),
            _ => self.fmt_file(formatter),
        }
    }
}

impl LoadError {
    fn fmt_multiboot(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MultibootFlags { offset, unknown } => write!(
                formatter,
                "the Multiboot header at file offset {offset:#x} requires features that Umbra does \
                 not have (flags {unknown:#x})"
            ),
            Self::MultibootAddresses { offset, reason } => {
                write!(
                    formatter,
                    "the Multiboot header at file offset {offset:#x}: {reason}"
                )
            }
            Self::MultibootNoAddresses { offset } => write!(
                formatter,
                "the Multiboot header at file offset {offset:#x} has no addresses (flag bit 16), \
                 and the file is not ELF: nothing says where to load it"
            ),
            Self::MultibootPastEnd { offset, end, size } => write!(
                formatter,
                "the Multiboot header at file offset {offset:#x}: the bytes to load end at {end:#x}, \
                 beyond the file's {size:#x} bytes"
            ),
            _ => Ok(()),
        }
    }

    fn fmt_memory(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotInRam {
                segment,
                start,
                length,
                memory: Some(memory),
            } => write!(
                formatter,
                "segment {segment} takes {length:#x} bytes at {start}, where the guest has no RAM: \
                 it needs --memory {}M",
                memory.div_ceil(1 << 20)
            ),
            Self::NotInRam {
                segment,
                start,
                length,
                memory: None,
            } => write!(
                formatter,
                "segment {segment} takes {length:#x} bytes at {start}, where a PC has no usable RAM"
            ),
            Self::NoRoom { what, length } => write!(
                formatter,
                "no room for {length:#x} bytes of {what}: give the guest more with --memory"
            ),
            _ => {
                formatter.write_str("the host has no memory left for the guest's RAM: give it more")
            }
        }
    }

    fn fmt_file(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownFormat(hint) => write!(
                formatter,
                "{hint}; known formats are Multiboot (a header in the first 8 KiB), PVH (an ELF note \
                 XEN_ELFNOTE_PHYS32_ENTRY), Linux bzImage, Hermit and boot sector"
            ),
            Self::ElfTruncated { size, needed } => write!(
                formatter,
                "the ELF header has {needed:#x} bytes, but the file only {size:#x}"
            ),
            Self::ElfClass(class) => {
                write!(
                    formatter,
                    "ELF class {class} is neither 1 (32-bit) nor 2 (64-bit)"
                )
            }
            Self::ElfByteOrder(order) => {
                write!(formatter, "ELF byte order {order} is not 1 (little-endian)")
            }
            Self::ElfVersion => formatter.write_str("the ELF version is not 1"),
            Self::ElfMachine(machine) => {
                write!(
                    formatter,
                    "it is for ELF machine {machine}, not x86 (3 or 62)"
                )
            }
            Self::ElfType(kind) => {
                write!(
                    formatter,
                    "ELF type {kind} is no executable (2 or 3): link it first"
                )
            }
            Self::TableEntrySize {
                table,
                found,
                expected,
            } => write!(
                formatter,
                "the ELF {table} has entries of {found} bytes instead of {expected}"
            ),
            Self::TablePastEnd {
                table,
                start,
                end,
                size,
            } => write!(
                formatter,
                "the ELF {table} at file offset {start:#x} ends at {end:#x}, beyond the file's \
                 {size:#x} bytes"
            ),
            Self::NoSegments => formatter.write_str("it has no bytes to load"),
            Self::SegmentPastEnd {
                segment,
                header,
                end,
                size,
            } => write!(
                formatter,
                "ELF program header {segment} at file offset {header:#x}: segment ends at {end:#x}, \
                 beyond the file's {size:#x} bytes"
            ),
            Self::SegmentShrinks {
                segment,
                header,
                file,
                memory,
            } => write!(
                formatter,
                "ELF program header {segment} at file offset {header:#x}: segment has {file:#x} \
                 bytes in the file but only {memory:#x} in memory"
            ),
            Self::SegmentsOverlap { first, second, at } => {
                write!(
                    formatter,
                    "segments {first} and {second} overlap in memory at {at}"
                )
            }
            Self::SectionPastEnd { section, end, size } => write!(
                formatter,
                "ELF section {section} ends at {end:#x}, beyond the file's {size:#x} bytes"
            ),
            Self::NotesOverlap => {
                formatter.write_str("its ELF notes overlap: they have more bytes than the file")
            }
            Self::PvhNote { length } => write!(
                formatter,
                "the note XEN_ELFNOTE_PHYS32_ENTRY holds {length} bytes that are no 32-bit address"
            ),
            Self::Entry(entry) => {
                write!(
                    formatter,
                    "the entry point {entry:#x} lies in no loaded segment"
                )
            }
            Self::Linux(error) => write!(formatter, "{error}"),
            Self::Hermit(error) => write!(formatter, "{error}"),
            Self::ZeroByte(what) => write!(formatter, "{what} holds a zero byte"),
            _ => Ok(()),
        }
    }
}

impl core::error::Error for LoadError {}

impl From<crate::OutOfRam> for LoadError {
    /// Everything is placed by the memory map before it is written, so that RAM is only missing if
    /// the host has none to give.
    fn from(_: crate::OutOfRam) -> Self {
        Self::HostMemory
    }
}
