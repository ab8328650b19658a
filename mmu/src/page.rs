//! Shadow pages, the table that owns them, and the lists that they are on.
//!
//! A page is in exactly one state. `Active`: on the active list (oldest first) and in the gfn hash.
//! `Invalid`: zapped while it was a root in use; on no list, unreachable through the hash, freed
//! when its root count reaches 0. `Zapped`: in a batch, waiting for the batch's commit.
//!
//! Only an [`ActivePage`] can be linked into a table, listed or made a root, and only
//! [`PageTable::active`] makes one, so an invalid page cannot come back.

use crate::arena::Arena;
use crate::level::{ENTRIES, Level};
use crate::registers::{Format, Pkru, Rights};
use crate::rmap::RmapHead;
use crate::role::{Role, RoleFlags};
use alloc::boxed::Box;
use core::num::NonZeroU32;
use hashbrown::HashTable;
use umbra_vcpu::address::{Gfn, Hpa};

/// Neighbouring entries that share a bit in a page's maps of its entries.
pub(crate) const GROUP: usize = ENTRIES / u64::BITS as usize;

/// The numbers of the bits that are set, from the lowest on.
pub(crate) fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let number = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(number)
    })
}

/// The bit of the group that entry `index` is in.
#[inline]
pub(crate) const fn group_bit(index: usize) -> u64 {
    1 << (index / GROUP)
}

/// Names a shadow page; at most 2^22 of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct PageId(NonZeroU32);

/// The most pages that a [`PageId`] can name.
pub(crate) const MAXIMUM_PAGES: usize = (1 << 22) - 2;

impl PageId {
    #[inline]
    pub const fn number(self) -> u32 {
        self.0.get()
    }

    /// # Panics
    /// On 0, which no page and no entry's reference ever has.
    #[inline]
    pub const fn from_number(number: u32) -> Self {
        Self(NonZeroU32::new(number).expect("shadow page 0 does not exist"))
    }
}

/// A page that was on the active list when this was made. Not kept across anything that zaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ActivePage(PageId);

impl ActivePage {
    pub const fn id(self) -> PageId {
        self.0
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum PageState {
    #[default]
    Unused,
    Active,
    Invalid,
    Zapped,
}

/// For each entry what the entry itself cannot say: a leaf's guest frame and rights, or a link's
/// page.
pub(crate) type Translations = Box<[u64; ENTRIES]>;

/// What a shadow page begins with.
pub(crate) struct NewPage {
    pub gfn: Gfn,
    pub role: Role,
    pub frame: Hpa,
    pub translations: Option<Translations>,
    pub generation: u32,
}

/// A shadow page's metadata.
pub(crate) struct ShadowPage {
    pub gfn: Gfn,
    pub role: Role,
    pub frame: Hpa,
    /// Absent only in direct pages of level 1, whose frames and rights are computed.
    pub translations: Option<Translations>,
    /// Entries that link to this page.
    pub parents: RmapHead,
    pub state: PageState,
    /// The guest may write the table behind this page: its entries are as stale as a TLB's.
    pub unsync: bool,
    /// Writes to the guest's table since an entry of this page was last used.
    pub write_flooding: u8,
    /// How often the reclaimer has lately found the page in use.
    pub heat: u8,
    /// Whether the reclaimer has looked at the page since it was made.
    pub met: bool,
    /// Entries that are not empty.
    pub used_entries: u16,
    /// Virtual CPUs' roots, in use or previous, that hold this page.
    pub root_count: u32,
    pub generation: u32,
    /// One bit for each [`GROUP`] of entries: clear where all of them are empty.
    pub occupied: u64,
    /// One bit for each [`GROUP`] of entries: clear where none leads to an unsync page. Wherever a
    /// page or one below it is unsync, the bits of all links to it are set.
    pub unsync_below: u64,
    /// The next page of the same batch, or of those that are being brought up to date.
    pub next_in_batch: Option<PageId>,
    /// Among the active pages that belong to the same guest frame.
    same_gfn: Links,
    /// On the list of orphans.
    orphan: bool,
    list: Links,
    orphan_list: Links,
}

impl ShadowPage {
    /// Whether the page is on the list of those that nothing leads to.
    pub fn is_on_orphan_list(&self) -> bool {
        self.orphan
    }
}

impl Default for ShadowPage {
    fn default() -> Self {
        Self {
            gfn: Gfn::new(0),
            role: Role {
                level: Level::One,
                format: Format::Unpaged,
                quadrant: 0,
                rights: Rights::empty(),
                flags: RoleFlags::empty(),
                pkru: Pkru(0),
            },
            frame: Hpa::new(0),
            translations: None,
            parents: RmapHead::EMPTY,
            state: PageState::Unused,
            unsync: false,
            write_flooding: 0,
            heat: 0,
            met: false,
            used_entries: 0,
            root_count: 0,
            generation: 0,
            occupied: 0,
            unsync_below: 0,
            next_in_batch: None,
            same_gfn: Links::default(),
            orphan: false,
            list: Links::default(),
            orphan_list: Links::default(),
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Links {
    previous: Option<PageId>,
    next: Option<PageId>,
}

/// A doubly linked list through the pages themselves.
#[derive(Clone, Copy, Default)]
pub(crate) struct PageList {
    first: Option<PageId>,
    last: Option<PageId>,
    length: usize,
}

impl PageList {
    pub fn first(&self) -> Option<PageId> {
        self.first
    }

    pub fn last(&self) -> Option<PageId> {
        self.last
    }

    pub fn len(&self) -> usize {
        self.length
    }
}

/// How many pages are unsync.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Unsync {
    /// At level 1.
    pub leaves: usize,
    /// At the levels above.
    pub tables: usize,
}

impl Unsync {
    fn at(&mut self, level: Level) -> &mut usize {
        match level {
            Level::One => &mut self.leaves,
            _ => &mut self.tables,
        }
    }

    /// At any level.
    pub fn count(self) -> usize {
        self.leaves + self.tables
    }
}

type Field = fn(&mut ShadowPage) -> &mut Links;

#[inline]
fn push_last(pages: &mut Arena<ShadowPage>, list: &mut PageList, id: PageId, field: Field) {
    *field(&mut pages[id.number()]) = Links {
        previous: list.last,
        next: None,
    };
    match list.last {
        Some(last) => field(&mut pages[last.number()]).next = Some(id),
        None => list.first = Some(id),
    }
    list.last = Some(id);
    list.length += 1;
}

fn unlink(pages: &mut Arena<ShadowPage>, list: &mut PageList, id: PageId, field: Field) {
    let links = core::mem::take(field(&mut pages[id.number()]));
    match links.previous {
        Some(previous) => field(&mut pages[previous.number()]).next = links.next,
        None => list.first = links.next,
    }
    match links.next {
        Some(next) => field(&mut pages[next.number()]).previous = links.previous,
        None => list.last = links.previous,
    }
    list.length -= 1;
}

/// All shadow pages of one VM.
pub(crate) struct PageTable {
    pages: Arena<ShadowPage>,
    by_gfn: HashTable<PageId>,
    /// Oldest first.
    active: PageList,
    unsync: Unsync,
    /// Active pages that nothing leads to.
    orphans: PageList,
    /// Where the reclaimer goes on; moved along when its page leaves the list.
    pub hand: Option<PageId>,
}

#[inline]
fn hash(gfn: Gfn) -> u64 {
    gfn.as_u64()
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(26)
}

impl PageTable {
    pub fn new() -> Self {
        Self {
            pages: Arena::new(),
            by_gfn: HashTable::new(),
            active: PageList::default(),
            unsync: Unsync::default(),
            orphans: PageList::default(),
            hand: None,
        }
    }

    pub fn arena(&mut self) -> &mut Arena<ShadowPage> {
        &mut self.pages
    }

    pub fn ids(&self) -> impl Iterator<Item = PageId> + use<> {
        self.pages.numbers().map(PageId::from_number)
    }

    pub fn active_list(&self) -> &PageList {
        &self.active
    }

    /// How many pages are unsync.
    pub fn unsync(&self) -> Unsync {
        self.unsync
    }

    pub fn orphans(&self) -> &PageList {
        &self.orphans
    }

    /// Puts a page on the list of orphans or takes it off, after its parents, its root count or its
    /// state have changed.
    #[inline]
    pub fn note_orphan(&mut self, id: PageId) {
        let page = &mut self[id];
        let orphan =
            page.state == PageState::Active && page.parents.is_empty() && page.root_count == 0;
        if page.orphan != orphan {
            self.set_orphan(id, orphan);
        }
    }

    fn set_orphan(&mut self, id: PageId, orphan: bool) {
        self[id].orphan = orphan;
        let list = &mut self.orphans;
        if orphan {
            push_last(&mut self.pages, list, id, |page| &mut page.orphan_list);
        } else {
            unlink(&mut self.pages, list, id, |page| &mut page.orphan_list);
        }
    }

    /// The hash keeps twice the room it needs, so that it never has to allocate when it rehashes.
    #[inline]
    pub fn hash_needs_room(&self, spare: usize) -> bool {
        self.by_gfn.capacity() < 2 * (self.by_gfn.len() + spare)
    }

    pub fn wanted_hash_capacity(&self, spare: usize) -> usize {
        4 * (self.by_gfn.len() + spare)
    }

    /// Moves the hash into `larger`, which is empty, and leaves the old one there.
    pub fn grow_hash(&mut self, larger: &mut HashTable<PageId>) {
        if larger.capacity() <= self.by_gfn.capacity() {
            return;
        }
        let pages = &self.pages;
        let hasher = |id: &PageId| hash(pages[id.number()].gfn);
        for id in &self.by_gfn {
            larger.insert_unique(hasher(id), *id, hasher);
        }
        core::mem::swap(larger, &mut self.by_gfn);
    }

    /// `id` as a page that may be linked; `None` if it has been zapped.
    #[inline]
    pub fn active(&self, id: PageId) -> Option<ActivePage> {
        (self[id].state == PageState::Active).then_some(ActivePage(id))
    }

    /// The first of the active pages that belong to `gfn`.
    #[inline]
    pub fn first_of(&self, gfn: Gfn) -> Option<PageId> {
        self.by_gfn
            .find(hash(gfn), |id| self[*id].gfn == gfn)
            .copied()
    }

    /// The active pages that belong to `gfn`.
    #[inline]
    pub fn of(&self, gfn: Gfn) -> impl Iterator<Item = PageId> + '_ {
        let mut at = self.first_of(gfn);
        core::iter::from_fn(move || {
            let id = at?;
            at = self.next_same_gfn(id);
            Some(id)
        })
    }

    #[inline]
    pub fn next_same_gfn(&self, id: PageId) -> Option<PageId> {
        self[id].same_gfn.next
    }

    /// Makes a new page, the newest, and enters it into list and hash. `same_gfn` is the first of the
    /// frame's pages, as [`Self::first_of`] found it. Whoever does not link the page or make it a
    /// root has to note an orphan.
    #[inline]
    pub fn insert(&mut self, page: NewPage, same_gfn: Option<PageId>) -> ActivePage {
        debug_assert!(same_gfn == self.first_of(page.gfn));
        let id = PageId::from_number(self.pages.take());
        let shadow = &mut self[id];
        shadow.gfn = page.gfn;
        shadow.role = page.role;
        shadow.frame = page.frame;
        shadow.translations = page.translations;
        shadow.generation = page.generation;
        shadow.state = PageState::Active;
        if let Some(first) = same_gfn {
            let next = self[first].same_gfn.next.replace(id);
            self[id].same_gfn = Links {
                previous: Some(first),
                next,
            };
            if let Some(next) = next {
                self[next].same_gfn.previous = Some(id);
            }
        } else {
            let pages = &self.pages;
            self.by_gfn
                .insert_unique(hash(page.gfn), id, |id| hash(pages[id.number()].gfn));
        }
        push_last(&mut self.pages, &mut self.active, id, |page| &mut page.list);
        ActivePage(id)
    }

    /// Takes an active page off list and hash for good. Its new state is `Invalid` or `Zapped`.
    pub fn retire(&mut self, page: ActivePage, state: PageState) {
        debug_assert!(matches!(state, PageState::Invalid | PageState::Zapped));
        let id = page.id();
        debug_assert!(self[id].state == PageState::Active, "retired twice");
        if self.hand == Some(id) {
            self.hand = self.next(id);
        }
        self.set_sync(id);
        unlink(&mut self.pages, &mut self.active, id, |page| &mut page.list);
        self.leave_hash(id);
        self[id].state = state;
        self.note_orphan(id);
    }

    fn leave_hash(&mut self, id: PageId) {
        let Links { previous, next } = core::mem::take(&mut self[id].same_gfn);
        if let Some(next) = next {
            self[next].same_gfn.previous = previous;
        }
        if let Some(previous) = previous {
            self[previous].same_gfn.next = next;
            return;
        }
        let hash = hash(self[id].gfn);
        match (self.by_gfn.find_entry(hash, |first| *first == id), next) {
            (Ok(mut entry), Some(next)) => *entry.get_mut() = next,
            (Ok(entry), None) => {
                entry.remove();
            }
            (Err(_), _) => debug_assert!(false, "an active page was not in the hash"),
        }
    }

    /// Forgets a page whose frame is freed.
    pub fn release(&mut self, id: PageId) -> ShadowPage {
        debug_assert!(
            self[id].state == PageState::Zapped,
            "a live page is released"
        );
        self.pages.give(id.number())
    }

    /// The next younger page on the active list.
    pub fn next(&self, id: PageId) -> Option<PageId> {
        self[id].list.next
    }

    /// The next older page on the active list.
    pub fn previous(&self, id: PageId) -> Option<PageId> {
        self[id].list.previous
    }

    /// Makes an active page the newest.
    pub fn move_to_last(&mut self, page: ActivePage) {
        let id = page.id();
        unlink(&mut self.pages, &mut self.active, id, |page| &mut page.list);
        push_last(&mut self.pages, &mut self.active, id, |page| &mut page.list);
    }

    pub fn set_unsync(&mut self, page: ActivePage) {
        let id = page.id();
        if !core::mem::replace(&mut self[id].unsync, true) {
            *self.unsync.at(self[id].role.level) += 1;
        }
    }

    /// Whether the page, or one below it, is or may be unsync.
    #[inline]
    pub fn is_unsync_within(&self, id: PageId) -> bool {
        self[id].unsync || self[id].unsync_below != 0
    }

    pub fn set_sync(&mut self, id: PageId) {
        if core::mem::replace(&mut self[id].unsync, false) {
            *self.unsync.at(self[id].role.level) -= 1;
        }
    }
}

impl core::ops::Index<PageId> for PageTable {
    type Output = ShadowPage;
    #[inline]
    fn index(&self, id: PageId) -> &ShadowPage {
        &self.pages[id.number()]
    }
}

impl core::ops::IndexMut<PageId> for PageTable {
    #[inline]
    fn index_mut(&mut self, id: PageId) -> &mut ShadowPage {
        &mut self.pages[id.number()]
    }
}

#[cfg(test)]
mod tests {
    use super::ShadowPage;

    #[test]
    fn metadata_is_small() {
        assert!(
            size_of::<ShadowPage>() <= 160,
            "{}",
            size_of::<ShadowPage>()
        );
    }
}
