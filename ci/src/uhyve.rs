//! uhyve, the Hermit project's own virtual machine monitor: installing it, what it is given to run, and
//! a small Linux machine for hosts whose KVM is of no use.
//!
//! uhyve comes from the package registry and stays in `target/uhyve`. It is built without shared
//! libraries, so that the Linux machine needs none.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::Step;
use crate::linux::{self, Kernel};
use crate::project::Project;
use crate::ram_disk;

const VERSION: &str = "0.10.0";
/// The arguments of the Linux machine's kernel, which says nothing that would disturb Umbra's lines.
pub const LINUX_COMMAND_LINE: &str = "console=ttyS0 loglevel=1 panic=-1";

/// Which uhyve it is, and whether it still must be built.
pub fn state(project: &Project) -> String {
    let built = if program(&root(project)).exists() {
        ""
    } else {
        ", built when it is needed"
    };
    format!("uhyve {VERSION}{built}")
}

fn root(project: &Project) -> PathBuf {
    project.root().join("target/uhyve").join(VERSION)
}

fn program(root: &Path) -> PathBuf {
    root.join("bin/uhyve")
}

/// Installs uhyve if it is missing, and returns the program.
///
/// # Errors
/// When it does not build.
pub fn install(project: &Project) -> Result<PathBuf> {
    let root = root(project);
    let program = program(&root);
    if program.exists() {
        return Ok(program);
    }
    let place = project.target("uhyve")?;
    let build = place.join("build");
    let mut command = linux::cargo_for_static_programs();
    command
        .current_dir(&place)
        .args(["install", "uhyve", "--locked"])
        .arg(format!("--version={VERSION}"))
        .args(["--target", linux::STATIC_TARGET])
        .arg("--root")
        .arg(&root)
        .arg("--target-dir")
        .arg(&build);
    Step::new("building uhyve").run(&mut command)?;
    fs::remove_dir_all(&build).context("cannot clean up after building uhyve")?;
    Ok(program)
}

/// The Linux machine.
pub struct Machine {
    kernel: Kernel,
    busybox: PathBuf,
    uhyve: PathBuf,
    init: PathBuf,
}

impl Machine {
    /// Downloads and builds what is missing.
    ///
    /// # Errors
    /// When that fails.
    pub fn set_up(project: &Project) -> Result<Self> {
        Ok(Self {
            kernel: linux::kernel(project)?,
            busybox: linux::busybox(project)?,
            uhyve: install(project)?,
            init: project.root().join("images/linux/init-uhyve"),
        })
    }

    /// The machine's kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel.image
    }

    /// An initial RAM disk that runs a shell's `command` with the file at `/umbra`.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn ram_disk(&self, command: &str, umbra: &Path) -> Result<Vec<u8>> {
        let mut files = vec![("command", command.as_bytes().to_vec())];
        let paths = [
            ("init", self.init.as_path()),
            ("bin/busybox", &self.busybox),
            ("bin/uhyve", &self.uhyve),
            ("umbra", umbra),
        ];
        for (name, path) in paths {
            files.push((name, read(path)?));
        }
        let modules = self.kernel.modules.iter().map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Ok((format!("modules/{name}"), read(path)?))
        });
        let modules = modules.collect::<Result<Vec<_>>>()?;
        files.extend(modules.iter().map(|(name, data)| (&**name, data.clone())));
        ram_disk::make(&files)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
