//! Where things are in the source tree and under its `target` directory.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file that only our tree has.
const LANDMARK: &str = "images/hermit-kernel.patch";

/// The source tree that this tool belongs to.
#[derive(Clone, Debug)]
pub struct Project {
    root: PathBuf,
}

impl Project {
    /// Finds the tree: around the package that cargo says it runs, if that is ours, or else where this
    /// tool was built. The package may be another one, whose program or test has started us.
    ///
    /// # Errors
    /// When the tree is gone since this tool was installed.
    pub fn find() -> Result<Self> {
        let running = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let built = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let around = |package: &Path| {
            let root = package.parent()?;
            root.join(LANDMARK).is_file().then(|| Self {
                root: root.to_path_buf(),
            })
        };
        running
            .as_deref()
            .and_then(around)
            .or_else(|| around(&built))
            .with_context(|| {
                format!(
                    "the source tree that this tool was installed from is no longer at {}: \
                     install it again by `cargo install --path ci` in the tree",
                    built.parent().unwrap_or(&built).display()
                )
            })
    }

    /// The directory that holds the root `Cargo.toml`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory for what is built, created when missing. It stays inside the tree whatever
    /// `CARGO_TARGET_DIR` says, because the image's manifest names the patched kernel there.
    pub fn target(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join("target").join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }
}

/// What the user types to start this tool: cargo says so when it does it for them.
pub fn invocation() -> &'static str {
    if env::var_os("CARGO").is_some() {
        "cargo xtask"
    } else {
        "xtask"
    }
}

/// Writes a file only when its content changes, so that cargo sees no change where there is none.
pub fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}
