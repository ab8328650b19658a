//! QEMU, by software emulation with SVM as the CPU offers it, or by KVM. It boots the ELF by its PVH
//! entry, or an ISO image or a disk by firmware.
//!
//! The ELF ends by `isa-debug-exit`: writing `code` ends QEMU with `(code << 1) | 1`.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::Result;

use super::{Boot, Clock, Console, Ending, exit_code_on_console, run_command};
use crate::command::clean;
use crate::grub::Content;
use crate::iso;
use crate::project::Project;
use crate::setup::{UEFI_CODE, UEFI_VARIABLES};

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
    let kernel_arguments = boot.kernel_arguments();
    iso::write(project, &content(boot, &kernel_arguments), boot.work, &iso)?;
    let mut command = machine("pc", Accelerator::Emulation, boot.memory_mib, boot);
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
    let kernel_arguments = boot.kernel_arguments();
    let content = content(boot, &kernel_arguments);
    let image = boot.disk.make(project, &content, boot.work)?;
    let disk = boot.disk.bootable(image)?;
    let mut command = machine("q35", Accelerator::Emulation, boot.memory_mib, boot);
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

fn content<'a>(boot: &'a Boot<'_>, kernel_arguments: &'a [String]) -> Content<'a> {
    Content {
        boot: &boot.image.boot,
        kernel_arguments,
        arguments: boot.arguments,
        archive: boot.archive,
    }
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
    /// QEMU, for a KVM inside. Its emulation of nested paging does not run guests with PAE, and it forgets
    /// which state components the guest of a guest has enabled.
    EmulationForKvm,
    /// The host's processor.
    Kvm,
}

/// The machine without what it boots; `kind` is QEMU's name for it, unless the user chose another.
pub(super) fn machine(
    kind: &str,
    accelerator: Accelerator,
    memory_mib: u64,
    boot: &Boot<'_>,
) -> Command {
    let (name, processor) = match accelerator {
        Accelerator::Emulation => ("tcg", "EPYC,+svm"),
        Accelerator::EmulationForKvm => ("tcg", "EPYC,+svm,-npt,-xsave"),
        Accelerator::Kvm => ("kvm", "host"),
    };
    let hardware = &boot.hardware;
    let mut command = clean("qemu-system-x86_64");
    command.args(["-machine", hardware.machine.as_deref().unwrap_or(kind)]);
    command.args(["-cpu", hardware.cpu.as_deref().unwrap_or(processor)]);
    command.args(["-accel", name, "-nodefaults", "-no-reboot"]);
    command.arg("-m").arg(format!("{memory_mib}M"));
    command.args(["-display", "none", "-serial", "stdio"]);
    if let Some(second) = boot.second_serial {
        let port = second.port();
        command
            .arg("-serial")
            .arg(format!("tcp:127.0.0.1:{port},nodelay=on"));
    }
    if let Some(processors) = hardware.host_cpus {
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
    let mut command = machine("pc", accelerator, boot.memory_mib, boot);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command.arg("-kernel").arg(&boot.image.boot);
    let mut words = vec!["umbra".to_owned()];
    words.extend(boot.kernel_arguments());
    words.push("--".to_owned());
    words.extend_from_slice(boot.arguments);
    command.arg("-append").arg(shell_words::join(words));
    if let Some(archive) = boot.archive {
        command.arg("-initrd").arg(archive);
    }
    command
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
