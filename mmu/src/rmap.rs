//! Reverse maps: which shadow entries refer to a guest frame, or to a shadow page.
//!
//! A head is four bytes: empty, or the one entry, or the root of a digital search tree (Knuth, The
//! Art of Computer Programming, vol. 3, 6.3) in which every node holds an entry and costs twelve
//! bytes. To add or remove an entry takes at most as many steps as an entry has bits, and usually
//! their number's logarithm: guests choose how often they map a page, and must not be able to make
//! zapping slow. Nodes come from an arena that is grown before the lock is taken.

use crate::arena::Arena;
use crate::page::PageId;

/// Names one entry of one shadow page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct SpteRef {
    pub page: PageId,
    pub index: usize,
}

/// Set in a head that holds the number of a tree's root.
const TREE: u32 = 1 << 31;

impl SpteRef {
    #[inline]
    const fn pack(self) -> u32 {
        (self.page.number() << 9) | self.index as u32
    }

    #[inline]
    fn unpack(value: u32) -> Self {
        Self {
            page: PageId::from_number(value >> 9),
            index: (value & 511) as usize,
        }
    }
}

/// All entries that refer to one thing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct RmapHead(u32);

/// What a head says.
enum Entries {
    None,
    One(u32),
    Tree(u32),
}

impl RmapHead {
    pub const EMPTY: Self = Self(0);

    #[inline]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[inline]
    fn entries(self) -> Entries {
        match self.0 {
            0 => Entries::None,
            tree if tree & TREE != 0 => Entries::Tree(tree & !TREE),
            entry => Entries::One(entry),
        }
    }
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Node {
    entry: u32,
    /// By the next bit of the way; 0 where there is none.
    children: [u32; 2],
}

/// The way down to an entry, one bit a level. No two entries share one, because the factor is odd,
/// and entries that are neighbours part early.
#[derive(Clone, Copy)]
struct Way(u32);

impl Way {
    #[inline]
    const fn to(entry: u32) -> Self {
        Self(entry.wrapping_mul(0x9e37_79b9))
    }

    #[inline]
    fn turn(&mut self) -> usize {
        let side = self.0 >> 31;
        self.0 <<= 1;
        side as usize
    }
}

/// The levels of a tree: two ways part after 32 turns at the latest.
const LEVELS: usize = 33;

/// The arena of tree nodes; node 0 is never used.
pub(crate) type RmapNodes = Arena<Node>;

impl RmapNodes {
    #[inline]
    pub fn insert(&mut self, head: &mut RmapHead, spte: SpteRef) {
        let entry = spte.pack();
        match head.entries() {
            Entries::None => head.0 = entry,
            Entries::One(first) => {
                let root = self.leaf(first);
                head.0 = TREE | root;
                self.add(root, entry);
            }
            Entries::Tree(root) => self.add(root, entry),
        }
    }

    fn add(&mut self, root: u32, entry: u32) {
        let mut way = Way::to(entry);
        let mut at = root;
        loop {
            let side = way.turn();
            match self[at].children[side] {
                0 => {
                    self[at].children[side] = self.leaf(entry);
                    return;
                }
                child => at = child,
            }
        }
    }

    fn leaf(&mut self, entry: u32) -> u32 {
        let number = self.take();
        self[number].entry = entry;
        number
    }

    /// Removes `spte`; `false` if it wasn't there, which is a bug of the caller.
    #[inline]
    pub fn remove(&mut self, head: &mut RmapHead, spte: SpteRef) -> bool {
        let entry = spte.pack();
        match head.entries() {
            Entries::Tree(root) => self.remove_from_tree(head, root, entry),
            Entries::One(found) if found == entry => {
                *head = RmapHead::EMPTY;
                true
            }
            Entries::One(_) | Entries::None => false,
        }
    }

    fn remove_from_tree(&mut self, head: &mut RmapHead, root: u32, entry: u32) -> bool {
        let mut way = Way::to(entry);
        let mut parent = (root, 0);
        let mut at = root;
        while self[at].entry != entry {
            parent = (at, way.turn());
            at = self[at].children[parent.1];
            if at == 0 {
                return false;
            }
        }
        // Any leaf below it may take its place: the ways agree so far.
        let mut leaf = at;
        while let Some(side) = self[leaf].children.iter().position(|child| *child != 0) {
            parent = (leaf, side);
            leaf = self[leaf].children[side];
        }
        self[at].entry = self[leaf].entry;
        // A tree has at least two nodes, so a leaf is never its root.
        self[parent.0].children[parent.1] = 0;
        self.give(leaf);
        if self[root].children == [0, 0] {
            head.0 = self.give(root).entry;
        }
        true
    }

    /// One of the entries.
    #[inline]
    pub fn first(&self, head: RmapHead) -> Option<SpteRef> {
        match head.entries() {
            Entries::None => None,
            Entries::One(entry) => Some(SpteRef::unpack(entry)),
            Entries::Tree(root) => Some(SpteRef::unpack(self[root].entry)),
        }
    }

    /// All entries. The set must not change meanwhile.
    pub fn iter(&self, head: RmapHead) -> impl Iterator<Item = SpteRef> + '_ {
        let mut cursor = Self::start(head);
        core::iter::from_fn(move || self.step(&mut cursor))
    }

    /// A place to continue from when the entries' values, but not the set, change in between.
    #[inline]
    pub fn start(head: RmapHead) -> Cursor {
        match head.entries() {
            Entries::None => Cursor::One(None),
            Entries::One(entry) => Cursor::One(Some(entry)),
            Entries::Tree(root) => {
                let mut nodes = [0; LEVELS];
                nodes[0] = root;
                Cursor::Tree { nodes, left: 1 }
            }
        }
    }

    /// The entry at the cursor, which moves on.
    #[inline]
    pub fn step(&self, cursor: &mut Cursor) -> Option<SpteRef> {
        match cursor {
            Cursor::One(entry) => entry.take().map(SpteRef::unpack),
            Cursor::Tree { nodes, left } => {
                *left = left.checked_sub(1)?;
                let node = self[nodes[*left]];
                for child in node.children {
                    if child != 0 {
                        nodes[*left] = child;
                        *left += 1;
                    }
                }
                Some(SpteRef::unpack(node.entry))
            }
        }
    }
}

/// See [`RmapNodes::start`].
pub(crate) enum Cursor {
    One(Option<u32>),
    /// The first `left` of `nodes` are still to be visited, each with all below it: never two of
    /// one level, but for the last.
    Tree {
        nodes: [u32; LEVELS],
        left: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Storage;
    use alloc::vec;
    use alloc::vec::Vec;
    use hashbrown::HashSet;

    fn spte(number: u32) -> SpteRef {
        SpteRef {
            page: PageId::from_number(1 + number / 512),
            index: number as usize % 512,
        }
    }

    #[test]
    fn grows_from_none_to_one_to_many_and_back() {
        let mut nodes = RmapNodes::new();
        nodes.grow(&mut Storage::allocate(64).unwrap());
        let free = nodes.available();
        let mut head = RmapHead::EMPTY;
        for number in 0..20 {
            nodes.insert(&mut head, spte(number));
        }
        assert_eq!(nodes.available(), free - 20);
        assert_eq!(nodes.iter(head).count(), 20);
        for number in (0..20).step_by(2).chain((1..20).step_by(2)) {
            assert!(nodes.remove(&mut head, spte(number)));
            assert!(!nodes.remove(&mut head, spte(number)));
        }
        assert!(head.is_empty());
        assert_eq!(nodes.available(), free);
    }

    /// Entries whose ways agree for as long as they can.
    fn deepest() -> Vec<SpteRef> {
        let mut inverse: u32 = 1;
        for _ in 0..5 {
            inverse = inverse.wrapping_mul(2_u32.wrapping_sub(inverse.wrapping_mul(0x9e37_79b9)));
        }
        let entries = (0..1 << 16).map(|way: u32| way.wrapping_mul(inverse));
        let valid = entries.filter(|entry| entry & TREE == 0 && entry >> 9 != 0);
        valid.map(SpteRef::unpack).collect()
    }

    #[test]
    fn no_set_of_entries_makes_a_tree_deeper_than_an_entry_has_bits() {
        let entries = deepest();
        let mut nodes = RmapNodes::new();
        nodes.grow(&mut Storage::allocate(1 << 17).unwrap());
        let mut head = RmapHead::EMPTY;
        for entry in &entries {
            nodes.insert(&mut head, *entry);
        }
        let found: HashSet<_> = nodes.iter(head).collect();
        assert_eq!(found, entries.iter().copied().collect());
        let mut deepest = 0;
        let mut waiting = vec![(head.0 & !TREE, 1)];
        while let Some((at, level)) = waiting.pop() {
            deepest = deepest.max(level);
            let below = nodes[at].children.into_iter().filter(|child| *child != 0);
            waiting.extend(below.map(|child| (child, level + 1)));
        }
        assert!((16..=LEVELS).contains(&deepest), "{deepest} levels");
        for (removed, entry) in entries.iter().rev().enumerate() {
            assert!(nodes.remove(&mut head, *entry));
            if removed % 4096 == 0 {
                assert_eq!(nodes.iter(head).count(), entries.len() - removed - 1);
            }
        }
        assert!(head.is_empty());
    }

    #[test]
    fn one_entry_costs_no_node() {
        let mut nodes = RmapNodes::new();
        let mut head = RmapHead::EMPTY;
        nodes.insert(&mut head, spte(7));
        assert_eq!(nodes.first(head), Some(spte(7)));
        assert_eq!(nodes.available(), 0);
        assert_eq!(size_of::<Node>(), 12);
    }
}
