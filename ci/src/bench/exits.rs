//! What round trips out of a guest cost: the guest `exit-costs`, which measures them by its own
//! time-stamp counter, where that counts instructions.

use std::fs;
use std::time::Duration;

use anyhow::{Result, bail};

use super::Measurement;
use crate::archive;
use crate::build::{Application, Builder, ImageFiles};
use crate::disk;
use crate::guest::{self, Source};
use crate::platform::{Boot, Clock, Console, Ending, Hardware, Platform, Show, UhyveSettings};
use crate::project::Project;
use crate::run::{archive_memory_mib, host_memory_mib};
use crate::setup;
use crate::typing::Input;

const GUEST: &str = "exit-costs";
const LIMIT: Duration = Duration::from_secs(600);

/// What each may cost at most, in instructions, where the processor has SVM.
const SVM_TARGETS: &[(&str, f64)] = &[
    ("cpuid", 400.0),
    ("rdmsr", 400.0),
    ("port-write", 400.0),
    ("port-read", 400.0),
    ("hypercall", 400.0),
    ("cr3-load", 800.0),
    ("cr0.wp-toggle", 1_500.0),
    ("cr4.pge-toggle", 1_000.0),
    ("self-ipi", 1_500.0),
];
/// The same with VMX.
const VMX_TARGETS: &[(&str, f64)] = &[("cpuid", 250.0), ("hypercall", 250.0)];

pub(super) fn measure(project: &Project) -> Result<Vec<Measurement>> {
    let platforms = [
        (Platform::Qemu, "qemu, instructions", SVM_TARGETS),
        (Platform::Bochs, "bochs, instructions", VMX_TARGETS),
    ];
    for (platform, _, _) in platforms {
        setup::install(&platform.needs())?;
    }
    let builder = Builder::new(project)?;
    let image = builder.images(Application::Umbra)?;
    let source = Source::find(&guest::own(project)?, GUEST)?;
    let guest = fs::read(builder.guest_files(&source)?.image)?;
    let archive = archive::guest(&guest, None)?;
    let mut measured = Vec::new();
    for (platform, where_and_what, targets) in platforms {
        let console = boot(project, platform, &image, &archive)?;
        let costs = costs(&console);
        if costs.is_empty() {
            bail!("{GUEST} on {platform} printed no costs:\n{console}");
        }
        measured.extend(costs.into_iter().map(|(name, value)| {
            Measurement {
                table: format!("exit round trips, {where_and_what}"),
                target: targets
                    .iter()
                    .find(|(named, _)| *named == name)
                    .map(|(_, target)| *target),
                name,
                value,
                unit: "instructions",
            }
        }));
    }
    Ok(measured)
}

/// Runs the guest, and returns what it printed.
fn boot(
    project: &Project,
    platform: Platform,
    image: &ImageFiles,
    archive: &[u8],
) -> Result<String> {
    let work = project.target("runs")?.join(format!("bench-{platform}"));
    fs::create_dir_all(&work)?;
    let path = work.join("guest.tar");
    fs::write(&path, archive)?;
    let arguments = [format!("--guest={GUEST}")];
    let console = Console::new(Show::Nothing);
    let boot = Boot {
        image,
        arguments: &arguments,
        environment: &[],
        archive: Some(&path),
        memory_mib: host_memory_mib(&[])? + archive_memory_mib(archive),
        hardware: Hardware::default(),
        uhyve: &UhyveSettings::default(),
        clock: Clock::Instructions,
        input: Input::Script(&[]),
        second_serial: None,
        limit: Some(LIMIT),
        disk: disk::Format::Raw,
        work: &work,
    };
    match platform.run(project, &boot, &console)? {
        Ending::Exit(0) => Ok(console.text()),
        ending => bail!("{GUEST} on {platform}: {ending:?}\n{}", console.text()),
    }
}

/// Reads the guest's lines `cost NAME: NUMBER`.
fn costs(console: &str) -> Vec<(String, f64)> {
    let lines = console
        .lines()
        .filter_map(|line| line.strip_prefix("cost "));
    lines
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_s_lines_are_read() {
        let console = "boot\ncost cpuid: 722.50\ncost port write: 9\ncosts nothing\ncost x\n";
        assert_eq!(
            costs(console),
            [("cpuid".to_owned(), 722.5), ("port-write".to_owned(), 9.0)]
        );
    }
}
