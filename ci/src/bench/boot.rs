//! How long it takes from the machine's start to the guest's first instruction, on every platform: in
//! instructions, by the time-stamp counter at the first entry, and in seconds, by the guest's first
//! words on the console.

#![allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]

use anyhow::{Context, Result};

use super::Measurement;
use super::guests::{Run, Runner};
use crate::platform::{Clock, Hardware, Platform};

const GUEST: &str = "hello64";
const FIRST_WORDS: &str = "Hello from the guest";

/// A name, the platform, and QEMU's machine if it is not the platform's own.
type Place = (&'static str, Platform, Option<&'static str>);
const PLACES: [Place; 9] = [
    ("qemu", Platform::Qemu, None),
    ("qemu, q35", Platform::Qemu, Some("q35")),
    ("qemu, microvm", Platform::Qemu, Some("microvm")),
    ("iso-bios", Platform::IsoBios, None),
    ("iso-uefi", Platform::IsoUefi, None),
    ("disk-bios", Platform::DiskBios, None),
    ("disk-uefi", Platform::DiskUefi, None),
    // Its counter starts with uhyve's machine, not with Linux.
    ("uhyve", Platform::Uhyve, None),
    ("bochs", Platform::Bochs, None),
];

pub(super) fn measure(runner: &Runner<'_>) -> Result<Vec<Measurement>> {
    let mut instructions = Vec::new();
    let mut seconds = Vec::new();
    for (name, platform, machine) in PLACES {
        let run = |clock| {
            runner.run(&Run {
                hardware: Hardware {
                    machine: machine.map(str::to_owned),
                    ..Hardware::default()
                },
                clock,
                awaited: Some(FIRST_WORDS),
                ..Run::new(platform, GUEST)
            })
        };
        let report = run(Clock::Instructions)?.reports.pop();
        let first_entry = report.context("the guest has no report")?.first_entry_tsc;
        instructions.push(Measurement::new(
            "from the machine's start to the first guest instruction",
            name,
            first_entry as f64,
            "instructions",
        ));
        let came = run(Clock::Time)?.awaited_after;
        let came = came.context("the guest said nothing")?;
        seconds.push(Measurement::new(
            "from the machine's start to the guest's first words, on this host",
            name,
            came.as_secs_f64(),
            "seconds",
        ));
    }
    Ok([instructions, seconds].concat())
}
