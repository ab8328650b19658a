//! A look at one address: what the guest's tables say of it, and what the shadow pages say, level by
//! level.
//!
//! Looking changes nothing, neither marks in the guest's tables nor shadow entries, and allocates
//! nothing: it is for monitors and for the last words on a guest that has died.

use crate::host::Host;
use crate::level::Level;
use crate::mmu::Mmu;
use crate::registers::{Format, GuestPaging, Rights};
use crate::role::{EntryFormat, bits};
use crate::state::{Core, Target};
use crate::vcpu::Vcpu;
use umbra_vcpu::address::{Gfn, Gpa, Gva, Hpa};

/// What guest and shadow say of one address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inspection {
    /// The address, as much of it as translation looks at.
    pub gva: Gva,
    /// The guest's entries on the path, by level: the entry of level *n* at position *n* - 1.
    pub guest: [Option<GuestEntry>; 5],
    /// Where the guest's path ends.
    pub guest_end: GuestEnd,
    /// The shadow entries on the path, by level as well.
    pub shadow: [Option<ShadowEntry>; 5],
    /// Where the shadow's path ends.
    pub shadow_end: ShadowEnd,
}

/// An entry of one of the guest's tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestEntry {
    /// Where the entry is; for a PAE page-directory pointer, which is held in a register, 0.
    pub at: Gpa,
    /// Its place in its table.
    pub index: usize,
    /// Its value; 32-bit paging has 32-bit entries.
    pub value: u64,
}

/// Where the path through the guest's tables ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestEnd {
    /// The guest doesn't page: linear is physical.
    Unpaged {
        /// The address in guest-physical memory.
        gpa: Gpa,
    },
    /// At a page.
    Page {
        /// The address in guest-physical memory.
        gpa: Gpa,
        /// The level of the leaf entry.
        level: Level,
        /// What the whole path permits.
        permits: Permissions,
    },
    /// At an entry that is not present, at this level.
    NotPresent(Level),
    /// At an entry with reserved bits set, at this level.
    Malformed(Level),
    /// Before it begins: the address is not canonical (SDM vol. 1 3.3.7.1).
    NotCanonical,
}

/// What a path permits beyond reading by the supervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permissions {
    /// Whether every entry lets write.
    pub write: Permission,
    /// Whether every entry is open to user mode.
    pub user: Permission,
    /// Whether no entry forbids fetching.
    pub execute: Permission,
}

/// Whether something is permitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Permission {
    /// It is.
    Granted,
    /// It is not.
    Denied,
}

/// An entry of a shadow page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShadowEntry {
    /// The shadow page's frame.
    pub table: Hpa,
    /// The entry's place in it.
    pub index: usize,
    /// The entry as the hardware sees it.
    pub value: u64,
    /// The guest frame that the shadow page belongs to.
    pub gfn: Gfn,
    /// How the shadow page stands to the guest's table.
    pub kind: ShadowKind,
}

/// How a shadow page stands to the guest's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShadowKind {
    /// It has none: it shadows a piece of a large page, or of memory while the guest doesn't page.
    Direct,
    /// The table is write-protected, and the shadow says what it says.
    Synced,
    /// The guest may have changed the table since.
    Unsync,
}

/// Where the path through the shadow pages ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShadowEnd {
    /// There is no root for the guest's registers, or the root has no table for the address.
    NoRoot,
    /// At an empty entry, at this level: an access faults, and is looked up then.
    Empty(Level),
    /// At an entry that says that there is no memory.
    Mmio,
    /// At memory.
    Page {
        /// The host's address.
        hpa: Hpa,
        /// The level of the leaf entry.
        level: Level,
        /// What the leaf permits.
        permits: Permissions,
    },
}

impl From<Rights> for Permissions {
    fn from(rights: Rights) -> Self {
        let permission = |right| {
            if rights.contains(right) {
                Permission::Granted
            } else {
                Permission::Denied
            }
        };
        Self {
            write: permission(Rights::WRITE),
            user: permission(Rights::USER),
            execute: permission(Rights::EXECUTE),
        }
    }
}

impl<H: Host> Mmu<H> {
    /// What guest and shadow say of `gva` under the virtual CPU's registers.
    pub fn inspect(&self, vcpu: &Vcpu, gva: Gva) -> Inspection {
        let paging = vcpu.paging();
        let gva = paging.linear(gva);
        let mut inspection = Inspection {
            gva,
            guest: [None; 5],
            guest_end: GuestEnd::NotCanonical,
            shadow: [None; 5],
            shadow_end: ShadowEnd::NoRoot,
        };
        if is_canonical(paging.format, gva) {
            self.locked(|core| {
                inspection.guest_end = core.inspect_guest(paging, gva, &mut inspection.guest);
                inspection.shadow_end = core.inspect_shadow(vcpu, gva, &mut inspection.shadow);
            });
        }
        inspection
    }
}

fn is_canonical(format: Format, gva: Gva) -> bool {
    let width = match format {
        Format::Unpaged | Format::Legacy | Format::Pae => return true,
        Format::Long4 => 48,
        Format::Long5 => 57,
    };
    let unused = 64 - width;
    (gva.as_u64() << unused).cast_signed() >> unused == gva.as_u64().cast_signed()
}

impl<H: Host> Core<'_, H> {
    fn inspect_guest(
        &self,
        paging: &GuestPaging,
        gva: Gva,
        entries: &mut [Option<GuestEntry>; 5],
    ) -> GuestEnd {
        let features = self.config.features;
        let format = EntryFormat::of(paging);
        let mut table = match paging.format {
            Format::Unpaged => {
                let gpa = Gpa::new(gva.as_u64() & 0xffff_ffff);
                return GuestEnd::Unpaged { gpa };
            }
            Format::Pae => {
                let index = (gva.as_u64() >> 30 & 3) as usize;
                let value = paging.pdptrs.0[index];
                entries[Level::Three.slot()] = Some(GuestEntry {
                    at: Gpa::new(0),
                    index,
                    value,
                });
                if value & bits::PRESENT == 0 {
                    return GuestEnd::NotPresent(Level::Three);
                }
                format.table(value)
            }
            Format::Legacy | Format::Long4 | Format::Long5 => paging.table,
        };
        let mut level = paging.format.root_level();
        let mut rights = Rights::all();
        loop {
            let offset = format.offset(level, gva);
            let value = self.read_guest(paging.format, table, offset);
            let entry_size = if paging.format == Format::Legacy {
                4
            } else {
                8
            };
            entries[level.slot()] = Some(GuestEntry {
                at: Gpa::new(table.base().as_u64() + offset as u64),
                index: offset / entry_size,
                value,
            });
            if value & bits::PRESENT == 0 {
                return GuestEnd::NotPresent(level);
            }
            if format.is_malformed(level, value, features) {
                return GuestEnd::Malformed(level);
            }
            rights &= format.rights(value);
            match level.below() {
                Some(below) if !format.is_leaf(level, value, features) => {
                    table = format.table(value);
                    level = below;
                }
                _ => {
                    let within = (gva.as_u64() >> 12) & (format.pages(level) - 1);
                    let page = format.page(level, value).offset(within);
                    return GuestEnd::Page {
                        gpa: Gpa::new(page.base().as_u64() | gva.page_offset()),
                        level,
                        permits: rights.into(),
                    };
                }
            }
        }
    }

    fn inspect_shadow(
        &self,
        vcpu: &Vcpu,
        gva: Gva,
        entries: &mut [Option<ShadowEntry>; 5],
    ) -> ShadowEnd {
        let Some(root) = self.root_page(vcpu.index(), vcpu.root_key(), gva) else {
            return ShadowEnd::NoRoot;
        };
        let mut id = root.id();
        loop {
            let page = &self.state.pages[id];
            let level = page.role.level;
            let index = level.index(gva);
            let spte = self.load(id, index);
            entries[level.slot()] = Some(ShadowEntry {
                table: page.frame,
                index,
                value: spte.0,
                gfn: page.gfn,
                kind: if page.role.is_direct() {
                    ShadowKind::Direct
                } else if page.unsync {
                    ShadowKind::Unsync
                } else {
                    ShadowKind::Synced
                },
            });
            if spte.is_empty() {
                return ShadowEnd::Empty(level);
            }
            if spte.as_mmio().is_some() {
                return ShadowEnd::Mmio;
            }
            match self.target(id, index, spte) {
                Target::Page(child) => id = child,
                Target::Leaf { .. } => {
                    let within = gva.as_u64() & ((level.pages() << 12) - 1);
                    return ShadowEnd::Page {
                        hpa: Hpa::new(spte.frame().base().as_u64() + within),
                        level,
                        permits: spte.rights().into(),
                    };
                }
            }
        }
    }
}
