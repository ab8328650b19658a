//! uhyve: the Hermit ELF, or a `.hermit` image that also holds guests.
//!
//! Umbra ends by uhyve's exit hypercall, and uhyve with the same code. In the Linux machine, the first
//! process says `exit status N` after it. uhyve reports 0 on a triple fault of Umbra's, which is why
//! success also needs the report line.

use std::fs;
use std::path::PathBuf;
use std::process::ExitStatus;

use anyhow::{Context, Result};
use serde::Deserialize;
use umbra_report::hermit_image::{HermitImage, Input, Requirements};

use super::qemu::Accelerator;
use super::{Boot, Console, Ending, exit_code_on_console, qemu, run_command};
use crate::archive;
use crate::command::clean;
use crate::project::Project;
use crate::uhyve::{self, LINUX_COMMAND_LINE, Machine};

/// What Linux, busybox and uhyve need besides the machine that uhyve makes, in MiB.
const LINUX_MEMORY_MIB: u64 = 128;

/// What only uhyve has.
#[derive(Clone, Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// More options for uhyve.
    #[serde(default)]
    options: Vec<String>,
    /// More lines for the `hermit.toml` of a `.hermit` image, which nobody checks before.
    #[serde(default)]
    hermit_toml: String,
}

/// Downloads and builds what the Linux machine is made of.
pub(super) fn set_up(project: &Project) -> Result<()> {
    Machine::set_up(project).map(|_| ())
}

/// Builds uhyve.
pub(super) fn set_up_native(project: &Project) -> Result<()> {
    uhyve::install(project).map(|_| ())
}

/// Runs uhyve in a Linux machine that QEMU emulates.
pub(super) fn run(project: &Project, boot: &Boot<'_>, console: &Console) -> Result<Ending> {
    let machine = Machine::set_up(project)?;
    let image = Image::make(boot)?;
    let mut words = vec!["uhyve".to_owned(), "--file-isolation=none".to_owned()];
    words.extend(image.arguments("/umbra", boot));
    let ram_disk = boot.work.join("initrd");
    let script = shell_words::join(words);
    fs::write(&ram_disk, machine.ram_disk(&script, &image.path)?)?;

    let memory_mib = boot.memory_mib + LINUX_MEMORY_MIB;
    let mut command = qemu::machine("pc", Accelerator::EmulationForKvm, memory_mib, boot);
    command.arg("-kernel").arg(machine.kernel());
    command.args(["-append", LINUX_COMMAND_LINE]);
    command.arg("-initrd").arg(&ram_disk);
    run_command(command, boot, console, exit_code_on_console)
}

/// Runs uhyve on this host.
pub(super) fn run_native(project: &Project, boot: &Boot<'_>, console: &Console) -> Result<Ending> {
    let image = Image::make(boot)?;
    let mut command = clean(uhyve::install(project)?);
    command.args(image.arguments(&image.path.to_string_lossy(), boot));
    run_command(command, boot, console, |status: ExitStatus, _: &Console| {
        u8::try_from(status.code()?).ok()
    })
}

/// What uhyve boots.
struct Image {
    path: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The Hermit ELF, which is given its arguments and environment by uhyve's command line.
    Elf,
    /// A `.hermit` image, which also holds guests, arguments and environment.
    Hermit,
}

impl Image {
    /// The Hermit ELF as it is, or a `.hermit` image where there are guests to put in.
    fn make(boot: &Boot<'_>) -> Result<Self> {
        let Some(archive) = boot.archive else {
            return Ok(Self {
                path: boot.image.hermit.clone(),
                kind: Kind::Elf,
            });
        };
        let archive =
            fs::read(archive).with_context(|| format!("cannot read {}", archive.display()))?;
        let input = Input {
            app_args: quoted(boot.arguments),
            env_vars: boot.environment.to_vec(),
            ..Input::default()
        };
        let config = HermitImage::new(input, Requirements::default());
        let text = toml::to_string(&config)? + &boot.uhyve.hermit_toml;
        let elf = fs::read(&boot.image.hermit)?;
        let image = archive::hermit(&text, &config.kernel, &elf, Some(&archive))?;
        let path = boot.work.join("umbra.hermit");
        fs::write(&path, image)?;
        Ok(Self {
            path,
            kind: Kind::Hermit,
        })
    }

    /// uhyve's arguments for the image at `path`.
    fn arguments(&self, path: &str, boot: &Boot<'_>) -> Vec<String> {
        // uhyve takes whole large pages, and no fewer than 16 MiB.
        let memory_mib = boot.memory_mib.next_multiple_of(2).max(16);
        let mut arguments = vec![format!("--memory-size={memory_mib}MiB")];
        arguments.extend_from_slice(&boot.uhyve.options);
        if self.kind == Kind::Elf {
            let variables = boot.environment.iter();
            arguments.extend(variables.map(|variable| format!("--env-vars={variable}")));
        }
        arguments.push(path.to_owned());
        if self.kind == Kind::Elf && !boot.arguments.is_empty() {
            // The first ends uhyve's options, the second the kernel's.
            arguments.extend(["--".to_owned(), "--".to_owned()]);
            arguments.extend(quoted(boot.arguments));
        }
        arguments
    }
}

/// Arguments as they survive being put together with spaces and taken apart as a shell does.
fn quoted(arguments: &[String]) -> Vec<String> {
    let quote = |argument: &String| shell_words::quote(argument).into_owned();
    arguments.iter().map(quote).collect()
}
