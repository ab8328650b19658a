//! `cargo xtask run`: boots one guest under Umbra and shows its console.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use umbra_report::config;
use umbra_report::options::{self, HOST_MEMORY_MIB, Request};

use crate::archive;
use crate::build::{Application, Builder};
use crate::config::Config;
use crate::disk;
use crate::guest::{self, Source};
use crate::input::BadInput;
use crate::platform::{Boot, Clock, Console, Hardware, Platform, Show, UhyveSettings};
use crate::project::Project;
use crate::report;
use crate::second_serial::SecondSerial;
use crate::setup;
use crate::trace::Trace;
use crate::typing::Input;

/// The options of `run`.
#[derive(Args, Debug)]
pub struct Options {
    /// Where to boot
    #[arg(long, value_name = "NAME", default_value = "qemu")]
    on: Platform,
    /// One of Umbra's own guests by name, `linux` (Debian's kernel with a shell), `hermit` (a
    /// Hermit application), or a guest image by path [default: hello]
    #[arg(long, value_name = "FILE|NAME")]
    guest: Option<String>,
    /// Several guests, as this umbra.toml describes them; its guests are Umbra's own by name, or files
    /// beside it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["guest", "initrd", "append", "memory", "smp", "mmu_pages", "mmu_policy", "mmu_batch", "on_exhausted"])]
    config: Option<PathBuf>,
    /// A file to pass to the guest as its initrd or first module
    #[arg(long, value_name = "FILE", requires = "guest")]
    initrd: Option<PathBuf>,
    /// The guest's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Option<String>,
    /// The guest's memory, as in 64M or 1G [default: 64M; 128M for linux]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// How many processors the guest has, 1 to 4 [default: what the guest needs]
    #[arg(long, value_name = "N")]
    smp: Option<String>,
    /// The most shadow pages that the guest may use [default: 1/50 of its pages]
    #[arg(long, value_name = "N")]
    mmu_pages: Option<String>,
    /// Which shadow pages go first when there are too many: clock or fifo [default: clock]
    #[arg(long, value_name = "NAME")]
    mmu_policy: Option<String>,
    /// The most shadow pages that go at once, with one flush: 1 is one at a time [default: all that must
    /// go]
    #[arg(long, value_name = "N")]
    mmu_batch: Option<String>,
    /// What happens when the guest needs more shadow pages at once than it may use: stop or raise
    /// [default: stop]
    #[arg(long, value_name = "DO")]
    on_exhausted: Option<String>,
    /// A device that the guest has besides the usual ones: testdev [default: what the guest needs]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Where a Linux kernel is entered: kernel or real-mode [default: kernel].
    #[arg(long)]
    entry: Option<String>,
    #[command(flatten)]
    hardware: Hardware,
    /// Take the monitor's commands at a local TCP port as well, a line each, with replies in JSON
    #[arg(long)]
    monitor: bool,
    /// Let the guest wait for GDB, and print the command that connects it
    #[arg(long, conflicts_with = "monitor")]
    gdb: bool,
    /// Give GDB the symbols of this file, such as Linux's vmlinux, instead of the guest's own
    #[arg(long, value_name = "FILE", requires = "gdb")]
    symbols: Option<PathBuf>,
    /// Record what the guest does: exits, mmu, devices, several of them with commas between, or all; the
    /// last events are printed if it fails
    #[arg(long, value_name = "WHAT")]
    trace: Option<String>,
    /// Write the recorded events to this file, for Perfetto or Chrome's trace viewer; without --trace,
    /// all of them
    #[arg(long, value_name = "FILE")]
    trace_to: Option<PathBuf>,
    /// Print what Umbra is told, as an umbra.toml, and run nothing
    #[arg(long)]
    print_config: bool,
    /// Write the report as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs it, and returns the exit code of the run.
///
/// # Errors
/// When an option is bad, or something cannot be set up or built.
pub fn run(project: &Project, options: &Options) -> Result<u8> {
    let source = options
        .guest
        .as_deref()
        .map(|name| Source::find(&guest::own(project)?, name))
        .transpose()?;
    let config = options
        .config
        .as_deref()
        .map(|path| Config::read(project, path))
        .transpose()?;
    let arguments = arguments(options, source.as_ref());
    // Bad values are better refused here than after a boot.
    let mut memory_mib = match &config {
        Some(config) => config.machine_memory_mib(),
        None => host_memory_mib(&arguments)?,
    };
    if let Some(path) = &options.symbols {
        read(path)?;
    }
    options.hardware.check(options.on)?;
    options.on.ensure_possible()?;
    if options.print_config {
        print!("{}", effective_config(config.as_ref(), &arguments)?);
        return Ok(0);
    }
    let initrd = options.initrd.as_deref().map(read).transpose()?;

    setup::install(&options.on.needs())?;
    options.on.set_up(project)?;
    let builder = Builder::new(project)?;
    let files = source
        .as_ref()
        .map(|source| builder.guest_files(source))
        .transpose()?;
    let image = builder.images(Application::Umbra)?;
    let work = project.target("runs")?.join(format!("run-{}", options.on));
    fs::create_dir_all(&work)?;
    let own_symbols = files.as_ref().map(|files| files.image.clone());
    let symbols = options.symbols.clone().or(own_symbols);
    let archive = match (files, &config) {
        (Some(files), _) => {
            let initrd = match (initrd, files.initrd) {
                (Some(initrd), _) => Some(initrd),
                (None, Some(path)) => Some(read(&path)?),
                (None, None) => None,
            };
            Some(archive::guest(&read(&files.image)?, initrd.as_deref())?)
        }
        (None, Some(config)) => Some(config.archive(&builder)?),
        (None, None) => None,
    };
    let archive = match archive {
        Some(archive) => {
            let path = work.join("guest.tar");
            memory_mib += archive_memory_mib(&archive);
            fs::write(&path, archive)?;
            Some(path)
        }
        None => None,
    };

    let console = Console::new(match options.trace_to {
        Some(_) => Show::LiveWithoutTrace,
        None => Show::Live,
    });
    let second_serial = second_serial(options, symbols.as_deref())?;
    let boot = Boot {
        image: &image,
        arguments: &arguments,
        environment: &[],
        archive: archive.as_deref(),
        memory_mib,
        hardware: options.hardware.clone(),
        uhyve: &UhyveSettings::default(),
        clock: Clock::Time,
        input: Input::User,
        second_serial: second_serial.as_ref(),
        limit: None,
        disk: disk::Format::Raw,
        work: &work,
    };
    let ending = options.on.run(project, &boot, &console)?;
    if let Some(second_serial) = second_serial {
        second_serial.finish();
    }
    let reports = config.as_ref().map_or(1, Config::reports);
    let result = report::judge(ending, &console.text(), Application::Umbra, reports);
    if let Some(problem) = &result.problem {
        eprintln!("{problem}");
    }
    if let Some(path) = &options.trace_to {
        let trace = Trace::of_console(&console.text())?.json()?;
        fs::write(path, trace).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.json {
        let json = match &result.reports[..] {
            [] => bail!("no report to write to {}", path.display()),
            [report] => serde_json::to_string_pretty(report)?,
            reports => serde_json::to_string_pretty(reports)?,
        } + "\n";
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(result.code)
}

/// Opens a local TCP port to the second serial port, if that is wanted, and says how to use it.
fn second_serial(options: &Options, symbols: Option<&Path>) -> Result<Option<SecondSerial>> {
    if !options.monitor && !options.gdb {
        return Ok(None);
    }
    let (bridge, port) = SecondSerial::bridge()?;
    if options.monitor {
        eprintln!("the monitor takes commands at TCP port {port}: nc localhost {port}");
    } else {
        let symbols = symbols.map(|path| path.display().to_string());
        let symbols = symbols.unwrap_or_default();
        eprintln!("when Umbra says so: gdb -ex 'target remote localhost:{port}' {symbols}");
    }
    Ok(Some(bridge))
}

/// Umbra's arguments.
fn arguments(options: &Options, source: Option<&Source>) -> Vec<String> {
    let append = options.append.as_deref();
    let memory = options.memory.as_deref();
    let values = [
        ("--guest", options.guest.as_deref().map(guest::display_name)),
        (
            "--append",
            match source {
                Some(source) => source.command_line(append),
                None => append.map(str::to_owned),
            },
        ),
        (
            "--memory",
            memory
                .or(source.and_then(Source::memory))
                .map(str::to_owned),
        ),
        (
            "--smp",
            options.smp.clone().or(source
                .and_then(Source::processors)
                .map(|processors| processors.to_string())),
        ),
        ("--mmu-pages", options.mmu_pages.clone()),
        ("--mmu-policy", options.mmu_policy.clone()),
        ("--mmu-batch", options.mmu_batch.clone()),
        ("--on-exhausted", options.on_exhausted.clone()),
        (
            "--trace",
            match (&options.trace, &options.trace_to) {
                (None, Some(_)) => Some("all".to_owned()),
                (trace, _) => trace.clone(),
            },
        ),
        ("--gdb", options.gdb.then(|| "wait".to_owned())),
        (
            "--trace-format",
            options.trace_to.as_ref().map(|_| "json".to_owned()),
        ),
        (
            "--device",
            options
                .device
                .as_deref()
                .or(source.and_then(Source::device))
                .map(str::to_owned),
        ),
        ("--entry", options.entry.clone()),
    ];
    let given = values.into_iter();
    given
        .filter_map(|(option, value)| Some(format!("{option}={}", value?)))
        .collect()
}

/// What Umbra makes of a configuration or, without one, of its arguments, as a configuration.
fn effective_config(config: Option<&Config>, arguments: &[String]) -> Result<String> {
    if let Some(config) = config {
        return Ok(config.effective());
    }
    Ok(match parse(arguments)? {
        Request::Run(options) | Request::PrintConfig(options) => config::text(&options),
        Request::Help => options::HELP.to_owned(),
    })
}

fn parse(arguments: &[String]) -> Result<Request> {
    options::parse(arguments.iter().map(String::as_str))
        .map_err(|error| BadInput(error.to_string()).into())
}

/// Checks Umbra's arguments as Umbra itself does, and returns the memory of the machine that it needs
/// for them.
///
/// # Errors
/// Umbra's own complaint about them.
pub fn host_memory_mib(arguments: &[String]) -> Result<u64> {
    Ok(match parse(arguments)? {
        Request::Run(options) | Request::PrintConfig(options) => options.machine_memory_mib(),
        Request::Help => HOST_MEMORY_MIB,
    })
}

/// The memory that the machine needs besides, in MiB: the boot loader keeps the archive in it while
/// Umbra copies out of it.
pub fn archive_memory_mib(archive: &[u8]) -> u64 {
    (archive.len() as u64).div_ceil(1 << 20)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_room_for_the_guest() {
        let memory = |value: &str| host_memory_mib(&["--memory".into(), value.into()]);
        assert_eq!(memory("256M").unwrap(), 256 + HOST_MEMORY_MIB);
        assert_eq!(host_memory_mib(&[]).unwrap(), 64 + HOST_MEMORY_MIB);
        assert!(memory("much").unwrap_err().to_string().contains("--memory"));
    }
}
