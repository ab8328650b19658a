//! Building what is booted: our own guests, the Hermit images, and the boot ELF around each.
//!
//! Cargo alone decides what is fresh. All bare-metal workspaces share `target/bare-metal`, and what
//! is booted is copied to `target/images`.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::command::Step;
use crate::input::BadInput;
use crate::kernel;
use crate::keys;
use crate::project::{Project, write_if_changed};
use crate::setup;
use crate::toolchain::Toolchain;

const BARE_METAL: &str = "x86_64-unknown-none";
/// The guest that the image carries, which runs when no other is given.
const DEFAULT_GUEST: &str = "hello";
/// Where the ELF header names the operating system, and Hermit's number for itself.
const ELF_OS_ABI: usize = 7;
const ELF_OS_ABI_STANDALONE: u8 = 0xff;

/// A Hermit application that can be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Application {
    /// Umbra.
    #[default]
    Umbra,
    /// The booted test of the kernel's low-memory callback.
    LowMemoryCallback,
}

impl Application {
    fn binary(self) -> &'static str {
        match self {
            Self::Umbra => "umbra",
            Self::LowMemoryCallback => "low_memory_callback",
        }
    }
}

impl fmt::Display for Application {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.binary())
    }
}

/// One of our own guests, as `images/guests/guests.toml` lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct Guest {
    /// Its name, which is also its binary's.
    pub name: String,
    /// The Rust target that it is built for.
    pub target: String,
    /// Umbra's exit code when it has run.
    pub expect_exit_code: u8,
    /// What it prints, in this order.
    pub console: Vec<String>,
    /// Its command line.
    pub command_line: Option<String>,
    /// Whether it takes so long that it only runs when asked for.
    #[serde(default)]
    pub long: bool,
}

#[derive(Deserialize)]
struct GuestList {
    guest: Vec<Guest>,
}

/// Everything that builds need.
pub struct Builder<'a> {
    project: &'a Project,
    toolchain: Toolchain,
    guests: Vec<Guest>,
}

impl<'a> Builder<'a> {
    /// Sets up toolchain and kernel, and builds our own guests.
    ///
    /// # Errors
    /// When something is missing that cannot be installed, or the guests do not build.
    pub fn new(project: &'a Project) -> Result<Self> {
        setup::install(&setup::for_building())?;
        let toolchain = Toolchain::set_up(project)?;
        kernel::set_up(project, &toolchain)?;
        let guests = guests(project)?;
        let builder = Self {
            project,
            toolchain,
            guests,
        };
        builder.build_guests()?;
        Ok(builder)
    }

    /// The file of the guest that the user calls `name`: one of our own, or any file.
    ///
    /// # Errors
    /// When there is neither such a guest nor such a file.
    pub fn guest(&self, name: &str) -> Result<PathBuf> {
        match find_guest(&self.guests, name)? {
            Some(guest) => Ok(self.binary(&guest.target, &guest.name)),
            None => Path::new(name)
                .canonicalize()
                .with_context(|| format!("cannot open {name}")),
        }
    }

    /// Builds an application as a Hermit ELF, and returns its path.
    ///
    /// # Errors
    /// When it does not build.
    pub fn hermit_elf(&self, application: Application) -> Result<PathBuf> {
        let binary = application.binary();
        let mut command = self.cargo("app");
        command.args(["--bin", binary]);
        command.env("UMBRA_DEFAULT_GUEST", self.guest(DEFAULT_GUEST)?);
        Step::new(&format!("building {binary}")).run(&mut command)?;
        let mut elf = read(&self.binary(BARE_METAL, binary))?;
        elf[ELF_OS_ABI] = ELF_OS_ABI_STANDALONE;
        let image = self
            .project
            .target("images")?
            .join(format!("{binary}.hermit.elf"));
        write_if_changed(&image, &elf)?;
        Ok(image)
    }

    /// Builds an application and the boot ELF around it, and returns that ELF's path.
    ///
    /// # Errors
    /// When one of them does not build.
    pub fn boot_elf(&self, application: Application) -> Result<PathBuf> {
        let hermit = self.hermit_elf(application)?;
        let mut command = self.cargo("images/boot");
        command.env("UMBRA_HERMIT_ELF", hermit);
        Step::new(&format!("building the boot image of {application}")).run(&mut command)?;
        let image = self
            .project
            .target("images")?
            .join(format!("{application}.elf"));
        write_if_changed(&image, &read(&self.binary(BARE_METAL, "umbra-boot"))?)?;
        Ok(image)
    }

    fn build_guests(&self) -> Result<()> {
        let mut targets: Vec<_> = self
            .guests
            .iter()
            .map(|guest| guest.target.as_str())
            .collect();
        targets.sort_unstable();
        targets.dedup();
        for target in targets {
            let mut command = self.cargo_for("images/guests", target, "core");
            for guest in self.guests.iter().filter(|guest| guest.target == target) {
                command.args(["--bin", &guest.name]);
            }
            Step::new(&format!("building the guests for {target}")).run(&mut command)?;
        }
        Ok(())
    }

    fn cargo(&self, workspace: &str) -> std::process::Command {
        self.cargo_for(workspace, BARE_METAL, "core,alloc")
    }

    fn cargo_for(&self, workspace: &str, target: &str, std: &str) -> std::process::Command {
        let mut command = self.toolchain.cargo(&self.project.root().join(workspace));
        command.args(["build", "--release", "--target", target]);
        command
            .arg(format!("-Zbuild-std={std}"))
            .arg("--target-dir")
            .arg(self.target_directory());
        command
    }

    fn target_directory(&self) -> PathBuf {
        self.project.root().join("target/bare-metal")
    }

    fn binary(&self, target: &str, name: &str) -> PathBuf {
        self.target_directory()
            .join(target)
            .join("release")
            .join(name)
    }
}

/// Finds a guest by what the user calls it: one of our own, or none of them for a file.
///
/// # Errors
/// When there is neither such a guest nor such a file.
pub fn find_guest<'a>(guests: &'a [Guest], name: &str) -> Result<Option<&'a Guest>> {
    if let Some(guest) = guests.iter().find(|guest| guest.name == name) {
        return Ok(Some(guest));
    }
    if Path::new(name).is_file() {
        return Ok(None);
    }
    let hint = keys::suggestion(name, guests.iter().map(|guest| guest.name.as_str()));
    let reason = "neither a file nor one of Umbra's own guests";
    Err(BadInput(format!("guest {name}: {reason}; {hint}")).into())
}

/// Reads the list of our own guests.
///
/// # Errors
/// When it cannot be read.
pub fn guests(project: &Project) -> Result<Vec<Guest>> {
    let path = project.root().join("images/guests/guests.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let list: GuestList = toml::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(list.guest)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_found_by_name_or_file() {
        let guests = guests(&Project::find()).unwrap();
        let name = |typed| find_guest(&guests, typed).map(|guest| guest.map(|guest| &guest.name));
        assert_eq!(name("hello").unwrap().unwrap(), "hello");
        assert_eq!(
            name(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap(),
            None
        );
        let error = name("helo").unwrap_err();
        assert!(error.is::<BadInput>() && error.to_string().contains("did you mean `hello`?"));
    }
}
