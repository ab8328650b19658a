//! The forms in which clouds and hypervisors want the disk.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Parts, SMALL, verify, vhd, write};
use crate::archive;
use crate::command::{Step, clean};
use crate::grub::Content;
use crate::project::Project;
use crate::setup::{self, Need};

/// A form of the disk image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk as it is.
    #[default]
    Raw,
    /// QEMU's format, for OpenStack.
    Qcow2,
    /// A fixed VHD, for Azure.
    Vhd,
    /// A disk of a whole gibibyte in a compressed archive, for Google Cloud.
    Gcp,
    /// A stream-optimized VMDK, for import into EC2 and vSphere.
    Vmdk,
}

impl Format {
    /// What must be installed to make it.
    pub fn needs(self) -> Vec<Need> {
        match self {
            Self::Raw => setup::for_disk(),
            Self::Qcow2 | Self::Vhd | Self::Gcp | Self::Vmdk => {
                [setup::for_disk(), setup::for_conversion()].concat()
            }
        }
    }

    /// What follows the dot in the file's name.
    fn extension(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Gcp => "tar.gz",
            Self::Vmdk => "vmdk",
        }
    }

    /// QEMU's name for what [`Format::bootable`] returns.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::Raw | Self::Gcp => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vpc",
            Self::Vmdk => "vmdk",
        }
    }

    /// Makes the image in `directory` and reads it back.
    ///
    /// # Errors
    /// When GRUB's tool or QEMU's fails, a file cannot be read or written, the content does not fit,
    /// or the image is not what it should be.
    pub fn make(
        self,
        project: &Project,
        content: &Content<'_>,
        directory: &Path,
    ) -> Result<PathBuf> {
        let parts = Parts::collect(project, content)?;
        let raw = directory.join("umbra.raw");
        let path = directory.join(format!("umbra.{}", self.extension()));
        let size = match self {
            Self::Gcp => 1 << 30,
            _ => SMALL,
        };
        write(&parts, size, &raw)?;
        verify::raw(&raw, &parts)?;
        match self {
            Self::Raw => {}
            Self::Qcow2 => convert(&raw, &["-O", "qcow2", "-c"], &path)?,
            Self::Vhd => {
                fs::copy(&raw, &path)?;
                vhd::append_footer(&mut File::options().write(true).open(&path)?, size)?;
            }
            Self::Gcp => archive::google_cloud(File::open(&raw)?, size, &path)?,
            Self::Vmdk => {
                let options = ["-O", "vmdk", "-o", "subformat=streamOptimized"];
                convert(&raw, &options, &path)?;
                fix_content_identifier(&path)?;
            }
        }
        match self {
            Self::Raw => {}
            Self::Gcp => compare_archive(&raw, &path)?,
            Self::Qcow2 | Self::Vhd | Self::Vmdk => {
                let mut command = clean("qemu-img");
                command.args(["compare", "-f", "raw", "-F", self.qemu_name()]);
                Step::new("reading the image back").run(command.arg(&raw).arg(&path))?;
            }
        }
        Ok(path)
    }

    /// The part of an image that a machine boots: all of it, but for an archive, whose disk is
    /// unpacked beside it.
    ///
    /// # Errors
    /// When the archive cannot be read.
    pub fn bootable(self, image: PathBuf) -> Result<PathBuf> {
        if self != Self::Gcp {
            return Ok(image);
        }
        let disk = image.with_file_name("disk.raw");
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(&image)?));
        let mut member = archive.entries()?.next().context("an empty archive")??;
        member.unpack(&disk)?;
        Ok(disk)
    }
}

fn convert(raw: &Path, options: &[&str], to: &Path) -> Result<()> {
    let mut command = clean("qemu-img");
    command.args(["convert", "-f", "raw"]).args(options);
    Step::new("converting the disk")
        .run(command.arg(raw).arg(to))
        .map(drop)
}

/// A VMDK's descriptor has a random identifier, by which layers of disks know each other. This disk
/// has no layers, and the same input shall give the same bytes.
fn fix_content_identifier(path: &Path) -> Result<()> {
    const KEY: &[u8] = b"\nCID=";
    const IDENTIFIER: &[u8] = b"756d6272";
    let mut disk = fs::read(path)?;
    let at = disk
        .windows(KEY.len())
        .position(|bytes| bytes == KEY)
        .with_context(|| format!("{} has no descriptor", path.display()))?
        + KEY.len();
    disk[at..at + IDENTIFIER.len()].copy_from_slice(IDENTIFIER);
    fs::write(path, disk).with_context(|| format!("cannot write {}", path.display()))
}

/// Compares the archive's one member with the raw disk.
fn compare_archive(raw: &Path, archive: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(archive)?));
    let mut members = archive.entries()?;
    let mut member = members.next().context("the archive is empty")??;
    ensure!(
        member.path()?.as_os_str() == "disk.raw",
        "the archive's member has another name than disk.raw"
    );
    let mut disk = File::open(raw)?;
    let (mut expected, mut found) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for _ in 0..fs::metadata(raw)?.len() >> 20 {
        disk.read_exact(&mut expected)?;
        member.read_exact(&mut found)?;
        ensure!(expected == found, "the archive's disk differs");
    }
    ensure!(members.next().is_none(), "the archive has another member");
    Ok(())
}
