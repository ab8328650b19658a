//! What the MMU needs from the host, as traits: guest memory, frames for shadow pages, TLB flushes.
//!
//! Everything that a hardware walker reads goes through these traits, so the whole MMU also runs
//! on an ordinary machine against simulated frames. Methods that may allocate say so; they are
//! called without the MMU lock.

use crate::level::Level;
use umbra_vcpu::address::{Gva, Hpa, Pfn};

/// The host has no memory for what was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfMemory;

/// Names one memory slot of a VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotId(pub u16);

/// Whether a look-up of guest memory may allocate it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touch {
    /// Only look: memory that was never touched is absent and reads as zero. Never allocates.
    Peek,
    /// Give the page a frame if it has none. Called without the MMU lock.
    Allocate,
}

/// Where a frame for the MMU's use must lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zone {
    /// Anywhere.
    Any,
    /// Below 4 GiB: CR3 has only 32 bits outside long mode (SDM vol. 3A 4.4.1).
    Below4GiB,
}

/// The guest's RAM behind its memory slots.
///
/// The frame of a page stays the same until the slot is removed.
pub trait GuestMemory {
    /// The frame behind page `page` (counted from the slot's start), or `None` if it has none yet.
    ///
    /// # Errors
    /// [`OutOfMemory`] if [`Touch::Allocate`] finds none.
    fn frame(&self, slot: SlotId, page: u64, touch: Touch) -> Result<Option<Pfn>, OutOfMemory>;
    /// Atomically loads 4 bytes at the aligned `offset`.
    fn load_u32(&self, frame: Pfn, offset: usize) -> u32;
    /// Atomically loads 8 bytes at the aligned `offset`.
    fn load_u64(&self, frame: Pfn, offset: usize) -> u64;
    /// Stores `new` at the aligned `offset` if it holds `current`.
    ///
    /// # Errors
    /// The value found, if it is another.
    fn compare_exchange_u32(
        &self,
        frame: Pfn,
        offset: usize,
        current: u32,
        new: u32,
    ) -> Result<u32, u32>;
    /// Stores `new` at the aligned `offset` if it holds `current`.
    ///
    /// # Errors
    /// The value found, if it is another.
    fn compare_exchange_u64(
        &self,
        frame: Pfn,
        offset: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64>;
    /// The largest level whose aligned range around `page` is contiguous and equally aligned in
    /// host memory, all of it allocated.
    fn mapping_level(&self, slot: SlotId, page: u64) -> Level {
        let _ = (slot, page);
        Level::One
    }
}

/// Host frames that hold shadow pages.
pub trait Frames {
    /// A zeroed frame, or `None` if there is none. Called without the MMU lock.
    fn allocate(&self, zone: Zone) -> Option<Hpa>;
    /// Takes a frame back. No processor can reach it any more. Must not allocate.
    fn free(&self, frame: Hpa);
    /// Atomically loads an entry.
    fn load(&self, frame: Hpa, index: usize) -> u64;
    /// Atomically stores an entry.
    fn store(&self, frame: Hpa, index: usize, value: u64);
    /// Atomically replaces an entry and returns what was there.
    fn swap(&self, frame: Hpa, index: usize, value: u64) -> u64;
    /// Replaces the entry if it holds `current`.
    ///
    /// # Errors
    /// The value found, if it is another.
    fn compare_exchange(
        &self,
        frame: Hpa,
        index: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64>;
}

/// Makes every virtual CPU of one VM forget translations, the caller's own included.
///
/// When the call returns, no virtual CPU uses an older translation any more: one that runs guest
/// code has been stopped, and one that doesn't will flush before it does. It may be called with the
/// MMU lock held, so it must not wait for a virtual CPU that is outside guest code.
pub trait TlbFlush {
    /// Forget everything, paging-structure caches included.
    fn flush_all(&self);
    /// Forget what concerns one address, and the paging-structure caches.
    fn flush_address(&self, gva: Gva) {
        let _ = gva;
        self.flush_all();
    }
}

/// All that one VM's MMU needs.
pub trait Host: GuestMemory + Frames + TlbFlush {}
impl<T: GuestMemory + Frames + TlbFlush> Host for T {}
