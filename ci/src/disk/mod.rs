//! Disk images that boot on a BIOS and on UEFI: one GPT disk, written without root or loop devices.
//!
//! Sector 0 holds GRUB's first stage besides the protective MBR; partition 1 is GRUB's core for
//! BIOS machines; partition 2 is a FAT file system (the EFI partition) with GRUB for UEFI machines,
//! GRUB's script, and Umbra. Whoever can write FAT puts a configuration at `/umbra/umbra.toml` and
//! guests below `/umbra/guests`.
//!
//! The same input gives the same bytes: identifiers and dates are fixed. Every image is read back
//! before it is handed out.

pub mod fat;
mod format;
mod verify;
mod vhd;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fatfs::FatType;
use gpt::mbr::{PartRecord, ProtectiveMBR};
use gpt::partition::Partition;
use gpt::partition_types;
use uuid::Uuid;

use crate::grub::{self, Content, Core, Places};
use crate::project::Project;

pub use self::format::Format;

/// Bytes in a sector.
const SECTOR: u64 = 512;
/// Partitions begin at whole mebibytes, as clouds and disks with large sectors like it.
const MIB: u64 = 1 << 20;
/// The size of a disk that no cloud asks to be larger, in bytes: room for a Linux guest or two.
const SMALL: u64 = 256 * MIB;

const PLACES: Places = Places {
    boot: "umbra/umbra.elf",
    archive: "umbra/guest.tar",
    user: Some("umbra"),
};

/// What goes onto a disk, as bytes.
#[derive(Clone)]
struct Parts {
    /// GRUB's first stage.
    first_stage: Vec<u8>,
    /// GRUB's core for BIOS machines.
    core: Vec<u8>,
    /// The files of the EFI partition, by their paths.
    files: Vec<(String, Vec<u8>)>,
}

impl Parts {
    fn collect(project: &Project, content: &Content<'_>) -> Result<Self> {
        let archive = content.archive.map(read).transpose()?.unwrap_or_default();
        let users = users_files(&archive)?;
        let content = &Content {
            archive: content.archive.filter(|_| users.is_empty()),
            ..*content
        };
        let mut files = vec![
            (
                "EFI/BOOT/BOOTX64.EFI".to_owned(),
                read(&Core::Uefi.make(project)?)?,
            ),
            (
                "boot/grub/grub.cfg".to_owned(),
                grub::script(content, &PLACES)?.into_bytes(),
            ),
            (PLACES.boot.to_owned(), read(content.boot)?),
        ];
        if content.archive.is_some() {
            files.push((PLACES.archive.to_owned(), archive));
        }
        files.extend(users);
        Ok(Self {
            first_stage: read(&Path::new(grub::BIOS).join("boot.img"))?,
            core: read(&Core::BiosDisk.make(project)?)?,
            files,
        })
    }
}

/// The files of an archive that holds a configuration, where a user would put them; nothing if it holds
/// none.
fn users_files(archive: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for member in tar::Archive::new(archive).entries()? {
        let mut member = member?;
        let name = member.path()?.to_string_lossy().into_owned();
        let mut data = Vec::new();
        member.read_to_end(&mut data)?;
        files.push((name, data));
    }
    if !files.iter().any(|(name, _)| name == "umbra.toml") {
        return Ok(Vec::new());
    }
    let place = |name: String| match &*name {
        "umbra.toml" => "umbra/umbra.toml".to_owned(),
        _ => format!("umbra/guests/{name}"),
    };
    Ok(files
        .into_iter()
        .map(|(name, data)| (place(name), data))
        .collect())
}

/// Where GRUB's core for BIOS machines is.
const BIOS_PARTITION: Sectors = Sectors::of(MIB, MIB);
/// The rest. The backup table ends the disk; the mebibyte that it is in is not the partition's.
const EFI_PARTITION: Sectors = Sectors::of(2 * MIB, SMALL - 3 * MIB);

/// Writes a disk of `size` bytes to `path`.
fn write(parts: &Parts, size: u64, path: &Path) -> Result<()> {
    ensure!(
        size.is_multiple_of(MIB) && size >= SMALL,
        "a disk has whole mebibytes, and 256 at least"
    );
    let mut disk = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    disk.set_len(size)?;
    boot_record(size, &parts.first_stage)?.overwrite_lba0(&mut disk)?;
    write_partition_table(&mut disk)?;
    write_sparsely(
        &mut disk,
        BIOS_PARTITION.start(),
        &embedded_core(&parts.core)?,
    )?;
    write_sparsely(
        &mut disk,
        EFI_PARTITION.start(),
        &efi_partition(&parts.files)?,
    )?;
    Ok(())
}

/// A range of sectors.
struct Sectors {
    first: u64,
    count: u64,
}

impl Sectors {
    /// From a start and a length in bytes.
    const fn of(start: u64, length: u64) -> Self {
        Self {
            first: start / SECTOR,
            count: length / SECTOR,
        }
    }

    const fn start(&self) -> u64 {
        self.first * SECTOR
    }

    const fn length(&self) -> u64 {
        self.count * SECTOR
    }
}

/// GRUB's first stage with the place of the core in it, and the protective MBR's one partition.
fn boot_record(size: u64, first_stage: &[u8]) -> Result<ProtectiveMBR> {
    /// Where GRUB's first stage has the sector of the core's beginning.
    const CORE_SECTOR: usize = 0x5c;
    /// Where it checks whether the BIOS said which drive it booted from.
    const DRIVE_CHECK: usize = 0x66;
    /// The check is skipped on disks: it is for floppies, and some BIOSes give wrong numbers.
    const NO_OPERATION: [u8; 2] = [0x90; 2];
    let mut code: [u8; 440] = first_stage
        .get(..440)
        .and_then(|code| code.try_into().ok())
        .context("GRUB's boot.img is too short")?;
    code[CORE_SECTOR..CORE_SECTOR + 8].copy_from_slice(&BIOS_PARTITION.first.to_le_bytes());
    code[DRIVE_CHECK..DRIVE_CHECK + 2].copy_from_slice(&NO_OPERATION);
    let sectors = u32::try_from(size / SECTOR - 1).unwrap_or(u32::MAX);
    let mut record = ProtectiveMBR::with_lb_size(sectors);
    record.set_bootcode(code);
    // Some BIOSes boot no disk without an active partition.
    let mut partition = record.partition(0).unwrap_or_else(PartRecord::zero);
    partition.boot_indicator = 0x80;
    record.set_partition(0, partition);
    Ok(record)
}

fn write_partition_table(disk: &mut File) -> Result<()> {
    const DISK: Uuid = Uuid::from_u128(0x756d_6272_6100_4000_8000_0000_0000_0000);
    const BIOS: Uuid = Uuid::from_u128(0x756d_6272_6100_4000_8000_0000_0000_0001);
    const EFI: Uuid = Uuid::from_u128(0x756d_6272_6100_4000_8000_0000_0000_0002);
    let partition = |sectors: &Sectors, kind, guid, name: &str| Partition {
        part_type_guid: kind,
        part_guid: guid,
        first_lba: sectors.first,
        last_lba: sectors.first + sectors.count - 1,
        flags: 0,
        name: name.to_owned(),
    };
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .create_from_device(&mut *disk, Some(DISK))?;
    table.update_partitions(BTreeMap::from([
        (
            1,
            partition(&BIOS_PARTITION, partition_types::BIOS, BIOS, "BIOS boot"),
        ),
        (
            2,
            partition(&EFI_PARTITION, partition_types::EFI, EFI, "EFI system"),
        ),
    ]))?;
    table.write()?;
    Ok(())
}

/// GRUB's core with the place of its own rest in its first sector: a start, a number of sectors, and
/// the segment to load them at.
fn embedded_core(core: &[u8]) -> Result<Vec<u8>> {
    const BLOCK_LIST: usize = 0x1f4;
    const SEGMENT: u16 = 0x820;
    ensure!(
        core.len() as u64 <= BIOS_PARTITION.length() && core.len() > SECTOR as usize,
        "GRUB's core of {} bytes does not fit its partition",
        core.len()
    );
    let mut core = core.to_vec();
    let rest = u16::try_from((core.len() as u64).div_ceil(SECTOR) - 1)?;
    core[BLOCK_LIST..BLOCK_LIST + 8].copy_from_slice(&(BIOS_PARTITION.first + 1).to_le_bytes());
    core[BLOCK_LIST + 8..BLOCK_LIST + 10].copy_from_slice(&rest.to_le_bytes());
    core[BLOCK_LIST + 10..BLOCK_LIST + 12].copy_from_slice(&SEGMENT.to_le_bytes());
    Ok(core)
}

/// The EFI partition's bytes.
fn efi_partition(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    // Where users put their guests, whether there are any.
    let directories = ["umbra", "umbra/guests"];
    fat::volume(FatType::Fat32, EFI_PARTITION.length(), &directories, files)
}

/// Writes `data` at `start`, and leaves holes where whole blocks are zero.
fn write_sparsely(disk: &mut File, start: u64, data: &[u8]) -> Result<()> {
    const BLOCK: usize = 4096;
    for (block, index) in data.chunks(BLOCK).zip(0u64..) {
        if block.iter().any(|&byte| byte != 0) {
            disk.seek(SeekFrom::Start(start + index * BLOCK as u64))?;
            disk.write_all(block)?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts that look like GRUB's.
    pub(super) fn parts() -> Parts {
        Parts {
            first_stage: (0..512u16).map(|at| (at % 251) as u8).collect(),
            core: vec![0xc3; 3000],
            files: vec![
                ("boot/grub/grub.cfg".into(), b"boot".to_vec()),
                (PLACES.boot.into(), vec![0x7f; 1_000_000]),
            ],
        }
    }

    #[test]
    fn the_same_parts_give_the_same_disk() {
        let directory = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| {
            let path = directory.path().join(name);
            write(&parts(), SMALL, &path).unwrap();
            fs::read(path).unwrap()
        });
        assert!(one == two);
        let block_list = &one[MIB as usize + 0x1f4..][..12];
        assert_eq!(block_list, [1, 8, 0, 0, 0, 0, 0, 0, 5, 0, 0x20, 8]);
        assert_eq!(one[0x5c..0x64], 2048u64.to_le_bytes());
        assert_eq!(one[510..512], [0x55, 0xaa]);
    }

    #[test]
    fn a_configuration_goes_where_a_user_would_put_it() {
        use crate::archive::{Entry, ustar};
        let entry = |name| Entry { name, data: b"x" };
        let config = ustar(&[entry("umbra.toml"), entry("hello")]).unwrap();
        let names: Vec<_> = users_files(&config)
            .unwrap()
            .into_iter()
            .map(|file| file.0)
            .collect();
        assert_eq!(names, ["umbra/umbra.toml", "umbra/guests/hello"]);
        let guest = ustar(&[entry("guest")]).unwrap();
        assert!(users_files(&guest).unwrap().is_empty() && users_files(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let write = |parts: &Parts, size| write(parts, size, &directory.path().join("disk"));
        let mut large = parts();
        large.files[1].1 = vec![1; SMALL as usize];
        let message = format!("{:#}", write(&large, SMALL).unwrap_err());
        assert!(
            message.contains("umbra/umbra.elf does not fit"),
            "{message}"
        );
        let core = vec![1; 2 << 20];
        assert!(write(&Parts { core, ..parts() }, SMALL).is_err());
        assert!(write(&parts(), SMALL + 512).is_err());
    }
}
