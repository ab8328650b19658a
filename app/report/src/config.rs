//! The configuration file `umbra.toml`: the options under the same names, without the hyphens.
//!
//! Keys at the top are every guest's options; each table `[[guest]]` is one guest, whose key `name` is
//! what `--guest` says. The file becomes arguments, so that there is one schema, one parser and one
//! kind of error. On the command line, options before any `--guest` overrule the file's top; a
//! `--guest` there means that the file is not read at all.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use toml::{Table, Value};

use crate::options::{Name, edit_distance};

/// Puts the options of a configuration file before those of a command line.
///
/// # Errors
/// The first mistake in the file, as [`ConfigError`]. Values are checked by
/// [`crate::options::parse`].
pub fn merge(text: &str, command_line: &[String]) -> Result<Vec<String>, ConfigError> {
    let mut merged = command_line.to_vec();
    if names(command_line, "--guest") {
        return Ok(merged);
    }
    let file: Table = text.parse().map_err(|error| ConfigError::syntax(&error))?;
    let mut guests = Vec::new();
    for (key, value) in &file {
        if key == "guest" {
            for table in tables(value)? {
                guests.extend(guest(table)?);
            }
            continue;
        }
        let option = option(key, &TOP)?;
        if !names(command_line, option.text()) {
            merged.push(argument(option, key, value)?);
        }
    }
    merged.extend(guests);
    Ok(merged)
}

/// The keys that stand at the top.
const TOP: [&str; 13] = [
    "image",
    "initrd",
    "append",
    "memory",
    "mmu-pages",
    "mmu-policy",
    "on-exhausted",
    "device",
    "repeat",
    "timeout",
    "trace",
    "trace-format",
    "guest",
];
/// The keys of a guest.
const GUEST: [&str; 13] = [
    "name",
    "image",
    "initrd",
    "append",
    "memory",
    "mmu-pages",
    "mmu-policy",
    "on-exhausted",
    "device",
    "repeat",
    "timeout",
    "trace",
    "trace-format",
];

fn names(command_line: &[String], option: &str) -> bool {
    command_line.iter().any(|argument| {
        argument
            .strip_prefix(option)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

fn tables(value: &Value) -> Result<impl Iterator<Item = &Table>, ConfigError> {
    let array = value
        .as_array()
        .filter(|array| array.iter().all(Value::is_table));
    let array = array.ok_or(ConfigError::NotTables)?;
    Ok(array.iter().filter_map(Value::as_table))
}

fn guest(table: &Table) -> Result<Vec<String>, ConfigError> {
    let name = table.get("name").ok_or(ConfigError::NoName)?;
    let mut arguments = Vec::from([argument(Name::Guest, "name", name)?]);
    for (key, value) in table.iter().filter(|(key, _)| *key != "name") {
        arguments.push(argument(option(key, &GUEST)?, key, value)?);
    }
    Ok(arguments)
}

fn option(key: &str, known: &[&'static str]) -> Result<Name, ConfigError> {
    let is_known = known.contains(&key);
    let name = Name::ALL
        .into_iter()
        .find(|name| is_known && name.text().trim_start_matches('-') == key);
    name.ok_or_else(|| ConfigError::UnknownKey {
        key: key.to_string(),
        nearest: known
            .iter()
            .map(|name| (edit_distance(key, name), *name))
            .min()
            .filter(|(distance, name)| *distance <= name.len() / 2)
            .map(|(_, name)| name),
    })
}

fn argument(option: Name, key: &str, value: &Value) -> Result<String, ConfigError> {
    let value = match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        _ => {
            return Err(ConfigError::BadKind {
                key: key.to_string(),
            });
        }
    };
    Ok(format!("{}={value}", option.text()))
}

/// What is wrong with a configuration file. Its text is one line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ConfigError {
    /// It is not TOML.
    Syntax {
        /// Which byte of the file the parser complains about.
        offset: usize,
        /// What it says.
        message: String,
    },
    /// There is no such key.
    UnknownKey {
        /// What was given.
        key: String,
        /// The key with the most similar name, if any is similar.
        nearest: Option<&'static str>,
    },
    /// A value is neither a text nor a whole number.
    BadKind {
        /// Its key.
        key: String,
    },
    /// A guest has no name.
    NoName,
    /// `guest` is not a list of tables.
    NotTables,
}

impl ConfigError {
    fn syntax(error: &toml::de::Error) -> Self {
        Self::Syntax {
            offset: error.span().map_or(0, |span| span.start),
            message: error.message().replace(['\n', '\r'], " "),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("umbra.toml: ")?;
        match self {
            Self::Syntax { offset, message } => {
                write!(formatter, "at byte {offset}: {message}")
            }
            Self::UnknownKey {
                key,
                nearest: Some(nearest),
            } => write!(formatter, "unknown key {key:?}: did you mean {nearest:?}?"),
            Self::UnknownKey { key, nearest: None } => {
                write!(formatter, "unknown key {key:?}: see --help for the options")
            }
            Self::BadKind { key } => write!(
                formatter,
                "the value of {key:?} must be a text between quotes or a whole number"
            ),
            Self::NoName => {
                formatter.write_str("a [[guest]] has no name: give it one, as in name = \"a\"")
            }
            Self::NotTables => formatter.write_str("guest must be written as [[guest]] tables"),
        }
    }
}

impl core::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{self, Request};
    use proptest::prelude::*;

    fn merged(text: &str, command_line: &[&str]) -> Vec<String> {
        let command_line: Vec<_> = command_line.iter().map(ToString::to_string).collect();
        merge(text, &command_line).unwrap()
    }

    #[test]
    fn a_file_says_what_a_command_line_says() {
        let text = "memory = \"16M\"\nmmu-pages = 64\n\
            [[guest]]\nname = \"a\"\nappend = \"x=1 y\"\n[[guest]]\nname = \"b\"\nmemory = \"8M\"\n";
        let arguments = merged(text, &[]);
        let Ok(Request::Run(options)) = options::parse(arguments.iter().map(String::as_str)) else {
            panic!("{arguments:?}");
        };
        let [a, b] = &options.guests[..] else {
            panic!()
        };
        assert_eq!((a.name.as_deref(), &*a.append), (Some("a"), "x=1 y"));
        assert_eq!([a.memory, b.memory], [16 << 20, 8 << 20]);
        assert_eq!([a.mmu_pages, b.mmu_pages], [Some(64); 2]);
    }

    #[test]
    fn the_command_line_comes_first() {
        let text = "memory = \"16M\"\ntimeout = 3\n[[guest]]\nname = \"a\"\n";
        assert_eq!(
            merged(text, &["--memory", "8M"]),
            ["--memory", "8M", "--timeout=3", "--guest=a"]
        );
        assert_eq!(merged(text, &["--guest=b"]), ["--guest=b"]);
    }

    #[test]
    fn every_key_of_the_lists_is_an_option() {
        for key in TOP.iter().chain(&GUEST).filter(|key| **key != "name") {
            let text = format!("--{key}");
            assert!(Name::ALL.iter().any(|name| name.text() == text), "{key}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| merge(text, &[]).unwrap_err().to_string();
        assert_eq!(
            error("memmory = \"1M\""),
            "umbra.toml: unknown key \"memmory\": did you mean \"memory\"?"
        );
        assert!(error("zzzzzzzz = 1").contains("see --help"));
        assert!(error("help = 1").contains("unknown key"));
        assert!(error("[[guest]]\nmemory = 1").contains("has no name"));
        assert!(error("[[guest]]\nname = \"a\"\nguest = 1").contains("unknown key \"guest\""));
        assert!(error("guest = \"a\"").contains("[[guest]] tables"));
        assert!(error("memory = true").contains("\"memory\" must be"));
        assert!(
            error("memory = ").starts_with("umbra.toml: at byte 9"),
            "{}",
            error("memory = ")
        );
    }

    proptest! {
        #[test]
        fn every_mistake_is_one_line(text in "(?s).*") {
            if let Err(error) = merge(&text, &[]) {
                prop_assert!(!error.to_string().contains(['\n', '\r']));
            }
        }
    }
}
