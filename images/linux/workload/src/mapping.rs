//! Memory mappings, and what happens to accesses that they do not allow.
//!
//! Protocol: a [`Mapping`] owns its range of addresses, so nobody else has references into it; every
//! access goes through volatile loads and stores, because pages come and go under the compiler's
//! feet. Accesses that may fault are made by [`Mapping::try_read`] and [`Mapping::try_write`], which
//! have a handler of SIGSEGV open the page and count: that is [`OpeningPages`], and only one thread of the process may use it.

use std::ffi::c_int;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::Failure;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// What may be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing.
    None,
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
    /// Reading and executing.
    ReadExecute,
}

impl Protection {
    /// Whether reading is allowed.
    pub fn is_readable(self) -> bool {
        self != Self::None
    }

    /// Whether writing is allowed.
    pub fn is_writable(self) -> bool {
        self == Self::ReadWrite
    }

    fn flags(self) -> ProtFlags {
        match self {
            Self::None => ProtFlags::PROT_NONE,
            Self::Read => ProtFlags::PROT_READ,
            Self::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            Self::ReadExecute => ProtFlags::PROT_READ | ProtFlags::PROT_EXEC,
        }
    }
}

/// Whether a file sees what is written to its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It does.
    Shared,
    /// It does not.
    Private,
}

impl Sharing {
    fn flags(self) -> MapFlags {
        match self {
            Self::Shared => MapFlags::MAP_SHARED,
            Self::Private => MapFlags::MAP_PRIVATE,
        }
    }
}

/// A range of pages of this process, which may have holes.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

impl Mapping {
    /// Maps so many pages of zeroes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn anonymous(pages: usize) -> Result<Self, Failure> {
        let length = pages * PAGE;
        let size = NonZeroUsize::new(length).ok_or("a mapping of no pages")?;
        // SAFETY: the kernel chooses addresses that nobody uses.
        let start = unsafe {
            mmap_anonymous(
                None,
                size,
                Protection::ReadWrite.flags(),
                MapFlags::MAP_PRIVATE,
            )
        };
        let start = start
            .map_err(|error| format!("mmap of {pages} pages: {error}"))?
            .cast();
        Ok(Self { start, length })
    }

    /// Maps a file from its beginning.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of_file(file: &File, pages: usize, sharing: Sharing) -> Result<Self, Failure> {
        let length = pages * PAGE;
        let size = NonZeroUsize::new(length).ok_or("a mapping of no pages")?;
        let protection = Protection::ReadWrite.flags();
        // SAFETY: the kernel chooses addresses that nobody uses.
        let start = unsafe { mmap(None, size, protection, sharing.flags(), file, 0) };
        let start = start
            .map_err(|error| format!("mmap of a file: {error}"))?
            .cast();
        Ok(Self { start, length })
    }

    /// The number of its pages.
    pub fn pages(&self) -> usize {
        self.length / PAGE
    }

    /// Where it begins.
    pub fn address(&self) -> usize {
        self.start.addr().get()
    }

    /// Reads the word at `offset`, which must be aligned and readable.
    pub fn read(&self, offset: usize) -> u64 {
        // SAFETY: `word` gives an aligned address inside the mapping; a page that is not there ends
        // the process, or is what `try_read` asks for.
        unsafe { self.word(offset).read_volatile() }
    }

    /// Writes the word at `offset`, which must be aligned and writable.
    pub fn write(&self, offset: usize, value: u64) {
        // SAFETY: as in `read`; there are no references into a mapping.
        unsafe { self.word(offset).write_volatile(value) };
    }

    /// Reads like [`Mapping::read`], and says whether the page had to be opened for it.
    pub fn try_read(&self, offset: usize) -> (u64, Faults) {
        let before = FAULTS.load(Ordering::SeqCst);
        let value = self.read(offset);
        (value, Faults::since(before))
    }

    /// Writes like [`Mapping::write`], and says whether the page had to be opened for it.
    pub fn try_write(&self, offset: usize, value: u64) -> Faults {
        let before = FAULTS.load(Ordering::SeqCst);
        self.write(offset, value);
        Faults::since(before)
    }

    /// Whether the kernel can read the byte at `offset` on our behalf.
    pub fn is_there(&self, offset: usize, sink: &File) -> bool {
        // SAFETY: the kernel checks the address.
        let written =
            unsafe { libc::write(sink.as_fd().as_raw_fd(), self.at(offset, 1).cast(), 1) };
        written == 1
    }

    /// Changes what may be done with `pages` pages from page `first` on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn protect(
        &self,
        first: usize,
        pages: usize,
        protection: Protection,
    ) -> Result<(), Failure> {
        let start = self.page(first, pages);
        // SAFETY: the range is the mapping's own, and nobody has references into it.
        let result = unsafe { mprotect(start, pages * PAGE, protection.flags()) };
        result.map_err(|error| format!("mprotect: {error}").into())
    }

    /// Makes a hole of `pages` pages from page `first` on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn punch(&self, first: usize, pages: usize) -> Result<(), Failure> {
        let start = self.page(first, pages);
        // SAFETY: as in `protect`.
        let result = unsafe { munmap(start, pages * PAGE) };
        result.map_err(|error| format!("munmap: {error}").into())
    }

    /// Maps zeroes where `pages` pages from page `first` on were.
    ///
    /// # Errors
    /// The kernel's.
    pub fn refill(&self, first: usize, pages: usize) -> Result<(), Failure> {
        let start = self.page(first, pages).addr().get();
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED;
        let (start, size) = NonZeroUsize::new(start)
            .zip(NonZeroUsize::new(pages * PAGE))
            .ok_or("a range of no pages")?;
        // SAFETY: the addresses are the mapping's own, and nobody has references into it.
        let result =
            unsafe { mmap_anonymous(Some(start), size, Protection::ReadWrite.flags(), flags) };
        result
            .map(|_| ())
            .map_err(|error| format!("mmap: {error}").into())
    }

    /// Puts a function that returns `value` on page `page`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write_function(&self, page: usize, value: u32) -> Result<(), Failure> {
        self.protect(page, 1, Protection::ReadWrite)?;
        // mov eax, value; ret; nop; nop
        let [a, b, c, d] = value.to_le_bytes();
        let code = [0xb8, a, b, c, d, 0xc3, 0x90, 0x90];
        self.write(page * PAGE, u64::from_le_bytes(code));
        self.protect(page, 1, Protection::ReadExecute)
    }

    /// Calls what [`Mapping::write_function`] has put on page `page`.
    pub fn call(&self, page: usize) -> u32 {
        let start = self.page(page, 1).as_ptr();
        // SAFETY: `write_function` has put a whole function there that keeps the C convention.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(start) };
        function()
    }

    /// The address of a page, after a check that the range is inside the mapping.
    fn page(&self, first: usize, pages: usize) -> NonNull<libc::c_void> {
        assert!(
            first + pages <= self.pages(),
            "page {first} and {pages} more are outside the mapping"
        );
        // SAFETY: it is inside the mapping.
        unsafe { self.start.add(first * PAGE) }.cast()
    }

    #[allow(clippy::cast_ptr_alignment, reason = "`at` checks the alignment")]
    fn word(&self, offset: usize) -> *mut u64 {
        self.at(offset, size_of::<u64>()).cast()
    }

    /// The address of `length` bytes, which are a word or a part of it.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset + length <= self.length && offset.is_multiple_of(length),
            "offset {offset:#x} is outside the mapping or misaligned"
        );
        // SAFETY: it is inside the mapping.
        unsafe { self.start.add(offset) }.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping's own, and nobody has references into it.
        let _ = unsafe { munmap(self.start.cast(), self.length) };
    }
}

// SAFETY: a mapping is memory like any other; volatile accesses of several threads to different words
// do not touch each other.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

static FAULTS: AtomicUsize = AtomicUsize::new(0);
static LAST_FAULT: AtomicUsize = AtomicUsize::new(0);

/// What faults an access had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults {
    /// How many.
    pub count: usize,
    /// The address of the last one of this process.
    pub last: usize,
}

impl Faults {
    fn since(before: usize) -> Self {
        Self {
            count: FAULTS.load(Ordering::SeqCst).wrapping_sub(before),
            last: LAST_FAULT.load(Ordering::SeqCst),
        }
    }
}

/// While it lives, faults of this process are counted, and the pages that they are on are opened.
pub struct OpeningPages {
    before: SigAction,
}

impl OpeningPages {
    /// Begins.
    ///
    /// # Errors
    /// The kernel's.
    pub fn begin() -> Result<Self, Failure> {
        let handler = SigHandler::SigAction(open_page);
        let action = SigAction::new(handler, SaFlags::SA_SIGINFO, SigSet::empty());
        // SAFETY: the handler uses atomics and one system call, and no lock.
        let before = unsafe { sigaction(Signal::SIGSEGV, &action) };
        let before = before.map_err(|error| format!("sigaction: {error}"))?;
        Ok(Self { before })
    }
}

impl Drop for OpeningPages {
    fn drop(&mut self) {
        // SAFETY: this is what was there before.
        let _ = unsafe { sigaction(Signal::SIGSEGV, &self.before) };
    }
}

/// Handles SIGSEGV.
extern "C" fn open_page(_: c_int, information: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, which has an address for this signal.
    let address = unsafe { (*information).si_addr() };
    LAST_FAULT.store(address.addr(), Ordering::SeqCst);
    FAULTS.fetch_add(1, Ordering::SeqCst);
    let page = address.map_addr(|address| address & !(PAGE - 1));
    // SAFETY: the kernel checks the range.
    let result = unsafe { libc::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE) };
    if result != 0 {
        // A fault outside any mapping would come again for ever.
        // SAFETY: it ends the process at once.
        unsafe { libc::_exit(STRAY_FAULT) };
    }
}

/// The exit status of a process that has touched what is not mapped.
pub const STRAY_FAULT: c_int = 99;
