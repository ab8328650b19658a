//! Boot sectors, alone or at the start of a disk image: what a PC's BIOS does with the first sector of
//! the first disk. The rest stays on that disk.

use umbra_vcpu::address::Gpa;

use crate::{Bios, EntryState, Format, GuestRam, LoadError, LoadRequest, Loaded};

/// Bytes in a sector.
const SECTOR_SIZE: usize = 512;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// Where a BIOS puts the sector and jumps to.
const ADDRESS: u16 = 0x7c00;
/// The first hard disk.
const DISK: u16 = 0x80;

/// The first sector of a file that is a boot sector or a disk image.
pub fn find(file: &[u8]) -> Option<&[u8; SECTOR_SIZE]> {
    let sector = file.first_chunk::<SECTOR_SIZE>()?;
    let is_whole = file.len().is_multiple_of(SECTOR_SIZE);
    (is_whole && sector.ends_with(&SIGNATURE)).then_some(sector)
}

/// Puts the sector where it runs.
///
/// # Errors
/// [`LoadError`] if the request has what such a guest has no use for, or the host has no memory.
pub fn load(
    sector: &[u8; SECTOR_SIZE],
    request: &LoadRequest<'_>,
    ram: &mut dyn GuestRam,
) -> Result<Loaded, LoadError> {
    if !request.modules.is_empty() {
        return Err(LoadError::BootSectorModule);
    }
    ram.write(Gpa::new(ADDRESS.into()), sector)?;
    Ok(Loaded {
        format: Format::BootSector,
        entry: EntryState::Real {
            cs: 0,
            ip: ADDRESS,
            data: 0,
            sp: ADDRESS,
            dx: DISK,
        },
        bios: Bios::Present,
    })
}
