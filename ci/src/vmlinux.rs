//! The kernel inside a bzImage, an ELF file that boots by PVH where it has that note (Linux's
//! Documentation/arch/x86/boot.rst, fields `setup_sects`, `payload_offset` and `payload_length`).
//!
//! Debian compresses it with LZ4 in the legacy format: a magic number, then blocks of at most 8 MiB
//! when decompressed, each behind its compressed length. Linux's build appends the decompressed size.

use anyhow::{Context, Result, bail, ensure};
use lz4_flex::block::decompress_into;

const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
const LEGACY_LZ4: u32 = 0x184c_2102;
const BLOCK: usize = 8 << 20;

/// Takes the kernel out of a bzImage.
///
/// # Errors
/// When the file is no bzImage, or its kernel is not compressed with LZ4.
pub fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let setup_sectors = *image
        .get(SETUP_SECTORS)
        .context("too short for a bzImage")?;
    let protected_mode = (usize::from(setup_sectors) + 1) * SECTOR;
    let start = protected_mode + word(image, PAYLOAD_OFFSET)? as usize;
    let length = word(image, PAYLOAD_LENGTH)? as usize;
    let payload = image
        .get(start..)
        .and_then(|rest| rest.get(..length))
        .context("the bzImage ends before its kernel does")?;
    let (payload, size) = payload
        .split_last_chunk::<4>()
        .context("the bzImage holds no kernel")?;
    if word(payload, 0)? != LEGACY_LZ4 {
        bail!("the bzImage's kernel is not compressed with LZ4");
    }
    let kernel = decompress(&payload[4..])?;
    ensure!(
        kernel.len() == u32::from_le_bytes(*size) as usize,
        "the bzImage's kernel has another size than the bzImage says"
    );
    Ok(kernel)
}

fn decompress(mut blocks: &[u8]) -> Result<Vec<u8>> {
    let mut output = Vec::new();
    let mut block = vec![0; BLOCK];
    while !blocks.is_empty() {
        let length = word(blocks, 0)? as usize;
        let compressed = blocks
            .get(4..)
            .and_then(|rest| rest.get(..length))
            .context("a compressed block is cut off")?;
        let size = decompress_into(compressed, &mut block)?;
        output.extend_from_slice(&block[..size]);
        blocks = &blocks[4 + length..];
    }
    Ok(output)
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map(|bytes| u32::from_le_bytes(*bytes))
        .context("the bzImage is cut off")
}

#[cfg(test)]
mod tests {
    use lz4_flex::block::compress;

    use super::*;

    fn image(kernel: &[u8]) -> Vec<u8> {
        let mut payload = LEGACY_LZ4.to_le_bytes().to_vec();
        for block in kernel.chunks(BLOCK) {
            let compressed = compress(block);
            payload.extend(u32::try_from(compressed.len()).unwrap().to_le_bytes());
            payload.extend(compressed);
        }
        payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
        let mut image = vec![0; 2 * SECTOR + 16];
        image[SETUP_SECTORS] = 1;
        image[PAYLOAD_OFFSET] = 16;
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn a_kernel_of_several_blocks_comes_out_whole() {
        let kernel: Vec<u8> = (0..BLOCK + 1000).map(|index| (index / 7) as u8).collect();
        assert!(extract(&image(&kernel)).unwrap() == kernel);
    }

    #[test]
    fn what_is_no_such_image_is_refused() {
        let whole = image(b"a kernel");
        for length in 0..whole.len() {
            assert!(extract(&whole[..length]).is_err(), "{length} bytes");
        }
        let mut other = whole.clone();
        other[2 * SECTOR + 16] ^= 1;
        assert!(extract(&other).is_err(), "another compression");
        let last = whole.len() - 1;
        other.clone_from(&whole);
        other[last] ^= 1;
        assert!(extract(&other).is_err(), "another size");
    }
}
