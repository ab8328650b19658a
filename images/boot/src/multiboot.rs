//! The Multiboot2 boot information (Multiboot2 Specification 2.0, 3.6).

use multiboot2::{BootInformation as Multiboot2, BootInformationHeader, MemoryAreaType};

use crate::console::{ExitCode, fail};
use crate::physical::{BootInformation, Module, PhysicalAddress};
use crate::rsdp;

/// The tag's type and size in front of an embedded ACPI root pointer.
const TAG_HEADER: u64 = 8;

/// Reads everything that the boot information at `address` tells.
pub fn read(address: PhysicalAddress) -> BootInformation {
    let size = address.bytes(8, "the Multiboot2 information");
    let size = u32::from_le_bytes([size[0], size[1], size[2], size[3]]);
    // Checks that all of it is mapped.
    let _ = address.bytes(u64::from(size), "the Multiboot2 information");

    // SAFETY: the structure is as long as its first field says, and the whole of that is mapped.
    let information = match unsafe { Multiboot2::load(address.0 as *const BootInformationHeader) } {
        Ok(information) => information,
        Err(error) => fail(
            ExitCode::BadInput,
            format_args!("the Multiboot2 information at {address} is malformed: {error:?}"),
        ),
    };

    let Some(memory_map) = information.memory_map_tag() else {
        fail(
            ExitCode::BadInput,
            format_args!("the boot loader passes no memory map"),
        )
    };
    let command_line = match information.command_line_tag().map(|tag| tag.cmdline()) {
        None => "",
        Some(Ok(command_line)) => command_line,
        Some(Err(error)) => fail(
            ExitCode::BadInput,
            format_args!("the command line is malformed: {error:?}"),
        ),
    };
    let rsdp = information
        .rsdp_v2_tag()
        .map(core::ptr::from_ref)
        .map(<*const _>::cast::<u8>)
        .or_else(|| {
            information
                .rsdp_v1_tag()
                .map(core::ptr::from_ref)
                .map(<*const _>::cast::<u8>)
        })
        .map(|tag| rsdp::copy(PhysicalAddress(tag as u64 + TAG_HEADER)));

    BootInformation {
        memory: memory_map
            .memory_areas()
            .iter()
            .filter(|area| area.typ() == MemoryAreaType::Available)
            .map(|area| area.start_address()..area.end_address())
            .collect(),
        command_line: command_line.into(),
        modules: information
            .module_tags()
            .map(|module| Module {
                range: u64::from(module.start_address())..u64::from(module.end_address()),
                arguments: match module.cmdline() {
                    Ok(arguments) => arguments.into(),
                    Err(error) => fail(
                        ExitCode::BadInput,
                        format_args!("a module's arguments are malformed: {error:?}"),
                    ),
                },
            })
            .collect(),
        rsdp,
    }
}
