//! FAT file systems in memory, whose bytes depend on their files alone.

use std::collections::BTreeSet;
use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Context, Result};
use fatfs::{Date, DateTime, FatType, FormatVolumeOptions, FsOptions, Time, TimeProvider};

/// A file system of `size` bytes with these directories and files, each by its path.
///
/// # Errors
/// When they do not fit.
pub fn volume(
    kind: FatType,
    size: u64,
    directories: &[&str],
    files: &[(String, Vec<u8>)],
) -> Result<Vec<u8>> {
    let mut volume = vec![0; usize::try_from(size)?];
    let options = FormatVolumeOptions::new()
        .fat_type(kind)
        .bytes_per_cluster(512)
        .volume_id(0x756d_6272)
        .volume_label(*b"UMBRA      ");
    fatfs::format_volume(Cursor::new(&mut volume), options)?;
    let options = FsOptions::new().time_provider(&FIXED_TIME);
    let file_system = fatfs::FileSystem::new(Cursor::new(&mut volume), options)?;
    let root = file_system.root_dir();
    for directory in with_parents(directories, files) {
        root.create_dir(directory)?;
    }
    for (path, data) in files {
        root.create_file(path)
            .and_then(|mut file| file.write_all(data))
            .with_context(|| format!("{path} does not fit the disk"))?;
    }
    drop(root);
    file_system.unmount()?;
    Ok(volume)
}

/// The directories and those of the files, each after its parent.
fn with_parents<'a>(
    directories: &'a [&'a str],
    files: &'a [(String, Vec<u8>)],
) -> impl Iterator<Item = &'a str> {
    let parents = |path: &'a str| Path::new(path).ancestors().skip(1);
    let of_files = files.iter().flat_map(|(path, _)| parents(path));
    let all: BTreeSet<_> = directories
        .iter()
        .flat_map(|path| Path::new(path).ancestors())
        .chain(of_files)
        .filter_map(Path::to_str)
        .filter(|path| !path.is_empty())
        .collect();
    all.into_iter()
}

/// 1 January 2000: any fixed date makes images reproducible.
#[derive(Debug)]
struct FixedTime;

static FIXED_TIME: FixedTime = FixedTime;

impl TimeProvider for FixedTime {
    fn get_current_date(&self) -> Date {
        Date {
            year: 2000,
            month: 1,
            day: 1,
        }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime {
            date: self.get_current_date(),
            time: Time {
                hour: 0,
                min: 0,
                sec: 0,
                millis: 0,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first() {
        let files = [("a/b/c".to_owned(), Vec::new())];
        let directories: Vec<_> = with_parents(&["z/y"], &files).collect();
        assert_eq!(directories, ["a", "a/b", "z", "z/y"]);
    }
}
