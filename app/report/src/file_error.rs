//! What is wrong with a configuration file.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::options::edit_distance;

/// What is wrong with a configuration file. Its text is one line, which names the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileError {
    file: &'static str,
    message: String,
}

impl FileError {
    pub(crate) fn new(file: &'static str, message: impl Into<String>) -> Self {
        let message = message.into().replace(['\n', '\r'], " ");
        Self { file, message }
    }

    /// The file is not TOML, or a value is of the wrong kind.
    pub(crate) fn parser(file: &'static str, error: &toml::de::Error) -> Self {
        let place = error
            .span()
            .map_or(String::new(), |span| format!("at byte {}: ", span.start));
        Self::new(file, format!("{place}{}", error.message()))
    }

    /// The file has a `what` of the name `typed`, which is not one of `known`.
    pub(crate) fn unknown<S: AsRef<str>>(
        file: &'static str,
        what: &str,
        typed: &str,
        known: &[S],
    ) -> Self {
        let known = known.iter().map(AsRef::as_ref);
        let nearest = known
            .clone()
            .map(|name| (edit_distance(typed, name), name))
            .min()
            .filter(|(distance, name)| *distance <= name.len() / 2);
        let hint = match nearest {
            Some((_, name)) => format!("did you mean {name:?}?"),
            None => format!("there are: {}", known.collect::<Vec<_>>().join(", ")),
        };
        Self::new(file, format!("unknown {what} {typed:?}: {hint}"))
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.file, self.message)
    }
}

impl core::error::Error for FileError {}
