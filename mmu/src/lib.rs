//! A KVM-style shadow MMU without hardware: guest page tables in, shadow page tables out.
//!
//! A processor without nested paging walks one set of tables. A hypervisor on such a processor keeps
//! *shadow* tables that say for each guest-virtual address what the guest's own tables and the host's
//! memory say together, and lets the hardware walk those. The shadow begins empty. Each fault asks
//! [`Mmu::handle_page_fault`], which walks the guest's tables and either fills in what is missing,
//! or finds that the fault is the guest's own, or that there is no memory but a device.
//!
//! # Words
//!
//! A *shadow page* is a host frame of 512 *SPTEs* that shadows one guest table, named by its *gfn*
//! and its role: everything besides the table that its entries depend on. A page without a
//! guest table is *direct*: a piece of a large guest page, or of memory while the guest doesn't page.
//! *Reverse maps* lead from a guest frame to the SPTEs that map it, *parents* from a shadow page to
//! the SPTEs that link to it. All pages are on the *active list*, oldest first, and in a hash by gfn.
//! To *zap* a page is to take it out of all of this and clear it; zapped pages are *prepared* into a
//! batch, which is *committed* with one TLB flush and then freed. A zapped page that is somebody's
//! root is *invalid*, on no list, and freed by the last who stands on it. Zapping everything makes all
//! pages *obsolete* at once and zaps them in bounded steps.
//!
//! # The guest writes its tables
//!
//! A shadowed table is write-protected. The first write to it faults, makes the table's shadow pages
//! *unsync* and goes through: from then on their SPTEs are what a TLB is, stale until the guest
//! flushes. A flush brings up to date what the current root leads to; marks in the pages above show
//! the way to what is unsync, so it costs nothing where nothing is (see the `sync` module). Every table
//! may become unsync, at every level, so no instruction has to be emulated for a write to a table, and
//! a table that maps itself needs no exception.
//!
//! # The common fault
//!
//! Most often only the last entry is missing. Links between synced pages say what the guest's upper
//! tables say, and a page's role holds the rights that they leave, so such a fault reads one guest
//! entry, no table above it, and needs no memory (see the `fast` module). Whatever is not the plain
//! success is left to the walk of all levels, which finds the exact error code. Around the entry, empty
//! neighbours whose guest entries have their accessed bits set are filled as well
//! ([`MmuConfig::prefetch`]).
//!
//! # Victims
//!
//! When pages run out, those go first that nothing leads to, then previous roots, then leaves that
//! have not been used, and upper tables last. What was used is told by the accessed bits of the links
//! to a page: the reclaimer's hand goes round the active list, a page found used gets warmer, one
//! found unused gets cooler and goes when it is cold. A new page is met once by the next reclaim,
//! which clears its bit, so that a page that was only used when it was made goes before one that is
//! used again and again.
//!
//! A VM at its own limit takes from itself. Where all VMs together are at theirs ([`MmuPool`]), each
//! gives in proportion to what it holds above [`MINIMUM_PAGES`], and none is driven below while
//! another is above; so it is when the host itself runs low.
//!
//! # Locking
//!
//! One spin lock a VM protects all structures. Memory that an operation may need is allocated before
//! the lock is taken, and the lock is never held across an allocation in the fault path, so the
//! low-memory callback may come at any allocation; it try-locks only. Freeing under the lock is
//! allowed. The pool's list of VMs has a lock of its own, taken before a VM's and never after.
//!
//! # Flushing
//!
//! Whatever takes a right from the hardware (an entry dropped or narrowed) makes a flush pending.
//! The flush is sent before the result is relied upon: before a frame is freed, before a table that
//! was just write-protected is read, and in any case before the lock is released. It goes to every
//! virtual CPU of the VM ([`TlbFlush`]). Entries that only gain rights need none: a processor that
//! still sees the old entry faults and comes back. A virtual CPU must look at its root
//! ([`Mmu::prepare_entry`]) after it has seen the flush request and before it enters the guest.
//! `mmu/interleavings` tries schedules of processors and host against these rules.
//!
//! # What no shadow entry can say
//!
//! - A page that a protection key lets nobody read but everybody fetch: once fetched, it can be read.
//! - With CR0.WP clear and SMAP on, a read-only user page that the supervisor wrote with AC set: until
//!   the user touches it again, the supervisor reaches it with AC clear, too.
//!
//! # Example
//!
//! A host of 64 KiB, a guest with one page table, and the faults of its first instruction:
//!
//! ```
//! use std::cell::{Cell, RefCell};
//! use umbra_mmu::*;
//! use umbra_vcpu::address::{Gfn, Gpa, Gva, Hpa, Pfn};
//! use x86_64::registers::control::{Cr0Flags, Cr4Flags};
//! use x86_64::registers::rflags::RFlags;
//! use x86_64::structures::idt::PageFaultErrorCode;
//!
//! /// Guest RAM and shadow frames in one array of words: guest frames 0 to 3, then ours.
//! struct Machine {
//!     words: Vec<Cell<u64>>,
//!     free: RefCell<Vec<u64>>,
//! }
//!
//! impl Machine {
//!     fn word(&self, frame: u64, index: usize) -> &Cell<u64> {
//!         &self.words[frame as usize * 512 + index]
//!     }
//! }
//!
//! impl GuestMemory for Machine {
//!     fn frame(&self, _: SlotId, page: u64, _: Touch) -> Result<Option<Pfn>, OutOfMemory> {
//!         Ok(Some(Pfn::new(page)))
//!     }
//!     fn load_u32(&self, frame: Pfn, offset: usize) -> u32 {
//!         (self.load_u64(frame, offset & !7) >> (offset % 8 * 8)) as u32
//!     }
//!     fn load_u64(&self, frame: Pfn, offset: usize) -> u64 {
//!         self.word(frame.as_u64(), offset / 8).get()
//!     }
//!     fn compare_exchange_u32(&self, frame: Pfn, offset: usize, current: u32, new: u32) -> Result<u32, u32> {
//!         let (word, shift) = (self.word(frame.as_u64(), offset / 8), offset % 8 * 8);
//!         word.set(word.get() & !(0xffff_ffff << shift) | u64::from(new) << shift);
//!         Ok(current)
//!     }
//!     fn compare_exchange_u64(&self, frame: Pfn, offset: usize, current: u64, new: u64) -> Result<u64, u64> {
//!         self.word(frame.as_u64(), offset / 8).set(new);
//!         Ok(current)
//!     }
//! }
//!
//! impl Frames for Machine {
//!     fn allocate(&self, _: Zone) -> Option<Hpa> {
//!         self.free.borrow_mut().pop().map(|frame| Pfn::new(frame).base())
//!     }
//!     fn free(&self, frame: Hpa) {
//!         self.free.borrow_mut().push(Pfn::containing(frame).as_u64());
//!     }
//!     fn load(&self, frame: Hpa, index: usize) -> u64 {
//!         self.word(Pfn::containing(frame).as_u64(), index).get()
//!     }
//!     fn store(&self, frame: Hpa, index: usize, value: u64) {
//!         self.word(Pfn::containing(frame).as_u64(), index).set(value);
//!     }
//!     fn swap(&self, frame: Hpa, index: usize, value: u64) -> u64 {
//!         self.word(Pfn::containing(frame).as_u64(), index).replace(value)
//!     }
//!     fn compare_exchange(&self, frame: Hpa, index: usize, current: u64, new: u64) -> Result<u64, u64> {
//!         self.store(frame, index, new);
//!         Ok(current)
//!     }
//! }
//!
//! impl TlbFlush for Machine {
//!     fn flush_all(&self) {}
//! }
//!
//! let machine = Machine { words: vec![Cell::new(0); 16 * 512], free: RefCell::new((4..16).collect()) };
//! // The guest's page directory in frame 1 points to the page table in frame 2, which maps linear
//! // address 0x1000 to frame 3, read-only.
//! machine.word(1, 0).set(2 << 12 | 0b111);
//! machine.word(2, 0).set((3 << 12 | 0b101) << 32);
//!
//! let mmu = Mmu::new(machine, MmuConfig::default());
//! let memory = MemorySlot { id: SlotId(0), base: Gfn::new(0), pages: 4, flags: SlotFlags::empty() };
//! mmu.add_slot(memory)?;
//! let mut vcpu = mmu.create_vcpu()?;
//! mmu.load_registers(&mut vcpu, PagingRegisters {
//!     cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
//!     cr3: Cr3::new(1 << 12),
//!     cr4: Cr4Flags::empty(),
//!     ..PagingRegisters::RESET
//! });
//!
//! // The guest's tables have two levels; the hardware gets a PAE table, below 4 GiB.
//! let entry = mmu.prepare_entry(&mut vcpu)?;
//! assert_eq!((entry.mode, entry.change), (ShadowMode::Pae, RootChange::Changed));
//!
//! // It reads 0x1008 and finds the shadow empty. We fill it, and the guest goes on.
//! let mut fault = Fault {
//!     gva: Gva::new(0x1008),
//!     error: PageFaultErrorCode::empty(),
//!     cpl: 0,
//!     rflags: RFlags::empty(),
//! };
//! assert_eq!(mmu.handle_page_fault(&mut vcpu, &fault)?, FaultOutcome::Fixed);
//! // The guest's own entries are marked accessed now.
//! assert_eq!(mmu.host().word(1, 0).get() & 0x20, 0x20);
//!
//! // A write there is the guest's fault, with the error code that its own mode would give.
//! fault.error = PageFaultErrorCode::PROTECTION_VIOLATION | PageFaultErrorCode::CAUSED_BY_WRITE;
//! assert_eq!(
//!     mmu.handle_page_fault(&mut vcpu, &fault)?,
//!     FaultOutcome::Inject(PageFault { gva: fault.gva, error: fault.error })
//! );
//! # mmu.audit()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod arena;
mod audit;
mod budget;
mod caches;
mod config;
mod error;
mod fast;
mod fault;
mod host;
mod inspect;
mod level;
mod lock;
mod memory;
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
mod vcpu;
mod walk;
mod zap;

pub use config::{
    Feature, GUEST_PAGES_PER_SHADOW_PAGE, GuestFeatures, MINIMUM_FREE_PAGES, MINIMUM_PAGES,
    MmuConfig, REFILL_PAGES, VictimPolicy, default_limit,
};
pub use error::{MmuError, NoPageAvailable};
pub use fault::{FaultOutcome, MmioTarget};
pub use host::{Frames, GuestMemory, Host, OutOfMemory, SlotId, TlbFlush, Touch, Zone};
pub use inspect::{
    GuestEnd, GuestEntry, Inspection, Permission, Permissions, ShadowEnd, ShadowEntry, ShadowKind,
};
pub use level::Level;
pub use memory::Accessed;
pub use mmu::{Mmu, TranslateError};
pub use pool::{MmuPool, Shrunk};
pub use registers::{
    Access, AccessKind, Cr3, Fault, HardwareControls, InvalidPdpte, Marking, PageFault,
    PagingRegisters, Pdptrs, Pkru, ShadowMode,
};
pub use slot::{MAXIMUM_SLOTS, MemorySlot, SlotError, SlotFlags};
pub use statistics::Statistics;
pub use vcpu::{HardwareRoot, RootChange, Vcpu};
