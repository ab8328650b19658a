//! A pool of equal items named by 32-bit numbers, which never allocates under the lock.
//!
//! Room is made by handing in larger storage that was allocated before ([`Arena::grow`]).

use alloc::vec::Vec;
use core::ops::{Index, IndexMut};

/// Item 0 never exists, so 0 can mean "none".
pub(crate) struct Arena<T> {
    items: Vec<T>,
    free: Vec<u32>,
}

/// Storage for an arena.
pub(crate) struct Storage<T> {
    items: Vec<T>,
    free: Vec<u32>,
}

impl<T: Default> Arena<T> {
    pub const fn new() -> Self {
        Self {
            items: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Items that can be taken without more storage.
    #[inline]
    pub fn available(&self) -> usize {
        self.free.len() + self.items.capacity() - self.items.len().max(1).min(self.items.capacity())
    }

    /// The capacity that has room for `spare` more items and is worth the move.
    pub fn wanted_capacity(&self, spare: usize) -> usize {
        (self.items.len() + spare + 1)
            .max(self.items.capacity() * 2)
            .max(128)
    }

    /// Takes over `storage` and leaves the old one in it, if that is larger.
    pub fn grow(&mut self, storage: &mut Storage<T>) {
        if storage.items.capacity() <= self.items.capacity() {
            return;
        }
        storage.items.append(&mut self.items);
        storage.free.append(&mut self.free);
        core::mem::swap(&mut storage.items, &mut self.items);
        core::mem::swap(&mut storage.free, &mut self.free);
        if self.items.is_empty() {
            self.items.push(T::default());
        }
    }

    /// Names an item that nobody uses; it has the default value.
    #[inline]
    pub fn take(&mut self) -> u32 {
        match self.free.pop() {
            Some(number) => number,
            None => self.append(),
        }
    }

    fn append(&mut self) -> u32 {
        debug_assert!(
            self.items.len() < self.items.capacity(),
            "an arena ran out of room"
        );
        self.items.push(T::default());
        (self.items.len() - 1) as u32
    }

    /// Takes an item back; what was in it is returned.
    pub fn give(&mut self, number: u32) -> T {
        self.free.push(number);
        core::mem::take(&mut self.items[number as usize])
    }

    /// The numbers that have ever been given out.
    pub fn numbers(&self) -> core::ops::Range<u32> {
        1..self.items.len().max(1) as u32
    }
}

impl<T> Storage<T> {
    /// Storage for `capacity` items; `None` if the host has no memory.
    pub fn allocate(capacity: usize) -> Option<Self> {
        let (mut items, mut free) = (Vec::new(), Vec::new());
        items.try_reserve_exact(capacity).ok()?;
        free.try_reserve_exact(items.capacity()).ok()?;
        Some(Self { items, free })
    }
}

impl<T> Index<u32> for Arena<T> {
    type Output = T;
    #[inline]
    fn index(&self, number: u32) -> &T {
        &self.items[number as usize]
    }
}

impl<T> IndexMut<u32> for Arena<T> {
    #[inline]
    fn index_mut(&mut self, number: u32) -> &mut T {
        &mut self.items[number as usize]
    }
}
