//! Fixed virtual hard disks, as Azure wants them: the raw disk, and a footer of one sector (Virtual
//! Hard Disk Image Format Specification 1.0).

use std::io::{Seek, SeekFrom, Write};

use anyhow::{Result, ensure};

const SECTOR: u64 = 512;
/// Azure takes whole mebibytes only.
const MIB: u64 = 1 << 20;

/// Appends the footer to a raw disk of `size` bytes.
///
/// # Errors
/// When the size is not one that Azure takes, or writing fails.
pub fn append_footer(disk: &mut (impl Write + Seek), size: u64) -> Result<()> {
    ensure!(
        size.is_multiple_of(MIB) && size != 0,
        "Azure takes disks of whole mebibytes only, not {size} bytes"
    );
    disk.seek(SeekFrom::Start(size))?;
    disk.write_all(&footer(size))?;
    Ok(())
}

fn footer(size: u64) -> [u8; SECTOR as usize] {
    /// Always set.
    const RESERVED_FEATURE: u32 = 2;
    const VERSION: u32 = 0x0001_0000;
    const FIXED: u32 = 2;
    /// Readers take the size from the footer for this one, and from the rounded geometry for others.
    const CREATOR: &[u8; 4] = b"win ";
    const CREATOR_SYSTEM: &[u8; 4] = b"Wi2k";
    const UNIQUE: &[u8; 16] = b"umbra disk image";
    const CHECKSUM: usize = 64;

    let mut footer = [0; SECTOR as usize];
    let mut rest = &mut footer[..];
    let mut put = |field: &[u8]| {
        let (head, tail) = std::mem::take(&mut rest).split_at_mut(field.len());
        head.copy_from_slice(field);
        rest = tail;
    };
    put(b"conectix");
    put(&RESERVED_FEATURE.to_be_bytes());
    put(&VERSION.to_be_bytes());
    put(&u64::MAX.to_be_bytes()); // no dynamic header
    put(&0u32.to_be_bytes()); // created on 1 January 2000
    put(CREATOR);
    put(&VERSION.to_be_bytes());
    put(CREATOR_SYSTEM);
    put(&size.to_be_bytes());
    put(&size.to_be_bytes());
    put(&geometry(size / SECTOR));
    put(&FIXED.to_be_bytes());
    put(&0u32.to_be_bytes()); // the checksum, below
    put(UNIQUE);
    let sum: u32 = footer.iter().map(|&byte| u32::from(byte)).sum();
    footer[CHECKSUM..CHECKSUM + 4].copy_from_slice(&(!sum).to_be_bytes());
    footer
}

/// Cylinders, heads and sectors per track (the specification's appendix, "CHS calculation").
fn geometry(sectors: u64) -> [u8; 4] {
    let sectors = sectors.min(65535 * 16 * 255);
    let (per_track, heads) = if sectors >= 65535 * 16 * 63 {
        (255, 16)
    } else {
        let tracks = sectors / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if tracks < heads * 1024 && heads <= 16 {
            (17, heads)
        } else if sectors / 31 < 16 * 1024 {
            (31, 16)
        } else {
            (63, 16)
        }
    };
    let cylinders = u16::try_from(sectors / per_track / heads).unwrap_or(u16::MAX);
    let [high, low] = cylinders.to_be_bytes();
    let byte = |number: u64| u8::try_from(number).unwrap_or(u8::MAX);
    [high, low, byte(heads), byte(per_track)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_footer_is_as_specified() {
        let footer = footer(256 * MIB);
        assert_eq!(&footer[..8], b"conectix");
        assert_eq!(&footer[48..56], &(256 * MIB).to_be_bytes());
        assert_eq!(&footer[60..64], &[0, 0, 0, 2], "a fixed disk");
        let sum: u32 = footer
            .iter()
            .enumerate()
            .filter(|(at, _)| !(64..68).contains(at))
            .map(|(_, &byte)| u32::from(byte))
            .sum();
        assert_eq!(footer[64..68], (!sum).to_be_bytes());
    }

    #[test]
    fn geometries_are_those_of_the_specification() {
        // By hand: 81,920 sectors are 4,818 tracks of 17, so 5 heads and 963 cylinders; 127 GiB have
        // 16 heads and 255 sectors per track, so 65,278 cylinders.
        assert_eq!(geometry(40 * 2048), [0x03, 0xc3, 5, 17]);
        assert_eq!(geometry(127 * 1024 * 2048), [0xfe, 0xfe, 16, 255]);
    }

    #[test]
    fn odd_sizes_are_refused() {
        let mut disk = std::io::Cursor::new(Vec::new());
        assert!(append_footer(&mut disk, MIB + 512).is_err());
        assert!(append_footer(&mut disk, MIB).is_ok());
        assert_eq!(disk.into_inner().len() as u64, MIB + 512);
    }
}
