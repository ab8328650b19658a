//! What the manual says of an access (SDM vol. 3, 4.5 to 4.8).

use umbra_guest::paging::error;
use umbra_guest::paging::space::bits;

use crate::entries::{KEY_BITS, Pair, RESERVED, RESERVED_LARGE};
use crate::page::Observed;
use crate::settings::{Keys, Protection, Settings};

/// Who accesses, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Ring 3 loads.
    UserRead,
    /// Ring 3 stores.
    UserWrite,
    /// Ring 3 fetches an instruction.
    UserFetch,
    /// Ring 0 loads.
    Read,
    /// Ring 0 stores.
    Write,
    /// Ring 0 fetches an instruction.
    Fetch,
    /// Ring 0 loads with RFLAGS.AC set.
    ReadAlignmentCheck,
    /// Ring 0 stores with RFLAGS.AC set.
    WriteAlignmentCheck,
}

impl Access {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::UserRead,
        Self::UserWrite,
        Self::UserFetch,
        Self::Read,
        Self::Write,
        Self::Fetch,
        Self::ReadAlignmentCheck,
        Self::WriteAlignmentCheck,
    ];

    const fn is_user(self) -> bool {
        matches!(self, Self::UserRead | Self::UserWrite | Self::UserFetch)
    }

    /// Whether it stores.
    pub const fn is_write(self) -> bool {
        matches!(
            self,
            Self::UserWrite | Self::Write | Self::WriteAlignmentCheck
        )
    }

    const fn is_fetch(self) -> bool {
        matches!(self, Self::UserFetch | Self::Fetch)
    }

    /// Whether it is one of its own under `settings`: RFLAGS.AC only matters to SMAP.
    pub fn exists(self, settings: Settings) -> bool {
        !self.suspends_smap() || settings.smap == Protection::On
    }

    /// Whether RFLAGS.AC is set meanwhile, which suspends SMAP.
    const fn suspends_smap(self) -> bool {
        matches!(self, Self::ReadAlignmentCheck | Self::WriteAlignmentCheck)
    }
}

/// What must come of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    /// The page fault's error code, if there is one.
    pub error_code: Option<u32>,
    /// What the entries are afterwards.
    pub after: Pair,
    /// Bits of the page directory's entry that may also be set: a processor that faults at the page
    /// table's entry may have marked the one above accessed (SDM vol. 3, 4.8).
    pub may_be_set: u64,
}

impl Expected {
    /// Whether this is what happened.
    pub fn agrees(&self, observed: &Observed) -> bool {
        let directory = observed.after.directory & !self.may_be_set;
        directory == self.after.directory & !self.may_be_set
            && observed.after.table == self.after.table
            && observed.is_consistent
            && self.error_code == observed.fault.map(|fault| fault.error_code)
    }
}

/// What must come of `access` to the page that `pair` maps, under `settings`.
pub fn expect(settings: Settings, access: Access, pair: Pair) -> Expected {
    match judge(settings, access, pair) {
        Ok(()) => Expected {
            error_code: None,
            after: marked(access, pair),
            may_be_set: 0,
        },
        Err(Denied { cause, may_be_set }) => Expected {
            error_code: Some(cause | access_bits(settings, access)),
            after: pair,
            may_be_set,
        },
    }
}

/// A page fault: the error code but for what it says of the access itself, and see
/// [`Expected::may_be_set`].
struct Denied {
    cause: u32,
    may_be_set: u64,
}

fn judge(settings: Settings, access: Access, pair: Pair) -> Result<(), Denied> {
    let large = pair.is_large();
    check_entry(settings, pair.directory, large).map_err(|cause| Denied {
        cause,
        may_be_set: 0,
    })?;
    let may_be_set = if large { 0 } else { bits::A };
    let (all, any, leaf) = if large {
        (pair.directory, pair.directory, pair.directory)
    } else {
        check_entry(settings, pair.table, false).map_err(|cause| Denied { cause, may_be_set })?;
        let all = pair.directory & pair.table;
        (all, pair.directory | pair.table, pair.table)
    };
    let user_page = all & bits::U != 0;
    let denied_by_mode = if access.is_user() {
        !user_page
            || access.is_write() && all & bits::W == 0
            || access.is_fetch() && any & bits::NX != 0
    } else if access.is_fetch() {
        any & bits::NX != 0 || settings.smep == Protection::On && user_page
    } else {
        let kept_out = settings.smap == Protection::On && user_page && !access.suspends_smap();
        let read_only = settings.write_protect == Protection::On && all & bits::W == 0;
        kept_out || access.is_write() && read_only
    };
    let key_counts = user_page && leaf & KEY_BITS != 0 && !access.is_fetch();
    let denied_by_key = key_counts
        && match settings.keys {
            Keys::Off | Keys::Free => false,
            Keys::AccessDisabled => true,
            Keys::WriteDisabled => {
                access.is_write() && (access.is_user() || settings.write_protect == Protection::On)
            }
        };
    if !denied_by_mode && !denied_by_key {
        return Ok(());
    }
    let key = if denied_by_key { error::KEY } else { 0 };
    Err(Denied {
        cause: error::PROTECTION | key,
        may_be_set,
    })
}

/// Whether a walk gets past `entry`; the error is the fault's cause.
fn check_entry(settings: Settings, entry: u64, large: bool) -> Result<(), u32> {
    let mut reserved = RESERVED;
    if large {
        reserved |= RESERVED_LARGE;
    }
    if settings.no_execute == Protection::Off {
        reserved |= bits::NX;
    }
    if entry & bits::P == 0 {
        Err(0)
    } else if entry & reserved != 0 {
        Err(error::PROTECTION | error::RESERVED)
    } else {
        Ok(())
    }
}

/// What an error code says of the access itself.
fn access_bits(settings: Settings, access: Access) -> u32 {
    let fetches_count = settings.no_execute == Protection::On || settings.smep == Protection::On;
    let user = if access.is_user() { error::USER } else { 0 };
    let write = if access.is_write() { error::WRITE } else { 0 };
    let fetch = if access.is_fetch() && fetches_count {
        error::FETCH
    } else {
        0
    };
    user | write | fetch
}

fn marked(access: Access, pair: Pair) -> Pair {
    let leaf = bits::A | if access.is_write() { bits::D } else { 0 };
    if pair.is_large() {
        Pair {
            directory: pair.directory | leaf,
            ..pair
        }
    } else {
        Pair {
            directory: pair.directory | bits::A,
            table: pair.table | leaf,
        }
    }
}
