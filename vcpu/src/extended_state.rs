//! Switching of x87, SSE and AVX state between guests.
//!
//! Host code never touches these registers (it is built soft-float), so a guest's state simply
//! stays in them until another guest is entered on the same core. Protocol: a driver calls
//! [`ExtendedStateOwner::acquire`] with its own [`ExtendedState`] before each entry, with
//! interrupts off; that saves the previous owner's registers and loads its own if the owner
//! changed. XCR0 is switched by the driver around the entry, because the host keeps its own.
#![allow(unsafe_code, reason = "XSAVE and XRSTOR have no safe wrapper")]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::asm;
use core::ptr::NonNull;

use crate::host::PageBlockError;

/// Bytes reserved for one guest's state: enough for x87, SSE, AVX, MPX, AVX-512 and PKRU in the
/// standard format (SDM vol. 1 13.5; 2696 bytes), rounded up.
pub const AREA_SIZE: usize = 4096;

/// How the processor saves extended state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveMethod {
    /// FXSAVE: x87 and SSE only.
    Fxsave,
    /// XSAVE with the given state components, a subset of what CPUID leaf 0xD lists.
    Xsave {
        /// The components, in the bits of XCR0.
        components: u64,
    },
}

/// A guest's x87, SSE and AVX registers while they are not in the processor.
#[repr(C, align(64))]
pub struct ExtendedState {
    area: [u8; AREA_SIZE],
}

impl ExtendedState {
    /// The state after reset: x87 as FNINIT leaves it, MXCSR 0x1F80, all else zero
    /// (SDM vol. 3A table 10-1 and vol. 1 13.6).
    pub const fn new() -> Self {
        let mut area = [0; AREA_SIZE];
        // FCW at byte 0 and MXCSR at byte 24 of the legacy region (SDM vol. 1 table 13-1).
        area[0] = 0x7f;
        area[1] = 0x03;
        area[24] = 0x80;
        area[25] = 0x1f;
        // XSTATE_BV: x87 and SSE come from the legacy region, the rest from its initial state.
        area[XSTATE_BV] = 0b11;
        Self { area }
    }

    /// The same on the heap.
    ///
    /// # Errors
    /// [`PageBlockError::OutOfMemory`].
    pub fn allocate() -> Result<Box<Self>, PageBlockError> {
        let mut place = Vec::new();
        place
            .try_reserve_exact(1)
            .map_err(|_| PageBlockError::OutOfMemory)?;
        place.push(Self::new());
        let first = Box::into_raw(place.into_boxed_slice()).cast();
        // SAFETY: the slice has one item, so its memory is that of a box of the item.
        Ok(unsafe { Box::from_raw(first) })
    }

    /// XMM register `index`, 0 to 15.
    pub fn xmm(&self, index: u8) -> u128 {
        // SSE registers in their initial state need not stand in the area.
        if self.area[XSTATE_BV] & XSTATE_SSE == 0 {
            return 0;
        }
        let at = xmm_offset(index);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.area[at..at + 16]);
        u128::from_le_bytes(bytes)
    }

    /// Sets XMM register `index`, 0 to 15; the upper part of its YMM register stays.
    pub fn set_xmm(&mut self, index: u8, value: u128) {
        if self.area[XSTATE_BV] & XSTATE_SSE == 0 {
            self.area[XMM0..XMM0 + 256].fill(0);
            self.area[XSTATE_BV] |= XSTATE_SSE;
        }
        let at = xmm_offset(index);
        self.area[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }
}

impl ExtendedState {
    /// MMX register `index`, 0 to 7: the low 64 bits of the x87 register of that number.
    pub fn mmx(&self, index: u8) -> u64 {
        if self.area[XSTATE_BV] & XSTATE_X87 == 0 {
            return 0;
        }
        let at = self.mmx_offset(index);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.area[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// The x87 control word and status word.
    pub fn x87_words(&self) -> (u16, u16) {
        if self.area[XSTATE_BV] & XSTATE_X87 == 0 {
            return (X87_CONTROL, 0);
        }
        let word = |at: usize| u16::from_le_bytes([self.area[at], self.area[at + 1]]);
        (word(0), word(2))
    }

    /// What FNINIT does: no register is valid, no exception is pending, and all are masked.
    pub fn reset_x87(&mut self) {
        self.area[..24].fill(0);
        self.area[..2].copy_from_slice(&X87_CONTROL.to_le_bytes());
        if self.area[XSTATE_BV] & XSTATE_X87 == 0 {
            self.area[X87_REGISTERS..XMM0].fill(0);
            self.area[XSTATE_BV] |= XSTATE_X87;
        }
    }

    /// Sets MMX register `index`, 0 to 7, as an MMX instruction does: sign and exponent become all
    /// ones, the top of the x87 stack 0, and all its registers valid (SDM vol. 3A 13.2).
    pub fn set_mmx(&mut self, index: u8, value: u64) {
        if self.area[XSTATE_BV] & XSTATE_X87 == 0 {
            self.reset_x87();
        }
        // The area has the registers in the order of the stack, which turns with its top.
        let top = self.x87_top();
        self.area[X87_REGISTERS..XMM0].rotate_right(16 * usize::from(top));
        self.area[3] &= !0x38;
        self.area[4] = 0xff;
        let at = self.mmx_offset(index);
        self.area[at..at + 8].copy_from_slice(&value.to_le_bytes());
        self.area[at + 8..at + 10].fill(0xff);
    }

    /// The x87 registers and MXCSR in the format of FXSAVE64 (SDM vol. 1 table 10-3).
    pub fn legacy_region(&self) -> [u8; LEGACY_SIZE] {
        let mut region = [0; LEGACY_SIZE];
        if self.area[XSTATE_BV] & XSTATE_X87 == 0 {
            region[..2].copy_from_slice(&X87_CONTROL.to_le_bytes());
        } else {
            region.copy_from_slice(&self.area[..LEGACY_SIZE]);
        }
        // MXCSR stands there whatever the header says.
        region[MXCSR].copy_from_slice(&self.area[MXCSR]);
        region
    }

    /// Sets the x87 registers and MXCSR, whose reserved bits are clear.
    pub fn set_legacy_region(&mut self, region: &[u8; LEGACY_SIZE]) {
        if self.area[XSTATE_BV] & XSTATE_SSE == 0 {
            self.area[XMM0..XMM0 + 256].fill(0);
        }
        self.area[XSTATE_BV] |= XSTATE_X87 | XSTATE_SSE;
        let mask = [28, 29, 30, 31].map(|at| self.area[at]);
        self.area[..LEGACY_SIZE].copy_from_slice(region);
        self.area[28..32].copy_from_slice(&mask);
    }

    const fn x87_top(&self) -> u8 {
        self.area[3] >> 3 & 7
    }

    fn mmx_offset(&self, index: u8) -> usize {
        let place = index.wrapping_sub(self.x87_top()) & 7;
        X87_REGISTERS + 16 * usize::from(place)
    }
}

/// Bytes of an area before the XMM registers.
pub const LEGACY_SIZE: usize = 160;
/// Where MXCSR stands.
const MXCSR: core::ops::Range<usize> = 24..28;
/// The x87 control word after FNINIT.
const X87_CONTROL: u16 = 0x037f;
/// Where ST0 stands.
const X87_REGISTERS: usize = 32;
const XSTATE_X87: u8 = 1 << 0;
/// Where the header says which components the area holds (SDM vol. 1 13.4.2).
const XSTATE_BV: usize = 512;
const XSTATE_SSE: u8 = 1 << 1;
/// Where XMM0 stands (SDM vol. 1 table 13-1).
const XMM0: usize = 160;

const fn xmm_offset(index: u8) -> usize {
    XMM0 + 16 * (index & 15) as usize
}

impl Default for ExtendedState {
    fn default() -> Self {
        Self::new()
    }
}

/// Whose state the registers of one core hold.
#[derive(Debug)]
pub struct ExtendedStateOwner {
    owner: Option<NonNull<ExtendedState>>,
    method: SaveMethod,
}

// SAFETY: the pointer is dereferenced only by `acquire`, whose contract is that the pointed-to
// state is alive and used by no one else.
unsafe impl Send for ExtendedStateOwner {}

impl ExtendedStateOwner {
    /// An owner record for a core whose registers hold nothing worth keeping.
    pub const fn new(method: SaveMethod) -> Self {
        Self {
            owner: None,
            method,
        }
    }

    /// Whether the core's registers hold `state`.
    pub fn is_owner(&self, state: NonNull<ExtendedState>) -> bool {
        self.owner == Some(state)
    }

    /// Makes `state` the owner of this core's registers.
    ///
    /// # Safety
    /// 1. The caller runs on the core that this record describes, in ring 0, with CR0.TS and CR0.EM
    ///    clear, CR4.OSFXSR set and, for [`SaveMethod::Xsave`], CR4.OSXSAVE set and XCR0 equal to
    ///    the method's components.
    /// 2. `state`, and every state acquired before, lives and stays in place until it is
    ///    released or another record's core has taken it over.
    pub unsafe fn acquire(&mut self, state: NonNull<ExtendedState>) {
        if self.owner == Some(state) {
            return;
        }
        if let Some(previous) = self.owner {
            // SAFETY: the caller's promises 1 and 2.
            unsafe { save(previous, self.method) };
        }
        // SAFETY: the caller's promises 1 and 2.
        unsafe { load(state, self.method) };
        self.owner = Some(state);
    }

    /// Saves `state` and makes nobody the owner, if it is the owner now.
    ///
    /// # Safety
    /// As [`ExtendedStateOwner::acquire`].
    pub unsafe fn suspend(&mut self, state: NonNull<ExtendedState>) {
        if self.owner == Some(state) {
            // SAFETY: the caller's promises 1 and 2.
            unsafe { save(state, self.method) };
            self.owner = None;
        }
    }

    /// Forgets `state` if it is the owner, before it is dropped. Its registers are lost.
    pub fn release(&mut self, state: NonNull<ExtendedState>) {
        if self.owner == Some(state) {
            self.owner = None;
        }
    }
}

/// # Safety
/// As [`ExtendedStateOwner::acquire`].
unsafe fn save(state: NonNull<ExtendedState>, method: SaveMethod) {
    let area = state.as_ptr();
    match method {
        // SAFETY: the area is writable, aligned to 64 bytes and larger than 512 bytes.
        SaveMethod::Fxsave => unsafe { asm!("fxsave64 [{}]", in(reg) area, options(nostack)) },
        SaveMethod::Xsave { components } => {
            // SAFETY: the area is writable, aligned to 64 bytes and holds every component in the
            // standard format.
            unsafe {
                asm!(
                    "xsave64 [{}]",
                    in(reg) area,
                    in("eax") components as u32,
                    in("edx") (components >> 32) as u32,
                    options(nostack)
                );
            }
        }
    }
}

/// # Safety
/// As [`ExtendedStateOwner::acquire`].
unsafe fn load(state: NonNull<ExtendedState>, method: SaveMethod) {
    let area = state.as_ptr();
    match method {
        // SAFETY: the area is readable, aligned, and was made by `new` or FXSAVE.
        SaveMethod::Fxsave => unsafe { asm!("fxrstor64 [{}]", in(reg) area, options(nostack)) },
        SaveMethod::Xsave { components } => {
            // SAFETY: the area is readable, aligned, and was made by `new` or XSAVE, so its
            // header is valid.
            unsafe {
                asm!(
                    "xrstor64 [{}]",
                    in(reg) area,
                    in("eax") components as u32,
                    in("edx") (components >> 32) as u32,
                    options(nostack)
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MXCSR as it stands in a saved area.
    fn mxcsr(state: &ExtendedState) -> u32 {
        u32::from_le_bytes(state.area[24..28].try_into().expect("four bytes"))
    }

    #[test]
    fn suspended_registers_can_be_changed() {
        let value = 0x0123_4567_89ab_cdef_1122_3344_5566_7788_u128;
        let mut state = ExtendedState::new();
        state.set_xmm(15, value);
        state.area[XSTATE_BV] = 1;
        assert_eq!(state.xmm(15), 0, "in its initial state");
        state.set_xmm(3, 5);
        assert_eq!((state.xmm(3), state.xmm(15)), (5, 0));
        state.set_xmm(15, value);
        let pointer = NonNull::from(&mut state);
        let mut owner = ExtendedStateOwner::new(SaveMethod::Fxsave);
        // SAFETY: an ordinary process may use FXSAVE and FXRSTOR, the state outlives the record, and
        // no floating-point value is live in this function.
        unsafe {
            owner.acquire(pointer);
            (*pointer.as_ptr()).area = [0xff; AREA_SIZE];
            owner.suspend(pointer);
        }
        assert!(!owner.is_owner(pointer));
        assert_eq!((state.xmm(3), state.xmm(15)), (5, value));
    }

    #[test]
    fn mmx_registers_lie_in_x87_registers() {
        let mut state = ExtendedState::new();
        state.set_mmx(3, 0x1122_3344_5566_7788);
        assert_eq!(state.mmx(3), 0x1122_3344_5566_7788);
        assert_eq!(state.area[4], 0xff, "all are valid");
        // With another top of the stack the area has them in another order.
        state.area[3] |= 5 << 3;
        state.area[X87_REGISTERS..XMM0].rotate_left(5 * 16);
        assert_eq!(state.mmx(3), 0x1122_3344_5566_7788);
        state.set_mmx(6, 9);
        assert_eq!((state.mmx(3), state.mmx(6)), (0x1122_3344_5566_7788, 9));
        assert_eq!(state.x87_words(), (X87_CONTROL, 0), "the top is 0 again");
        state.reset_x87();
        assert_eq!(state.area[4], 0);
        state.area[XSTATE_BV] = 0;
        assert_eq!(state.mmx(6), 0, "in its initial state");
    }

    #[test]
    fn a_change_of_owner_saves_and_loads() {
        let mut first = ExtendedState::new();
        let mut second = ExtendedState::new();
        first.area[24..28].copy_from_slice(&0x1f81_u32.to_le_bytes());
        second.area[24..28].copy_from_slice(&0x1f82_u32.to_le_bytes());
        let (one, two) = (NonNull::from(&mut first), NonNull::from(&mut second));
        let mut owner = ExtendedStateOwner::new(SaveMethod::Fxsave);
        // SAFETY: an ordinary process may use FXSAVE and FXRSTOR, both states outlive the record,
        // and no floating-point value is live in this function.
        unsafe {
            owner.acquire(one);
            (*one.as_ptr()).area = [0; AREA_SIZE];
            owner.acquire(two);
        }
        assert_eq!(mxcsr(&first), 0x1f81, "saved when the owner changed");
        let mut clean = ExtendedState::new();
        // SAFETY: as above; this leaves the registers as a thread starts with them.
        unsafe { owner.acquire(NonNull::from(&mut clean)) };
        assert_eq!(mxcsr(&second), 0x1f82);
        owner.release(NonNull::from(&mut clean));
    }
}
