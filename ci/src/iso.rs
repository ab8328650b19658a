//! ISO images that boot by GRUB on a BIOS, from CD and from USB sticks.
//!
//! GRUB's core is made once; each image is then one call of xorriso.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::command::{Step, clean};
use crate::grub::{self, Content, Core, Places};
use crate::project::{Project, write_if_changed};

/// 1 January 2000, in xorriso's words: any fixed date makes images reproducible.
const DATE: &str = "2000010100000000";
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
    let mut command = clean("xorriso");
    command.env("SOURCE_DATE_EPOCH", "946684800");
    command.args(["-as", "mkisofs", "-quiet", "-graft-points", "-V", "UMBRA"]);
    command
        .arg(format!("--modification-date={DATE}"))
        .args(["--set_all_file_dates", DATE]);
    command.args([
        "-uid",
        "0",
        "-gid",
        "0",
        "-b",
        "boot/grub/loader.img",
        "-no-emul-boot",
    ]);
    command.args([
        "-boot-load-size",
        "4",
        "-boot-info-table",
        "--grub2-boot-info",
    ]);
    command
        .arg("--grub2-mbr")
        .arg(format!("{}/boot_hybrid.img", grub::BIOS));
    command.arg("-o").arg(iso);
    command.arg(format!("/boot/grub/loader.img={}", loader.display()));
    command.arg(format!("/boot/grub/grub.cfg={}", config.display()));
    command.arg(format!("/{}={}", PLACES.boot, content.boot.display()));
    if let Some(archive) = content.archive {
        command.arg(format!("/{}={}", PLACES.archive, archive.display()));
    }
    Step::new("writing the ISO image")
        .run(&mut command)
        .map(drop)
}
