//! PVH: the `hvm_start_info` structure, version 1 (Xen's public/arch-x86/hvm/start_info.h).

use alloc::vec::Vec;

use umbra_vcpu::address::Gpa;

use crate::image::Executable;
use crate::placement::{Place, Placement, terminated};
use crate::{Bios, EntryState, Format, GuestRam, LoadError, LoadRequest, Loaded};

const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const START_INFO_SIZE: usize = 56;

/// Loads an image and builds its start information.
pub fn load(
    image: &Executable<'_>,
    request: &LoadRequest<'_>,
    ram: &mut dyn GuestRam,
) -> Result<Loaded, LoadError> {
    let map = request.memory_map;
    image.check_ram(map)?;
    let command_line = terminated("the command line", request.command_line)?;

    let mut placement = Placement::new(map, image.occupied());
    let mut modules = Vec::new();
    for module in request.modules {
        let name = terminated("a module's command line", module.name)?;
        let start = placement.put("a module", Place::High, module.data)?;
        let name_at = placement.put("a module's command line", Place::Low, name)?;
        for field in [
            u64::from(start),
            module.data.len() as u64,
            u64::from(name_at),
            0,
        ] {
            modules.extend_from_slice(&field.to_le_bytes());
        }
    }
    let mut ranges = Vec::new();
    for range in map.ranges() {
        ranges.extend_from_slice(&range.start.as_u64().to_le_bytes());
        ranges.extend_from_slice(&range.length.to_le_bytes());
        ranges.extend_from_slice(&u64::from(range.kind as u32).to_le_bytes());
    }
    let modules_at = placement.put("the list of modules", Place::Low, modules)?;
    let map_at = placement.put("the memory map", Place::Low, ranges)?;
    let command_line_at = placement.put("the command line", Place::Low, command_line)?;

    let mut information = [0; START_INFO_SIZE];
    let mut set = |offset: usize, bytes: &[u8]| {
        information[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    set(0, &START_INFO_MAGIC.to_le_bytes());
    set(4, &START_INFO_VERSION.to_le_bytes());
    set(12, &(request.modules.len() as u32).to_le_bytes());
    set(16, &u64::from(modules_at).to_le_bytes());
    set(24, &u64::from(command_line_at).to_le_bytes());
    let acpi_root = request.acpi_root.map_or(0, Gpa::as_u64);
    set(32, &acpi_root.to_le_bytes());
    set(40, &u64::from(map_at).to_le_bytes());
    set(48, &(map.ranges().len() as u32).to_le_bytes());
    let ebx = placement.put("the start information", Place::Low, Vec::from(information))?;
    image.write(ram)?;
    placement.write(ram)?;
    Ok(Loaded {
        format: Format::Pvh,
        entry: EntryState::Protected32 {
            eip: image.entry(),
            eax: 0,
            ebx,
        },
        bios: Bios::Absent,
    })
}
