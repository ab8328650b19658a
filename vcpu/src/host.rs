//! What a driver needs of the host: physical addresses, and memory that the processor reads and
//! writes by them.
#![allow(unsafe_code, reason = "page blocks come from the raw allocator")]

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use crate::address::{Hpa, PAGE_SIZE};

/// The host's translation of its own pointers.
pub trait HostMemory {
    /// The physical address of the byte behind `pointer`, which is mapped.
    fn physical_address(&self, pointer: NonNull<u8>) -> Hpa;
}

/// Host memory for a structure of the processor could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageBlockError {
    /// The allocator has no such block left.
    OutOfMemory,
    /// The block's pages do not follow each other in physical memory.
    NotContiguous,
}

impl fmt::Display for PageBlockError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::OutOfMemory => "no host memory for the processor's structures",
            Self::NotContiguous => "host memory for the processor's structures is not contiguous",
        })
    }
}

impl core::error::Error for PageBlockError {}

/// Zeroed, physically contiguous 4 KiB pages that belong to one owner and are given back on drop.
#[derive(Debug)]
pub struct PageBlock {
    start: NonNull<u8>,
    layout: Layout,
    physical: Hpa,
}

// SAFETY: a block is plain memory of which the value is the only owner.
unsafe impl Send for PageBlock {}
// SAFETY: a shared reference gives out addresses only.
unsafe impl Sync for PageBlock {}

impl PageBlock {
    /// Allocates `pages` pages, at least one.
    ///
    /// # Errors
    /// [`PageBlockError`] if the host has no such memory.
    pub fn new(pages: usize, memory: &dyn HostMemory) -> Result<Self, PageBlockError> {
        let page = PAGE_SIZE as usize;
        let layout = pages
            .max(1)
            .checked_mul(page)
            .and_then(|size| Layout::from_size_align(size, page).ok())
            .ok_or(PageBlockError::OutOfMemory)?;
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc::alloc::alloc_zeroed(layout) };
        let start = NonNull::new(start).ok_or(PageBlockError::OutOfMemory)?;
        let block = Self {
            start,
            layout,
            physical: memory.physical_address(start),
        };
        let contiguous = (0..layout.size()).step_by(page).all(|offset| {
            // SAFETY: the offset is within the block.
            let pointer = unsafe { start.add(offset) };
            memory.physical_address(pointer) == block.physical.wrapping_add(offset as u64)
        });
        if contiguous {
            Ok(block)
        } else {
            Err(PageBlockError::NotContiguous)
        }
    }

    /// The first byte. It is valid for reads and writes of [`PageBlock::size`] bytes as long as the
    /// block lives, and shared with the processor by whatever points it there.
    pub const fn pointer(&self) -> NonNull<u8> {
        self.start
    }

    /// The physical address of the first byte.
    pub const fn physical_address(&self) -> Hpa {
        self.physical
    }

    /// The size in bytes.
    pub const fn size(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for PageBlock {
    fn drop(&mut self) {
        // SAFETY: the block was allocated with this layout and nobody uses it after its owner.
        unsafe { alloc::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shifted;

    impl HostMemory for Shifted {
        fn physical_address(&self, pointer: NonNull<u8>) -> Hpa {
            Hpa::new(pointer.as_ptr() as u64 + 0x10_0000)
        }
    }

    struct Scattered;

    impl HostMemory for Scattered {
        fn physical_address(&self, pointer: NonNull<u8>) -> Hpa {
            Hpa::new(2 * (pointer.as_ptr() as u64))
        }
    }

    #[test]
    fn blocks_are_zeroed_and_aligned() {
        let block = PageBlock::new(3, &Shifted).expect("memory");
        assert_eq!(block.size(), 3 * 4096);
        assert_eq!(block.physical_address().page_offset(), 0);
        // SAFETY: the block is readable over its size.
        let bytes = unsafe { core::slice::from_raw_parts(block.pointer().as_ptr(), block.size()) };
        assert!(bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn scattered_pages_are_refused() {
        assert!(PageBlock::new(1, &Scattered).is_ok());
        assert_eq!(
            PageBlock::new(2, &Scattered).err(),
            Some(PageBlockError::NotContiguous)
        );
    }
}
