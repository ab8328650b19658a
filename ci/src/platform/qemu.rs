//! QEMU's software emulation: boots the ELF by its PVH entry, with SVM as the CPU offers it.
//!
//! Umbra ends by `isa-debug-exit`: writing `code` ends QEMU with `(code << 1) | 1`.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result};

use super::{Boot, Clock, Console, Ending};
use crate::command::clean;
use crate::grub::Content;
use crate::project::Project;
use crate::report;
use crate::setup::{UEFI_CODE, UEFI_VARIABLES};
use crate::typing::End;

pub(super) fn run(boot: &Boot<'_>, console: &Console) -> Result<Ending> {
    run_command(command(boot), boot, console, exit_code_of)
}

/// Boots a disk as the cloud image is one: a machine without `isa-debug-exit`, which Umbra powers off
/// by ACPI after its line `exit status N`.
pub(super) fn run_disk(
    project: &Project,
    firmware: Firmware,
    boot: &Boot<'_>,
    console: &Console,
) -> Result<Ending> {
    let content = Content {
        boot: boot.image,
        kernel_arguments: &[],
        arguments: boot.arguments,
        archive: boot.archive,
    };
    let image = boot.disk.make(project, &content, boot.work)?;
    let disk = boot.disk.bootable(image)?;
    let command = disk_command(firmware, &disk, boot)?;
    run_command(command, boot, console, |status, console| {
        status
            .success()
            .then(|| report::exit_status(&console.text()))
            .flatten()
    })
}

/// Runs QEMU to its end; `code` says what its status means.
fn run_command(
    mut command: Command,
    boot: &Boot<'_>,
    console: &Console,
    code: impl Fn(ExitStatus, &Console) -> Option<u8>,
) -> Result<Ending> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start qemu-system-x86_64")?;
    let keyboard = child.stdin.take().context("QEMU has no input")?;
    let output = child.stdout.take().context("QEMU has no output")?;
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
                format!("QEMU ended without an exit code of Umbra's ({status}) {complaints}")
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

/// The machine's firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
}

/// The machine without what it boots.
fn machine(boot: &Boot<'_>) -> Command {
    let mut command = clean("qemu-system-x86_64");
    command.args([
        "-accel",
        "tcg",
        "-cpu",
        "EPYC,+svm",
        "-nodefaults",
        "-no-reboot",
    ]);
    command.arg("-m").arg(format!("{}M", boot.memory_mib));
    command.args(["-display", "none", "-serial", "stdio"]);
    match boot.clock {
        Clock::Time => {}
        Clock::Instructions => {
            command.args(["-icount", "shift=0"]);
        }
    }
    command
}

fn disk_command(firmware: Firmware, disk: &Path, boot: &Boot<'_>) -> Result<Command> {
    let mut command = machine(boot);
    command.args(["-machine", "q35"]);
    if firmware == Firmware::Uefi {
        let variables = boot.work.join("variables.fd");
        fs::copy(UEFI_VARIABLES, &variables)?;
        let flash = |file: &Path, access: &str| {
            format!("if=pflash,format=raw,{access}file={}", file.display())
        };
        command
            .arg("-drive")
            .arg(flash(Path::new(UEFI_CODE), "readonly=on,"));
        command.arg("-drive").arg(flash(&variables, ""));
    }
    // What the guest of a cloud writes is no concern of the image.
    let drive = format!(
        "if=virtio,snapshot=on,format={},file={}",
        boot.disk.qemu_name(),
        disk.display()
    );
    command.arg("-drive").arg(drive);
    Ok(command)
}

fn command(boot: &Boot<'_>) -> Command {
    let mut command = machine(boot);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command.arg("-kernel").arg(boot.image);
    command
        .arg("-append")
        .arg(format!("umbra -- {}", shell_words::join(boot.arguments)));
    if let Some(archive) = boot.archive {
        command.arg("-initrd").arg(archive);
    }
    command
}

/// Umbra's exit code; `None` when QEMU ended for another reason. A triple fault of the host ends
/// QEMU with 0 (`-no-reboot`), which is even and so never a code; 1 alone is QEMU's own error status
/// as well as code 0, which is why success also needs the report line.
fn exit_code_of(status: ExitStatus, _: &Console) -> Option<u8> {
    exit_code(status)
}

fn exit_code(status: ExitStatus) -> Option<u8> {
    let status = u8::try_from(status.code()?).ok()?;
    (status & 1 == 1).then_some(status >> 1)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn only_odd_statuses_are_codes() {
        let exited = |code: i32| exit_code(ExitStatus::from_raw(code << 8));
        assert_eq!(exited(1), Some(0));
        assert_eq!(exited((6 << 1) | 1), Some(6));
        assert_eq!(exited((101 << 1) | 1), Some(101));
        assert_eq!(exited(0), None);
        assert_eq!(exited(2), None);
        assert_eq!(
            exit_code(ExitStatus::from_raw(9)),
            None,
            "killed by a signal"
        );
    }
}
