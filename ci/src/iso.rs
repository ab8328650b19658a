//! ISO images that boot by GRUB on a BIOS and on UEFI, from CD and from USB sticks.
//!
//! A BIOS loads GRUB's core from the CD itself, UEFI from a FAT file system in it, whose script leads to
//! the CD's. The cores are made once; each image is then one call of xorriso.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use fatfs::FatType;

use crate::command::{Step, clean};
use crate::disk::fat;
use crate::grub::{self, Content, Core, Places};
use crate::project::{Project, write_if_changed};

/// 1 January 2000, in xorriso's words: any fixed date makes images reproducible.
const DATE: &str = "2000010100000000";
/// The bytes of the FAT file system that UEFI reads.
const EFI_IMAGE_SIZE: u64 = 2 << 20;
/// What GRUB does when UEFI has loaded it: find the CD, and do as it says.
const EFI_SCRIPT: &str =
    "search --set=root --file /boot/umbra.elf\nconfigfile /boot/grub/grub.cfg\n";
const PLACES: Places = Places {
    boot: "boot/umbra.elf",
    archive: "boot/guest.tar",
    user: None,
};

/// Writes an ISO image to `iso`, with the directory `work` for its parts.
///
/// # Errors
/// When GRUB's tools or xorriso fail.
pub fn write(project: &Project, content: &Content<'_>, work: &Path, iso: &Path) -> Result<()> {
    let config = work.join("grub.cfg");
    write_if_changed(&config, grub::script(content, &PLACES)?.as_bytes())?;
    let loader = Core::BiosCd.make(project)?;
    if iso.exists() {
        fs::remove_file(iso).with_context(|| format!("cannot replace {}", iso.display()))?;
    }
    let efi = work.join("efi.img");
    write_if_changed(&efi, &efi_image(project)?)?;
    let mut command = clean("xorriso");
    command.env("SOURCE_DATE_EPOCH", "946684800");
    let date = format!("--modification-date={DATE}");
    command.args(["-as", "mkisofs", "-quiet", "-graft-points", "-V", "UMBRA"]);
    command.args([&*date, "--set_all_file_dates", DATE]);
    command.args(["-uid", "0", "-gid", "0"]);
    // From a CD, by a BIOS.
    command.args(["-b", "boot/grub/loader.img", "-no-emul-boot"]);
    command.args(["-boot-load-size", "4", "-boot-info-table"]);
    command.arg("--grub2-boot-info");
    // From a disk, by a BIOS.
    let first_stage = format!("{}/boot_hybrid.img", grub::BIOS);
    command.args(["--grub2-mbr", &first_stage]);
    // From a CD and from a disk, by UEFI.
    command.args(["-eltorito-alt-boot", "-e", "boot/efi.img", "-no-emul-boot"]);
    command.arg("-isohybrid-gpt-basdat");
    command.arg("-o").arg(iso);
    command.arg(format!("/boot/grub/loader.img={}", loader.display()));
    command.arg(format!("/boot/grub/grub.cfg={}", config.display()));
    command.arg(format!("/boot/efi.img={}", efi.display()));
    command.arg(format!("/{}={}", PLACES.boot, content.boot.display()));
    if let Some(archive) = content.archive {
        command.arg(format!("/{}={}", PLACES.archive, archive.display()));
    }
    Step::new("writing the ISO image")
        .run(&mut command)
        .map(drop)
}

fn efi_image(project: &Project) -> Result<Vec<u8>> {
    let core = Core::UefiCd.make(project)?;
    let core = fs::read(&core).with_context(|| format!("cannot read {}", core.display()))?;
    let files = [
        ("EFI/BOOT/BOOTX64.EFI".to_owned(), core),
        ("boot/grub/grub.cfg".to_owned(), EFI_SCRIPT.into()),
    ];
    fat::volume(FatType::Fat12, EFI_IMAGE_SIZE, &[], &files)
}
