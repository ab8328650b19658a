//! QEMU's software emulation: boots the ELF by its PVH entry, with SVM as the CPU offers it.
//!
//! Umbra ends by `isa-debug-exit`: writing `code` ends QEMU with `(code << 1) | 1`.

use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result};

use super::{Boot, Console, Ending};
use crate::command::clean;
use crate::typing::End;

pub(super) fn run(boot: &Boot<'_>, console: &Console) -> Result<Ending> {
    let mut command = command(boot);
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
    Ok(match end {
        End::Quit => Ending::quit(),
        End::TooLong => Ending::too_long(boot.limit),
        End::Exited(status) => match exit_code(status) {
            Some(code) => Ending::Exit(code),
            None => Ending::Failed(
                format!("QEMU ended without an exit code of Umbra's ({status}) {complaints}")
                    .trim_end()
                    .to_owned(),
            ),
        },
    })
}

fn command(boot: &Boot<'_>) -> Command {
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
