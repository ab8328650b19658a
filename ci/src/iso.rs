//! ISO images that boot by GRUB on a BIOS, from CD and from USB sticks.
//!
//! GRUB's core is made once; each image is then one call of xorriso.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::{Step, clean};
use crate::input::BadInput;
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
    "test",
    "halt",
];
/// 1 January 2000, in xorriso's words: any fixed date makes images reproducible.
const DATE: &str = "2000010100000000";

/// What an ISO image boots.
pub struct Content<'a> {
    /// The boot ELF.
    pub boot: &'a Path,
    /// The Hermit kernel's arguments.
    pub kernel_arguments: &'a [String],
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
    check_arguments(content.arguments)?;
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
    let stamp = directory.join("stamp");
    let modules = MODULES.join(" ");
    let core = Path::new(GRUB).join("kernel.img");
    let is_newer = |path: &Path, than: &Path| -> Option<bool> {
        Some(fs::metadata(path).ok()?.modified().ok()? > fs::metadata(than).ok()?.modified().ok()?)
    };
    let has_modules = fs::read_to_string(&stamp).is_ok_and(|old| old == modules);
    if has_modules && is_newer(&loader, &core) == Some(true) {
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
    fs::write(&stamp, modules)?;
    Ok(loader)
}

/// No menu, no waiting, and nothing on the serial console unless something is wrong.
fn grub_config(content: &Content<'_>) -> String {
    let mut load = vec!["multiboot2 /boot/umbra.elf".to_owned()];
    load.extend(content.kernel_arguments.iter().cloned());
    load.push("--".to_owned());
    load.extend(content.arguments.iter().map(|argument| quote(argument)));
    let load = load.join(" ");
    // GRUB's shell has no `&&`.
    let boot = match content.archive {
        Some(_) => "if module2 /boot/guest.tar guest.tar; then boot; fi",
        None => "boot",
    };
    format!(
        "if {load}; then {boot}; fi\n\
         serial --unit=0 --speed=115200\n\
         terminal_output serial\n\
         echo \"GRUB cannot load the image: its files are damaged, or the memory is too small\"\n\
         halt\n"
    )
}

/// GRUB puts an argument with a space between double quotes, and escapes apostrophes within by a
/// backslash, which Hermit's parser then takes for itself.
fn check_arguments(arguments: &[String]) -> Result<()> {
    match arguments
        .iter()
        .find(|argument| argument.contains(' ') && argument.contains('\''))
    {
        Some(argument) => Err(BadInput(format!(
            "GRUB cannot pass on an argument that has a space and an apostrophe: {argument}"
        ))
        .into()),
        None => Ok(()),
    }
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
            kernel_arguments: &["-freq".to_owned(), "60".to_owned()],
            arguments: &arguments,
            archive,
        })
    }

    #[test]
    fn the_guest_is_a_module() {
        let arguments = ["--guest", "hello", "--append", "a $b"];
        let text = config(&arguments, Some(Path::new("g.tar")));
        let first = "if multiboot2 /boot/umbra.elf -freq 60 -- --guest hello --append 'a $b'; \
                     then if module2 /boot/guest.tar guest.tar; then boot; fi; fi";
        assert_eq!(text.lines().next(), Some(first));
    }

    #[test]
    fn without_a_guest_there_is_no_module() {
        assert!(!config(&[], None).contains("module2"));
        assert!(config(&["--append", ""], None).contains("-- --append ''; then boot; fi"));
        assert_eq!(quote("it's"), r"'it'\''s'");
    }

    #[test]
    fn what_grub_would_change_is_refused() {
        let check = |argument: &str| check_arguments(&[argument.to_owned()]);
        assert!(check("a b").is_ok() && check("a'b").is_ok() && check("\"a b\"").is_ok());
        assert!(check("it's that").unwrap_err().is::<BadInput>());
    }
}
