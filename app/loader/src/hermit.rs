//! Hermit applications: ELF files that are entered by Hermit's entry protocol, version 4 (the crate
//! `hermit-entry` defines it), and that call their hypervisor by version 1 of the uhyve interface.
//!
//! The application starts in long mode with paging, and finds a boot information structure and a
//! device tree with its memory and its arguments. It owns all memory from its image on, so whatever
//! is put there for it lies below.
//!
//! The file is read here rather than by `hermit-entry`, which takes the file's word for every offset.

use alloc::vec::Vec;
use core::fmt;

use elf::abi;
use elf::relocation::Rela;
use umbra_vcpu::address::Gpa;

use crate::device_tree::DeviceTree;
use crate::elf_file::ElfFile;
use crate::image::Executable;
use crate::long_mode::{self, Code};
use crate::placement::{Place, Placement, terminated};
use crate::{Bios, EntryState, Format, GuestRam, LoadError, LoadRequest, Loaded, MemoryMap};

const ENTRY_VERSION_NAME: &[u8] = b"HERMIT\0";
const ENTRY_VERSION_TYPE: u64 = 0x5a00;
const ENTRY_VERSION: u8 = 4;
const INTERFACE_VERSION_NAME: &[u8] = b"UHYVEIF\0";
const INTERFACE_VERSION_TYPE: u64 = 0x5b00;
const INTERFACE_VERSION: u32 = 1;

/// Where a relocatable image goes: what is put below it must find room.
const IMAGE_START: u64 = 2 << 20;
/// The kernel takes this much from where its stack pointer points.
const STACK_SIZE: u64 = 32 << 10;
/// The hypercall of one character, which stands for the serial port.
const SERIAL_PORT: u16 = 0x800;

/// Why a Hermit application is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HermitError {
    /// It is to be entered by another version of the protocol.
    EntryVersion(u8),
    /// The note that says the version of the entry protocol or of the interface has a wrong size.
    VersionNote {
        /// How many bytes it has.
        length: usize,
    },
    /// It calls its hypervisor by another version of the interface.
    InterfaceVersion(u32),
    /// It is 32-bit code.
    NotLongMode,
    /// It wants libraries.
    Libraries,
    /// The dynamic section or what it points to is not in the file.
    Dynamic,
    /// A relocation is of a kind that is not known.
    RelocationKind {
        /// Its index.
        relocation: usize,
        /// Its kind.
        kind: u32,
    },
    /// A relocation changes what is not the image's.
    RelocationPlace {
        /// Its index.
        relocation: usize,
        /// The place, counted from the image's start.
        place: u64,
    },
    /// A relocation's symbol is not in the file.
    Symbol {
        /// The relocation's index.
        relocation: usize,
        /// The symbol's.
        symbol: u32,
    },
    /// A module was given.
    Module,
}

impl fmt::Display for HermitError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Hermit application: ")?;
        match *self {
            Self::EntryVersion(version) => write!(
                formatter,
                "its entry version is {version}, and only {ENTRY_VERSION} is known: build it with a \
                 kernel that uses hermit-entry 0.10"
            ),
            Self::VersionNote { length } => write!(
                formatter,
                "the ELF note with its version has {length} bytes, which is wrong"
            ),
            Self::InterfaceVersion(version) => write!(
                formatter,
                "it calls version {version} of the uhyve interface, and only {INTERFACE_VERSION} is \
                 known: build it with a kernel that uses uhyve-interface 0.1"
            ),
            Self::NotLongMode => formatter.write_str("it is not an ELF64 file for x86-64"),
            Self::Libraries => {
                formatter.write_str("it wants dynamic libraries: link it statically")
            }
            Self::Dynamic => formatter
                .write_str("the file ends within its dynamic section or what that points to"),
            Self::RelocationKind { relocation, kind } => {
                write!(
                    formatter,
                    "relocation {relocation} is of the unknown kind {kind}"
                )
            }
            Self::RelocationPlace { relocation, place } => write!(
                formatter,
                "relocation {relocation} changes 8 bytes at {place:#x}, which no segment has"
            ),
            Self::Symbol { relocation, symbol } => write!(
                formatter,
                "relocation {relocation} uses symbol {symbol}, which the file does not have"
            ),
            Self::Module => formatter.write_str("it takes no initrd or module"),
        }
    }
}

/// Where thread-local data are in the image.
#[derive(Clone, Copy, Debug, Default)]
struct ThreadLocal {
    start: u64,
    file_size: u64,
    memory_size: u64,
    alignment: u64,
}

/// A Hermit application whose file has been read.
#[derive(Debug)]
pub struct Application<'a> {
    executable: Executable<'a>,
    /// First address and the one behind the last.
    range: (u64, u64),
    thread_local: ThreadLocal,
    /// Words to write into the image: where, and what.
    relocations: Vec<(Gpa, u64)>,
}

impl<'a> Application<'a> {
    /// Reads an ELF file that may be a Hermit application; `None` if it does not claim to be one.
    ///
    /// # Errors
    /// [`LoadError`] for the first thing that is wrong with it.
    pub fn parse(elf: &ElfFile<'a>, file: &'a [u8]) -> Result<Option<Self>, LoadError> {
        let Some(version) = elf.note(ENTRY_VERSION_NAME, ENTRY_VERSION_TYPE)? else {
            return Ok(None);
        };
        match version {
            [ENTRY_VERSION] => {}
            [version] => return Err(HermitError::EntryVersion(*version).into()),
            note => return Err(HermitError::VersionNote { length: note.len() }.into()),
        }
        if let Some(note) = elf.note(INTERFACE_VERSION_NAME, INTERFACE_VERSION_TYPE)? {
            // The one number in the file that is big-endian.
            let bytes = note
                .try_into()
                .map_err(|_| HermitError::VersionNote { length: note.len() })?;
            let version = u32::from_be_bytes(bytes);
            if version != INTERFACE_VERSION {
                return Err(HermitError::InterfaceVersion(version).into());
            }
        }
        if !elf.is_x86_64() {
            return Err(HermitError::NotLongMode.into());
        }
        let base = if elf.is_relocatable() { IMAGE_START } else { 0 };
        let executable = Executable::at_base(elf, file, base)?;
        let range = executable.range();
        let thread_local = elf
            .segments()
            .find(|segment| segment.header.p_type == abi::PT_TLS)
            .map(|segment| ThreadLocal {
                start: base.wrapping_add(segment.header.p_vaddr),
                file_size: segment.header.p_filesz,
                memory_size: segment.header.p_memsz,
                alignment: segment.header.p_align,
            });
        let relocations = if elf.is_relocatable() {
            relocations(elf, base, &executable)?
        } else {
            Vec::new()
        };
        Ok(Some(Self {
            executable,
            range,
            thread_local: thread_local.unwrap_or_default(),
            relocations,
        }))
    }

    /// Loads it and builds what it finds at its start.
    ///
    /// # Errors
    /// [`LoadError`] if it or what goes along with it does not fit, or the host has no memory.
    pub fn load(
        &self,
        request: &LoadRequest<'_>,
        ram: &mut dyn GuestRam,
    ) -> Result<Loaded, LoadError> {
        let map = request.memory_map;
        self.executable.check_ram(map)?;
        if !request.modules.is_empty() {
            return Err(HermitError::Module.into());
        }
        // The device tree's strings end with a zero byte, too.
        terminated("the command line", request.command_line)?;
        let tree = device_tree(request);

        // All that lies from the image on is the kernel's to give away.
        let mut placement = Placement::new(map, [(self.range.0, u64::MAX)]);
        let cr3 = long_mode::put_identity_tables(&mut placement)?;
        let gdt = long_mode::put_descriptors(&mut placement, Code::Bits64)?;
        let stack = placement.reserve("the boot stack", Place::LowPage, STACK_SIZE)?;
        let tree_at = placement.put("the device tree", Place::LowPage, tree)?;
        let information = self.boot_information(request, tree_at);
        let information_at = placement.put("the boot information", Place::Low, information)?;

        self.executable.write(ram)?;
        for (at, word) in &self.relocations {
            ram.write(*at, &word.to_le_bytes())?;
        }
        placement.write(ram)?;
        Ok(Loaded {
            format: Format::Hermit,
            entry: EntryState::Hermit64 {
                rip: u64::from(self.executable.entry()),
                rdi: u64::from(information_at),
                rsp: u64::from(stack),
                cr3,
                gdt,
            },
            bios: Bios::Absent,
        })
    }

    /// The structure `RawBootInfo` of `hermit-entry`, in C's layout.
    fn boot_information(&self, request: &LoadRequest<'_>, device_tree: u32) -> Vec<u8> {
        /// The platform's place among the variants for this architecture.
        const UHYVE: u64 = 1;
        const NO_PCI: u64 = 0;
        const PROCESSORS: u64 = 1;
        let memory_end = request.memory_map.ram().map(|range| range.end()).max();
        let boot_time = i128::from(request.clock.unix_nanoseconds);
        let ThreadLocal {
            start,
            file_size,
            memory_size,
            alignment,
        } = self.thread_local;
        let words = [
            // Hardware
            0,
            memory_end.map_or(0, Gpa::as_u64),
            u64::from(SERIAL_PORT),
            u64::from(device_tree),
            // Load
            self.range.0,
            self.range.1,
            start,
            file_size,
            memory_size,
            alignment,
            // Platform
            UHYVE,
            NO_PCI,
            PROCESSORS,
            u64::from(request.clock.tsc_khz),
        ];
        let words = words.into_iter().flat_map(u64::to_le_bytes);
        words.chain(boot_time.to_le_bytes()).collect()
    }
}

/// What the application is told about its memory, its clock and its arguments.
fn device_tree(request: &LoadRequest<'_>) -> Vec<u8> {
    let mut tree = DeviceTree::default();
    tree.begin_node("");
    tree.string("compatible", "hermit,uhyve");
    tree.cell("#address-cells", 2);
    tree.cell("#size-cells", 2);

    tree.begin_node("chosen");
    tree.string("bootargs", request.command_line);
    tree.end_node();

    for (start, length) in usable_above_first_megabyte(request.memory_map) {
        tree.begin_node(&alloc::format!("memory@{start:x}"));
        tree.string("device_type", "memory");
        tree.wide_cells("reg", &[start, length]);
        tree.end_node();
    }

    tree.begin_node("hermit,tsc");
    tree.cell("khz", request.clock.tsc_khz);
    tree.end_node();
    tree.end_node();
    tree.finish()
}

/// Start and length of the memory that the kernel may use, but for what its image covers.
fn usable_above_first_megabyte(map: &MemoryMap) -> impl Iterator<Item = (u64, u64)> {
    let ranges = map.usable();
    ranges
        .filter(|range| range.start.as_u64() >= 1 << 20)
        .map(|range| (range.start.as_u64(), range.length))
}

/// The words that relocation writes into an image at `base`.
fn relocations(
    elf: &ElfFile<'_>,
    base: u64,
    executable: &Executable<'_>,
) -> Result<Vec<(Gpa, u64)>, LoadError> {
    let Some(dynamic) = elf.dynamic()? else {
        return Ok(Vec::new());
    };
    if dynamic.needs_libraries {
        return Err(HermitError::Libraries.into());
    }
    let mut words = Vec::new();
    for (relocation, entry) in dynamic.relocations.enumerate() {
        let Rela {
            r_offset: place,
            r_sym: symbol,
            r_type: kind,
            r_addend: addend,
        } = entry;
        let value = match kind {
            abi::R_X86_64_NONE => continue,
            abi::R_X86_64_RELATIVE => 0,
            abi::R_X86_64_64 | abi::R_X86_64_GLOB_DAT => {
                let found = elf
                    .symbol(dynamic.symbols, symbol)
                    .ok_or(HermitError::Symbol { relocation, symbol })?;
                // What is weak and defined nowhere is null.
                if found.is_undefined() && found.st_bind() == abi::STB_WEAK {
                    continue;
                }
                found.st_value
            }
            kind => return Err(HermitError::RelocationKind { relocation, kind }.into()),
        };
        let at = Gpa::new(base.wrapping_add(place));
        if !executable.holds(at, size_of::<u64>() as u64) {
            return Err(HermitError::RelocationPlace { relocation, place }.into());
        }
        words.push((at, base.wrapping_add(value).wrapping_add_signed(addend)));
    }
    Ok(words)
}

impl From<HermitError> for LoadError {
    fn from(error: HermitError) -> Self {
        Self::Hermit(error)
    }
}
