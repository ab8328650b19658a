//! Why an image is refused, each as one line.

use core::fmt;

use umbra_vcpu::address::Gpa;

/// Why an image was not loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The content belongs to no known format.
    UnknownFormat {
        /// The size of the file in bytes.
        size: usize,
    },
    /// The ELF headers cannot be read.
    Elf {
        /// What cannot be read.
        part: &'static str,
    },
    /// The ELF image is for another machine than x86.
    Machine(u16),
    /// There is nothing to load.
    NoSegments,
    /// A segment's bytes are not all in the file.
    SegmentPastEnd {
        /// The segment's number.
        segment: usize,
        /// Where its bytes end in the file.
        end: u64,
        /// The size of the file.
        size: u64,
    },
    /// A segment has more bytes in the file than in memory.
    SegmentShrinks {
        /// The segment's number.
        segment: usize,
        /// Bytes in the file.
        file: u64,
        /// Bytes in memory.
        memory: u64,
    },
    /// A segment does not fit the guest's RAM.
    NotInRam {
        /// What was to be placed.
        what: &'static str,
        /// Where it was to go.
        start: Gpa,
        /// Its size in bytes.
        length: u64,
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
    MultibootFlags(u32),
    /// The address fields of the Multiboot header contradict each other.
    MultibootAddresses(&'static str),
    /// A text holds a zero byte.
    ZeroByte(&'static str),
    /// The host has no memory for the guest's RAM.
    HostMemory,
}

impl fmt::Display for LoadError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("guest image: ")?;
        match *self {
            Self::UnknownFormat { size } => write!(
                formatter,
                "no known format in its {size} bytes; known are Multiboot (a header in the first \
                 8 KiB) and PVH ELF (a note XEN_ELFNOTE_PHYS32_ENTRY)"
            ),
            Self::Elf { part } => write!(formatter, "the ELF {part} cannot be read"),
            Self::Machine(machine) => {
                write!(
                    formatter,
                    "it is for ELF machine {machine}, not x86 (3 or 62)"
                )
            }
            Self::NoSegments => formatter.write_str("it has no bytes to load"),
            Self::SegmentPastEnd { segment, end, size } => write!(
                formatter,
                "segment {segment} ends at file offset {end:#x}, beyond the file's {size:#x} bytes"
            ),
            Self::SegmentShrinks {
                segment,
                file,
                memory,
            } => write!(
                formatter,
                "segment {segment} has {file:#x} bytes in the file but {memory:#x} in memory"
            ),
            Self::NotInRam {
                what,
                start,
                length,
            } => write!(
                formatter,
                "{what} needs {length:#x} bytes at {start}, which is not all RAM; give the guest \
                 more with --memory, or link it elsewhere"
            ),
            Self::NoRoom { what, length } => write!(
                formatter,
                "no room for {length:#x} bytes of {what}; give the guest more with --memory"
            ),
            Self::Entry(entry) => {
                write!(
                    formatter,
                    "the entry point {entry:#x} lies in no loaded segment"
                )
            }
            Self::MultibootFlags(flags) => write!(
                formatter,
                "the Multiboot header requires unknown features (flags {flags:#x})"
            ),
            Self::MultibootAddresses(rule) => {
                write!(
                    formatter,
                    "the Multiboot header's addresses are wrong: {rule}"
                )
            }
            Self::ZeroByte(what) => write!(formatter, "{what} holds a zero byte"),
            Self::HostMemory => formatter
                .write_str("the image's heap has no room for the guest's RAM; give it more memory"),
        }
    }
}

impl core::error::Error for LoadError {}
