//! Addresses, and accesses that come back with the exception that they raised.

use core::fmt;

use crate::trap::{Trap, catch};

/// Where RAM that belongs to nobody starts: above image, loader data and modules.
pub const FREE_START: u64 = 8 << 20;

/// End of the identity-mapped RAM that tests may use.
pub const FREE_END: u64 = 32 << 20;

/// A guest virtual (linear) address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VirtAddr(pub usize);

/// A guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PhysAddr(pub u64);

impl VirtAddr {
    /// This address plus `bytes`.
    #[must_use]
    pub const fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes)
    }
}

impl PhysAddr {
    /// This address plus `bytes`.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }

    /// Where the identity mapping shows it.
    #[must_use]
    pub const fn identity(self) -> VirtAddr {
        VirtAddr(self.0 as usize)
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#x}", self.0)
    }
}

impl fmt::Debug for PhysAddr {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#x}", self.0)
    }
}

/// Integers that one instruction loads and stores.
pub trait Word: Copy + PartialEq + fmt::Debug {}

impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for usize {}
#[cfg(target_arch = "x86_64")]
impl Word for u64 {}

/// Loads from `address`.
///
/// # Errors
///
/// The exception that the load raised.
pub fn read<T: Word>(address: VirtAddr) -> Result<T, Trap> {
    // SAFETY: any bit pattern is a `Word`; a bad address raises an exception that `catch` returns.
    catch(|| unsafe { load(address.0 as *const T) })
}

/// Stores to `address`.
///
/// # Errors
///
/// The exception that the store raised.
pub fn write<T: Word>(address: VirtAddr, value: T) -> Result<(), Trap> {
    // SAFETY: the crate's fact 2: tests store where no Rust object lies.
    catch(|| unsafe { store(address.0 as *mut T, value) })
}

/// Loads from identity-mapped RAM.
pub fn peek<T: Word>(address: PhysAddr) -> T {
    // SAFETY: the crate's fact 2.
    unsafe { load(address.identity().0 as *const T) }
}

/// Stores to identity-mapped RAM.
pub fn poke<T: Word>(address: PhysAddr, value: T) {
    // SAFETY: the crate's fact 2.
    unsafe { store(address.identity().0 as *mut T, value) }
}

/// A word of identity-mapped RAM that others change, too: other processors, or this one's walk of
/// page tables.
///
/// # Panics
///
/// If the address is not aligned.
#[cfg(target_arch = "x86_64")]
pub fn atomic(address: PhysAddr) -> &'static core::sync::atomic::AtomicU64 {
    assert!(address.0.is_multiple_of(8), "{address:?} is not aligned");
    // SAFETY: the crate's fact 2; the RAM is never given back, and aligned.
    unsafe { core::sync::atomic::AtomicU64::from_ptr(address.identity().0 as *mut u64) }
}

/// Fills `bytes` bytes of identity-mapped RAM with zeroes.
pub fn clear(address: PhysAddr, bytes: usize) {
    // SAFETY: the crate's fact 2.
    unsafe { (address.identity().0 as *mut u8).write_bytes(0, bytes) };
}

/// Copies `bytes` into identity-mapped RAM.
pub fn copy_to(address: PhysAddr, bytes: &[u8]) {
    for (index, byte) in bytes.iter().enumerate() {
        poke(address.plus(index as u64), *byte);
    }
}

/// # Safety
///
/// As for `read_volatile`, but alignment does not matter.
unsafe fn load<T: Word>(pointer: *const T) -> T {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the caller's promise; the asm writes the whole value (one plain load of its width).
    unsafe {
        let slot = value.as_mut_ptr();
        match size_of::<T>() {
            1 => core::arch::asm!("mov {t}, byte ptr [{p}]", "mov byte ptr [{s}], {t}",
                t = out(reg_byte) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            2 => core::arch::asm!("mov {t:x}, word ptr [{p}]", "mov word ptr [{s}], {t:x}",
                t = out(reg) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            4 => core::arch::asm!("mov {t:e}, dword ptr [{p}]", "mov dword ptr [{s}], {t:e}",
                t = out(reg) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            #[cfg(target_arch = "x86_64")]
            8 => core::arch::asm!("mov {t}, qword ptr [{p}]", "mov qword ptr [{s}], {t}",
                t = out(reg) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            _ => unreachable!(),
        }
        value.assume_init()
    }
}

/// # Safety
///
/// As for `write_volatile`, but alignment does not matter.
unsafe fn store<T: Word>(pointer: *mut T, value: T) {
    let slot = &raw const value;
    // SAFETY: the caller's promise; one plain store of the value's width.
    unsafe {
        match size_of::<T>() {
            1 => core::arch::asm!("mov {t}, byte ptr [{s}]", "mov byte ptr [{p}], {t}",
                t = out(reg_byte) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            2 => core::arch::asm!("mov {t:x}, word ptr [{s}]", "mov word ptr [{p}], {t:x}",
                t = out(reg) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            4 => core::arch::asm!("mov {t:e}, dword ptr [{s}]", "mov dword ptr [{p}], {t:e}",
                t = out(reg) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            #[cfg(target_arch = "x86_64")]
            8 => core::arch::asm!("mov {t}, qword ptr [{s}]", "mov qword ptr [{p}], {t}",
                t = out(reg) _, p = in(reg) pointer, s = in(reg) slot, options(nostack)),
            _ => unreachable!(),
        }
    }
}
