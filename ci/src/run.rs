//! `cargo xtask run`: boots one guest under Umbra and shows its console.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use umbra_report::options::{self, Request};

use crate::archive;
use crate::build::{self, Application, Builder};
use crate::input::BadInput;
use crate::platform::{Boot, Console, Platform, Show};
use crate::project::Project;
use crate::report;
use crate::setup;

/// What Umbra, Hermit and the boot stub need besides the guest's memory, in MiB.
const HOST_MEMORY_MIB: u64 = 192;

/// The options of `run`.
#[derive(Args, Debug)]
pub struct Options {
    /// Where to boot
    #[arg(long, value_name = "NAME", default_value = "qemu")]
    on: Platform,
    /// One of Umbra's own guests by name, or a Multiboot1 or PVH image by path [default: hello]
    #[arg(long, value_name = "FILE|NAME")]
    guest: Option<String>,
    /// A file to pass to the guest as its initrd or first module
    #[arg(long, value_name = "FILE", requires = "guest")]
    initrd: Option<PathBuf>,
    /// The guest's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Option<String>,
    /// The guest's memory, as in 64M or 1G [default: 64M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// The most shadow pages that the guest may use [default: 1/50 of its pages]
    #[arg(long, value_name = "N")]
    mmu_pages: Option<String>,
    /// Write the report as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs it, and returns the exit code of the run.
///
/// # Errors
/// When an option is bad, or something cannot be set up or built.
pub fn run(project: &Project, options: &Options) -> Result<u8> {
    let mut arguments = Vec::new();
    if let Some(guest) = &options.guest {
        arguments.extend(["--guest".to_owned(), guest_name(guest)]);
    }
    let append = options
        .append
        .as_ref()
        .map(|text| format!("--append={text}"));
    arguments.extend(append);
    for (name, value) in [
        ("--memory", &options.memory),
        ("--mmu-pages", &options.mmu_pages),
    ] {
        if let Some(value) = value {
            arguments.extend([name.to_owned(), value.clone()]);
        }
    }
    if let Some(guest) = &options.guest {
        build::find_guest(&build::guests(project)?, guest)?;
    }
    // Bad values are better refused here than after a boot.
    let memory_mib = host_memory_mib(&arguments)?;
    let initrd = options.initrd.as_deref().map(read).transpose()?;

    setup::install(&options.on.needs())?;
    let builder = Builder::new(project)?;
    let guest = options
        .guest
        .as_deref()
        .map(|name| builder.guest(name))
        .transpose()?;
    let image = builder.boot_elf(Application::Umbra)?;
    let work = project.target("runs")?.join(format!("run-{}", options.on));
    fs::create_dir_all(&work)?;
    let archive = match guest {
        Some(guest) => {
            let path = work.join("guest.tar");
            fs::write(&path, archive::guest(&read(&guest)?, initrd.as_deref())?)?;
            Some(path)
        }
        None => None,
    };

    let console = Console::new(Show::Live);
    let boot = Boot {
        image: &image,
        arguments: &arguments,
        archive: archive.as_deref(),
        memory_mib,
        limit: None,
        work: &work,
    };
    let ending = options.on.run(project, &boot, &console)?;
    let result = report::judge(ending, &console.text(), Application::Umbra);
    if let Some(problem) = &result.problem {
        eprintln!("{problem}");
    }
    if let Some(path) = &options.json {
        let Some(report) = &result.report else {
            bail!("no report to write to {}", path.display());
        };
        let json = serde_json::to_string_pretty(report)? + "\n";
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(result.code)
}

/// What Umbra calls a guest: a file's name without its directory.
pub fn guest_name(guest: &str) -> String {
    let name = Path::new(guest)
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| guest.to_owned())
}

/// Checks Umbra's arguments as Umbra itself does, and returns the memory of the machine that it needs
/// for them.
///
/// # Errors
/// Umbra's own complaint about them.
pub fn host_memory_mib(arguments: &[String]) -> Result<u64> {
    let request = options::parse(arguments.iter().map(String::as_str))
        .map_err(|error| BadInput(error.to_string()))?;
    let guest = match request {
        Request::Run(options) => options.memory,
        Request::Help => 0,
    };
    Ok(guest.div_ceil(1 << 20) + HOST_MEMORY_MIB)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_named_after_their_files() {
        assert_eq!(guest_name("hello"), "hello");
        assert_eq!(guest_name("/some/where/kernel.elf"), "kernel.elf");
    }

    #[test]
    fn the_machine_has_room_for_the_guest() {
        let memory = |value: &str| host_memory_mib(&["--memory".into(), value.into()]);
        assert_eq!(memory("256M").unwrap(), 256 + HOST_MEMORY_MIB);
        assert_eq!(host_memory_mib(&[]).unwrap(), 64 + HOST_MEMORY_MIB);
        assert!(memory("much").unwrap_err().to_string().contains("--memory"));
    }
}
