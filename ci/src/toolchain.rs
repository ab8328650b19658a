//! The Rust toolchain for the bare-metal parts.
//!
//! They build their own `core` and `alloc` (`-Zbuild-std`), so what counts is that a toolchain has
//! the library's source. Taken in this order: a rustup toolchain that has it; Debian's own, when it
//! is there; `rustup component add rust-src`, where that works (without network access it does not,
//! and that is no error); Debian's own, to be installed.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{Step, answer, clean, find_program};
use crate::project::Project;
use crate::setup::{self, Need};

/// The oldest compiler that builds the kernel: `#[unsafe(naked)]` is stable since then.
const OLDEST: (u32, u32) = (1, 88);
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);

/// A toolchain that builds for bare metal.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// What to call it when talking to the user.
    pub name: String,
    /// What its `rustc` says about itself.
    pub version: Version,
    cargo: PathBuf,
    rustc: PathBuf,
    /// Where a `rust-lld` is, when the toolchain has none of its own.
    linker: Option<PathBuf>,
}

impl Toolchain {
    /// Finds a toolchain, installing one when there is none.
    ///
    /// # Errors
    /// When there is none and none can be installed: with what to do.
    pub fn set_up(project: &Project) -> Result<Self> {
        if let Some(found) = Self::installed(project)? {
            return Ok(found);
        }
        if let Some(found) = add_source_by_rustup() {
            return Ok(found);
        }
        setup::install(&debian_needs()).context(
            "no Rust toolchain has the library's source (rust-src), and rustup cannot get it",
        )?;
        let version =
            Version::of(Path::new(DEBIAN_RUSTC)).context("/usr/bin/rustc does not run")?;
        if linker(&version).is_none() {
            let package = format!("lld-{}", version.llvm);
            setup::install(&[Need::new(&package, &package, "links the image")])?;
        }
        debian(project)?.context("Debian's Rust toolchain is installed, but incomplete")
    }

    /// Finds a toolchain among those that are installed.
    ///
    /// # Errors
    /// When the link to its linker cannot be written.
    pub fn installed(project: &Project) -> Result<Option<Self>> {
        match rustup_toolchains().iter().find_map(|name| rustup(name)) {
            Some(found) => Ok(Some(found)),
            None => debian(project),
        }
    }

    /// A `cargo` of this toolchain, to be run in `directory` (a bare-metal workspace).
    pub fn cargo(&self, directory: &Path) -> Command {
        let mut command = clean(&self.cargo);
        command
            .current_dir(directory)
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1");
        if let Some(linker) = &self.linker {
            let path = env::var_os("PATH").unwrap_or_default();
            let directories = [linker.clone()].into_iter().chain(env::split_paths(&path));
            if let Ok(path) = env::join_paths(directories) {
                command.env("PATH", path);
            }
        }
        command
    }
}

/// The versions that matter of a compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Major and minor, as in `(1, 96)`.
    pub release: (u32, u32),
    /// The major version of its LLVM.
    pub llvm: u32,
}

impl Version {
    /// Asks `rustc`; `None` if it does not run.
    pub fn of(rustc: &Path) -> Option<Self> {
        Self::parse(&answer(clean(rustc).arg("-vV"))?)
    }

    /// Reads what `rustc -vV` prints.
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let mut release = field("release: ")?.split('.');
        let mut llvm = field("LLVM version: ")?.split('.');
        Some(Self {
            release: (release.next()?.parse().ok()?, release.next()?.parse().ok()?),
            llvm: llvm.next()?.parse().ok()?,
        })
    }
}

/// The names of rustup's toolchains, the active one first; none without rustup.
fn rustup_toolchains() -> Vec<String> {
    let list = answer(clean("rustup").args(["toolchain", "list"])).unwrap_or_default();
    let (mut active, others): (Vec<_>, Vec<_>) = list
        .lines()
        .filter(|line| !line.starts_with("no "))
        .partition(|line| line.contains("(active") || line.contains("(default)"));
    active.extend(others);
    active
        .iter()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

fn rustup(name: &str) -> Option<Toolchain> {
    let which = |program| {
        answer(clean("rustup").args(["which", "--toolchain", name, program])).map(PathBuf::from)
    };
    let rustc = which("rustc")?;
    let sysroot = rustc.parent()?.parent()?;
    if !has_source(sysroot) {
        return None;
    }
    let version = Version::of(&rustc).filter(|version| version.release >= OLDEST)?;
    Some(Toolchain {
        name: name.to_owned(),
        version,
        cargo: which("cargo")?,
        rustc,
        linker: None,
    })
}

fn has_source(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib/src/rust/library/core/src/lib.rs")
        .exists()
}

fn add_source_by_rustup() -> Option<Toolchain> {
    let name = rustup_toolchains().into_iter().next()?;
    eprintln!("Installing the component rust-src into rustup's toolchain {name}");
    let step = Step::new("rustup component add rust-src").within(RUSTUP_LIMIT);
    let mut command = clean("rustup");
    command.args(["component", "add", "rust-src", "--toolchain", &name]);
    if step.run(&mut command).is_err() {
        eprintln!("rustup cannot get it from here; taking Debian's toolchain instead");
        return None;
    }
    rustup(&name)
}

const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_SOURCE: &str = "/usr/lib/rustlib/src/rust/library/core/src/lib.rs";

/// Debian's `-web` packages are its newest Rust: the plain ones are older than the kernel needs.
fn debian_needs() -> Vec<Need> {
    let old = Version::of(Path::new(DEBIAN_RUSTC)).is_some_and(|version| version.release < OLDEST);
    let need = |probe: &str, package, purpose| {
        // An old compiler is there, but does not meet the need.
        let probe = if old {
            format!("{probe}-new-enough")
        } else {
            probe.to_owned()
        };
        Need::new(&probe, package, purpose)
    };
    vec![
        need(DEBIAN_RUSTC, "rustc-web", "compiles the image"),
        need(DEBIAN_CARGO, "cargo-web", "builds the image"),
        Need::new(
            DEBIAN_SOURCE,
            "rust-web-src",
            "is the library's source for bare metal",
        ),
    ]
}

fn debian(project: &Project) -> Result<Option<Toolchain>> {
    if !Path::new(DEBIAN_CARGO).exists() || !Path::new(DEBIAN_SOURCE).exists() {
        return Ok(None);
    }
    let rustc = Path::new(DEBIAN_RUSTC);
    let Some(version) = Version::of(rustc).filter(|version| version.release >= OLDEST) else {
        return Ok(None);
    };
    let Some(linker) = linker(&version) else {
        return Ok(None);
    };
    Ok(Some(Toolchain {
        name: "Debian's".to_owned(),
        version,
        cargo: DEBIAN_CARGO.into(),
        rustc: rustc.to_owned(),
        linker: Some(link_as_rust_lld(project, &linker)?),
    }))
}

/// Debian's compiler looks for a `rust-lld`, which is LLVM's own linker of the same version.
fn linker(version: &Version) -> Option<PathBuf> {
    find_program("rust-lld").or_else(|| find_program(&format!("lld-{}", version.llvm)))
}

/// Makes a directory for the search path in which `linker` is called `rust-lld`.
fn link_as_rust_lld(project: &Project, linker: &Path) -> Result<PathBuf> {
    let directory = project.target("linker")?;
    let link = directory.join("rust-lld");
    if fs::read_link(&link).is_ok_and(|old| old == linker) {
        return Ok(directory);
    }
    if link.is_symlink() {
        fs::remove_file(&link)?;
    }
    if let Err(error) = symlink(linker, &link) {
        bail!(
            "cannot link {} to {}: {error}",
            link.display(),
            linker.display()
        );
    }
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                    release: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(
            Version::parse(text),
            Some(Version {
                release: (1, 96),
                llvm: 22
            })
        );
        let nightly = "release: 1.99.0-nightly\nLLVM version: 23.0.0\n";
        assert_eq!(
            Version::parse(nightly),
            Some(Version {
                release: (1, 99),
                llvm: 23
            })
        );
        assert_eq!(Version::parse("rustc: command not found"), None);
    }

    #[test]
    fn the_release_before_naked_functions_is_too_old() {
        assert!(
            Version {
                release: (1, 87),
                llvm: 20
            }
            .release
                < OLDEST
        );
        assert!(
            Version {
                release: (2, 0),
                llvm: 30
            }
            .release
                >= OLDEST
        );
    }
}
