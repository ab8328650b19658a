//! What can go wrong on the host's side of the MMU.

use crate::host::OutOfMemory;
use core::fmt;

/// A VM needs more shadow pages than it may have, and nothing that it holds can be given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoPageAvailable {
    /// Pages that the operation needs at once.
    pub needed: usize,
    /// Pages in use.
    pub used: usize,
    /// Pages allowed.
    pub limit: usize,
    /// Pages in use that are roots of virtual CPUs.
    pub pinned: usize,
}

/// Why an operation of the MMU stopped. The guest's state is unchanged; after the cause is gone the
/// same call may be repeated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MmuError {
    /// See [`NoPageAvailable`].
    NoPageAvailable(NoPageAvailable),
    /// The host has no memory for a shadow page, its metadata, or the guest's page.
    OutOfMemory,
}

impl From<NoPageAvailable> for MmuError {
    fn from(error: NoPageAvailable) -> Self {
        Self::NoPageAvailable(error)
    }
}

impl From<OutOfMemory> for MmuError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl fmt::Display for MmuError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPageAvailable(NoPageAvailable {
                needed,
                used,
                limit,
                pinned,
            }) => write!(
                formatter,
                "no MMU page available: needed {needed}, used {used} of {limit}, pinned {pinned}"
            ),
            Self::OutOfMemory => formatter.write_str("the host is out of memory"),
        }
    }
}

impl core::error::Error for MmuError {}
