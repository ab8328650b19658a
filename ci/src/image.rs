//! `cargo xtask image`: the image as files for other machines.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::archive;
use crate::build::{Application, Builder};
use crate::config::Config;
use crate::disk;
use crate::grub::Content;
use crate::input::BadInput;
use crate::iso;
use crate::keys::{self, Keys, LEAF};
use crate::project::{Project, write_if_changed};
use crate::setup::{self, Need};

/// The options of `image`.
#[derive(Args, Debug)]
pub struct Options {
    /// What to make
    #[arg(long)]
    format: Format,
    /// Guests to put onto an ISO or a disk, as this umbra.toml describes them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Elf,
    Hermit,
    Iso,
    Disk(disk::Format),
}

impl Format {
    fn needs(self) -> Vec<Need> {
        match self {
            Self::Elf | Self::Hermit => Vec::new(),
            Self::Iso => setup::for_iso(),
            Self::Disk(format) => format.needs(),
        }
    }
}

impl ValueEnum for Format {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self::Elf,
            Self::Hermit,
            Self::Iso,
            Self::Disk(disk::Format::Raw),
            Self::Disk(disk::Format::Qcow2),
            Self::Disk(disk::Format::Vhd),
            Self::Disk(disk::Format::Gcp),
            Self::Disk(disk::Format::Vmdk),
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            Self::Elf => (
                "elf",
                "One ELF for `qemu -kernel` and other PVH or Multiboot2 boot loaders",
            ),
            Self::Hermit => (
                "hermit",
                "A `.hermit` archive for uhyve and Hermit's own loader",
            ),
            Self::Iso => (
                "iso",
                "An ISO image that boots on a BIOS and on UEFI, from CD or USB",
            ),
            Self::Disk(disk::Format::Raw) => ("raw", "A raw disk that boots on a BIOS and on UEFI"),
            Self::Disk(disk::Format::Qcow2) => (
                "qcow2",
                "The same disk for OpenStack and other clouds built on QEMU",
            ),
            Self::Disk(disk::Format::Vhd) => ("vhd", "The same disk as a fixed VHD for Azure"),
            Self::Disk(disk::Format::Gcp) => (
                "gcp",
                "The same disk, 1 GiB large, in the archive that Google Cloud imports",
            ),
            Self::Disk(disk::Format::Vmdk) => (
                "vmdk",
                "The same disk as a stream-optimized VMDK, for import into EC2 and vSphere",
            ),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

/// Makes it, and prints where it is.
///
/// # Errors
/// When something cannot be set up or built.
pub fn image(project: &Project, options: &Options) -> Result<()> {
    let config = options
        .config
        .as_deref()
        .map(|path| Config::read(project, path))
        .transpose()?;
    if config.is_some() && matches!(options.format, Format::Elf | Format::Hermit) {
        bail!(BadInput(
            "--config puts files onto an ISO or a disk; this format has no place for them".into()
        ));
    }
    setup::install(&options.format.needs())?;
    let builder = Builder::new(project)?;
    let archive = match config {
        Some(config) => {
            let path = project.target("images")?.join("guests.tar");
            write_if_changed(&path, &config.archive(&builder)?)?;
            Some(path)
        }
        None => None,
    };
    let archive = archive.as_deref();
    let path = match options.format {
        Format::Elf => builder.boot_elf(Application::Umbra)?,
        Format::Hermit => hermit(project, &builder)?,
        Format::Iso => bootable_iso(project, &builder, archive)?,
        Format::Disk(format) => disk_image(project, &builder, archive, format)?,
    };
    let bytes = fs::metadata(&path)?.len();
    println!("{} ({} KiB)", path.display(), bytes.div_ceil(1024));
    Ok(())
}

fn bootable_iso(
    project: &Project,
    builder: &Builder<'_>,
    archive: Option<&Path>,
) -> Result<PathBuf> {
    let boot = builder.boot_elf(Application::Umbra)?;
    let work = project.target("runs")?.join("image");
    fs::create_dir_all(&work)?;
    let path = project.target("images")?.join("umbra.iso");
    let content = Content {
        boot: &boot,
        kernel_arguments: &[],
        arguments: &[],
        archive,
    };
    iso::write(project, &content, &work, &path)?;
    Ok(path)
}

fn disk_image(
    project: &Project,
    builder: &Builder<'_>,
    archive: Option<&Path>,
    format: disk::Format,
) -> Result<PathBuf> {
    let boot = builder.boot_elf(Application::Umbra)?;
    let content = Content {
        boot: &boot,
        kernel_arguments: &[],
        arguments: &[],
        archive,
    };
    format.make(project, &content, &project.target("images")?)
}

fn hermit(project: &Project, builder: &Builder<'_>) -> Result<PathBuf> {
    let config_path = project.root().join("hermit.toml");
    let text = fs::read_to_string(&config_path)
        .with_context(|| format!("cannot read {}", config_path.display()))?;
    let config: HermitConfig = keys::parse(&config_path, &text, &CONFIG_KEYS)
        .map_err(|error| BadInput(error.to_string()))?;
    if config.version != "1" {
        bail!(BadInput(format!(
            "{}: version must be \"1\"",
            config_path.display()
        )));
    }
    crate::run::host_memory_mib(&config.input.app_args)
        .with_context(|| format!("{}: app_args", config_path.display()))?;
    let elf = fs::read(builder.hermit_elf(Application::Umbra)?)?;
    let path = project.target("images")?.join("umbra.hermit");
    write_if_changed(&path, &archive::hermit(&text, &config.kernel, &elf)?)?;
    Ok(path)
}

/// The configuration of a Hermit image, version 1, as `hermit-entry` defines it.
#[derive(Debug, Deserialize)]
struct HermitConfig {
    version: String,
    kernel: String,
    input: Input,
}

#[derive(Debug, Deserialize)]
struct Input {
    app_args: Vec<String>,
}

const CONFIG_KEYS: Keys = Keys(&[
    ("version", LEAF),
    ("kernel", LEAF),
    (
        "input",
        Keys(&[
            ("kernel_args", LEAF),
            ("app_args", LEAF),
            ("env_vars", LEAF),
        ]),
    ),
    ("requirements", Keys(&[("memory", LEAF), ("cpus", LEAF)])),
]);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn our_own_configuration_is_good() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hermit.toml");
        let text = fs::read_to_string(&path).unwrap();
        let config: HermitConfig = keys::parse(&path, &text, &CONFIG_KEYS).unwrap();
        assert_eq!(
            (config.version.as_str(), config.kernel.as_str()),
            ("1", "umbra")
        );
        crate::run::host_memory_mib(&config.input.app_args).unwrap();
    }

    #[test]
    fn a_mistyped_key_names_the_nearest() {
        let text = "version = \"1\"\nkernel = \"x\"\n[input]\napp_arg = []\n";
        let error =
            keys::parse::<HermitConfig>(Path::new("hermit.toml"), text, &CONFIG_KEYS).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("`input.app_arg`; did you mean `app_args`?")
        );
    }
}
