//! The user's mistakes, which end this tool with the exit code of a bad option.

use thiserror::Error;

/// An option, a guest or a scenario that cannot be what the user meant: one line that says what is
/// wrong and what would be right.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct BadInput(pub String);
