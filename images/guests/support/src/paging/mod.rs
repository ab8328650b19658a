//! Page tables of all modes, and the checks that run in each of them.
//!
//! A check changes an entry, flushes what the manual says must be flushed (SDM vol. 3, 4.10.4), and
//! looks at what an access then does. None depends on a stale translation.

mod access;
mod edits;
mod large;
mod random;
mod rights;
pub mod space;
mod suite;

use crate::boot::BootInfo;
use crate::check::Checks;
pub use random::Numbers;
use space::Space;
use suite::Suite;
pub use suite::{CODE_RESULT, USER_ENTRY, call, copy_code, error};

/// Runs all checks of one mode. Paging must be on with `space`.
pub fn run(boot: &BootInfo, checks: &mut Checks, space: Space) {
    let mut suite = Suite::new(boot, checks, space);
    access::run(&mut suite);
    rights::run(&mut suite);
    edits::run(&mut suite);
    large::run(&mut suite);
    random::run(&mut suite);
}
