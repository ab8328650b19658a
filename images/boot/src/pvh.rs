//! The PVH boot protocol's `hvm_start_info`, as Xen's public header `arch-x86/hvm/start_info.h`
//! defines it.

use alloc::vec::Vec;

use crate::console::{ExitCode, fail};
use crate::physical::{BootInformation, Module, PhysicalAddress};
use crate::rsdp;

const MAGIC: u32 = 0x336e_c578;
/// `XEN_HVM_MEMMAP_TYPE_RAM`
const RAM: u32 = 1;

const START_INFO_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;
const MEMORY_MAP_ENTRY_SIZE: u64 = 24;

/// Reads everything that the start information at `address` tells.
pub fn read(address: PhysicalAddress) -> BootInformation {
    let start_info = address.bytes(START_INFO_SIZE, "the PVH start information");
    if u32_at(start_info, 0) != MAGIC {
        fail(
            ExitCode::BadInput,
            format_args!("there is no PVH start information at {address}"),
        );
    }
    let version = u32_at(start_info, 4);
    if version < 1 {
        fail(
            ExitCode::BadInput,
            format_args!("the PVH start information has no memory map (version {version})"),
        );
    }

    let module_count = u64::from(u32_at(start_info, 12));
    let memory_map_count = u64::from(u32_at(start_info, 48));
    let rsdp = PhysicalAddress(u64_at(start_info, 32));

    BootInformation {
        memory: entries(
            u64_at(start_info, 40),
            memory_map_count,
            MEMORY_MAP_ENTRY_SIZE,
            "memory map",
        )
        .filter(|entry| u32_at(entry, 16) == RAM)
        .map(|entry| {
            let start = u64_at(entry, 0);
            start..start.saturating_add(u64_at(entry, 8))
        })
        .collect(),
        command_line: optional_string(u64_at(start_info, 24), "the command line"),
        modules: entries(
            u64_at(start_info, 16),
            module_count,
            MODULE_SIZE,
            "module list",
        )
        .map(|entry| {
            let start = u64_at(entry, 0);
            Module {
                range: start..start.saturating_add(u64_at(entry, 8)),
                arguments: optional_string(u64_at(entry, 16), "a module's arguments"),
            }
        })
        .collect::<Vec<_>>(),
        rsdp: (rsdp.0 != 0).then(|| rsdp::copy(rsdp)),
    }
}

/// The `count` entries of `size` bytes of an array that may be empty.
fn entries(
    address: u64,
    count: u64,
    size: u64,
    what: &str,
) -> impl Iterator<Item = &'static [u8]> + use<> {
    let bytes = match count {
        0 => &[],
        _ => PhysicalAddress(address).bytes(count * size, what),
    };
    bytes.chunks_exact(size as usize)
}

fn optional_string(address: u64, what: &str) -> alloc::string::String {
    match address {
        0 => alloc::string::String::new(),
        _ => PhysicalAddress(address).string(what),
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}
