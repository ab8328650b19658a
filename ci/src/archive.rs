//! The archives that Umbra and Hermit read, byte for byte the same each time.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};
use umbra_report::hermit_image;

/// A file that the image is given at boot.
pub struct Entry<'a> {
    /// Its name in the archive.
    pub name: &'a str,
    /// Its content.
    pub data: &'a [u8],
}

/// What Umbra reads as its one boot module: an uncompressed ustar archive of `guest` and, after it,
/// `initrd` if there is one.
///
/// # Errors
/// Never in practice: writing to memory does not fail.
pub fn guest(guest: &[u8], initrd: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut entries = vec![Entry {
        name: "guest",
        data: guest,
    }];
    entries.extend(initrd.map(|data| Entry {
        name: "initrd",
        data,
    }));
    ustar(&entries)
}

/// A `.hermit` image: a gzipped ustar archive of `hermit.toml`, the Hermit ELF that it names, and what the
/// tar archive `more` holds.
///
/// # Errors
/// When a name is too long for the format.
pub fn hermit(
    config: &str,
    kernel_name: &str,
    kernel: &[u8],
    more: Option<&[u8]>,
) -> Result<Vec<u8>> {
    let more = more.map_or(Ok(Vec::new()), members)?;
    let mut entries = vec![
        Entry {
            name: hermit_image::FILE,
            data: config.as_bytes(),
        },
        Entry {
            name: kernel_name,
            data: kernel,
        },
    ];
    entries.extend(more.iter().map(|(name, data)| Entry { name, data }));
    let mut gzip = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), Compression::best());
    gzip.write_all(&ustar(&entries)?)?;
    gzip.finish().context("cannot compress the image")
}

/// The files in a tar archive, by their names.
fn members(archive: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries()?.map(|entry| {
        let mut entry = entry?;
        let mut data = Vec::new();
        entry.read_to_end(&mut data)?;
        Ok((entry.path()?.to_string_lossy().into_owned(), data))
    });
    entries.collect()
}

/// What Google Cloud imports: a gzipped tar archive in GNU's old format whose one member is
/// `disk.raw`, of `size` bytes.
///
/// # Errors
/// When the disk cannot be read or the archive cannot be written.
pub fn google_cloud(disk: impl Read, size: u64, path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let gzip = GzBuilder::new()
        .mtime(0)
        .write(BufWriter::new(file), Compression::fast());
    let mut archive = Builder::new(gzip);
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size);
    archive.append_data(&mut header, "disk.raw", disk)?;
    archive.into_inner()?.finish()?.flush()?;
    Ok(())
}

/// An uncompressed ustar archive.
///
/// # Errors
/// When a name is too long for the format.
pub fn ustar(entries: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    for entry in entries {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o444);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(entry.data.len() as u64);
        archive
            .append_data(&mut header, entry.name, entry.data)
            .with_context(|| format!("cannot pack {}", entry.name))?;
    }
    archive.into_inner().context("cannot pack the archive")
}

#[cfg(test)]
mod tests {
    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn the_guest_comes_first() {
        let with_initrd = guest(b"image", Some(b"more")).unwrap();
        let expected = [
            ("guest".into(), b"image".to_vec()),
            ("initrd".into(), b"more".to_vec()),
        ];
        assert_eq!(members(&with_initrd).unwrap(), expected);
        assert_eq!(&with_initrd[257..263], b"ustar\0");
        assert_eq!(
            members(&guest(b"", None).unwrap()).unwrap(),
            [("guest".into(), vec![])]
        );
    }

    #[test]
    fn the_hermit_image_is_reproducible() {
        let config = "version = \"1\"";
        let guest = guest(b"image", None).unwrap();
        let make = || hermit(config, "umbra", &[7; 5000], Some(&guest)).unwrap();
        assert_eq!(make(), make());
        let mut archive = Vec::new();
        GzDecoder::new(&make()[..])
            .read_to_end(&mut archive)
            .unwrap();
        let members = members(&archive).unwrap();
        let names: Vec<_> = members.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["hermit.toml", "umbra", "guest"]);
        assert_eq!(members[0].1, config.as_bytes());
    }
}
