//! Where an image can be booted: each platform gives a console, and in the end an exit code.
//!
//! A platform that has to be killed, or ends without saying how Umbra ended, has failed: that is
//! never taken for an exit code.

mod bochs;
mod hardware;
mod qemu;
mod uhyve;

use std::fmt;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use umbra_inspect::trace;
use umbra_report::Driver;

pub use self::hardware::Hardware;
use self::qemu::{Accelerator, Firmware};
pub use self::uhyve::Settings as UhyveSettings;
use crate::build::ImageFiles;
use crate::command::die_with_us;
use crate::disk;
use crate::kvm;
use crate::project::Project;
use crate::report;
use crate::second_serial::SecondSerial;
use crate::setup::{self, Need};
use crate::typing::{End, Input};

/// A machine to boot on, by its name on the command line and in scenarios.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    ValueEnum,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Platform {
    /// QEMU's software emulation of an AMD CPU with SVM
    Qemu,
    /// QEMU with KVM and this host's own processor, if it has nested virtualization
    QemuKvm,
    /// The ISO image in QEMU, booted by a BIOS
    IsoBios,
    /// The ISO image in QEMU, booted by UEFI
    IsoUefi,
    /// The disk image in QEMU, booted by a BIOS
    DiskBios,
    /// The disk image in QEMU, booted by UEFI
    DiskUefi,
    /// uhyve on Linux with KVM, in QEMU
    Uhyve,
    /// uhyve on this host
    UhyveKvm,
    /// Bochs's emulation of an Intel CPU with VMX, booted by GRUB from an ISO image
    Bochs,
}

impl Platform {
    /// Where a scenario runs that does not say where: one platform of each driver.
    pub const USUAL: [Self; 2] = [Self::Qemu, Self::Bochs];

    /// What must be installed.
    pub fn needs(self) -> Vec<Need> {
        let qemu = setup::for_qemu();
        match self {
            Self::Qemu | Self::QemuKvm | Self::Uhyve => qemu,
            Self::UhyveKvm => Vec::new(),
            Self::IsoBios => [qemu, setup::for_iso()].concat(),
            Self::IsoUefi => [qemu, setup::for_iso(), setup::for_uefi()].concat(),
            Self::DiskBios => [qemu, setup::for_disk()].concat(),
            Self::DiskUefi => [qemu, setup::for_disk(), setup::for_uefi()].concat(),
            Self::Bochs => setup::for_bochs(),
        }
    }

    /// Why this host cannot boot on the platform, whatever is installed, and what would help.
    pub fn obstacle(self) -> Option<String> {
        match self {
            Self::QemuKvm | Self::UhyveKvm => kvm::preflight()
                .err()
                .map(|reason| format!("{reason}; {}", reason.fix())),
            _ => None,
        }
    }

    /// The driver that Umbra must have run its guest with; none where that is the host's to say.
    pub fn driver(self) -> Option<Driver> {
        match self {
            Self::Qemu
            | Self::IsoBios
            | Self::IsoUefi
            | Self::DiskBios
            | Self::DiskUefi
            | Self::Uhyve => Some(Driver::Svm),
            Self::Bochs => Some(Driver::Vmx),
            Self::QemuKvm | Self::UhyveKvm => None,
        }
    }

    /// Downloads and builds what it needs besides packages.
    ///
    /// # Errors
    /// When that fails.
    pub fn set_up(self, project: &Project) -> Result<()> {
        match self {
            Self::Uhyve => uhyve::set_up(project),
            Self::UhyveKvm => uhyve::set_up_native(project),
            Self::Qemu
            | Self::QemuKvm
            | Self::IsoBios
            | Self::IsoUefi
            | Self::DiskBios
            | Self::DiskUefi
            | Self::Bochs => Ok(()),
        }
    }

    /// Whether the platform boots the disk image.
    pub fn has_disk(self) -> bool {
        matches!(self, Self::DiskBios | Self::DiskUefi)
    }

    /// Checks that there is no obstacle.
    ///
    /// # Errors
    /// With the obstacle.
    pub fn ensure_possible(self) -> Result<()> {
        match self.obstacle() {
            None => Ok(()),
            Some(obstacle) => bail!("{self} cannot run here: {obstacle}"),
        }
    }

    /// Boots `boot`, and returns when it ended.
    ///
    /// # Errors
    /// When the platform cannot be started at all.
    pub fn run(self, project: &Project, boot: &Boot<'_>, console: &Console) -> Result<Ending> {
        match self {
            Self::Qemu => qemu::run(Accelerator::Emulation, boot, console),
            Self::QemuKvm => qemu::run(Accelerator::Kvm, boot, console),
            Self::IsoBios => qemu::run_iso(project, Firmware::Bios, boot, console),
            Self::IsoUefi => qemu::run_iso(project, Firmware::Uefi, boot, console),
            Self::DiskBios => qemu::run_disk(project, Firmware::Bios, boot, console),
            Self::DiskUefi => qemu::run_disk(project, Firmware::Uefi, boot, console),
            Self::Uhyve => uhyve::run(project, boot, console),
            Self::UhyveKvm => uhyve::run_native(project, boot, console),
            Self::Bochs => bochs::run(project, boot, console),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::QemuKvm => "qemu-kvm",
            Self::IsoBios => "iso-bios",
            Self::IsoUefi => "iso-uefi",
            Self::DiskBios => "disk-bios",
            Self::DiskUefi => "disk-uefi",
            Self::Uhyve => "uhyve",
            Self::UhyveKvm => "uhyve-kvm",
            Self::Bochs => "bochs",
        })
    }
}

/// One boot of the image.
pub struct Boot<'a> {
    /// The application.
    pub image: &'a ImageFiles,
    /// Umbra's arguments.
    pub arguments: &'a [String],
    /// Umbra's environment variables, each as `NAME=VALUE`.
    pub environment: &'a [String],
    /// The guest archive, if the guest is not one that the image carries.
    pub archive: Option<&'a Path>,
    /// The emulated machine's memory in MiB: the guest's, and what Umbra and Hermit need.
    pub memory_mib: u64,
    /// What else the machine is made of.
    pub hardware: Hardware,
    /// What only uhyve has.
    pub uhyve: &'a UhyveSettings,
    /// What the machine's clock follows.
    pub clock: Clock,
    /// What is typed at the console.
    pub input: Input<'a>,
    /// What is connected to the second serial port, if the machine shall have one.
    pub second_serial: Option<&'a SecondSerial>,
    /// When to give up.
    pub limit: Option<Duration>,
    /// The form of the disk, on a platform that boots one.
    pub disk: disk::Format,
    /// A directory for this boot's files.
    pub work: &'a Path,
}

impl Boot<'_> {
    /// The Hermit kernel's arguments that carry the environment.
    fn kernel_arguments(&self) -> Vec<String> {
        let variables = self.environment.iter();
        variables
            .map(|variable| format!("env={variable}"))
            .collect()
    }
}

/// What an emulated machine's clock follows. Bochs's always counts instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// The time that passes.
    #[default]
    Time,
    /// The instructions that are executed, one a nanosecond.
    Instructions,
}

/// How a boot ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Umbra ended by itself, with this exit code.
    Exit(u8),
    /// The machine ended or was ended without an exit code, for this reason.
    Failed(String),
}

impl Ending {
    fn too_long(limit: Option<Duration>) -> Self {
        let seconds = limit.unwrap_or_default().as_secs();
        Self::Failed(format!("still running after {seconds} s; killed"))
    }

    fn quit() -> Self {
        Self::Failed("ended by Ctrl-A x".to_owned())
    }
}

/// Runs an emulator, whose standard input and output are the console, to its end; `code` says what its
/// status means.
fn run_command(
    mut command: Command,
    boot: &Boot<'_>,
    console: &Console,
    code: impl Fn(ExitStatus, &Console) -> Option<u8>,
) -> Result<Ending> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    console.start_of_machine();
    let child = die_with_us(&mut command).spawn();
    let mut child = child.with_context(|| format!("cannot start {program}"))?;
    let keyboard = child.stdin.take().context("the console has no input")?;
    let output = child.stdout.take().context("the console has no output")?;
    let complaints = child.stderr.take();
    let reader = thread::spawn({
        let console = console.clone();
        move || console.record(output)
    });
    let complaints = thread::spawn(move || complaints.map(std::io::read_to_string));
    let typing = boot.input.start(keyboard, console);
    let end = typing.wait(&mut child, boot.limit)?;
    let _ = reader.join();
    let complaints = complaints
        .join()
        .ok()
        .flatten()
        .and_then(Result::ok)
        .unwrap_or_default();
    let complaints: Vec<_> = complaints.lines().filter(|line| is_news(line)).collect();
    let complaints = complaints.join("\n");
    Ok(match end {
        End::Quit => Ending::quit(),
        End::TooLong => Ending::too_long(boot.limit),
        End::Exited(status) => match code(status, console) {
            Some(code) => Ending::Exit(code),
            None => Ending::Failed(
                format!("{program} ended without an exit code of Umbra's ({status}) {complaints}")
                    .trim_end()
                    .to_owned(),
            ),
        },
    })
}

/// Whether a line of QEMU's is worth showing: that the emulation lacks a feature of the CPU is not.
fn is_news(line: &str) -> bool {
    !line.contains("TCG doesn't support requested feature")
}

/// Umbra's exit code on a machine without `isa-debug-exit`, which it powers off by ACPI after its line
/// `exit status N`.
fn exit_code_on_console(status: ExitStatus, console: &Console) -> Option<u8> {
    status
        .success()
        .then(|| report::exit_status(&console.text()))
        .flatten()
}

/// Whether the console is shown while it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// On the standard output, as it comes.
    Live,
    /// The same, without the lines of a trace.
    LiveWithoutTrace,
    /// Not at all.
    Nothing,
}

/// Leaves out lines that begin with a marker.
struct LineFilter<'a> {
    marker: &'a [u8],
    line: LineSoFar,
}

/// How a line has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LineSoFar {
    /// With so many bytes of the marker, which are held back.
    Marker(usize),
    /// With the marker.
    Hidden,
    /// In another way.
    Shown,
}

impl<'a> LineFilter<'a> {
    const fn new(marker: &'a [u8]) -> Self {
        Self {
            marker,
            line: LineSoFar::Marker(0),
        }
    }

    fn filter(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut shown = Vec::new();
        for &byte in bytes {
            match self.line {
                LineSoFar::Marker(length) if self.marker[length] == byte => {
                    self.line = if length + 1 == self.marker.len() {
                        LineSoFar::Hidden
                    } else {
                        LineSoFar::Marker(length + 1)
                    };
                    continue;
                }
                LineSoFar::Marker(length) => {
                    shown.extend(&self.marker[..length]);
                    shown.push(byte);
                    self.line = LineSoFar::Shown;
                }
                LineSoFar::Shown => shown.push(byte),
                LineSoFar::Hidden => {}
            }
            if byte == b'\n' {
                self.line = LineSoFar::Marker(0);
            }
        }
        shown
    }
}

/// The machine's serial console, recorded.
#[derive(Clone)]
pub struct Console {
    show: Show,
    start: Instant,
    machine_start: Arc<OnceLock<Instant>>,
    recorded: Arc<Mutex<Vec<u8>>>,
}

impl Console {
    /// A console that has seen nothing yet.
    pub fn new(show: Show) -> Self {
        Self {
            show,
            start: Instant::now(),
            machine_start: Arc::default(),
            recorded: Arc::default(),
        }
    }

    /// Reads a machine's serial output to its end.
    pub fn record(&self, mut output: impl Read) {
        let mut buffer = [0; 4096];
        let mut filter = LineFilter::new(trace::MARKER.as_bytes());
        loop {
            let length = match output.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if let Ok(mut recorded) = self.recorded.lock() {
                recorded.extend_from_slice(&buffer[..length]);
            }
            let shown = match self.show {
                Show::Live => &buffer[..length],
                Show::LiveWithoutTrace => &filter.filter(&buffer[..length]),
                Show::Nothing => continue,
            };
            let mut terminal = std::io::stdout().lock();
            // A closed terminal is no reason to stop the machine.
            let _ = terminal.write_all(shown).and_then(|()| terminal.flush());
        }
    }

    /// What was printed until now, without carriage returns.
    pub fn text(&self) -> String {
        let recorded = self
            .recorded
            .lock()
            .map(|bytes| bytes.clone())
            .unwrap_or_default();
        String::from_utf8_lossy(&recorded).replace('\r', "")
    }

    /// Where `text` ends among the bytes recorded from `position` on, if it is there.
    pub fn find(&self, text: &str, position: usize) -> Option<usize> {
        let recorded = self.recorded.lock().ok()?;
        let rest = recorded.get(position..)?;
        if text.is_empty() {
            return Some(position);
        }
        let at = rest
            .windows(text.len())
            .position(|window| window == text.as_bytes())?;
        Some(position + at + text.len())
    }

    /// How long it has been there, which is longer than its machine.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Notes that the machine is started now.
    fn start_of_machine(&self) {
        self.machine_start.get_or_init(Instant::now);
    }

    /// How long ago the machine was started.
    pub fn since_start_of_machine(&self) -> Option<Duration> {
        self.machine_start.get().map(Instant::elapsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_lines_are_left_out_however_they_arrive() {
        let text = b"one\nXY two\nX three\nfour XY\n\nXY";
        for size in 1..text.len() {
            let mut filter = LineFilter::new(b"XY ");
            let shown: Vec<u8> = text
                .chunks(size)
                .flat_map(|part| filter.filter(part))
                .collect();
            assert_eq!(shown, b"one\nX three\nfour XY\n\n", "{size}");
        }
    }
}
