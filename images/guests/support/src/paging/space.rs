//! Address spaces: page tables built and changed by hand, entry by entry.
//!
//! Tables lie in identity-mapped free RAM, so an entry has a physical address that is also where
//! it is read and written. Nothing here flushes: each check says itself what it flushes.

use crate::cpu::{self, Feature, cr0, cr4, efer, has, msr};
use crate::memory::{FREE_END, FREE_START, PhysAddr, VirtAddr, clear, peek, poke};
use crate::trap::Global;

/// Entry bits (SDM vol. 3, 4.3 to 4.5).
pub mod bits {
    #![allow(missing_docs)]
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const PWT: u64 = 1 << 3;
    pub const PCD: u64 = 1 << 4;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// Present, writable, user.
    pub const PWU: u64 = P | W | U;
}

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// How the processor translates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 32-bit paging with CR4.PSE = 0.
    Legacy,
    /// 32-bit paging with CR4.PSE = 1: 4 MiB pages.
    LegacyPse,
    /// PAE paging.
    Pae,
    /// 4-level paging.
    Long,
}

impl Mode {
    /// Whether this is one of the modes with 4-byte entries.
    pub const fn is_legacy(self) -> bool {
        matches!(self, Self::Legacy | Self::LegacyPse)
    }

    /// Bytes of an entry.
    pub const fn entry_bytes(self) -> u64 {
        if self.is_legacy() { 4 } else { 8 }
    }

    /// Number of levels; the root's table is at this level, leaves of 4 KiB at level 1.
    pub const fn levels(self) -> u32 {
        match self {
            Self::Legacy | Self::LegacyPse => 2,
            Self::Pae => 3,
            Self::Long => 4,
        }
    }

    /// The highest level whose entries have permission and accessed bits.
    pub const fn highest_full_level(self) -> u32 {
        match self {
            Self::Legacy | Self::LegacyPse | Self::Pae => 2,
            Self::Long => 4,
        }
    }

    const fn index_bits(self) -> u32 {
        if self.is_legacy() { 10 } else { 9 }
    }

    /// Bytes that an entry at `level` maps.
    pub const fn span(self, level: u32) -> u64 {
        1 << (12 + (level - 1) * self.index_bits())
    }

    /// Index of `address` in its table at `level`.
    pub const fn index(self, address: VirtAddr, level: u32) -> u64 {
        (address.0 as u64 / self.span(level)) & ((1 << self.index_bits()) - 1)
    }

    /// Whether an entry at `level` can map a page of its own.
    pub fn has_large(self, level: u32) -> bool {
        match (self, level) {
            (Self::LegacyPse | Self::Pae | Self::Long, 2) => true,
            (Self::Long, 3) => has(Feature::Gibibyte),
            _ => false,
        }
    }

    /// Whether execute-disable works here.
    pub fn has_nx(self) -> bool {
        !self.is_legacy() && has(Feature::Nx)
    }

    /// Bits of an entry that hold an address.
    pub const fn address_mask(self) -> u64 {
        if self.is_legacy() {
            0xffff_f000
        } else {
            0x000f_ffff_ffff_f000
        }
    }

    /// Where checks map their pages: alone below its entry at the highest level.
    pub const fn window(self) -> VirtAddr {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Long => VirtAddr(0x0000_5a80_4000_0000),
            _ => VirtAddr(0x4000_0000),
        }
    }
}

static NEXT_FREE: Global<u64> = Global::new(FREE_START);

/// Takes `bytes` of zeroed RAM, aligned to `alignment`.
///
/// # Panics
///
/// When free RAM is used up, which is a bug of the guest.
pub fn take(bytes: u64, alignment: u64) -> PhysAddr {
    let start = NEXT_FREE.get().next_multiple_of(alignment);
    assert!(start + bytes <= FREE_END, "out of free RAM");
    NEXT_FREE.set(start + bytes);
    clear(PhysAddr(start), bytes as usize);
    PhysAddr(start)
}

/// Takes one zeroed page frame.
pub fn take_frame() -> PhysAddr {
    take(PAGE, PAGE)
}

/// Gives back everything that was taken; no table taken before may be in use.
pub fn release_all() {
    NEXT_FREE.set(FREE_START);
}

/// A set of page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// How its tables are laid out.
    pub mode: Mode,
    /// Its root table.
    pub root: PhysAddr,
}

impl Space {
    /// A space that identity-maps the guest's RAM for ring 0, with the largest pages there are.
    pub fn new(mode: Mode) -> Self {
        let space = Self {
            mode,
            root: take_frame(),
        };
        if mode == Mode::Pae {
            // The processor loads these four with CR3, so all of them exist from the start.
            for index in 0..4 {
                poke_entry(mode, space.root.plus(index * 8), take_frame().0 | bits::P);
            }
        }
        let level = if mode.has_large(2) { 2 } else { 1 };
        let mut address = 0;
        while address < FREE_END {
            let flags = bits::P | bits::W;
            space.map(VirtAddr(address as usize), level, PhysAddr(address), flags);
            address += mode.span(level);
        }
        space
    }

    /// Makes the processor use it. Paging must be on in its mode.
    pub fn enter(self) {
        cpu::load_root(self.root);
    }

    /// Physical address of the entry for `address` at `level`, creating tables above it with all
    /// permissions.
    ///
    /// # Panics
    ///
    /// When a large page is in the way, which is a bug of the guest.
    pub fn entry(self, address: VirtAddr, level: u32) -> PhysAddr {
        let mut table = self.root;
        let mut at = self.mode.levels();
        loop {
            let entry = table.plus(self.mode.index(address, at) * self.mode.entry_bytes());
            if at == level {
                return entry;
            }
            let value = peek_entry(self.mode, entry);
            table = if value & bits::P == 0 {
                let new = take_frame();
                poke_entry(self.mode, entry, new.0 | bits::PWU);
                new
            } else {
                assert!(
                    at > 2 || value & bits::PS == 0 || !self.mode.has_large(2),
                    "large page"
                );
                PhysAddr(value & self.mode.address_mask())
            };
            at -= 1;
        }
    }

    /// Maps the page of `level` at `address` to `frame` with `flags`.
    pub fn map(self, address: VirtAddr, level: u32, frame: PhysAddr, flags: u64) {
        let large = if level > 1 { bits::PS } else { 0 };
        self.set(address, level, frame.0 | flags | large);
    }

    /// Reads the entry for `address` at `level`.
    pub fn get(self, address: VirtAddr, level: u32) -> u64 {
        peek_entry(self.mode, self.entry(address, level))
    }

    /// Writes the entry for `address` at `level`.
    pub fn set(self, address: VirtAddr, level: u32, value: u64) {
        poke_entry(self.mode, self.entry(address, level), value);
    }

    /// Clears `clear` and sets `set` in the entry for `address` at `level`.
    pub fn change(self, address: VirtAddr, level: u32, clear: u64, set: u64) {
        self.set(address, level, self.get(address, level) & !clear | set);
    }
}

/// Reads an entry.
pub fn peek_entry(mode: Mode, entry: PhysAddr) -> u64 {
    let low = u64::from(peek::<u32>(entry));
    if mode.is_legacy() {
        low
    } else {
        low | u64::from(peek::<u32>(entry.plus(4))) << 32
    }
}

/// Writes an entry: at once where one store does it, else the half with the present bit last.
pub fn poke_entry(mode: Mode, entry: PhysAddr, value: u64) {
    if mode.is_legacy() {
        poke(entry, value as u32);
        return;
    }
    #[cfg(target_arch = "x86_64")]
    poke(entry, value);
    #[cfg(target_arch = "x86")]
    {
        if value & bits::P == 0 {
            poke(entry, value as u32);
            poke(entry.plus(4), (value >> 32) as u32);
        } else {
            poke(entry, 0_u32);
            poke(entry.plus(4), (value >> 32) as u32);
            poke(entry, value as u32);
        }
    }
}

/// Turns paging on in the mode of `space`, with CR0.WP and, where there is one, EFER.NXE.
pub fn turn_on(space: Space) {
    if space.mode.has_nx() {
        cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) | efer::NXE);
    }
    match space.mode {
        Mode::Legacy => cpu::clear_cr4(cr4::PSE | cr4::PAE),
        Mode::LegacyPse => {
            cpu::clear_cr4(cr4::PAE);
            cpu::set_cr4(cr4::PSE);
        }
        Mode::Pae | Mode::Long => cpu::set_cr4(cr4::PAE),
    }
    space.enter();
    cpu::set_cr0(cr0::PG | cr0::WP);
}

/// Turns paging off (32-bit modes).
pub fn turn_off() {
    cpu::clear_cr0(cr0::PG);
    if has(Feature::Nx) {
        cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) & !efer::NXE);
    }
}
