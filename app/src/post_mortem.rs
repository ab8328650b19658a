//! The last words on a guest that has died: registers, page walks, exits, and why.

use alloc::string::String;
use core::fmt::{self, Write};

use umbra_inspect::{Death, PostMortem, ProcessorState};
use umbra_report::Outcome;

use crate::guest::{End, Guest};
use crate::pressure;

/// The page on a guest that `end` ends, unless it ended as guests do.
pub fn page(name: &str, guest: &Guest, end: &End) -> Option<String> {
    let death = match end.outcome {
        Outcome::TripleFault => Death::TripleFault,
        Outcome::Halted => Death::Halted,
        Outcome::Unsupported | Outcome::EntryFailed | Outcome::Watchdog => Death::Stopped,
        _ => return None,
    };
    // What it takes to write it must not fail.
    if !pressure::has_room_for_start() {
        return None;
    }
    let page = PostMortem {
        guest: name,
        message: &end.message,
        death,
        state: &ProcessorState::of(&*guest.vcpu),
        view: &guest.paging,
        exits: &guest.exit_log,
    };
    let mut text = Text(String::new());
    // What there is no memory for is left out.
    let _ = write!(text, "{page}");
    Some(text.0)
}

/// A text that grows as far as the heap allows.
struct Text(String);

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.0.try_reserve(part.len()).map_err(|_| fmt::Error)?;
        self.0.push_str(part);
        Ok(())
    }
}
