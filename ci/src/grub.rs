//! GRUB, the boot loader of ISO and disk images: its core for each kind of machine, and the script
//! that it follows.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::{Step, clean};
use crate::input::BadInput;
use crate::project::Project;

/// Where Debian's `grub-pc-bin` keeps GRUB for BIOS machines.
pub const BIOS: &str = "/usr/lib/grub/i386-pc";
/// Where Debian's `grub-efi-amd64-bin` keeps GRUB for UEFI machines.
pub const UEFI: &str = "/usr/lib/grub/x86_64-efi";

/// What an image boots.
#[derive(Clone, Copy)]
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

/// How a machine's firmware loads GRUB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Core {
    /// By a BIOS, from a CD.
    BiosCd,
    /// By a BIOS, from a disk's BIOS boot partition.
    BiosDisk,
    /// By UEFI, as a program on a disk's EFI partition.
    Uefi,
    /// By UEFI, as a program on a CD's EFI image.
    UefiCd,
}

impl Core {
    /// What it is called below `target/grub`.
    fn name(self) -> &'static str {
        match self {
            Self::BiosCd => "bios-cd",
            Self::BiosDisk => "bios-disk",
            Self::Uefi => "uefi",
            Self::UefiCd => "uefi-cd",
        }
    }

    fn format(self) -> &'static str {
        match self {
            Self::BiosCd => "i386-pc-eltorito",
            Self::BiosDisk => "i386-pc",
            Self::Uefi | Self::UefiCd => "x86_64-efi",
        }
    }

    fn directory(self) -> &'static str {
        match self {
            Self::BiosCd | Self::BiosDisk => BIOS,
            Self::Uefi | Self::UefiCd => UEFI,
        }
    }

    /// Where the core finds its script.
    fn prefix(self) -> &'static str {
        match self {
            // On the CD, the partition or the EFI image that the core itself was read from.
            Self::BiosCd | Self::Uefi | Self::UefiCd => "/boot/grub",
            // On the second partition of the disk that the BIOS booted.
            Self::BiosDisk => "(,gpt2)/boot/grub",
        }
    }

    fn modules(self) -> &'static [&'static str] {
        match self {
            Self::BiosCd => &["biosdisk", "iso9660"],
            Self::BiosDisk => &["biosdisk", "part_gpt", "fat"],
            Self::Uefi => &["part_gpt", "fat"],
            Self::UefiCd => &["fat", "iso9660", "search", "search_fs_file", "configfile"],
        }
    }

    /// The core with all that it needs to read the image. It is made once.
    ///
    /// # Errors
    /// When GRUB's tool fails.
    pub fn make(self, project: &Project) -> Result<PathBuf> {
        const MODULES: &[&str] = &[
            "normal",
            "multiboot2",
            "boot",
            "echo",
            "serial",
            "terminal",
            "test",
            "regexp",
            "halt",
        ];
        let directory = project.target("grub")?;
        let core = directory.join(format!("{}.img", self.name()));
        let stamp = directory.join(format!("{}.stamp", self.name()));
        let words = [&[self.prefix()], self.modules(), MODULES].concat();
        let made_of = words.join(" ");
        let source = Path::new(self.directory()).join("moddep.lst");
        let is_newer = |path: &Path, than: &Path| -> Option<bool> {
            Some(
                fs::metadata(path).ok()?.modified().ok()?
                    > fs::metadata(than).ok()?.modified().ok()?,
            )
        };
        let is_same = fs::read_to_string(&stamp).is_ok_and(|old| old == made_of);
        if is_same && is_newer(&core, &source) == Some(true) {
            return Ok(core);
        }
        // Several runs may want it at once: each makes its own, and moves it into its place.
        let fresh = tempfile::NamedTempFile::new_in(&directory)?;
        let mut command = clean("grub-mkimage");
        command
            .args(["-O", self.format(), "-d", self.directory()])
            .args(["-p", self.prefix(), "-o"])
            .arg(fresh.path())
            .args(&words[1..]);
        Step::new("making GRUB's core").run(&mut command)?;
        fresh
            .persist(&core)
            .with_context(|| format!("cannot write {}", core.display()))?;
        fs::write(&stamp, made_of)?;
        Ok(core)
    }
}

/// Where the image's files are on the device that GRUB was read from.
pub struct Places {
    /// The boot ELF.
    pub boot: &'static str,
    /// The guest archive.
    pub archive: &'static str,
    /// The directory in which users put a configuration and guests, if they can.
    pub user: Option<&'static str>,
}

/// No menu, no waiting, and nothing on the serial console unless something is wrong.
///
/// # Errors
/// [`BadInput`] for an argument that GRUB cannot pass on.
pub fn script(content: &Content<'_>, places: &Places) -> Result<String> {
    check_arguments(content.kernel_arguments)?;
    check_arguments(content.arguments)?;
    let mut load = vec![format!("multiboot2 /{}", places.boot)];
    load.extend(content.kernel_arguments.iter().map(|word| quote(word)));
    load.push("--".to_owned());
    load.extend(content.arguments.iter().map(|argument| quote(argument)));
    let load = load.join(" ");
    // GRUB's shell has no `&&`.
    let boot = match (content.archive, places.user) {
        (Some(_), _) => format!("if module2 /{} guest.tar; then boot; fi", places.archive),
        (None, None) => "boot".to_owned(),
        (None, Some(user)) => format!(
            "if [ -f /{user}/umbra.toml ]; then module2 /{user}/umbra.toml umbra.toml; fi\n\
             for file in /{user}/guests/*; do\n\
             if [ -f \"$file\" ]; then module2 \"$file\" \"$file\"; fi\n\
             done\n\
             boot"
        ),
    };
    Ok(format!(
        "if {load}; then\n\
         {boot}\n\
         fi\n\
         serial --unit=0 --speed=115200\n\
         terminal_output serial\n\
         echo \"GRUB cannot load the image: its files are damaged, or the memory is too small\"\n\
         halt\n"
    ))
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

    fn script(arguments: &[&str], archive: Option<&Path>, user: Option<&'static str>) -> String {
        let arguments: Vec<_> = arguments
            .iter()
            .map(|&argument| argument.to_owned())
            .collect();
        let content = Content {
            boot: Path::new("x"),
            kernel_arguments: &["-freq".to_owned(), "60".to_owned()],
            arguments: &arguments,
            archive,
        };
        let places = Places {
            boot: "boot/umbra.elf",
            archive: "boot/guest.tar",
            user,
        };
        super::script(&content, &places).unwrap()
    }

    #[test]
    fn the_guest_is_a_module() {
        let arguments = ["--guest", "hello", "--append", "a $b"];
        let text = script(&arguments, Some(Path::new("g.tar")), None);
        let first = "if multiboot2 /boot/umbra.elf -freq 60 -- --guest hello --append 'a $b'; then\n\
                     if module2 /boot/guest.tar guest.tar; then boot; fi\nfi\n";
        assert!(text.starts_with(first), "{text}");
    }

    #[test]
    fn without_a_guest_there_is_no_module() {
        assert!(!script(&[], None, None).contains("module2"));
        assert!(script(&["--append", ""], None, None).contains("-- --append ''; then\nboot\nfi"));
        assert_eq!(quote("it's"), r"'it'\''s'");
    }

    #[test]
    fn a_users_files_are_modules_named_after_their_paths() {
        let text = script(&[], None, Some("umbra"));
        assert!(text.contains("module2 /umbra/umbra.toml umbra.toml"));
        assert!(text.contains("for file in /umbra/guests/*; do"));
    }

    #[test]
    fn what_grub_would_change_is_refused() {
        let check = |argument: &str| check_arguments(&[argument.to_owned()]);
        assert!(check("a b").is_ok() && check("a'b").is_ok() && check("\"a b\"").is_ok());
        assert!(check("it's that").unwrap_err().is::<BadInput>());
    }
}
