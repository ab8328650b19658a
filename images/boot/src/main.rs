//! The boot stub: one ELF file that PVH (QEMU `-kernel`, cloud-hypervisor, Firecracker) and
//! Multiboot2 (GRUB) boot, and that carries the Hermit image.
//!
//! Build it with the environment variable `UMBRA_HERMIT_ELF` set to the absolute path of the Hermit
//! image, for `x86_64-unknown-none`.
//!
//! Protocol: `entry.s` brings the processor to long mode, with everything below 4 GiB
//! identity-mapped, and calls [`start`]. That copies what the boot protocol tells, loads the Hermit
//! image clear of the modules, describes the machine in a device tree, and enters the image by
//! version 4 of Hermit's entry contract: RAM identity-mapped by 2 MiB pages, the first 2 MiB
//! unmapped, `rdi` the boot information, `esi` 0, `rsp` at the *bottom* of a stack of 32 KiB.
//! The stub's memory, with the device tree, the stack and the page tables, is never given to the
//! kernel.
//!
//! Whatever is missing ends with one line on COM1 and an exit code.

#![no_std]
#![no_main]

extern crate alloc;

mod console;
mod device_tree;
mod multiboot;
mod paging;
mod physical;
mod pvh;
mod rsdp;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::{asm, global_asm};
use core::fmt;
use core::mem::MaybeUninit;
use core::num::{NonZeroU16, NonZeroU64};
use core::ops::Range;
use core::ptr::addr_of;

use hermit_entry::boot_info::{BootInfo, HardwareInfo, PlatformInfo, RawBootInfo};
use hermit_entry::elf::{KernelObject, LoadedKernel};
use talc::{ClaimOnOom, Span, Talc, Talck};
use x86_64::VirtAddr;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::registers::model_specific::{FsBase, GsBase};

use crate::console::{COM1, ExitCode, fail};
use crate::physical::{BootInformation, LARGE_PAGE, PAGE, PhysicalAddress};

global_asm!(include_str!("entry.s"));

/// The Hermit image, aligned as its headers want to be.
static HERMIT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("UMBRA_HERMIT_ELF")));

#[repr(C, align(4096))]
struct Aligned<T: ?Sized>(T);

/// The stub's heap: boot information and device tree.
const HEAP_SIZE: usize = 1 << 20;
static mut HEAP: [MaybeUninit<u8>; HEAP_SIZE] = [MaybeUninit::uninit(); HEAP_SIZE];

#[global_allocator]
static ALLOCATOR: Talck<spin::Mutex<()>, ClaimOnOom> = Talc::new(
    // SAFETY: nothing else uses the array.
    unsafe { ClaimOnOom::new(Span::from_array((&raw mut HEAP).cast::<[u8; HEAP_SIZE]>())) },
)
.lock();

/// The stack on which the kernel boots.
const KERNEL_STACK_SIZE: usize = 32 << 10;
static mut KERNEL_STACK: Aligned<[MaybeUninit<u8>; KERNEL_STACK_SIZE]> =
    Aligned([MaybeUninit::uninit(); KERNEL_STACK_SIZE]);

/// The kernel cannot start with less memory above its image.
const MINIMUM_MEMORY: u64 = 16 << 20;

/// Called by `entry.s` in long mode.
#[unsafe(no_mangle)]
extern "C" fn start(protocol: u64, information: u64) -> ! {
    let information = PhysicalAddress(information);
    let mut boot = match protocol {
        0 => pvh::read(information),
        _ => multiboot::read(information),
    };
    if let Err(error) = shell_words::split(&boot.command_line) {
        fail(
            ExitCode::BadInput,
            format_args!("the command line is malformed: {error}"),
        );
    }

    let stub = stub_range();
    let memory = physical::normalize(boot.memory.clone());
    check_modules(&boot, &stub);
    lift_modules(&memory, &mut boot, &stub);
    let (image, loaded) = load_image(&memory, &boot, &stub);

    let usable = usable_memory(memory.clone(), &boot, &image);
    let size: u64 = usable.iter().map(|range| range.end - range.start).sum();
    if let Some(missing) = MINIMUM_MEMORY.checked_sub(size)
        && missing > 0
    {
        let what = format_args!(
            "only {} KiB of memory are free, 16 MiB are needed",
            size >> 10
        );
        fail_without_memory(what, &memory, missing);
    }

    let rsdp = boot.rsdp.map(|rsdp| rsdp.leak().as_ptr() as u64);
    let tree = match device_tree::build(&usable, &boot.command_line, &boot.modules, rsdp) {
        Ok(tree) => tree.leak(),
        Err(error) => fail(ExitCode::BadInput, format_args!("no device tree: {error}")),
    };

    let below_4g = 0..4 << 30;
    let mapped = memory
        .iter()
        .map(|range| range.start..range.end.min(below_4g.end))
        .chain(boot.modules.iter().map(|module| module.range.clone()))
        .chain([stub, image.clone()]);
    let root = paging::build(mapped);

    let boot_info = Box::leak(Box::new(RawBootInfo::from(BootInfo {
        hardware_info: HardwareInfo {
            // The kernel subtracts what is below the image's end from what it may use.
            phys_addr_range: image.start..memory.last().map_or(image.end, |range| range.end),
            serial_port_base: NonZeroU16::new(COM1),
            device_tree: NonZeroU64::new(tree.as_ptr() as u64),
        },
        load_info: loaded.load_info,
        platform_info: PlatformInfo::Fdt,
    })));

    // The kernel checks that nobody has set these yet.
    FsBase::write(VirtAddr::zero());
    GsBase::write(VirtAddr::zero());
    // SAFETY: the new tables map the stub, its stack and the image where they are now.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
    // SAFETY: 1. The entry point, loaded above, follows the entry contract in version 4, which
    // `KernelObject::parse` has checked. 2. What it wants is as the module's protocol says.
    unsafe {
        asm!(
            "mov rsp, {stack}",
            "xor ebp, ebp",
            "jmp {entry}",
            stack = in(reg) &raw mut KERNEL_STACK,
            entry = in(reg) loaded.entry_point,
            in("rdi") boot_info,
            in("esi") 0,
            options(noreturn),
        )
    }
}

/// Where the stub lies, with everything that it hands over.
fn stub_range() -> Range<u64> {
    unsafe extern "C" {
        static stub_start: u8;
        static stub_end: u8;
    }
    addr_of!(stub_start) as u64..addr_of!(stub_end) as u64
}

/// A loader that puts a module over the stub, or over nothing, would make us run garbage.
fn check_modules(boot: &BootInformation, stub: &Range<u64>) {
    for module in &boot.modules {
        let range = &module.range;
        if range.start > range.end || (range.start < stub.end && stub.start < range.end) {
            fail(
                ExitCode::BadInput,
                format_args!("a module cannot lie at {range:#x?}: the stub is at {stub:#x?}"),
            );
        }
    }
}

/// Moves modules out of the first 2 MiB, which stay unmapped for the kernel. (GRUB likes to put
/// them there.)
fn lift_modules(memory: &[Range<u64>], boot: &mut BootInformation, stub: &Range<u64>) {
    for index in 0..boot.modules.len() {
        let Range { start, end } = boot.modules[index].range;
        if start >= LARGE_PAGE || start == end {
            continue;
        }
        let size = end - start;
        let free = without_modules(memory.to_vec(), boot);
        let place =
            physical::place(&free, size, PAGE, stub.end).filter(|place| place.end <= 4 << 30);
        let Some(place) = place else {
            let what = format_args!("there are no {} KiB of memory for a module", size >> 10);
            fail_without_memory(what, memory, size + MINIMUM_MEMORY)
        };
        let module = PhysicalAddress(start).bytes(size, "a module");
        // SAFETY: 1. The place is RAM, mapped, and neither the stub's nor a module's, so it doesn't
        // overlap this module either. 2. The boot protocol's structures may lie there, but all that
        // was needed is copied.
        unsafe {
            core::ptr::copy_nonoverlapping(module.as_ptr(), place.start as *mut u8, module.len());
        };
        boot.modules[index].range = place;
    }
}

/// Loads the Hermit image as low as possible (the kernel uses no memory below it), clear of the
/// stub and the modules.
fn load_image(
    memory: &[Range<u64>],
    boot: &BootInformation,
    stub: &Range<u64>,
) -> (Range<u64>, LoadedKernel) {
    let object = match KernelObject::parse(&HERMIT.0) {
        Ok(object) => object,
        Err(error) => fail(
            ExitCode::BadInput,
            format_args!("the embedded image is bad: {error}"),
        ),
    };
    let size = object.mem_size() as u64;

    let free = without_modules(memory.to_vec(), boot);
    let place =
        physical::place(&free, size, LARGE_PAGE, stub.end).filter(|place| place.end <= 4 << 30);
    let Some(place) = place else {
        let what = format_args!("there are no {} KiB of memory for the image", size >> 10);
        fail_without_memory(what, memory, size + MINIMUM_MEMORY)
    };

    // SAFETY: 1. The place is RAM, mapped, and neither the stub's nor a module's. 2. The boot
    // protocol's structures may lie there, but all that was needed is copied.
    let target = unsafe {
        core::slice::from_raw_parts_mut(place.start as *mut MaybeUninit<u8>, size as usize)
    };
    let loaded = object.load_kernel(target, place.start);
    (place, loaded)
}

/// Ends the boot for want of so many bytes in addition to `memory`.
fn fail_without_memory(what: fmt::Arguments<'_>, memory: &[Range<u64>], missing: u64) -> ! {
    let there_is: u64 = memory.iter().map(|range| range.end - range.start).sum();
    let enough = (there_is + missing).div_ceil(1 << 20) + 1;
    fail(
        ExitCode::OutOfMemory,
        format_args!(
            "{what}: give the machine at least {enough} MiB (qemu-system-x86_64 -m {enough}), and what its \
             guests use"
        ),
    )
}

/// What the kernel may use: memory above the large pages of its image, without the modules.
fn usable_memory(
    memory: Vec<Range<u64>>,
    boot: &BootInformation,
    image: &Range<u64>,
) -> Vec<Range<u64>> {
    let below = 0..image.end.next_multiple_of(LARGE_PAGE);
    physical::subtract(without_modules(memory, boot), &below)
}

/// `memory` without the pages of the modules.
fn without_modules(memory: Vec<Range<u64>>, boot: &BootInformation) -> Vec<Range<u64>> {
    boot.modules
        .iter()
        .map(|module| module.range.start / PAGE * PAGE..module.range.end.next_multiple_of(PAGE))
        .fold(memory, |memory, hole| physical::subtract(memory, &hole))
}
