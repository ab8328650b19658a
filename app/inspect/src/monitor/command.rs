//! The monitor's commands.

use alloc::string::{String, ToString};
use core::fmt;

use umbra_mmu::MINIMUM_PAGES;
use umbra_vcpu::address::Gva;

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The list of commands.
    Help,
    /// The guests and what they do.
    List,
    /// What the guests have done so far: all of them, or one.
    Statistics(Option<String>),
    /// Give shadow pages back to the heap.
    Shrink {
        /// How many.
        pages: usize,
    },
    /// Change how many shadow pages a guest may have.
    Limit {
        /// The guest.
        guest: String,
        /// How many.
        pages: usize,
    },
    /// Let guests wait: all of them, or one.
    Pause(Option<String>),
    /// Let guests that wait go on: all of them, or one.
    Resume(Option<String>),
    /// End a guest.
    Stop(String),
    /// Show what guest and shadow say of an address.
    Walk {
        /// The guest.
        guest: String,
        /// The linear address.
        address: Gva,
    },
    /// Show a guest's registers.
    Registers(String),
    /// Show a guest's last exits.
    Exits(String),
}

/// Each command with its arguments and its meaning.
pub const COMMANDS: [(&str, &str, &str); 11] = [
    ("help", "", "this list"),
    ("list", "", "the guests and what they do"),
    (
        "statistics",
        "[GUEST]",
        "exits and shadow pages of all guests so far, or of one",
    ),
    ("shrink", "N", "give N shadow pages back to the heap"),
    ("limit", "GUEST N", "let a guest have N shadow pages"),
    ("pause", "[GUEST]", "let all guests wait, or one"),
    ("resume", "[GUEST]", "let them go on"),
    ("stop", "GUEST", "end a guest"),
    (
        "walk",
        "GUEST ADDRESS",
        "what the guest's page tables and the shadow pages say of a linear address",
    ),
    ("registers", "GUEST", "a guest's registers"),
    ("exits", "GUEST", "a guest's last exits"),
];

impl Command {
    /// Reads a line; `None` if it is blank.
    ///
    /// # Errors
    /// [`CommandError`], whose text says what would be right.
    pub fn parse(line: &str) -> Result<Option<Self>, CommandError> {
        let mut words = line.split_ascii_whitespace();
        let Some(name) = words.next() else {
            return Ok(None);
        };
        let Some((_, arguments, _)) = COMMANDS.iter().find(|(known, _, _)| *known == name) else {
            return Err(CommandError::Unknown(name.to_string()));
        };
        let usage = CommandError::Usage(name.to_string(), arguments);
        let (first, second) = (words.next(), words.next());
        let surplus = words.next();
        let one = || first.filter(|_| second.is_none()).map(ToString::to_string);
        let any = || match (first, second) {
            (None, _) => Some(None),
            (Some(guest), None) => Some(Some(guest.to_string())),
            (Some(_), Some(_)) => None,
        };
        let command = match name {
            "help" if first.is_none() => Some(Self::Help),
            "list" if first.is_none() => Some(Self::List),
            "statistics" => any().map(Self::Statistics),
            "shrink" => {
                let pages = one().and_then(|pages| pages.parse().ok());
                pages.map(|pages| Self::Shrink { pages })
            }
            "limit" => match (first, second.and_then(|pages| pages.parse().ok())) {
                (_, Some(pages)) if pages < MINIMUM_PAGES => {
                    return Err(CommandError::TooFewPages(pages));
                }
                (Some(guest), Some(pages)) => Some(Self::Limit {
                    guest: guest.to_string(),
                    pages,
                }),
                _ => None,
            },
            "pause" => any().map(Self::Pause),
            "resume" => any().map(Self::Resume),
            "stop" => one().map(Self::Stop),
            "walk" => match (first, second.and_then(address)) {
                (Some(guest), Some(address)) => Some(Self::Walk {
                    guest: guest.to_string(),
                    address,
                }),
                _ => None,
            },
            "registers" => one().map(Self::Registers),
            "exits" => one().map(Self::Exits),
            _ => None,
        };
        match command {
            Some(command) if surplus.is_none() => Ok(Some(command)),
            _ => Err(usage),
        }
    }
}

/// An address in hexadecimal, with or without 0x.
fn address(text: &str) -> Option<Gva> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let is_number = !digits.starts_with('+');
    let value = u64::from_str_radix(digits, 16).ok().filter(|_| is_number)?;
    Some(Gva::new(value))
}

/// Why a command cannot be carried out. Its text is one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// There is no such command.
    Unknown(String),
    /// The command has other arguments.
    Usage(String, &'static str),
    /// No guest works with so few shadow pages.
    TooFewPages(usize),
    /// There is no such guest, or it has ended.
    NoGuest(String),
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                write!(f, "there is no command {name:?}; help lists all")
            }
            Self::Usage(name, "") => write!(f, "{name} has no arguments"),
            Self::Usage(name, arguments) => write!(f, "what is meant is: {name} {arguments}"),
            Self::TooFewPages(pages) => write!(
                f,
                "{pages} shadow pages are too few, a guest needs {MINIMUM_PAGES}"
            ),
            Self::NoGuest(name) => write!(f, "there is no guest {name:?}; list shows all"),
        }
    }
}

impl core::error::Error for CommandError {}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn every_command_is_understood() {
        for (name, arguments, _) in COMMANDS {
            let arguments = arguments
                .replace(['[', ']'], "")
                .replace("GUEST", "a")
                .replace('N', "100")
                .replace("ADDRESS", "0xffff800000001000");
            let line = format!("  {name}  {arguments} ");
            assert!(matches!(Command::parse(&line), Ok(Some(_))), "{line}");
            let surplus = Command::parse(&format!("{line} b c d"));
            assert!(
                matches!(surplus, Err(CommandError::Usage(..))),
                "{surplus:?}"
            );
        }
        let walk = Command::Walk {
            guest: "a".into(),
            address: Gva::new(0x1000),
        };
        assert_eq!(Command::parse("walk a 1000"), Ok(Some(walk)));
        assert_eq!(Command::parse("pause"), Ok(Some(Command::Pause(None))));
        assert_eq!(Command::parse("  "), Ok(None));
    }

    #[test]
    fn mistakes_say_what_is_right() {
        let error = |line| Command::parse(line).unwrap_err().to_string();
        assert_eq!(error("lst"), "there is no command \"lst\"; help lists all");
        assert_eq!(error("walk a"), "what is meant is: walk GUEST ADDRESS");
        assert_eq!(error("walk a +1"), "what is meant is: walk GUEST ADDRESS");
        assert_eq!(error("list a"), "list has no arguments");
        assert_eq!(error("stop"), "what is meant is: stop GUEST");
        assert_eq!(error("shrink many"), "what is meant is: shrink N");
        assert!(error("limit a 63").contains("a guest needs 64"));
    }
}
