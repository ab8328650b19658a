//! The lock and the atomics, in one place so that a check of their interleavings can replace them.
//!
//! `mmu/interleavings` builds this crate with those of `shuttle`, which runs the threads one at a
//! time and switches between them wherever one takes a lock or reads or writes an atomic.

#[cfg(not(feature = "shuttle"))]
pub(crate) use {
    core::sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    spin::{Mutex, MutexGuard},
};

#[cfg(feature = "shuttle")]
pub(crate) use self::scheduled::{Mutex, MutexGuard};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

#[cfg(feature = "shuttle")]
mod scheduled {
    pub(crate) use shuttle::sync::MutexGuard;

    /// A lock with the methods of `spin`'s, whose holder can be made to wait by the scheduler.
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().expect("no thread panicked with the lock")
        }

        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }
}
