//! Bochs: an Intel CPU with VMX, booted by GRUB from an ISO image.
//!
//! The serial port is a socket rather than a file, because Bochs buffers the file until it ends.
//! Umbra prints `exit status N` and powers off through port 0x8900; Bochs then ends with a status
//! that says nothing.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Boot, Console, Ending};
use crate::command::{clean, die_with_us, find_program};
use crate::grub::Content;
use crate::iso;
use crate::project::Project;
use crate::report;
use crate::setup::{BOCHS_BIOS, BOCHS_VGA_BIOS};
use crate::typing::End;

const CPU: &str = "corei7_ivy_bridge_3770k";
/// Bochs's clock: its time-stamp counter counts instructions, whatever frequency its CPUID claims.
/// About as many as it really executes, so that its seconds are about as long as ours.
const INSTRUCTIONS_PER_MICROSECOND: u32 = 60;
/// How long Bochs may take from its start to opening its serial port.
const CONNECTION_LIMIT: Duration = Duration::from_secs(20);

pub(super) fn run(project: &Project, boot: &Boot<'_>, console: &Console) -> Result<Ending> {
    let iso = boot.work.join("umbra.iso");
    let mut kernel_arguments = vec!["-freq".to_owned(), INSTRUCTIONS_PER_MICROSECOND.to_string()];
    kernel_arguments.extend(boot.kernel_arguments());
    let content = Content {
        boot: &boot.image.boot,
        kernel_arguments: &kernel_arguments,
        arguments: boot.arguments,
        archive: boot.archive,
    };
    iso::write(project, &content, boot.work, &iso)?;

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .context("cannot open a local port for the serial console")?;
    let port = listener.local_addr()?.port();
    let config = boot.work.join("bochsrc");
    let text = configuration(boot.work, &iso, port, boot.memory_mib);
    let second = boot.second_serial.map(|second| {
        let port = second.port();
        format!("com2: enabled=1, mode=socket-client, dev=\"localhost:{port}\"\n")
    });
    fs::write(&config, text + &second.unwrap_or_default())?;
    // The debugger's build stops before the first instruction, and takes its commands from here.
    let debugger = boot.work.join("debugger");
    fs::write(&debugger, "c\n")?;

    let output = File::create(boot.work.join("bochs.out"))?;
    let program = find_program("bochs").context("cannot find bochs")?;
    let mut command = clean(program);
    command
        .current_dir(boot.work)
        .arg("-q")
        .arg("-f")
        .arg(&config)
        .arg("-rc")
        .arg(&debugger)
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output));
    console.start_of_machine();
    let child = die_with_us(&mut command).spawn();
    let mut child = child.context("cannot start bochs")?;
    let ending = converse(&mut child, &listener, boot, console);
    if child.try_wait()?.is_none() {
        child.kill()?;
        child.wait()?;
    }
    ending
}

/// Records the console until Bochs ends.
fn converse(
    child: &mut Child,
    listener: &TcpListener,
    boot: &Boot<'_>,
    console: &Console,
) -> Result<Ending> {
    listener.set_nonblocking(true)?;
    let start = Instant::now();
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("the serial console's port failed"),
        }
        if child.try_wait()?.is_some() || start.elapsed() > CONNECTION_LIMIT {
            let log = complaints(boot.work);
            return Ok(Ending::Failed(format!("Bochs did not start\n{log}")));
        }
        thread::sleep(Duration::from_millis(5));
    };
    stream.set_nonblocking(false)?;
    let keyboard = stream
        .try_clone()
        .context("cannot type at the serial console")?;
    let reader = thread::spawn({
        let console = console.clone();
        move || console.record(stream)
    });
    let typing = boot.input.start(keyboard, console);
    let end = typing.wait(child, boot.limit)?;
    let _ = reader.join();
    Ok(match (end, report::exit_status(&console.text())) {
        (End::Quit, _) => Ending::quit(),
        (End::TooLong, _) => Ending::too_long(boot.limit),
        (End::Exited(_), Some(code)) => Ending::Exit(code),
        (End::Exited(status), None) => Ending::Failed(format!(
            "Bochs ended without an exit status of Umbra's ({status})\n{}",
            complaints(boot.work)
        )),
    })
}

/// No screen is shown: `rfb` with no waiting time is the one display that needs no terminal.
fn configuration(work: &Path, iso: &Path, port: u16, memory_mib: u64) -> String {
    format!(
        "config_interface: textconfig\n\
         display_library: rfb, options=\"timeout=0\"\n\
         romimage: file={BOCHS_BIOS}\n\
         vgaromimage: file={BOCHS_VGA_BIOS}\n\
         cpu: model={CPU}, count=1, ips={INSTRUCTIONS_PER_MICROSECOND}000000, reset_on_triple_fault=0\n\
         memory: guest={memory_mib}, host={memory_mib}\n\
         ata0-master: type=cdrom, path=\"{iso}\", status=inserted\n\
         boot: cdrom\n\
         com1: enabled=1, mode=socket-client, dev=\"localhost:{port}\"\n\
         clock: sync=none, time0=utc\n\
         log: {log}\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n\
         debug: action=ignore\n\
         speaker: enabled=0\n\
         sound: driver=default, waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\n",
        iso = iso.display(),
        log = work.join("bochs.log").display(),
    )
}

/// The end of what Bochs itself printed and logged.
fn complaints(work: &Path) -> String {
    let last_lines = |name: &str| {
        let bytes = fs::read(work.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    };
    format!("{}\n{}", last_lines("bochs.out"), last_lines("bochs.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_this_run_s_files() {
        let text = configuration(Path::new("/w"), Path::new("/w/umbra.iso"), 4711, 256);
        for line in [
            "ata0-master: type=cdrom, path=\"/w/umbra.iso\", status=inserted",
            "com1: enabled=1, mode=socket-client, dev=\"localhost:4711\"",
            "memory: guest=256, host=256",
            "log: /w/bochs.log",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
