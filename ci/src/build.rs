//! Building what is booted: our own guests, the Hermit images, and the boot ELF around each.
//!
//! Cargo alone decides what is fresh. All bare-metal workspaces share `target/bare-metal`, and what
//! is booted is copied to `target/images`.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::command::{Step, clean};
use crate::first_guest;
use crate::guest::{self, Guest, Source};
use crate::kernel;
use crate::linux;
use crate::memtest;
use crate::project::{Project, write_if_changed};
use crate::setup;
use crate::toolchain::Toolchain;

const BARE_METAL: &str = "x86_64-unknown-none";
/// The guest that the image carries, which runs when no other is given.
const DEFAULT_GUEST: &str = "hello";
/// The Hermit application that runs as a guest.
const HERMIT_GUEST: &str = "hermit-guest";
/// Where the ELF header names the operating system, and Hermit's number for itself.
const ELF_OS_ABI: usize = 7;
const ELF_OS_ABI_STANDALONE: u8 = 0xff;

/// A Hermit application that can be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize, schemars::JsonSchema)]
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

/// The files that a guest is made of.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    /// The kernel image.
    pub image: PathBuf,
    /// The initial RAM disk or first module.
    pub initrd: Option<PathBuf>,
}

/// The two forms of an application that are booted.
#[derive(Clone, Debug)]
pub struct ImageFiles {
    /// The ELF that ordinary boot loaders boot.
    pub boot: PathBuf,
    /// The Hermit ELF inside it, which Hermit's own loaders boot.
    pub hermit: PathBuf,
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
        kernel::set_up(project, &toolchain, kernel::OF_IMAGE)?;
        let guests = guest::own(project)?;
        let builder = Self {
            project,
            toolchain,
            guests,
        };
        builder.build_guests()?;
        Ok(builder)
    }

    /// The files of a guest, built or downloaded where that is needed.
    ///
    /// # Errors
    /// When they cannot be.
    pub fn guest_files(&self, source: &Source) -> Result<GuestFiles> {
        let (image, initrd) = match source {
            Source::Own(guest) => (self.own_guest(guest), None),
            Source::Linux(protocol) => {
                let linux = linux::set_up(self.project, *protocol)?;
                (linux.kernel, Some(linux.initrd))
            }
            Source::Hermit => (self.hermit_guest()?, None),
            Source::Memtest => (memtest::set_up(self.project)?, None),
            Source::First => (first_guest::set_up(self.project)?, None),
            Source::File(path) => (path.clone(), None),
        };
        Ok(GuestFiles { image, initrd })
    }

    fn own_guest(&self, guest: &Guest) -> PathBuf {
        let linked = self.binary(&guest.target, &guest.name);
        if guest.is_elf32() {
            linked.with_extension("elf32")
        } else if guest.is_boot_sector() {
            linked.with_extension("img")
        } else {
            linked
        }
    }

    fn default_guest(&self) -> Result<PathBuf> {
        let guest = self.guests.iter().find(|guest| guest.name == DEFAULT_GUEST);
        let guest = guest.with_context(|| format!("there is no guest {DEFAULT_GUEST}"))?;
        Ok(self.own_guest(guest))
    }

    /// Builds an application as a Hermit ELF, and returns its path.
    ///
    /// # Errors
    /// When it does not build.
    pub fn hermit_elf(&self, application: Application) -> Result<PathBuf> {
        let binary = application.binary();
        let mut command = self.cargo("app");
        command.args(["--bin", binary]);
        command.env("UMBRA_DEFAULT_GUEST", self.default_guest()?);
        Step::new(&format!("building {binary}")).run(&mut command)?;
        self.as_hermit_elf(binary)
    }

    /// Builds the Hermit application that runs as a guest, and returns its path.
    fn hermit_guest(&self) -> Result<PathBuf> {
        kernel::set_up(self.project, &self.toolchain, kernel::OF_GUEST)?;
        let mut command = self.cargo("images/hermit-guest");
        // The kernel's information about the machine would drown what the guest prints.
        command.env("HERMIT_LOG_LEVEL_FILTER", "warn");
        Step::new("building the Hermit guest").run(&mut command)?;
        self.as_hermit_elf(HERMIT_GUEST)
    }

    /// Marks a binary as one for Hermit, which its linker does not know.
    fn as_hermit_elf(&self, binary: &str) -> Result<PathBuf> {
        let mut elf = read(&self.binary(BARE_METAL, binary))?;
        elf[ELF_OS_ABI] = ELF_OS_ABI_STANDALONE;
        let images = self.project.target("images")?;
        let image = images.join(format!("{binary}.hermit.elf"));
        write_if_changed(&image, &elf)?;
        Ok(image)
    }

    /// Builds an application and the boot ELF around it.
    ///
    /// # Errors
    /// When one of them does not build.
    pub fn images(&self, application: Application) -> Result<ImageFiles> {
        let hermit = self.hermit_elf(application)?;
        let mut command = self.cargo("images/boot");
        command.env("UMBRA_HERMIT_ELF", &hermit);
        Step::new(&format!("building the boot image of {application}")).run(&mut command)?;
        let boot = self
            .project
            .target("images")?
            .join(format!("{application}.elf"));
        write_if_changed(&boot, &read(&self.binary(BARE_METAL, "umbra-boot"))?)?;
        Ok(ImageFiles { boot, hermit })
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
        for guest in self.guests.iter().filter(|guest| guest.is_elf32()) {
            let mut command = clean("objcopy");
            command.args(["-O", "elf32-i386"]);
            command.arg(self.binary(&guest.target, &guest.name));
            command.arg(self.own_guest(guest));
            Step::new(&format!("making {} an ELF32", guest.name)).run(&mut command)?;
        }
        for guest in self.guests.iter().filter(|guest| guest.is_boot_sector()) {
            let mut command = clean("objcopy");
            command.args(["-O", "binary", "--only-section=.boot_sector"]);
            command.arg(self.binary(&guest.target, &guest.name));
            command.arg(self.own_guest(guest));
            Step::new(&format!("cutting {} out", guest.name)).run(&mut command)?;
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

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
