//! The last words on a guest that has died: registers, page walks, exits, and why.

use alloc::string::{String, ToString};

use umbra_inspect::{Death, PostMortem, ProcessorState};
use umbra_report::Outcome;

use crate::guest::{End, Guest};

/// The page on a guest that `end` ends, unless it ended as guests do.
pub fn page(guest: &Guest, end: &End) -> Option<String> {
    let death = match end.outcome {
        Outcome::TripleFault => Death::TripleFault,
        Outcome::Halted => Death::Halted,
        Outcome::Unsupported | Outcome::EntryFailed | Outcome::Watchdog => Death::Stopped,
        _ => return None,
    };
    let page = PostMortem {
        guest: &guest.report.guest,
        message: &end.message,
        death,
        state: &ProcessorState::of(&*guest.vcpu),
        view: &guest.paging,
        exits: &guest.exit_log,
    };
    Some(page.to_string())
}
