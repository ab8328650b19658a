//! The Linux guest: Debian's own kernel, and an initial RAM disk with busybox and our workload.
//!
//! Kernel and busybox come out of Debian's packages. All of it stays in `target/linux`: whoever wants
//! a newer kernel removes that directory.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cpio::NewcBuilder;
use cpio::newc::{ModeFileType, trailer};

use crate::command::Step;
use crate::debian::{Apt, take_file};
use crate::project::{Project, write_if_changed};
use crate::vmlinux;

/// What the kernel is told besides the user's own words: the console that Umbra shows, and to end a
/// panic by a reset, which ends the guest.
pub const COMMAND_LINE: &str = "console=ttyS0 panic=-1";
/// The guest's memory if the user does not say: Debian's kernel alone takes 52 MiB from 16 MiB on.
pub const MEMORY: &str = "128M";

/// The package that depends on the current kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
const WORKLOAD_PACKAGE: &str = "umbra-workload";
const WORKLOAD_TARGET: &str = "x86_64-unknown-linux-gnu";

/// How the kernel is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// As the bzImage that Debian ships, by Linux's own boot protocol.
    Linux,
    /// As the ELF file inside it, by PVH.
    Pvh,
}

/// The files of the guest.
#[derive(Clone, Debug)]
pub struct Linux {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
}

/// Downloads what is missing, builds the workload, and makes the initial RAM disk.
///
/// # Errors
/// When something cannot be downloaded or built.
pub fn set_up(project: &Project, protocol: Protocol) -> Result<Linux> {
    let place = project.target("linux")?;
    let kernel = place.join("vmlinuz");
    if !kernel.exists() {
        let package = Apt::new(&place)?.download_dependency(KERNEL_PACKAGE, "linux-image-")?;
        take_file(&package, "boot/vmlinuz-", &kernel)?;
    }
    let kernel = match protocol {
        Protocol::Linux => kernel,
        Protocol::Pvh => {
            let elf = place.join("vmlinux");
            if !elf.exists() {
                let image = fs::read(&kernel)
                    .with_context(|| format!("cannot read {}", kernel.display()))?;
                let content = vmlinux::extract(&image).context(kernel.display().to_string())?;
                write_if_changed(&elf, &content)?;
            }
            elf
        }
    };
    let busybox = place.join("busybox");
    if !busybox.exists() {
        let package = Apt::new(&place)?.download(BUSYBOX_PACKAGE)?;
        take_file(&package, "bin/busybox", &busybox)?;
    }
    let init = project.root().join("images/linux/init");
    let workload = build_workload(project, &place)?;
    let files = [
        ("init", &init),
        ("bin/busybox", &busybox),
        ("bin/workload", &workload),
    ];
    let files = files
        .into_iter()
        .map(|(name, path)| {
            let content =
                fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            Ok((name, content))
        })
        .collect::<Result<Vec<_>>>()?;
    let initrd = place.join("initrd");
    write_if_changed(&initrd, &initial_ram_disk(&files)?)?;
    Ok(Linux { kernel, initrd })
}

/// The workload as a program that needs no libraries.
fn build_workload(project: &Project, place: &Path) -> Result<PathBuf> {
    let target_directory = place.join("build");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .current_dir(project.root())
        .args(["build", "--release", "--package", WORKLOAD_PACKAGE])
        .args(["--target", WORKLOAD_TARGET])
        .arg("--target-dir")
        .arg(&target_directory)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        // At a fixed address, so that no process spends its first thousand page faults on relocation.
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C relocation-model=static",
        )
        .env("CARGO_PROFILE_RELEASE_STRIP", "true");
    Step::new("building the Linux guest's workload").run(&mut command)?;
    Ok(target_directory
        .join(WORKLOAD_TARGET)
        .join("release/workload"))
}

/// An uncompressed archive of executable files and the directories that they are in, with the
/// console that the kernel opens for its first process. Byte for byte the same each time.
fn initial_ram_disk(files: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    const DIRECTORIES: [&str; 2] = ["bin", "dev"];
    const CONSOLE: (u32, u32) = (5, 1);
    let mut number = 0;
    let mut entry = |name: &str, kind: ModeFileType, permissions: u32| {
        number += 1;
        NewcBuilder::new(name)
            .ino(number)
            .mode(permissions)
            .set_mode_file_type(kind)
    };
    let mut archive = Vec::new();
    for directory in DIRECTORIES {
        archive = entry(directory, ModeFileType::Directory, 0o755)
            .nlink(2)
            .write(archive, 0)
            .finish()?;
    }
    let console = entry("dev/console", ModeFileType::Char, 0o600);
    archive = console
        .rdev_major(CONSOLE.0)
        .rdev_minor(CONSOLE.1)
        .write(archive, 0)
        .finish()?;
    for (name, content) in files {
        let size = u32::try_from(content.len()).with_context(|| format!("{name} is too large"))?;
        let mut writer = entry(name, ModeFileType::Regular, 0o755).write(archive, size);
        writer.write_all(content)?;
        archive = writer.finish()?;
    }
    trailer(archive).context("cannot end the initial RAM disk")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use cpio::NewcReader;

    use super::*;

    #[test]
    fn the_ram_disk_has_directories_before_their_files() -> Result<()> {
        let archive = initial_ram_disk(&[("init", b"#!/bin/sh\n".to_vec())])?;
        assert_eq!(
            archive,
            initial_ram_disk(&[("init", b"#!/bin/sh\n".to_vec())])?
        );
        let mut rest = &archive[..];
        let mut found = Vec::new();
        loop {
            let mut reader = NewcReader::new(rest)?;
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut content = String::new();
            reader.read_to_string(&mut content)?;
            found.push((entry.name().to_owned(), entry.mode(), content));
            rest = reader.finish()?;
        }
        let expected = [
            ("bin", 0o40755, ""),
            ("dev", 0o40755, ""),
            ("dev/console", 0o20600, ""),
            ("init", 0o100755, "#!/bin/sh\n"),
        ];
        let expected = expected.map(|(name, mode, content)| (name.into(), mode, content.into()));
        assert_eq!(found, expected);
        Ok(())
    }
}
