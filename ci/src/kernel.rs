//! The Hermit kernel: the registry's source with a patch applied, where a manifest expects it.
//!
//! There are two: the kernel of our own image with all that Umbra needs, and the kernel of the Hermit
//! guest, which is as its authors made it.
//!
//! Each is made again only when the patch or the version changes, and then only files that differ are
//! written, so that cargo rebuilds no more than it must.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command::{Step, clean};
use crate::project::{Project, write_if_changed};
use crate::toolchain::Toolchain;

const VERSION: &str = "0.11.0";

/// A kernel with a patch.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The patch, relative to the source tree.
    patch: &'static str,
    /// Where the kernel goes, below `target`.
    place: &'static str,
    /// A directory below `target` for making it.
    work: &'static str,
}

/// The kernel of our own image.
pub const OF_IMAGE: Kernel = Kernel {
    patch: "images/hermit-kernel.patch",
    place: "hermit-kernel",
    work: "kernel",
};

/// The kernel of the Hermit guest.
pub const OF_GUEST: Kernel = Kernel {
    patch: "images/hermit-guest/kernel.patch",
    place: "hermit-guest-kernel",
    work: "guest-kernel",
};

/// A package that depends on nothing but the kernel, to make cargo download it.
const MANIFEST: &str = r#"[package]
name = "hermit-kernel-source"
version = "0.0.0"
edition = "2024"

[lib]
path = "lib.rs"

[dependencies]
hermit-kernel = { version = "=VERSION", default-features = false }

[workspace]
"#;

/// Puts a patched kernel in its place.
///
/// # Errors
/// When it cannot be downloaded or the patch does not apply.
pub fn set_up(project: &Project, toolchain: &Toolchain, kernel: Kernel) -> Result<()> {
    let patch = project.root().join(kernel.patch);
    let patch_text =
        fs::read(&patch).with_context(|| format!("cannot read {}", patch.display()))?;
    let work = project.target(kernel.work)?;
    let stamp_path = work.join("stamp");
    let stamp = [format!("{VERSION}\n").as_bytes(), &patch_text].concat();
    let place = project.root().join("target").join(kernel.place);
    if place.join("Cargo.toml").exists() && fs::read(&stamp_path).is_ok_and(|old| old == stamp) {
        return Ok(());
    }

    let source = download(toolchain, &work)?;
    let fresh = work.join("patched");
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    synchronize(&source, &fresh)?;
    let step = Step::new("patching the kernel");
    step.run(
        clean("patch")
            .current_dir(&fresh)
            .args([
                "-p1",
                "--batch",
                "--forward",
                "--fuzz=0",
                "--no-backup-if-mismatch",
                "-i",
            ])
            .arg(&patch),
    )
    .with_context(|| format!("{} does not fit hermit-kernel {VERSION}", kernel.patch))?;
    synchronize(&fresh, &place)?;
    fs::remove_dir_all(&fresh)?;
    fs::write(&stamp_path, stamp).with_context(|| format!("cannot write {}", stamp_path.display()))
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
}

/// Has cargo download the kernel, and says where its source is.
fn download(toolchain: &Toolchain, work: &Path) -> Result<PathBuf> {
    let package = work.join("download");
    write_if_changed(
        &package.join("Cargo.toml"),
        MANIFEST.replace("VERSION", VERSION).as_bytes(),
    )?;
    write_if_changed(&package.join("lib.rs"), b"")?;
    let step = Step::new("downloading the Hermit kernel");
    let text = step.run(toolchain.cargo(&package).args([
        "metadata",
        "--format-version=1",
        "--filter-platform=x86_64-unknown-none",
    ]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("cargo metadata is unreadable")?;
    let kernel = metadata
        .packages
        .into_iter()
        .find(|package| package.name == "hermit-kernel");
    let manifest = kernel
        .context("cargo did not download hermit-kernel")?
        .manifest_path;
    manifest
        .parent()
        .map(Path::to_owned)
        .context("hermit-kernel has no directory")
}

/// Makes `to` hold the files of `from` and no others, leaving alone what is the same.
fn synchronize(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(to)? {
        let old = entry?;
        let (name, is_directory) = (old.file_name(), old.file_type()?.is_dir());
        let new = from.join(&name);
        // `target` is cargo's own, in case somebody builds there.
        if name == "target" || (new.exists() && new.is_dir() == is_directory) {
            continue;
        }
        if is_directory {
            fs::remove_dir_all(old.path())?;
        } else {
            fs::remove_file(old.path())?;
        }
    }
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let new = entry?;
        let old = to.join(new.file_name());
        let kind = new.file_type()?;
        if kind.is_dir() {
            synchronize(&new.path(), &old)?;
        } else if kind.is_file() {
            write_if_changed(&old, &fs::read(new.path())?)?;
        } else {
            bail!("{} is neither a file nor a directory", new.path().display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synchronizing_writes_only_what_differs() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(from.join("inner"))?;
        fs::create_dir_all(to.join("gone"))?;
        fs::write(from.join("same"), "1")?;
        fs::write(from.join("inner/changed"), "new")?;
        synchronize(&from, &to)?;
        let before = fs::metadata(to.join("same"))?.modified()?;
        fs::write(to.join("inner/changed"), "old")?;
        fs::write(to.join("stray"), "x")?;
        std::thread::sleep(std::time::Duration::from_millis(20));
        synchronize(&from, &to)?;
        assert_eq!(fs::metadata(to.join("same"))?.modified()?, before);
        assert_eq!(fs::read_to_string(to.join("inner/changed"))?, "new");
        assert!(!to.join("gone").exists() && !to.join("stray").exists());
        Ok(())
    }
}
