//! Reading images back: what a machine's firmware would find on them must be what was meant.

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use gpt::partition_types;

use super::{BIOS_PARTITION, EFI_PARTITION, Parts, Sectors, embedded_core};

/// Compares the raw disk at `path` with what it should hold.
pub(super) fn raw(path: &Path, parts: &Parts) -> Result<()> {
    let mut disk = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    check(&mut disk, parts).with_context(|| format!("{} is damaged", path.display()))
}

fn check(disk: &mut File, parts: &Parts) -> Result<()> {
    // Both tables must be whole: the crate refuses a table whose checksum is wrong.
    let table = gpt::GptConfig::new()
        .only_valid_headers(true)
        .open_from_device(disk.try_clone()?)?;
    for (id, kind, place) in [
        (1, partition_types::BIOS, &BIOS_PARTITION),
        (2, partition_types::EFI, &EFI_PARTITION),
    ] {
        let partition = table
            .partitions()
            .get(&id)
            .context("a partition is missing")?;
        let is_there = partition.first_lba == place.first
            && partition.last_lba == place.first + place.count - 1
            && partition.part_type_guid == kind;
        ensure!(is_there, "partition {id} is not where it should be");
    }
    let core = embedded_core(&parts.core)?;
    ensure!(
        read(disk, &BIOS_PARTITION)?.starts_with(&core),
        "GRUB's core differs"
    );
    let volume = read(disk, &EFI_PARTITION)?;
    let file_system = fatfs::FileSystem::new(Cursor::new(volume), fatfs::FsOptions::new())?;
    for (path, expected) in &parts.files {
        let mut data = Vec::new();
        file_system
            .root_dir()
            .open_file(path)?
            .read_to_end(&mut data)?;
        ensure!(data == *expected, "{path} differs");
    }
    Ok(())
}

fn read(disk: &mut File, place: &Sectors) -> Result<Vec<u8>> {
    let mut data = vec![0; usize::try_from(place.length())?];
    disk.seek(SeekFrom::Start(place.start()))?;
    disk.read_exact(&mut data)?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::{SMALL, tests::parts, write};
    use super::*;

    #[test]
    fn any_damage_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let parts = parts();
        // The header, an entry, the backup, the core, and the last file's last byte.
        let boot = &parts.files[1].1;
        write(&parts, SMALL, &path).unwrap();
        raw(&path, &parts).unwrap();
        let disk = std::fs::read(&path).unwrap();
        let file = disk.windows(64).rposition(|bytes| bytes == &boot[..64]);
        let places = [
            512 + 24,
            1024,
            SMALL as usize - 512 + 24,
            1 << 20,
            file.unwrap(),
        ];
        for place in places {
            write(&parts, SMALL, &path).unwrap();
            let mut file = File::options().write(true).open(&path).unwrap();
            file.seek(SeekFrom::Start(place as u64)).unwrap();
            file.write_all(&[disk[place] ^ 0xff]).unwrap();
            assert!(raw(&path, &parts).is_err(), "damage at {place:#x}");
        }
    }
}
