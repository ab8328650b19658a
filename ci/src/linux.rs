//! The Linux guest: Debian's own kernel, and an initial RAM disk with busybox and our workload.
//!
//! Kernel and busybox come out of Debian's packages. All of it stays in `target/linux`: whoever wants
//! a newer kernel removes that directory.

use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{self, Step};
use crate::debian::{Apt, take_file};
use crate::project::{Project, write_if_changed};
use crate::ram_disk;
use crate::vmlinux;

/// What the kernel is told besides the user's own words: the console that Umbra shows, and to end a
/// panic by a reset, which ends the guest.
pub const COMMAND_LINE: &str = "console=ttyS0 panic=-1";
/// The guest's memory if the user does not say: Debian's kernel alone takes 52 MiB from 16 MiB on.
pub const MEMORY: &str = "128M";

/// Below `target`.
const PLACE: &str = "linux";
/// The package that depends on the current kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
const WORKLOAD_PACKAGE: &str = "umbra-workload";
/// What programs for a small Linux are built for.
pub const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

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
    let place = project.target(PLACE)?;
    let kernel = kernel(project)?.image;
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
    let busybox = busybox(project)?;
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
    write_if_changed(&initrd, &ram_disk::make(&files)?)?;
    Ok(Linux { kernel, initrd })
}

/// Debian's kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The kernel itself, a bzImage.
    pub image: PathBuf,
    /// Those of its modules with which it is a hypervisor on AMD processors, in the order in which they
    /// must be loaded.
    pub modules: Vec<PathBuf>,
}

/// The modules of [`Kernel`].
const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];

/// Downloads the kernel if it is missing.
///
/// # Errors
/// When it cannot be downloaded.
pub fn kernel(project: &Project) -> Result<Kernel> {
    let place = project.target(PLACE)?;
    let image = place.join("vmlinuz");
    let modules = MODULES.map(|name| place.join(format!("{name}.ko")));
    // Modules fit no other kernel than their own.
    if !iter::once(&image).chain(&modules).all(|file| file.exists()) {
        let package = Apt::new(&place)?.download_dependency(KERNEL_PACKAGE, "linux-image-")?;
        for (name, module) in MODULES.iter().zip(&modules) {
            take_file(&package, &format!("/{name}.ko"), module)?;
        }
        take_file(&package, "/boot/vmlinuz-", &image)?;
    }
    let modules = modules.to_vec();
    Ok(Kernel { image, modules })
}

/// Downloads busybox, which needs no libraries, if it is missing.
///
/// # Errors
/// When it cannot be downloaded.
pub fn busybox(project: &Project) -> Result<PathBuf> {
    let place = project.target(PLACE)?;
    let busybox = place.join("busybox");
    if !busybox.exists() {
        let package = Apt::new(&place)?.download(BUSYBOX_PACKAGE)?;
        take_file(&package, "/bin/busybox", &busybox)?;
    }
    Ok(busybox)
}

/// The workload as a program that needs no libraries.
fn build_workload(project: &Project, place: &Path) -> Result<PathBuf> {
    let target_directory = place.join("build");
    let mut command = cargo_for_static_programs();
    command
        .current_dir(project.root())
        .args(["build", "--release", "--package", WORKLOAD_PACKAGE])
        .args(["--target", STATIC_TARGET])
        .arg("--target-dir")
        .arg(&target_directory);
    Step::new("building the Linux guest's workload").run(&mut command)?;
    Ok(target_directory
        .join(STATIC_TARGET)
        .join("release/workload"))
}

/// Cargo for building programs for [`STATIC_TARGET`] that need no libraries.
pub fn cargo_for_static_programs() -> Command {
    let mut command = command::cargo();
    command
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        // At a fixed address, so that no process spends its first thousand page faults on relocation.
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C relocation-model=static",
        )
        .env("CARGO_PROFILE_RELEASE_STRIP", "true");
    command
}
