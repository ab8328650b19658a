//! What `--guest` may name: one of our own guests, a guest that this tool puts together, or a file.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::input::BadInput;
use crate::keys;
use crate::linux;
use crate::memtest;
use crate::project::Project;

/// One of our own guests, as `images/guests/guests.toml` lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct Guest {
    /// Its name, which is also its binary's.
    pub name: String,
    /// The Rust target that it is built for.
    pub target: String,
    /// How it may be loaded.
    format: Vec<String>,
    /// Umbra's exit code when it has run.
    pub expect_exit_code: u8,
    /// What it prints, in this order.
    pub console: Vec<String>,
    /// Its command line.
    pub command_line: Option<String>,
    /// A device that it needs besides the usual ones.
    pub device: Option<String>,
    /// How many processors it needs, if not one.
    pub smp: Option<u64>,
    /// Whether it takes so long that it only runs when asked for.
    #[serde(default)]
    pub long: bool,
}

impl Guest {
    /// Whether it is a boot sector, which is cut out of the linked program.
    pub fn is_boot_sector(&self) -> bool {
        self.format.iter().any(|format| format == "boot-sector")
    }

    /// Whether it is a 64-bit program that is made an ELF32 after it is linked, as Multiboot loaders
    /// want it.
    pub fn is_elf32(&self) -> bool {
        self.format.iter().any(|format| format == "elf32")
    }
}

#[derive(Deserialize)]
struct GuestList {
    guest: Vec<Guest>,
}

/// Reads the list of our own guests.
///
/// # Errors
/// When it cannot be read.
pub fn own(project: &Project) -> Result<Vec<Guest>> {
    let path = project.root().join("images/guests/guests.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let list: GuestList = toml::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(list.guest)
}

/// Where a guest comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// It is one of our own.
    Own(Guest),
    /// Debian's Linux with our initial RAM disk.
    Linux(linux::Protocol),
    /// A Hermit application.
    Hermit,
    /// Debian's memory tester.
    Memtest,
    /// The one whose making `docs/ci.md` shows.
    First,
    /// It is this file.
    File(PathBuf),
}

/// The name of [`Source::Linux`].
const LINUX: &str = "linux";
/// The name of [`Source::Linux`] by PVH.
const LINUX_PVH: &str = "linux-pvh";
/// The name of [`Source::Hermit`].
const HERMIT: &str = "hermit";
/// The name of [`Source::Memtest`].
const MEMTEST: &str = "memtest86";
/// The name of [`Source::First`].
const FIRST: &str = "first-guest";

impl Source {
    /// Finds a guest by what the user calls it.
    ///
    /// # Errors
    /// When there is neither such a guest nor such a file.
    pub fn find(own: &[Guest], name: &str) -> Result<Self> {
        if let Some(guest) = own.iter().find(|guest| guest.name == name) {
            return Ok(Self::Own(guest.clone()));
        }
        if name == LINUX {
            return Ok(Self::Linux(linux::Protocol::Linux));
        }
        if name == LINUX_PVH {
            return Ok(Self::Linux(linux::Protocol::Pvh));
        }
        if name == HERMIT {
            return Ok(Self::Hermit);
        }
        if name == MEMTEST {
            return Ok(Self::Memtest);
        }
        if name == FIRST {
            return Ok(Self::First);
        }
        if Path::new(name).is_file() {
            return Ok(Self::File(PathBuf::from(name)));
        }
        let names = own
            .iter()
            .map(|guest| guest.name.as_str())
            .chain([LINUX, LINUX_PVH, HERMIT, MEMTEST, FIRST]);
        let hint = keys::suggestion(name, names);
        let reason = "neither a file nor one of Umbra's own guests";
        Err(BadInput(format!("guest {name}: {reason}; {hint}")).into())
    }

    /// The guest's command line, when the user appends `append` to it.
    pub fn command_line(&self, append: Option<&str>) -> Option<String> {
        let own = match self {
            Self::Linux(_) => Some(linux::COMMAND_LINE),
            Self::Memtest => Some(memtest::COMMAND_LINE),
            Self::Own(_) | Self::Hermit | Self::First | Self::File(_) => None,
        };
        match (own, append) {
            (Some(own), Some(append)) => Some(format!("{own} {append}")),
            (Some(text), None) | (None, Some(text)) => Some(text.to_owned()),
            (None, None) => None,
        }
    }

    /// The device that the guest needs besides the usual ones.
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::Own(guest) => guest.device.as_deref(),
            Self::Linux(_) | Self::Hermit | Self::Memtest | Self::First | Self::File(_) => None,
        }
    }

    /// How many processors the guest needs, if not one.
    pub fn processors(&self) -> Option<u64> {
        match self {
            Self::Own(guest) => guest.smp,
            Self::Linux(_) | Self::Hermit | Self::Memtest | Self::First | Self::File(_) => None,
        }
    }

    /// The guest's memory if the user does not say, where Umbra's own default is not enough.
    pub fn memory(&self) -> Option<&'static str> {
        match self {
            Self::Linux(_) => Some(linux::MEMORY),
            Self::Own(_) | Self::Hermit | Self::Memtest | Self::First | Self::File(_) => None,
        }
    }
}

/// What Umbra calls a guest: a file's name without its directory.
pub fn display_name(guest: &str) -> String {
    let name = Path::new(guest)
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| guest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_found_by_name_or_file() {
        let guests = own(&Project::find().unwrap()).unwrap();
        let find = |typed| Source::find(&guests, typed);
        assert!(matches!(find("hello"), Ok(Source::Own(guest)) if guest.name == "hello"));
        assert!(matches!(
            find("linux"),
            Ok(Source::Linux(linux::Protocol::Linux))
        ));
        assert!(matches!(find("memtest86"), Ok(Source::Memtest)));
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        assert!(matches!(find(file), Ok(Source::File(found)) if found == Path::new(file)));
        for (typed, meant) in [("helo", "hello"), ("linus", "linux")] {
            let error = find(typed).unwrap_err();
            let hint = format!("did you mean `{meant}`?");
            assert!(error.is::<BadInput>() && error.to_string().contains(&hint));
        }
    }

    #[test]
    fn the_user_s_words_come_last() {
        let file = Source::File(PathBuf::new());
        assert_eq!(file.command_line(None), None);
        assert_eq!(file.command_line(Some("a b")).as_deref(), Some("a b"));
        let line = Source::Linux(linux::Protocol::Linux)
            .command_line(Some("quiet"))
            .unwrap();
        assert!(line.starts_with("console=ttyS0 ") && line.ends_with(" quiet"));
    }

    #[test]
    fn guests_are_named_after_their_files() {
        assert_eq!(display_name("hello"), "hello");
        assert_eq!(display_name("/some/where/kernel.elf"), "kernel.elf");
    }
}
