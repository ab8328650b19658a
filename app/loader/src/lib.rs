//! The guest loader: tells guest image formats apart by content, puts an image with its modules
//! and boot information into guest RAM, and says how the processor must enter it.
//!
//! | format | told by | module |
//! | --- | --- | --- |
//! | Multiboot 0.6.96, ELF32 or address fields | header in the first 8 KiB | `multiboot` |
//! | PVH (ELF32 or ELF64) | note `XEN_ELFNOTE_PHYS32_ENTRY` | `pvh` |
//! | Multiboot with ELF64 | header and ELF class, if there is no PVH note | `multiboot` |
//! | Hermit application | note of the name HERMIT with the entry version | `hermit` |
//! | Linux bzImage | `HdrS` and the boot flag in the first two sectors | `linux` |
//! | boot sector or disk image | whole sectors, and 55 AA at the end of the first | `boot_sector` |
//!
//! Protocol: [`load`] first reads and checks the whole image, then writes; an image that is refused
//! has written nothing. Only a host without memory stops it halfway. Image bytes are hostile: every offset, size and address in them is checked
//! where it is used, and a refusal is one line that says what is wrong and where.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod boot_sector;
mod device_tree;
mod elf_file;
mod error;
mod hermit;
mod image;
mod linux;
mod long_mode;
mod memory_map;
mod multiboot;
mod placement;
mod pvh;

pub use error::{Hint, LoadError, Table};
pub use hermit::HermitError;
pub use linux::LinuxError;
pub use long_mode::{CODE_SELECTOR, DATA_SELECTOR, DESCRIPTORS_SIZE};
pub use memory_map::{MemoryKind, MemoryMap, MemoryRange};

use umbra_vcpu::address::Gpa;

use image::Image;

/// The guest's RAM while it is being filled. Untouched RAM reads as zero.
pub trait GuestRam {
    /// Copies `bytes` to `at`.
    ///
    /// # Errors
    /// [`OutOfRam`] if some of it is not RAM, or the host has no memory for it.
    fn write(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), OutOfRam>;

    /// Makes `length` bytes at `at` zero.
    ///
    /// # Errors
    /// [`OutOfRam`] if some of it is not RAM.
    fn zero(&mut self, at: Gpa, length: u64) -> Result<(), OutOfRam>;
}

/// Guest RAM could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRam;

/// A file that goes along with the guest's kernel: an initial RAM disk or any other module.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Its command line, which begins with its name.
    pub name: &'a str,
    /// Its content.
    pub data: &'a [u8],
}

/// What to load besides the image.
#[derive(Clone, Copy, Debug)]
pub struct LoadRequest<'a> {
    /// The guest's name, which Multiboot puts in front of the command line.
    pub name: &'a str,
    /// The kernel's arguments.
    pub command_line: &'a str,
    /// The modules in their order.
    pub modules: &'a [Module<'a>],
    /// The guest's physical memory.
    pub memory_map: &'a MemoryMap,
    /// Where ACPI's root pointer (RSDP) is, for protocols that tell it.
    pub acpi_root: Option<Gpa>,
    /// The guest's clock, for protocols that tell it.
    pub clock: BootClock,
    /// How Linux is entered.
    pub linux_entry: LinuxEntry,
}

/// Which of its entry points a Linux bzImage is entered at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinuxEntry {
    /// The one for 64-bit loaders, or if there is none, for 32-bit ones.
    #[default]
    Kernel,
    /// The setup code in real mode, which asks the BIOS for what it needs to know.
    RealMode,
}

/// What time it is.
#[derive(Clone, Copy, Debug)]
pub struct BootClock {
    /// The frequency of the time-stamp counter in kHz.
    pub tsc_khz: u32,
    /// The wall clock in nanoseconds since 1970.
    pub unix_nanoseconds: u64,
}

/// How an image is to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryState {
    /// 32-bit protected mode without paging: flat segments, A20 open, interrupts off.
    Protected32 {
        /// The entry point.
        eip: u32,
        /// The boot protocol's magic number, or zero.
        eax: u32,
        /// The guest-physical address of the boot information.
        ebx: u32,
    },
    /// 32-bit protected mode without paging, with the descriptor table that Linux wants: flat
    /// segments with [`CODE_SELECTOR`] and [`DATA_SELECTOR`], interrupts off.
    Linux32 {
        /// The entry point.
        eip: u32,
        /// The guest-physical address of the boot parameters.
        esi: u32,
        /// The guest-physical address of the descriptor table of [`DESCRIPTORS_SIZE`] bytes.
        gdt: u32,
    },
    /// As `Long64`, by Hermit's entry protocol.
    Hermit64 {
        /// The entry point.
        rip: u64,
        /// The guest-physical address of the boot information.
        rdi: u64,
        /// The lowest address of the boot stack.
        rsp: u64,
        /// The guest-physical address of the root page table.
        cr3: u32,
        /// The guest-physical address of the descriptor table of [`DESCRIPTORS_SIZE`] bytes.
        gdt: u32,
    },
    /// Real mode: CS:IP as given, all other segments alike, interrupts as given.
    Real {
        /// The code segment.
        cs: u16,
        /// The instruction pointer.
        ip: u16,
        /// The other segments.
        data: u16,
        /// The stack pointer.
        sp: u16,
        /// What DX holds: the disk that was booted.
        dx: u16,
    },
    /// Long mode with 4-level paging: segments with [`CODE_SELECTOR`] and [`DATA_SELECTOR`],
    /// interrupts off.
    Long64 {
        /// The entry point.
        rip: u64,
        /// The guest-physical address of the boot information.
        rsi: u64,
        /// The guest-physical address of the root page table, which maps at least the image and the
        /// boot information onto themselves.
        cr3: u32,
        /// The guest-physical address of the descriptor table of [`DESCRIPTORS_SIZE`] bytes.
        gdt: u32,
    },
}

/// The format that an image was found to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Multiboot 0.6.96.
    Multiboot,
    /// Xen's PVH.
    Pvh,
    /// Linux's boot protocol.
    Linux,
    /// Hermit's entry protocol.
    Hermit,
    /// A boot sector, alone or at the start of a disk image.
    BootSector,
}

/// Whether a guest finds what a PC's BIOS leaves: interrupt vectors, data area and services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bios {
    /// It does.
    Present,
    /// Its protocol knows of none, or its image lies there.
    Absent,
}

/// An image that is in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Its format.
    pub format: Format,
    /// How to enter it.
    pub entry: EntryState,
    /// Whether it finds a BIOS.
    pub bios: Bios,
}

/// Loads `image` with what `request` adds to it.
///
/// # Errors
/// [`LoadError`], whose text is one line, if the image or the request is refused.
pub fn load(
    image: &[u8],
    request: &LoadRequest<'_>,
    ram: &mut dyn GuestRam,
) -> Result<Loaded, LoadError> {
    match Image::parse(image)? {
        Image::Multiboot(image, elf) => multiboot::load(&image, elf.as_ref(), request, ram),
        Image::Pvh(image) => pvh::load(&image, request, ram),
        Image::Linux(image) => image.load(request, ram),
        Image::Hermit(application) => application.load(request, ram),
        Image::BootSector(sector) => boot_sector::load(sector, request, ram),
    }
}
