//! ISO images that boot by GRUB on a BIOS, from CD and from USB sticks.
//!
//! GRUB's core is made once; each image is then one call of xorriso.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::{Step, clean};
use crate::project::{Project, write_if_changed};

/// Where Debian's `grub-pc-bin` keeps GRUB for BIOS machines.
const GRUB: &str = "/usr/lib/grub/i386-pc";
const MODULES: &[&str] = &[
    "biosdisk",
    "iso9660",
    "normal",
    "multiboot2",
    "boot",
    "echo",
    "serial",
    "terminal",
];
/// 1 January 2000, in xorriso's words: any fixed date makes images reproducible.
const DATE: &str = "2000010100000000";

/// What an ISO image boots.
pub struct Content<'a> {
    /// The boot ELF.
    pub boot: &'a Path,
    /// Umbra's arguments.
    pub arguments: &'a [String],
    /// The guest archive; without it the guest that Umbra carries runs.
    pub archive: Option<&'a Path>,
}

/// Writes an ISO image to `iso`, with the directory `work` for its parts.
///
/// # Errors
/// When GRUB's tools or xorriso fail.
pub fn write(project: &Project, content: &Content<'_>, work: &Path, iso: &Path) -> Result<()> {
    let config = work.join("grub.cfg");
    write_if_changed(&config, grub_config(content).as_bytes())?;
    let loader = loader(project)?;
    if iso.exists() {
        fs::remove_file(iso).with_context(|| format!("cannot replace {}", iso.display()))?;
    }
    let mut command = clean("xorriso");
    command.env("SOURCE_DATE_EPOCH", "946684800");
    command.args(["-as", "mkisofs", "-quiet", "-graft-points", "-V", "UMBRA"]);
    command
        .arg(format!("--modification-date={DATE}"))
        .args(["--set_all_file_dates", "set_to_mtime"]);
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
        .arg(format!("{GRUB}/boot_hybrid.img"));
    command.arg("-o").arg(iso);
    command.arg(format!("/boot/grub/loader.img={}", loader.display()));
    command.arg(format!("/boot/grub/grub.cfg={}", config.display()));
    command.arg(format!("/boot/umbra.elf={}", content.boot.display()));
    if let Some(archive) = content.archive {
        command.arg(format!("/boot/guest.tar={}", archive.display()));
    }
    Step::new("writing the ISO image")
        .run(&mut command)
        .map(drop)
}

/// GRUB's core with all that it needs to read the image, to be loaded by a BIOS from CD.
fn loader(project: &Project) -> Result<PathBuf> {
    let directory = project.target("grub")?;
    let loader = directory.join("loader.img");
    let core = Path::new(GRUB).join("kernel.img");
    let is_newer = |path: &Path, than: &Path| -> Option<bool> {
        Some(fs::metadata(path).ok()?.modified().ok()? > fs::metadata(than).ok()?.modified().ok()?)
    };
    if is_newer(&loader, &core) == Some(true) {
        return Ok(loader);
    }
    // Several runs may want it at once: each makes its own, and moves it into its place.
    let fresh = tempfile::NamedTempFile::new_in(&directory)?;
    let mut command = clean("grub-mkimage");
    command.args([
        "-O",
        "i386-pc-eltorito",
        "-p",
        "/boot/grub",
        "-d",
        GRUB,
        "-o",
    ]);
    command.arg(fresh.path()).args(MODULES);
    Step::new("making GRUB's core").run(&mut command)?;
    fresh
        .persist(&loader)
        .with_context(|| format!("cannot write {}", loader.display()))?;
    Ok(loader)
}

/// No menu, no waiting; what GRUB has to complain about goes to the serial console.
fn grub_config(content: &Content<'_>) -> String {
    let mut boot = vec!["multiboot2 /boot/umbra.elf --".to_owned()];
    boot.extend(content.arguments.iter().map(|argument| quote(argument)));
    let boot = boot.join(" ");
    let mut lines = vec![
        "serial --unit=0 --speed=115200",
        "terminal_output serial",
        &boot,
    ];
    lines.extend(content.archive.map(|_| "module2 /boot/guest.tar guest.tar"));
    lines.extend(["boot", ""]);
    lines.join("\n")
}

/// Quotes a word for GRUB's shell, which knows single quotes as POSIX's does.
fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str], archive: Option<&Path>) -> String {
        let arguments: Vec<_> = arguments
            .iter()
            .map(|&argument| argument.to_owned())
            .collect();
        grub_config(&Content {
            boot: Path::new("x"),
            arguments: &arguments,
            archive,
        })
    }

    #[test]
    fn the_guest_is_a_module() {
        let text = config(
            &["--guest", "hello", "--append", "a 'b' $c"],
            Some(Path::new("g.tar")),
        );
        assert!(text.contains("umbra.elf -- --guest hello --append 'a '\\''b'\\'' $c'\nmodule2 "));
        assert!(text.ends_with("boot\n"));
    }

    #[test]
    fn without_a_guest_there_is_no_module() {
        assert!(!config(&[], None).contains("module2"));
        assert!(config(&["--append", ""], None).contains("-- --append ''\n"));
    }
}
