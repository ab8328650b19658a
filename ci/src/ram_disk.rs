//! Initial RAM disks for Linux: uncompressed cpio archives, byte for byte the same each time.

use std::collections::BTreeSet;
use std::io::Write;

use anyhow::{Context, Result};
use cpio::NewcBuilder;
use cpio::newc::{ModeFileType, trailer};

/// Device number of the console that the kernel opens for its first process.
const CONSOLE: (u32, u32) = (5, 1);

/// A file by its path, and its content.
pub type File<'a> = (&'a str, Vec<u8>);

/// An archive of executable files, the directories that they are in, and the console. The kernel runs
/// the file `init`.
///
/// # Errors
/// When a file is too large for the format.
pub fn make(files: &[File<'_>]) -> Result<Vec<u8>> {
    let mut number = 0;
    let mut entry = |name: &str, kind: ModeFileType, permissions: u32| {
        number += 1;
        NewcBuilder::new(name)
            .ino(number)
            .mode(permissions)
            .set_mode_file_type(kind)
    };
    let parents = files.iter().filter_map(|(name, _)| name.rsplit_once('/'));
    let directories: BTreeSet<_> = parents.map(|(parent, _)| parent).chain(["dev"]).collect();
    let mut archive = Vec::new();
    for directory in directories {
        archive = entry(directory, ModeFileType::Directory, 0o755)
            .nlink(2)
            .write(archive, 0)
            .finish()?;
    }
    let console = entry("dev/console", ModeFileType::Char, 0o600);
    archive = console
        .rdev_major(CONSOLE.0)
        .rdev_minor(CONSOLE.1)
        .write(archive, 0)
        .finish()?;
    for (name, content) in files {
        let size = u32::try_from(content.len()).with_context(|| format!("{name} is too large"))?;
        let mut writer = entry(name, ModeFileType::Regular, 0o755).write(archive, size);
        writer.write_all(content)?;
        archive = writer.finish()?;
    }
    trailer(archive).context("cannot end the initial RAM disk")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use cpio::NewcReader;

    use super::*;

    #[test]
    fn directories_come_before_their_files() -> Result<()> {
        let files = [("init", b"#!/bin/sh\n".to_vec()), ("bin/x", b"x".to_vec())];
        let archive = make(&files)?;
        assert_eq!(archive, make(&files)?);
        let mut rest = &archive[..];
        let mut found = Vec::new();
        loop {
            let mut reader = NewcReader::new(rest)?;
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut content = String::new();
            reader.read_to_string(&mut content)?;
            found.push((entry.name().to_owned(), entry.mode(), content));
            rest = reader.finish()?;
        }
        let expected = [
            ("bin", 0o40755, ""),
            ("dev", 0o40755, ""),
            ("dev/console", 0o20600, ""),
            ("init", 0o100755, "#!/bin/sh\n"),
            ("bin/x", 0o100755, "x"),
        ];
        let expected = expected.map(|(name, mode, content)| (name.into(), mode, content.into()));
        assert_eq!(found, expected);
        Ok(())
    }
}
