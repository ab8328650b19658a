//! The monitor: commands on guests that run, typed at the console or sent by a program.
//!
//! At the console Ctrl-A is a prefix, as in QEMU ([`Escape`]), and a prompt takes lines
//! ([`LineEditor`]) and answers in text. On a port for programs each line is a command, and each reply
//! is one line of JSON ([`answer`]). Both take the same [`Command`]s and give the same [`Reply`].

mod command;
mod keys;
mod line;
mod reply;

pub use command::{COMMANDS, Command, CommandError};
pub use keys::{Escape, HELP, Key};
pub use line::{LineEditor, Typed};
pub use reply::{GuestStatistics, GuestStatus, Reply, Run, WalkReply, answer};

/// What stands before what the user types.
pub const PROMPT: &str = "(umbra) ";
