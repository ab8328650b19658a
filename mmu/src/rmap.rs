//! Reverse maps: which shadow entries refer to a guest frame, or to a shadow page.
//!
//! A head is four bytes: empty, or the one entry, or the first node of a chain. A chain costs eight
//! bytes an entry. Nodes come from an arena that is grown before the lock is taken.

use crate::arena::Arena;
use crate::page::PageId;

/// Names one entry of one shadow page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct SpteRef {
    pub page: PageId,
    pub index: usize,
}

const CHAIN: u32 = 1 << 31;

impl SpteRef {
    const fn pack(self) -> u32 {
        (self.page.number() << 9) | self.index as u32
    }

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

impl RmapHead {
    pub const EMPTY: Self = Self(0);

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Node {
    entry: u32,
    next: u32,
}

/// The arena of chain nodes; node 0 is never used and ends every chain.
pub(crate) type RmapNodes = Arena<Node>;

impl RmapNodes {
    #[inline]
    pub fn insert(&mut self, head: &mut RmapHead, spte: SpteRef) {
        let entry = spte.pack();
        if head.is_empty() {
            head.0 = entry;
        } else {
            self.push(head, entry);
        }
    }

    /// Puts an entry before those that are there.
    fn push(&mut self, head: &mut RmapHead, entry: u32) {
        let rest = if head.0 & CHAIN != 0 {
            head.0 & !CHAIN
        } else {
            self.node(head.0, 0)
        };
        head.0 = CHAIN | self.node(entry, rest);
    }

    fn node(&mut self, entry: u32, next: u32) -> u32 {
        let number = self.take();
        self[number] = Node { entry, next };
        number
    }

    /// Removes `spte`; `false` if it wasn't there, which is a bug of the caller.
    pub fn remove(&mut self, head: &mut RmapHead, spte: SpteRef) -> bool {
        let entry = spte.pack();
        if head.0 & CHAIN == 0 {
            let found = head.0 == entry;
            if found {
                *head = RmapHead::EMPTY;
            }
            return found;
        }
        let (mut before, mut at) = (0, head.0 & !CHAIN);
        while at != 0 {
            let node = self[at];
            if node.entry == entry {
                if before == 0 {
                    head.0 = CHAIN | node.next;
                } else {
                    self[before].next = node.next;
                }
                self.give(at);
                // A chain has at least two nodes: fold a chain of one into the head.
                let first = head.0 & !CHAIN;
                if self[first].next == 0 {
                    head.0 = self[first].entry;
                    self.give(first);
                }
                return true;
            }
            (before, at) = (at, node.next);
        }
        false
    }

    /// One of the entries, the last added first.
    pub fn first(&self, head: RmapHead) -> Option<SpteRef> {
        match head.0 {
            0 => None,
            chain if chain & CHAIN != 0 => Some(SpteRef::unpack(self[chain & !CHAIN].entry)),
            single => Some(SpteRef::unpack(single)),
        }
    }

    /// All entries. The list must not change meanwhile.
    pub fn iter(&self, head: RmapHead) -> impl Iterator<Item = SpteRef> + '_ {
        let chain = head.0 & CHAIN != 0;
        let single = (!chain && head.0 != 0).then(|| SpteRef::unpack(head.0));
        let mut at = if chain { head.0 & !CHAIN } else { 0 };
        single.into_iter().chain(core::iter::from_fn(move || {
            if at == 0 {
                return None;
            }
            let node = self[at];
            at = node.next;
            Some(SpteRef::unpack(node.entry))
        }))
    }

    /// A place to continue from when the entries' values, but not the list, change in between.
    pub fn start(head: RmapHead) -> Cursor {
        Cursor(head.0)
    }

    /// The entry at the cursor, which moves on.
    pub fn step(&self, cursor: &mut Cursor) -> Option<SpteRef> {
        match cursor.0 {
            0 => None,
            chain if chain & CHAIN != 0 => {
                let node = self[chain & !CHAIN];
                cursor.0 = if node.next == 0 { 0 } else { CHAIN | node.next };
                Some(SpteRef::unpack(node.entry))
            }
            single => {
                cursor.0 = 0;
                Some(SpteRef::unpack(single))
            }
        }
    }
}

/// See [`RmapNodes::start`].
pub(crate) struct Cursor(u32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Storage;

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

    #[test]
    fn one_entry_costs_no_node() {
        let mut nodes = RmapNodes::new();
        let mut head = RmapHead::EMPTY;
        nodes.insert(&mut head, spte(7));
        assert_eq!(nodes.first(head), Some(spte(7)));
        assert_eq!(nodes.available(), 0);
        assert_eq!(size_of::<Node>(), 8);
    }
}
