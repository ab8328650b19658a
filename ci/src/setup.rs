//! The Debian packages that building and booting Umbra needs: finding out what is missing, and
//! installing it.
//!
//! A need is a program or a file, never a package: what is there already is left alone, wherever it
//! came from.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::command::{Step, answer, clean, find_program};

/// Something that must be there, and the Debian package that brings it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// A program's name, or a file's absolute path.
    pub probe: String,
    /// The package that has it.
    pub package: String,
    /// What it is for.
    pub purpose: &'static str,
}

impl Need {
    /// A need for `probe` (a program's name, or a file's absolute path).
    pub fn new(probe: &str, package: &str, purpose: &'static str) -> Self {
        Self {
            probe: probe.to_owned(),
            package: package.to_owned(),
            purpose,
        }
    }

    /// Whether it is there.
    pub fn is_met(&self) -> bool {
        if self.probe.starts_with('/') {
            Path::new(&self.probe).exists()
        } else {
            find_program(&self.probe).is_some()
        }
    }
}

/// What builds need besides Rust.
pub fn for_building() -> Vec<Need> {
    vec![Need::new(
        "patch",
        "patch",
        "applies our patch to the Hermit kernel",
    )]
}

/// What the platform `qemu` needs.
pub fn for_qemu() -> Vec<Need> {
    vec![Need::new(
        "qemu-system-x86_64",
        "qemu-system-x86",
        "boots the image on an emulated AMD CPU",
    )]
}

/// What counting the MMU's instructions needs.
pub fn for_benchmarks() -> Vec<Need> {
    vec![Need::new(
        "valgrind",
        "valgrind",
        "counts instructions on the host",
    )]
}

/// What the guest of `docs/ci.md` is compiled by.
pub fn for_first_guest() -> Vec<Need> {
    vec![Need::new("gcc", "gcc", "compiles the first guest")]
}

/// What a session of GDB needs.
pub fn for_gdb() -> Vec<Need> {
    vec![Need::new("gdb", "gdb", "debugs guests")]
}

/// What an ISO image needs.
pub fn for_iso() -> Vec<Need> {
    vec![
        Need::new("grub-mkimage", "grub-common", "makes the ISO's boot loader"),
        Need::new(
            "/usr/lib/grub/i386-pc/cdboot.img",
            "grub-pc-bin",
            "is the ISO's boot loader for BIOS machines",
        ),
        Need::new(
            "/usr/lib/grub/x86_64-efi/moddep.lst",
            "grub-efi-amd64-bin",
            "is the ISO's boot loader for UEFI machines",
        ),
        Need::new("xorriso", "xorriso", "writes ISO images"),
    ]
}

/// What a disk image needs.
pub fn for_disk() -> Vec<Need> {
    vec![
        Need::new(
            "grub-mkimage",
            "grub-common",
            "makes the disk's boot loader",
        ),
        Need::new(
            "/usr/lib/grub/i386-pc/boot.img",
            "grub-pc-bin",
            "is the disk's boot loader for BIOS machines",
        ),
        Need::new(
            "/usr/lib/grub/x86_64-efi/moddep.lst",
            "grub-efi-amd64-bin",
            "is the disk's boot loader for UEFI machines",
        ),
    ]
}

/// What turns raw disks into other formats.
pub fn for_conversion() -> Vec<Need> {
    vec![Need::new(
        "qemu-img",
        "qemu-utils",
        "converts the raw disk into other formats",
    )]
}

/// UEFI firmware for QEMU's machines.
pub const UEFI_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
/// Its variables, before anything was set.
pub const UEFI_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// What the platform `disk-uefi` needs besides `disk-bios`.
pub fn for_uefi() -> Vec<Need> {
    vec![Need::new(
        UEFI_CODE,
        "ovmf",
        "is the emulated machine's UEFI firmware",
    )]
}

/// What the platform `bochs` needs, its ISO image included.
pub fn for_bochs() -> Vec<Need> {
    let mut needs = for_iso();
    needs.extend([
        Need::new("bochs", "bochs", "boots the image on an emulated Intel CPU"),
        Need::new(
            BOCHS_BIOS,
            "bochsbios",
            "is the emulated machine's firmware",
        ),
        Need::new(
            BOCHS_VGA_BIOS,
            "vgabios",
            "is the emulated machine's video firmware",
        ),
    ]);
    needs
}

/// Bochs's firmware.
pub const BOCHS_BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
/// Bochs's video firmware.
pub const BOCHS_VGA_BIOS: &str = "/usr/share/vgabios/vgabios.bin";

/// Installs what is missing of `needs`.
///
/// # Errors
/// When something is missing and cannot be installed: with the one command that installs it.
pub fn install(needs: &[Need]) -> Result<()> {
    let missing: Vec<_> = needs.iter().filter(|need| !need.is_met()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = packages(&missing);
    let by_hand = format!(
        "sudo apt-get install --no-install-recommends {}",
        packages.join(" ")
    );
    let Some(administrator) = administrator() else {
        bail!("missing: {}; install with: {by_hand}", list(&missing));
    };
    eprintln!("Installing Debian packages:");
    for need in &missing {
        eprintln!("  {} (its {} {})", need.package, need.probe, need.purpose);
    }
    // An unrelated repository that cannot be reached is no reason to give up: what is needed may
    // be installable all the same.
    let update = Step::new("updating the package lists").within(Duration::from_secs(300));
    if let Err(error) = update.run(apt_get(administrator).arg("update")) {
        eprintln!("apt-get update: {}", first_line(&error.to_string()));
    }
    let installation = Step::new("installing packages").run(
        apt_get(administrator)
            .args(["install", "-y", "--no-install-recommends"])
            .args(&packages),
    );
    let missing: Vec<_> = needs.iter().filter(|need| !need.is_met()).collect();
    match installation {
        _ if missing.is_empty() => Ok(()),
        Ok(_) => bail!("still missing after the installation: {}", list(&missing)),
        Err(error) => bail!(
            "{error}\nmissing: {}; install with: {by_hand}",
            list(&missing)
        ),
    }
}

/// How this process may install packages.
#[derive(Clone, Copy)]
enum Administrator {
    Root,
    Sudo,
}

fn administrator() -> Option<Administrator> {
    find_program("apt-get")?;
    if answer(clean("id").arg("-u")).is_some_and(|id| id == "0") {
        return Some(Administrator::Root);
    }
    answer(clean("sudo").args(["-n", "true"])).map(|_| Administrator::Sudo)
}

fn apt_get(administrator: Administrator) -> Command {
    let mut command = match administrator {
        Administrator::Root => clean("apt-get"),
        Administrator::Sudo => {
            let mut sudo = clean("sudo");
            sudo.args(["-n", "apt-get"]);
            sudo
        }
    };
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    // Another installation may hold the lock for a while.
    command.args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}

fn packages(needs: &[&Need]) -> Vec<String> {
    let mut packages: Vec<_> = needs.iter().map(|need| need.package.clone()).collect();
    packages.sort();
    packages.dedup();
    packages
}

fn list(needs: &[&Need]) -> String {
    let probes: Vec<_> = needs.iter().map(|need| need.probe.as_str()).collect();
    probes.join(", ")
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_a_program_are_found_or_missed() {
        assert!(Need::new("sh", "dash", "").is_met());
        assert!(Need::new("/proc/self/exe", "linux", "").is_met());
        assert!(!Need::new("no-such-program-anywhere", "x", "").is_met());
        assert!(!Need::new("/no/such/file", "x", "").is_met());
    }

    #[test]
    fn a_package_is_named_once() {
        let [a, b] = ["one", "two"].map(|probe| Need::new(probe, "same", ""));
        assert_eq!(packages(&[&a, &b]), ["same"]);
    }
}
