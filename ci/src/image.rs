//! `cargo xtask image`: the image as files for other machines.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use umbra_report::hermit_image::{self, HermitImage, Input, Memory, Requirements};

use crate::archive;
use crate::build::{Application, Builder};
use crate::config::Config;
use crate::disk;
use crate::grub::Content;
use crate::input::BadInput;
use crate::iso;
use crate::project::{Project, write_if_changed};
use crate::run::{archive_memory_mib, host_memory_mib};
use crate::setup::{self, Need};

/// The options of `image`.
#[derive(Args, Debug)]
pub struct Options {
    /// What to make
    #[arg(long)]
    format: Format,
    /// Guests to put into the image, as this umbra.toml describes them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Elf,
    HermitElf,
    Hermit,
    Iso,
    Disk(disk::Format),
}

impl Format {
    fn needs(self) -> Vec<Need> {
        match self {
            Self::Elf | Self::HermitElf | Self::Hermit => Vec::new(),
            Self::Iso => setup::for_iso(),
            Self::Disk(format) => format.needs(),
        }
    }
}

impl ValueEnum for Format {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self::Elf,
            Self::HermitElf,
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
            Self::HermitElf => (
                "hermit-elf",
                "The Hermit ELF inside it, for `uhyve` and Hermit's own loader",
            ),
            Self::Hermit => (
                "hermit",
                "A `.hermit` archive for the same two, with arguments and guests inside",
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
    if config.is_some() && matches!(options.format, Format::Elf | Format::HermitElf) {
        bail!(BadInput(
            "--config puts files into an image; this format has no place for them".into()
        ));
    }
    setup::install(&options.format.needs())?;
    let builder = Builder::new(project)?;
    let archive = match &config {
        Some(config) => {
            let path = project.target("images")?.join("guests.tar");
            write_if_changed(&path, &config.archive(&builder)?)?;
            Some(path)
        }
        None => None,
    };
    let archive = archive.as_deref();
    let path = match options.format {
        Format::Elf => builder.images(Application::Umbra)?.boot,
        Format::HermitElf => builder.hermit_elf(Application::Umbra)?,
        Format::Hermit => hermit(project, &builder, config.as_ref(), archive)?,
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
    let boot = builder.images(Application::Umbra)?.boot;
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
    let boot = builder.images(Application::Umbra)?.boot;
    let content = Content {
        boot: &boot,
        kernel_arguments: &[],
        arguments: &[],
        archive,
    };
    format.make(project, &content, &project.target("images")?)
}

/// The image that `hermit.toml` describes, or one with the guests of `config`, which are in `archive`.
fn hermit(
    project: &Project,
    builder: &Builder<'_>,
    config: Option<&Config>,
    archive: Option<&Path>,
) -> Result<PathBuf> {
    let archive = archive.map(fs::read).transpose()?;
    let (text, kernel) = match (config, &archive) {
        (Some(config), Some(archive)) => {
            let mib = config.machine_memory_mib() + archive_memory_mib(archive);
            let requirements = Requirements {
                memory: Some(Memory::Text(format!("{mib} MiB"))),
                cpus: 1,
            };
            let config = HermitImage::new(Input::default(), requirements);
            (toml::to_string(&config)?, config.kernel)
        }
        _ => own_hermit_config(project)?,
    };
    let elf = fs::read(builder.hermit_elf(Application::Umbra)?)?;
    let path = project.target("images")?.join("umbra.hermit");
    write_if_changed(
        &path,
        &archive::hermit(&text, &kernel, &elf, archive.as_deref())?,
    )?;
    Ok(path)
}

/// The text of our own `hermit.toml`, whose arguments Umbra will accept, and the kernel's name in it.
fn own_hermit_config(project: &Project) -> Result<(String, String)> {
    let path = project.root().join(hermit_image::FILE);
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = HermitImage::read(&text).map_err(|error| BadInput(error.to_string()))?;
    // Umbra gets them put together and taken apart again.
    let words = shell_words::split(&config.input.app_args.join(" "))
        .map_err(|error| BadInput(format!("{}: app_args: {error}", path.display())))?;
    host_memory_mib(&words).with_context(|| format!("{}: app_args", path.display()))?;
    Ok((text, config.kernel))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_configuration_is_good() {
        own_hermit_config(&Project::find().unwrap()).unwrap();
    }
}
