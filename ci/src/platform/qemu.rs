//! QEMU, by software emulation with SVM as the CPU offers it, or by KVM. It boots the ELF by its PVH
//! entry, or an ISO image or a disk by firmware.
//!
//! The ELF ends by `isa-debug-exit`: writing `code` ends QEMU with `(code << 1) | 1`.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result};

use super::{Boot, Clock, Console, Ending};
use crate::command::{clean, die_with_us};
use crate::grub::Content;
use crate::iso;
use crate::project::Project;
use crate::report;
use crate::setup::{UEFI_CODE, UEFI_VARIABLES};
use crate::typing::End;

pub(super) fn run(accelerator: Accelerator, boot: &Boot<'_>, console: &Console) -> Result<Ending> {
    let command = kernel_command(accelerator, boot);
    run_command(command, boot, console, |status, _| exit_code(status))
}

/// Boots the ISO image from a CD.
pub(super) fn run_iso(
    project: &Project,
    firmware: Firmware,
    boot: &Boot<'_>,
    console: &Console,
) -> Result<Ending> {
    let iso = boot.work.join("umbra.iso");
    iso::write(project, &content(boot), boot.work, &iso)?;
    let mut command = machine("pc", Accelerator::Emulation, boot);
    add_firmware(&mut command, firmware, boot)?;
    command.arg("-cdrom").arg(iso);
    run_command(command, boot, console, exit_code_on_console)
}

/// Boots a disk as the cloud image is one.
pub(super) fn run_disk(
    project: &Project,
    firmware: Firmware,
    boot: &Boot<'_>,
    console: &Console,
) -> Result<Ending> {
    let image = boot.disk.make(project, &content(boot), boot.work)?;
    let disk = boot.disk.bootable(image)?;
    let mut command = machine("q35", Accelerator::Emulation, boot);
    add_firmware(&mut command, firmware, boot)?;
    // What the guest of a cloud writes is no concern of the image.
    let drive = format!(
        "if=virtio,snapshot=on,format={},file={}",
        boot.disk.qemu_name(),
        disk.display()
    );
    command.arg("-drive").arg(drive);
    run_command(command, boot, console, exit_code_on_console)
}

fn content<'a>(boot: &'a Boot<'_>) -> Content<'a> {
    Content {
        boot: boot.image,
        kernel_arguments: &[],
        arguments: boot.arguments,
        archive: boot.archive,
    }
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
    let child = die_with_us(&mut command).spawn();
    let mut child = child.context("cannot start qemu-system-x86_64")?;
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

/// What executes the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// QEMU.
    Emulation,
    /// The host's processor.
    Kvm,
}

/// The machine without what it boots; `kind` is QEMU's name for it, unless the user chose another.
fn machine(kind: &str, accelerator: Accelerator, boot: &Boot<'_>) -> Command {
    let (name, processor) = match accelerator {
        Accelerator::Emulation => ("tcg", "EPYC,+svm"),
        Accelerator::Kvm => ("kvm", "host"),
    };
    let hardware = &boot.hardware;
    let mut command = clean("qemu-system-x86_64");
    command.args(["-machine", hardware.machine.as_deref().unwrap_or(kind)]);
    command.args(["-cpu", hardware.cpu.as_deref().unwrap_or(processor)]);
    command.args(["-accel", name, "-nodefaults", "-no-reboot"]);
    command.arg("-m").arg(format!("{}M", boot.memory_mib));
    command.args(["-display", "none", "-serial", "stdio"]);
    if let Some(second) = boot.second_serial {
        let port = second.port();
        command
            .arg("-serial")
            .arg(format!("tcp:127.0.0.1:{port},nodelay=on"));
    }
    if let Some(processors) = hardware.processors {
        command.arg("-smp").arg(processors.to_string());
    }
    match boot.clock {
        Clock::Time => {}
        Clock::Instructions => {
            command.args(["-icount", "shift=0"]);
        }
    }
    command
}

fn add_firmware(command: &mut Command, firmware: Firmware, boot: &Boot<'_>) -> Result<()> {
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
    Ok(())
}

fn kernel_command(accelerator: Accelerator, boot: &Boot<'_>) -> Command {
    let mut command = machine("pc", accelerator, boot);
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

/// Umbra's exit code on a machine without `isa-debug-exit`, which it powers off by ACPI after its line
/// `exit status N`.
fn exit_code_on_console(status: ExitStatus, console: &Console) -> Option<u8> {
    status
        .success()
        .then(|| report::exit_status(&console.text()))
        .flatten()
}

/// Umbra's exit code; `None` when QEMU ended for another reason. A triple fault of the host ends
/// QEMU with 0 (`-no-reboot`), which is even and so never a code; 1 alone is QEMU's own error status
/// as well as code 0, which is why success also needs the report line.
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
