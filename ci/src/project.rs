//! Where things are in the source tree and under its `target` directory.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The source tree that this tool belongs to.
#[derive(Clone, Debug)]
pub struct Project {
    root: PathBuf,
}

impl Project {
    /// Finds the tree: the parent of this package, as cargo names it when it runs us.
    pub fn find() -> Self {
        let package = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = package.parent().unwrap_or(&package).to_path_buf();
        Self { root }
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
