//! Linux bzImages by the x86 boot protocol (Linux's Documentation/arch/x86/boot.rst), version 2.10
//! and newer.
//!
//! The kernel is entered in long mode where it has a 64-bit entry point, otherwise in 32-bit
//! protected mode. It is put where it prefers to run, or if something is in the way and it can be
//! moved, at the next aligned place above: below its preferred place it would move itself there.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use umbra_vcpu::address::{Gpa, PAGE_SIZE};

use crate::long_mode::{self, Code};
use crate::placement::{Place, Placement, terminated};
use crate::{
    Bios, EntryState, Format, GuestRam, LinuxEntry, LoadError, LoadRequest, Loaded, MemoryKind,
    MemoryMap, Module,
};

/// Offsets in the file, which are those in the boot parameters, too.
mod field {
    pub const SETUP_SECTORS: usize = 0x1f1;
    pub const SYSTEM_SIZE: usize = 0x1f4;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const HEAP_END: usize = 0x224;
    pub const HEADER_LENGTH: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const LOADER_TYPE: usize = 0x210;
    pub const LOAD_FLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const INITRD_ADDRESS: usize = 0x218;
    pub const INITRD_SIZE: usize = 0x21c;
    pub const COMMAND_LINE: usize = 0x228;
    pub const INITRD_ADDRESS_MAX: usize = 0x22c;
    pub const ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const EXTENDED_LOAD_FLAGS: usize = 0x236;
    pub const COMMAND_LINE_SIZE: usize = 0x238;
    pub const PREFERRED_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
}

/// Offsets in the boot parameters only.
mod parameter {
    pub const ACPI_ROOT: usize = 0x070;
    pub const MEMORY_MAP_ENTRIES: usize = 0x1e8;
    pub const MEMORY_MAP: usize = 0x2d0;
}

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: [u8; 4] = *b"HdrS";
/// The version that has all fields which are read here but for the extended load flags.
const OLDEST_VERSION: u16 = 0x020a;
/// The version that has the extended load flags.
const EXTENDED_LOAD_FLAGS_VERSION: u16 = 0x020c;
/// Where the setup header begins in the file and in the boot parameters.
const HEADER_START: usize = field::SETUP_SECTORS;
/// The setup header ends this many bytes after its magic number plus what it says itself.
const HEADER_LONGEST: usize = 0x290;
const SECTOR_SIZE: usize = 512;
/// The size of the setup code in sectors if the header says zero.
const DEFAULT_SETUP_SECTORS: usize = 4;
/// The system's size is counted in units of this many bytes.
const PARAGRAPH: usize = 16;
const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 1 << 7;
/// The segment of the setup code, the end of its heap and of its stack in it, and where the command line
/// follows (boot.rst, "Loading The Rest of The Kernel").
const SETUP_SEGMENT: u16 = 0x1000;
const SETUP_STACK: u16 = 0xe000;
const SETUP_HEAP_END: u16 = SETUP_STACK - 0x200;
const SETUP_COMMAND_LINE: u64 = ((SETUP_SEGMENT as u64) << 4) + SETUP_STACK as u64;
const SETUP_LONGEST_COMMAND_LINE: u32 = 0xfff;
const SETUP_AREA: u64 = 0x1_0000;
const HAS_ENTRY_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// A loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
const BOOT_PARAMETERS_SIZE: usize = PAGE_SIZE as usize;
const MEMORY_MAP_ENTRY_SIZE: usize = 20;
const MEMORY_MAP_CAPACITY: usize = 128;

/// Why a bzImage is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinuxError {
    /// The file ends before what its header says.
    Truncated {
        /// The size of the file.
        size: u64,
        /// The size that the header says.
        needed: u64,
    },
    /// The boot protocol is too old.
    Version(u16),
    /// The kernel is a zImage, which goes below 640 KiB.
    LoadedLow,
    /// The setup header's own length is wrong.
    HeaderLength(u8),
    /// The alignment is not a power of two.
    Alignment(u32),
    /// The kernel needs less memory than it has bytes.
    InitSize {
        /// What it says that it needs.
        needed: u64,
        /// The bytes that it has.
        size: u64,
    },
    /// There is no RAM where the kernel runs.
    NotInRam {
        /// Where it runs at the lowest.
        start: Gpa,
        /// How much memory it needs there in bytes.
        length: u64,
        /// The guest's memory in bytes that would have RAM there; none has, if `None`.
        memory: Option<u64>,
    },
    /// The command line is longer than the kernel takes.
    CommandLine {
        /// Its length in bytes.
        length: u64,
        /// The most that the kernel takes.
        limit: u32,
    },
    /// The setup code does not fit its segment.
    SetupLength(usize),
    /// More than one module.
    Modules(usize),
}

impl fmt::Display for LinuxError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Linux bzImage: ")?;
        match *self {
            Self::Truncated { size, needed } => write!(
                formatter,
                "its header says {needed:#x} bytes, but the file has only {size:#x}"
            ),
            Self::Version(version) => write!(
                formatter,
                "its boot protocol {}.{:02} is older than 2.10",
                version >> 8,
                version & 0xff
            ),
            Self::SetupLength(length) => write!(
                formatter,
                "its setup code has {length:#x} bytes, which do not fit a real-mode segment with heap and \
                 stack: leave out --entry real-mode"
            ),
            Self::LoadedLow => {
                formatter.write_str("it is a zImage (load flag 0 is clear): make a bzImage")
            }
            Self::HeaderLength(length) => write!(
                formatter,
                "its setup header has a wrong length ({length:#x} at file offset {:#x})",
                field::HEADER_LENGTH
            ),
            Self::Alignment(alignment) => write!(
                formatter,
                "its alignment {alignment:#x} at file offset {:#x} is not a power of two from \
                 0x1000 up",
                field::ALIGNMENT
            ),
            Self::InitSize { needed, size } => write!(
                formatter,
                "it says that it needs {needed:#x} bytes of memory, but it has {size:#x} itself"
            ),
            Self::NotInRam {
                start,
                length,
                memory: Some(memory),
            } => write!(
                formatter,
                "it needs {length:#x} bytes of RAM at {start}: give the guest --memory {}M or more",
                memory.div_ceil(1 << 20)
            ),
            Self::NotInRam { start, length, .. } => write!(
                formatter,
                "it needs {length:#x} bytes of RAM at {start} or above, where a PC has none"
            ),
            Self::CommandLine { length, limit } => write!(
                formatter,
                "the command line has {length} bytes, but this kernel takes {limit} at most"
            ),
            Self::Modules(count) => write!(
                formatter,
                "it takes one initrd at most, but there are {count} modules"
            ),
        }
    }
}

/// A bzImage whose header has been checked.
#[derive(Debug)]
pub struct BzImage<'a> {
    /// The setup header.
    header: &'a [u8],
    /// The sectors that run in real mode.
    setup: &'a [u8],
    /// What goes to memory.
    system: &'a [u8],
    has_entry_64: bool,
    alignment: u64,
    is_relocatable: bool,
    preferred_address: u64,
    /// How much memory the kernel needs from where it runs, in bytes.
    init_size: u64,
    initrd_limit: u64,
    command_line_limit: u32,
}

fn bytes_at<const N: usize>(file: &[u8], offset: usize) -> Option<[u8; N]> {
    file.get(offset..)?.first_chunk().copied()
}

impl<'a> BzImage<'a> {
    /// Whether the file claims to be a bzImage.
    pub fn is_bz_image(file: &[u8]) -> bool {
        bytes_at(file, field::MAGIC) == Some(MAGIC)
            && bytes_at(file, field::BOOT_FLAG) == Some(BOOT_FLAG.to_le_bytes())
    }

    /// Reads the header.
    ///
    /// # Errors
    /// [`LoadError::Linux`] for the first thing that is wrong with it.
    pub fn parse(file: &'a [u8]) -> Result<Self, LoadError> {
        let size = file.len() as u64;
        let truncated = |needed: usize| {
            LoadError::Linux(LinuxError::Truncated {
                size,
                needed: needed as u64,
            })
        };
        // The first sectors are there in any bzImage, and with them the longest header.
        let setup = file
            .get(..HEADER_LONGEST)
            .ok_or(truncated(HEADER_LONGEST))?;
        let byte = |offset: usize| setup[offset];
        let half = |offset: usize| u16::from_le_bytes([byte(offset), byte(offset + 1)]);
        let word = |offset: usize| u32::from(half(offset)) | u32::from(half(offset + 2)) << 16;
        let double = |offset: usize| u64::from(word(offset)) | u64::from(word(offset + 4)) << 32;

        let version = half(field::VERSION);
        if version < OLDEST_VERSION {
            return Err(LinuxError::Version(version).into());
        }
        let header_length = byte(field::HEADER_LENGTH);
        let header_end = field::MAGIC + usize::from(header_length);
        if !(field::INIT_SIZE + 4..=HEADER_LONGEST).contains(&header_end) {
            return Err(LinuxError::HeaderLength(header_length).into());
        }
        if byte(field::LOAD_FLAGS) & LOADED_HIGH == 0 {
            return Err(LinuxError::LoadedLow.into());
        }
        let alignment = word(field::ALIGNMENT);
        let is_relocatable = byte(field::RELOCATABLE) != 0;
        if is_relocatable && !(alignment.is_power_of_two() && u64::from(alignment) >= PAGE_SIZE) {
            return Err(LinuxError::Alignment(alignment).into());
        }

        let setup_sectors = match usize::from(byte(field::SETUP_SECTORS)) {
            0 => DEFAULT_SETUP_SECTORS,
            sectors => sectors,
        };
        let system_start = (setup_sectors + 1) * SECTOR_SIZE;
        let system_end = system_start + word(field::SYSTEM_SIZE) as usize * PARAGRAPH;
        // The header counts whole paragraphs; a file may end in the middle of its last one.
        let system = file
            .get(system_start..system_end.min(file.len()))
            .filter(|system| system_start + system.len() + PARAGRAPH > system_end)
            .ok_or(truncated(system_end))?;
        let init_size = u64::from(word(field::INIT_SIZE));
        if init_size < system.len() as u64 {
            return Err(LinuxError::InitSize {
                needed: init_size,
                size: system.len() as u64,
            }
            .into());
        }
        Ok(Self {
            header: &setup[HEADER_START..header_end],
            setup: &file[..system_start],
            system,
            has_entry_64: version >= EXTENDED_LOAD_FLAGS_VERSION
                && half(field::EXTENDED_LOAD_FLAGS) & HAS_ENTRY_64 != 0,
            alignment: u64::from(alignment),
            is_relocatable,
            preferred_address: double(field::PREFERRED_ADDRESS),
            init_size,
            initrd_limit: u64::from(word(field::INITRD_ADDRESS_MAX)) + 1,
            command_line_limit: word(field::COMMAND_LINE_SIZE),
        })
    }

    /// Loads it and builds the boot parameters.
    ///
    /// # Errors
    /// [`LoadError`] if it or what goes along with it does not fit, or the host has no memory.
    pub fn load(
        &self,
        request: &LoadRequest<'_>,
        ram: &mut dyn GuestRam,
    ) -> Result<Loaded, LoadError> {
        let map = request.memory_map;
        let start = self.find_address(map)?;
        let command_line = terminated("the command line", request.command_line)?;
        let length = request.command_line.len() as u64;
        let limit = match request.linux_entry {
            LinuxEntry::Kernel => self.command_line_limit,
            LinuxEntry::RealMode => self.command_line_limit.min(SETUP_LONGEST_COMMAND_LINE),
        };
        if length > u64::from(limit) {
            return Err(LinuxError::CommandLine { length, limit }.into());
        }
        let initrd = match request.modules {
            [] => None,
            [initrd] => Some(initrd),
            modules => return Err(LinuxError::Modules(modules.len()).into()),
        };

        let taken = self.occupied(start, request.linux_entry);
        let mut placement = Placement::new(map, taken);
        placement.fill(address_32(start)?, self.system);
        let initrd = match initrd {
            Some(&Module { data, .. }) => {
                let place = Place::HighBelow(self.initrd_limit);
                let at = placement.put("the initrd", place, data)?;
                // It lies below 4 GiB, so its length has 32 bits.
                (at, data.len() as u32)
            }
            None => (0, 0),
        };
        if request.linux_entry == LinuxEntry::RealMode {
            placement.fill(SETUP_COMMAND_LINE as u32, command_line);
            placement.fill(
                u32::from(SETUP_SEGMENT) << 4,
                self.real_mode_setup(start, initrd)?,
            );
            placement.write(ram)?;
            return Ok(Loaded {
                format: Format::Linux,
                entry: EntryState::Real {
                    cs: SETUP_SEGMENT + 0x20,
                    ip: 0,
                    data: SETUP_SEGMENT,
                    sp: SETUP_STACK,
                    dx: 0,
                },
                bios: Bios::Present,
            });
        }
        let command_line_at = placement.put("the command line", Place::Low, command_line)?;
        let parameters_at = placement.reserve(
            "the boot parameters",
            Place::LowPage,
            BOOT_PARAMETERS_SIZE as u64,
        )?;

        let mut parameters = vec![0; BOOT_PARAMETERS_SIZE];
        let mut set = |offset: usize, bytes: &[u8]| {
            parameters[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        set(HEADER_START, self.header);
        set(field::LOADER_TYPE, &[UNKNOWN_LOADER]);
        set(field::CODE32_START, &address_32(start)?.to_le_bytes());
        set(field::INITRD_ADDRESS, &initrd.0.to_le_bytes());
        set(field::INITRD_SIZE, &initrd.1.to_le_bytes());
        set(field::COMMAND_LINE, &command_line_at.to_le_bytes());
        let acpi_root = request.acpi_root.map_or(0, Gpa::as_u64);
        set(parameter::ACPI_ROOT, &acpi_root.to_le_bytes());
        let ranges = &map.ranges()[..map.ranges().len().min(MEMORY_MAP_CAPACITY)];
        set(parameter::MEMORY_MAP_ENTRIES, &[ranges.len() as u8]);
        let entries = (parameter::MEMORY_MAP..).step_by(MEMORY_MAP_ENTRY_SIZE);
        for (offset, range) in entries.zip(ranges) {
            set(offset, &range.start.as_u64().to_le_bytes());
            set(offset + 8, &range.length.to_le_bytes());
            set(offset + 16, &(range.kind as u32).to_le_bytes());
        }
        placement.fill(parameters_at, parameters);

        let entry = if self.has_entry_64 {
            EntryState::Long64 {
                rip: start + ENTRY_64_OFFSET,
                rsi: u64::from(parameters_at),
                cr3: long_mode::put_identity_tables(&mut placement)?,
                gdt: long_mode::put_descriptors(&mut placement, Code::Bits64)?,
            }
        } else {
            EntryState::Linux32 {
                eip: address_32(start)?,
                esi: parameters_at,
                gdt: long_mode::put_descriptors(&mut placement, Code::Bits32)?,
            }
        };
        placement.write(ram)?;
        Ok(Loaded {
            format: Format::Linux,
            entry,
            bios: Bios::Absent,
        })
    }

    /// What is taken before anything else is placed, by start and end.
    fn occupied(&self, start: u64, entry: LinuxEntry) -> impl Iterator<Item = (u64, u64)> {
        let area = u64::from(SETUP_SEGMENT) << 4;
        let setup = match entry {
            LinuxEntry::Kernel => None,
            LinuxEntry::RealMode => Some((area, area + SETUP_AREA)),
        };
        let kernel = (start, start.saturating_add(self.init_size));
        core::iter::once(kernel).chain(setup)
    }

    /// The setup code with what a loader tells it in its header.
    fn real_mode_setup(&self, start: u64, initrd: (u32, u32)) -> Result<Vec<u8>, LoadError> {
        if self.setup.len() > usize::from(SETUP_HEAP_END) {
            return Err(LinuxError::SetupLength(self.setup.len()).into());
        }
        let mut setup = Vec::from(self.setup);
        let mut set = |offset: usize, bytes: &[u8]| {
            setup[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        set(field::LOADER_TYPE, &[UNKNOWN_LOADER]);
        set(
            field::LOAD_FLAGS,
            &[self.setup[field::LOAD_FLAGS] | CAN_USE_HEAP],
        );
        set(field::CODE32_START, &address_32(start)?.to_le_bytes());
        set(field::INITRD_ADDRESS, &initrd.0.to_le_bytes());
        set(field::INITRD_SIZE, &initrd.1.to_le_bytes());
        set(field::HEAP_END, &SETUP_HEAP_END.to_le_bytes());
        let command_line = SETUP_COMMAND_LINE as u32;
        set(field::COMMAND_LINE, &command_line.to_le_bytes());
        Ok(setup)
    }

    /// Where the kernel goes.
    fn find_address(&self, map: &MemoryMap) -> Result<u64, LoadError> {
        let preferred = self.preferred_address;
        if map.is_usable(Gpa::new(preferred), self.init_size) && address_32(preferred).is_ok() {
            return Ok(preferred);
        }
        let above = || {
            map.ranges().iter().find_map(|range| {
                let lowest = range.start.as_u64().max(preferred);
                let start = lowest.checked_next_multiple_of(self.alignment)?;
                let fits = range.kind == MemoryKind::Usable
                    && range.contains(Gpa::new(start), self.init_size)
                    && start.checked_add(self.init_size)? <= 1 << 32;
                fits.then_some(start)
            })
        };
        let place = if self.is_relocatable { above() } else { None };
        place.ok_or_else(|| {
            LinuxError::NotInRam {
                start: Gpa::new(preferred),
                length: self.init_size,
                memory: map.size_for(Gpa::new(preferred), self.init_size),
            }
            .into()
        })
    }
}

/// An address below 4 GiB.
fn address_32(address: u64) -> Result<u32, LoadError> {
    u32::try_from(address).map_err(|_| {
        LinuxError::NotInRam {
            start: Gpa::new(address),
            length: 0,
            memory: None,
        }
        .into()
    })
}

impl From<LinuxError> for LoadError {
    fn from(error: LinuxError) -> Self {
        Self::Linux(error)
    }
}
