//! The Linux guest: Debian's own kernel, and an initial RAM disk with busybox and our workload.
//!
//! Kernel and busybox come out of Debian's packages, which are downloaded by `apt-get` and never
//! installed; an ordinary user may do that. All of it stays in `target/linux`: whoever wants a newer
//! kernel removes that directory.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cpio::NewcBuilder;
use cpio::newc::{ModeFileType, trailer};

use crate::command::{Step, clean, find_program};
use crate::project::{Project, write_if_changed};

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
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// The files of the guest.
#[derive(Clone, Debug)]
pub struct Linux {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
}

/// Downloads what is missing, builds the workload, and makes the initial RAM disk.
///
/// # Errors
/// When something cannot be downloaded or built.
pub fn set_up(project: &Project) -> Result<Linux> {
    let place = project.target("linux")?;
    let kernel = place.join("vmlinuz");
    if !kernel.exists() {
        let package = Apt::new(&place)?.download_dependency(KERNEL_PACKAGE, "linux-image-")?;
        take_file(&package, "boot/vmlinuz-", &kernel)?;
    }
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

/// `apt-get`, with the system's package lists, or if those are missing or old with lists of our own.
struct Apt {
    place: PathBuf,
    lists: Lists,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lists {
    System,
    Own,
}

impl Apt {
    fn new(place: &Path) -> Result<Self> {
        if find_program("apt-get").is_none() || find_program("dpkg-deb").is_none() {
            bail!(
                "the Linux guest is made of Debian's packages {KERNEL_PACKAGE} and {BUSYBOX_PACKAGE}, \
                 but there is no apt-get; give your own kernel by --guest FILE --initrd FILE"
            );
        }
        Ok(Self {
            place: place.to_owned(),
            lists: Lists::System,
        })
    }

    /// Downloads the package on which `package` depends and whose name begins with `prefix`.
    fn download_dependency(mut self, package: &str, prefix: &str) -> Result<PathBuf> {
        let mut description = self.describe(package);
        if description.is_err() {
            self.update()?;
            description = self.describe(package);
        }
        let name = dependency(&description?, prefix)
            .with_context(|| format!("{package} depends on no package named {prefix}…"))?;
        self.download(&name)
    }

    /// Downloads a package, and returns the file.
    fn download(mut self, package: &str) -> Result<PathBuf> {
        let attempt = self.try_download(package);
        if attempt.is_ok() || self.lists == Lists::Own {
            return attempt;
        }
        self.update()?;
        self.try_download(package)
    }

    fn describe(&self, package: &str) -> Result<String> {
        let what = format!("looking up {package}");
        Step::new(&what).run(
            self.command("apt-cache")?
                .args(["show", "--no-all-versions"])
                .arg(package),
        )
    }

    fn try_download(&self, package: &str) -> Result<PathBuf> {
        let directory = self.place.join("packages").join(package);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir_all(&directory)?;
        let what = format!("downloading Debian's {package}");
        Step::new(&what).within(DOWNLOAD_LIMIT).run(
            self.command("apt-get")?
                .current_dir(&directory)
                .arg("download")
                .arg(package),
        )?;
        let files = fs::read_dir(&directory)?.filter_map(|entry| Some(entry.ok()?.path()));
        let is_package = |path: &PathBuf| path.extension().is_some_and(|name| name == "deb");
        files
            .into_iter()
            .find(is_package)
            .with_context(|| format!("apt-get has downloaded no {package}"))
    }

    /// Gets package lists of our own, which takes no rights on the system.
    fn update(&mut self) -> Result<()> {
        self.lists = Lists::Own;
        Step::new("getting Debian's package lists")
            .within(DOWNLOAD_LIMIT)
            .run(self.command("apt-get")?.arg("update"))?;
        Ok(())
    }

    fn command(&self, program: &str) -> Result<Command> {
        let mut command = clean(program);
        // Root would otherwise hand the download to a user who may not write here.
        command.args(["-o", "APT::Sandbox::User=root"]);
        if self.lists == Lists::Own {
            let state = self.place.join("apt");
            fs::create_dir_all(state.join("lists/partial"))?;
            fs::create_dir_all(state.join("cache/archives/partial"))?;
            for (name, path) in [("Dir::State", &state), ("Dir::Cache", &state.join("cache"))] {
                command.arg("-o").arg(format!("{name}={}", path.display()));
            }
            // What is installed here does not matter.
            let status = state.join("status");
            fs::write(&status, "")?;
            let status = format!("Dir::State::status={}", status.display());
            command.arg("-o").arg(status);
        }
        Ok(command)
    }
}

/// The first package of `Depends:` that has the prefix, in what `apt-cache show` prints.
fn dependency(description: &str, prefix: &str) -> Option<String> {
    let lines = description.lines();
    let mut fields = lines.filter_map(|line| line.strip_prefix("Depends:"));
    let depends = fields.next()?.split(',');
    let names = depends.filter_map(|dependency| dependency.split_whitespace().next());
    names
        .into_iter()
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

/// Takes the one regular file whose path begins with `prefix` out of a Debian package.
fn take_file(package: &Path, prefix: &str, to: &Path) -> Result<()> {
    let content = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .output()
        .context("cannot start dpkg-deb")?;
    let name = package.display();
    if !content.status.success() {
        let complaint = String::from_utf8_lossy(&content.stderr);
        bail!("dpkg-deb cannot unpack {name}: {}", complaint.trim());
    }
    let file = find_in_tar(&content.stdout, prefix).with_context(|| format!("{name}"))?;
    // A file that is there is taken to be whole.
    let partial = to.with_extension("partial");
    fs::write(&partial, file)
        .and_then(|()| fs::rename(&partial, to))
        .with_context(|| format!("cannot write {}", to.display()))
}

fn find_in_tar(archive: &[u8], prefix: &str) -> Result<Vec<u8>> {
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let path = path.strip_prefix("./").unwrap_or(&path);
        if path.starts_with(prefix) && entry.header().entry_type().is_file() {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            return Ok(content);
        }
    }
    bail!("it has no file {prefix}…");
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
    use cpio::NewcReader;

    use super::*;

    #[test]
    fn the_kernel_is_a_dependency() {
        let description = "Package: linux-image-cloud-amd64\nPriority: optional\n\
            Depends: something (>= 1), linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n\nPackage: x\n";
        assert_eq!(
            dependency(description, "linux-image-").as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(dependency(description, "nothing"), None);
        assert_eq!(dependency("Package: x\n", "x"), None);
    }

    #[test]
    fn a_file_is_found_by_the_beginning_of_its_path() -> Result<()> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, content) in [("./boot/config-6", "no"), ("./boot/vmlinuz-6", "kernel")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, name, content.as_bytes())?;
        }
        let archive = archive.into_inner()?;
        assert_eq!(find_in_tar(&archive, "boot/vmlinuz-")?, b"kernel");
        let error = find_in_tar(&archive, "bin/busybox").unwrap_err();
        assert_eq!(error.to_string(), "it has no file bin/busybox…");
        Ok(())
    }

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
