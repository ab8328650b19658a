//! Files out of Debian's packages, which are downloaded by `apt-get` and never installed; an ordinary
//! user may do that.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{Step, clean, find_program};

const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// `apt-get`, with the system's package lists, or if those are missing or old with lists of our own.
pub struct Apt {
    place: PathBuf,
    lists: Lists,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lists {
    System,
    Own,
}

impl Apt {
    /// Keeps packages, and lists if it needs its own, in `place`.
    ///
    /// # Errors
    /// When this is not a Debian-like machine.
    pub fn new(place: &Path) -> Result<Self> {
        if find_program("apt-get").is_none() || find_program("dpkg-deb").is_none() {
            bail!(
                "this guest is made of Debian's packages, but there is no apt-get and dpkg-deb; give \
                 your own by --guest FILE --initrd FILE"
            );
        }
        Ok(Self {
            place: place.to_owned(),
            lists: Lists::System,
        })
    }

    /// Downloads the package on which `package` depends and whose name begins with `prefix`.
    ///
    /// # Errors
    /// When there is none, or it cannot be downloaded.
    pub fn download_dependency(mut self, package: &str, prefix: &str) -> Result<PathBuf> {
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
    ///
    /// # Errors
    /// When it cannot be downloaded.
    pub fn download(mut self, package: &str) -> Result<PathBuf> {
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

/// Takes the first regular file whose path, which begins with a slash, contains `part` out of a Debian
/// package.
///
/// # Errors
/// When there is none.
pub fn take_file(package: &Path, part: &str, to: &Path) -> Result<()> {
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
    let file = find_in_tar(&content.stdout, part).with_context(|| format!("{name}"))?;
    // A file that is there is taken to be whole.
    let partial = to.with_extension("partial");
    fs::write(&partial, file)
        .and_then(|()| fs::rename(&partial, to))
        .with_context(|| format!("cannot write {}", to.display()))
}

fn find_in_tar(archive: &[u8], part: &str) -> Result<Vec<u8>> {
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?;
        let path = format!("/{}", path.strip_prefix(".").unwrap_or(&path).display());
        if path.contains(part) && entry.header().entry_type().is_file() {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            return Ok(content);
        }
    }
    bail!("it has no file …{part}…");
}

#[cfg(test)]
mod tests {
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
    fn a_file_is_found_by_a_part_of_its_path() -> Result<()> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, content) in [("./boot/config-6", "no"), ("./boot/vmlinuz-6", "kernel")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, name, content.as_bytes())?;
        }
        let archive = archive.into_inner()?;
        assert_eq!(find_in_tar(&archive, "/boot/vmlinuz-")?, b"kernel");
        let error = find_in_tar(&archive, "/bin/busybox").unwrap_err();
        assert_eq!(error.to_string(), "it has no file …/bin/busybox…");
        Ok(())
    }
}
