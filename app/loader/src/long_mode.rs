//! What a processor needs in memory to start in long mode or with segments: page tables that map
//! the first 4 GiB onto themselves, and a global descriptor table.
//!
//! Boot protocols want these to be out of the way of the image, so they go where boot information
//! goes.

use alloc::vec::Vec;

use umbra_vcpu::address::PAGE_SIZE;

use crate::LoadError;
use crate::placement::{Place, Placement};

/// The selector of the code segment in the table of [`put_descriptors`].
pub const CODE_SELECTOR: u16 = 0x10;
/// The selector of the data segment in the table of [`put_descriptors`].
pub const DATA_SELECTOR: u16 = 0x18;
/// The size of that table in bytes.
pub const DESCRIPTORS_SIZE: u16 = 0x20;

const DATA: u64 = 0x00cf_9300_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const CODE_64: u64 = 0x00af_9b00_0000_ffff;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// Page directories, of which each maps 1 GiB.
const DIRECTORIES: u64 = 4;

/// The code segment that a descriptor table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Flat 32-bit code.
    Bits32,
    /// 64-bit code.
    Bits64,
}

/// Puts a global descriptor table with flat code and data segments into memory, and returns where.
///
/// # Errors
/// [`LoadError::NoRoom`] if there is no room for it.
pub fn put_descriptors(placement: &mut Placement<'_>, code: Code) -> Result<u32, LoadError> {
    let code = match code {
        Code::Bits32 => CODE_32,
        Code::Bits64 => CODE_64,
    };
    let table: Vec<u8> = [0, 0, code, DATA]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    placement.put("the descriptor table", Place::Low, table)
}

/// Puts 4-level page tables into memory that map the first 4 GiB onto themselves with pages of
/// 2 MiB, and returns where the root is.
///
/// # Errors
/// [`LoadError::NoRoom`] if there is no room for them.
pub fn put_identity_tables(placement: &mut Placement<'_>) -> Result<u32, LoadError> {
    const WHAT: &str = "page tables";
    let tables = 2 + DIRECTORIES;
    let root = placement.reserve(WHAT, Place::LowPage, tables * PAGE_SIZE)?;
    let table = |number: u64| (u64::from(root) + number * PAGE_SIZE) | PRESENT_WRITABLE;
    let mut entries = Vec::with_capacity((tables * ENTRIES) as usize);
    entries.push(table(1));
    entries.resize(ENTRIES as usize, 0);
    entries.extend((0..DIRECTORIES).map(|directory| table(2 + directory)));
    entries.resize(2 * ENTRIES as usize, 0);
    let pages = 0..DIRECTORIES * ENTRIES;
    entries.extend(pages.map(|page| (page * LARGE_PAGE_SIZE) | LARGE_PAGE | PRESENT_WRITABLE));
    let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
    placement.fill(root, bytes);
    Ok(root)
}
