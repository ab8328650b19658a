//! A KVM-style shadow MMU without hardware: guest page tables in, shadow page tables out.
//!
//! # Locking and flushing
//!
//! One spin lock a VM protects all structures. Memory that an operation may need is allocated
//! before the lock is taken and the lock is never held across an allocation, so a low-memory
//! callback may fire at any allocation; it try-locks only. Freeing under the lock is allowed.
//!
//! Whatever takes a right from the hardware (an entry dropped or narrowed) makes a flush pending.
//! The flush is sent before the result is relied upon: before a frame is freed, before a table just
//! write-protected is read, and in any case before the lock is released. Entries that only gain
//! rights need none: a processor that still sees the old entry faults and comes back.
//!
//! Frames belong to the shadow page that they hold; only the commit of a batch frees them.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod arena;
mod audit;
mod budget;
mod config;
mod error;
mod fault;
mod host;
mod level;
mod mmu;
mod page;
mod pool;
mod reclaim;
mod registers;
mod rmap;
mod role;
mod root;
mod slot;
mod spte;
mod state;
mod statistics;
mod sync;
mod walk;
mod zap;

pub use config::{
    Feature, GUEST_PAGES_PER_SHADOW_PAGE, GuestFeatures, MINIMUM_FREE_PAGES, MINIMUM_PAGES,
    MmuConfig, REFILL_PAGES, VictimPolicy, default_limit,
};
pub use error::{MmuError, NoPageAvailable};
pub use fault::{FaultOutcome, MmioTarget};
pub use host::{Frames, GuestMemory, Host, OutOfMemory, SlotId, TlbFlush, Touch, Zone};
pub use level::Level;
pub use mmu::{Accessed, HardwareRoot, Mmu, RootChange, TranslateError, Vcpu};
pub use pool::{MmuPool, Shrunk};
pub use registers::{
    Access, AccessKind, Cr3, Fault, HardwareControls, InvalidPdpte, Marking, PageFault,
    PagingRegisters, Pdptrs, Pkru, ShadowMode,
};
pub use slot::{MAXIMUM_SLOTS, MemorySlot, SlotError, SlotFlags};
pub use statistics::Statistics;
