//! Mistakes in options, each one line that says what is wrong and what would be right.

use alloc::string::String;
use core::fmt;

/// What is wrong with the arguments. Its text is one line; the exit code is
/// [`crate::ExitCode::BadInput`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OptionsError {
    /// There is no such option.
    Unknown {
        /// What was given.
        option: String,
        /// The option with the most similar name, if any is similar.
        nearest: Option<&'static str>,
    },
    /// An argument is neither an option nor an option's value.
    NotAnOption {
        /// What was given.
        text: String,
    },
    /// An option lacks its value.
    MissingValue {
        /// The option.
        option: &'static str,
        /// What its value looks like.
        expected: &'static str,
    },
    /// An option was given twice.
    Duplicate {
        /// The option.
        option: &'static str,
    },
    /// Two guests have the same name.
    SameName {
        /// The name.
        guest: String,
    },
    /// An option's value is not of the right kind.
    BadValue {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
        /// What it should look like.
        expected: &'static str,
    },
    /// An option's value is too small or too large.
    OutOfRange {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        range: Range,
    },
}

/// The values that an option allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    pub(super) minimum: u64,
    pub(super) maximum: u64,
    pub(super) unit: Unit,
}

/// What a range's values are printed in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unit {
    None,
    Bytes,
}

impl fmt::Display for Range {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unit {
            Unit::None => write!(formatter, "from {} to {}", self.minimum, self.maximum),
            Unit::Bytes => {
                write!(
                    formatter,
                    "from {}M to {}G",
                    self.minimum >> 20,
                    self.maximum >> 30
                )
            }
        }
    }
}

impl fmt::Display for OptionsError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown {
                option,
                nearest: Some(nearest),
            } => {
                write!(
                    formatter,
                    "unknown option {option:?}: did you mean {nearest}?"
                )
            }
            Self::Unknown {
                option,
                nearest: None,
            } => {
                write!(formatter, "unknown option {option:?}: see --help")
            }
            Self::NotAnOption { text } => {
                write!(
                    formatter,
                    "unexpected argument {text:?}: options begin with --, see --help"
                )
            }
            Self::MissingValue { option, expected } => {
                write!(
                    formatter,
                    "option {option} lacks its value: it takes {expected}"
                )
            }
            Self::Duplicate { option } => {
                write!(formatter, "option {option} is given twice: give it once")
            }
            Self::SameName { guest } => {
                write!(
                    formatter,
                    "two guests are named {guest:?}: give each a name of its own"
                )
            }
            Self::BadValue {
                option,
                value,
                reason,
                expected,
            } => write!(
                formatter,
                "bad value {value:?} for option {option}: {reason}; it takes {expected}"
            ),
            Self::OutOfRange {
                option,
                value,
                range,
            } => {
                write!(
                    formatter,
                    "value {value:?} for option {option} is out of range: {range}"
                )
            }
        }
    }
}

impl core::error::Error for OptionsError {}
