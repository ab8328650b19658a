//! `cargo xtask bench`: what the parts that matter cost, in instructions, beside what they may cost.
//!
//! Instructions are the same on every machine, so the numbers of two runs can be compared: the MMU's
//! are counted by callgrind on the host, those of exits by the guest itself, on emulated processors
//! whose time-stamp counters count instructions.

mod boot;
mod chart;
mod exits;
mod guests;
mod mmu;
mod paging;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;

use self::guests::Runner;
use crate::project::Project;

/// How far the cost of a page may be from the mean, whatever the sizes, in percent.
const SPREAD_TARGET: f64 = 30.0;

/// The options of `bench`.
#[derive(Args, Debug)]
pub struct Options {
    /// Write all that was measured to this file, as a JSON list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write plots of what grows, and of what KVM is known to take, to this directory, as SVG files
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Measure one part only
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
}

/// What can be measured apart from the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The shadow MMU, on the host
    Mmu,
    /// Round trips out of a guest, on emulated processors
    Exits,
    /// A guest's page tables: first use, changes, forks, recycling and shrinking, several guests at once
    Paging,
    /// The way from a machine's start to the guest's first instruction, on every platform
    Boot,
}

/// One thing that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Measurement {
    /// The table that it belongs to.
    table: String,
    name: String,
    value: f64,
    /// What `value` counts.
    unit: &'static str,
    /// What it should be at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<f64>,
    /// What KVM takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    kvm: Option<f64>,
    /// What it grows with.
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<f64>,
}

impl Measurement {
    fn new(
        table: impl Into<String>,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
    ) -> Self {
        Self {
            table: table.into(),
            name: name.into(),
            value,
            unit,
            target: None,
            kvm: None,
            at: None,
        }
    }
}

/// Measures, and prints tables. A missed target is marked, and no failure.
///
/// # Errors
/// When something cannot be set up or does not say what it measured.
pub fn bench(project: &Project, options: &Options) -> Result<()> {
    let wants = |part| options.only.is_none_or(|only| only == part);
    let mut measured = Vec::new();
    if wants(Part::Mmu) {
        measured.extend(mmu::measure(project)?);
    }
    if [Part::Exits, Part::Paging, Part::Boot]
        .into_iter()
        .any(wants)
    {
        let runner = Runner::new(project)?;
        if wants(Part::Exits) {
            measured.extend(exits::measure(&runner)?);
        }
        if wants(Part::Paging) {
            measured.extend(paging::measure(&runner)?);
        }
        if wants(Part::Boot) {
            measured.extend(boot::measure(&runner)?);
        }
    }
    print_tables(&measured);
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&measured)? + "\n";
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(directory) = &options.svg {
        chart::write(&measured, directory)?;
    }
    Ok(())
}

/// How far any value is from the mean, in percent of that.
fn spread(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / f64::from(values.len() as u32);
    let distances = values.iter().map(|value| (value - mean).abs());
    distances.fold(0.0, f64::max) * 100.0 / mean
}

fn print_tables(measured: &[Measurement]) {
    let mut table = "";
    for measurement in measured {
        if measurement.table != table {
            table = &measurement.table;
            println!("\n{table}");
        }
        println!("{}", row(measurement));
    }
}

fn row(measurement: &Measurement) -> String {
    let Measurement {
        name,
        value,
        unit,
        target,
        kvm,
        ..
    } = measurement;
    let verdict = target.map_or(String::new(), |target| {
        let word = if *value <= target { "met" } else { "MISSED" };
        format!("   at most {target:>8.0}   {word}")
    });
    let kvm = kvm.map_or(String::new(), |kvm| format!("   KVM {kvm:>8.0}"));
    format!("  {name:<44} {value:>10.1} {unit}{verdict}{kvm}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_the_largest_distance_from_the_mean() {
        assert!((spread(&[100.0, 100.0]) - 0.0).abs() < 1e-9);
        assert!((spread(&[80.0, 90.0, 130.0]) - 30.0).abs() < 1e-9);
    }

    #[test]
    fn a_row_says_whether_the_target_is_met() {
        let mut measurement = Measurement {
            target: Some(400.0),
            ..Measurement::new("exits", "cpuid", 399.5, "instructions")
        };
        assert!(row(&measurement).ends_with(" met"));
        measurement.kvm = Some(2877.0);
        assert!(row(&measurement).ends_with(" met   KVM     2877"));
        measurement.kvm = None;
        measurement.value = 400.5;
        assert!(row(&measurement).ends_with(" MISSED"));
        measurement.target = None;
        assert!(row(&measurement).ends_with("400.5 instructions"));
        let json = serde_json::to_string(&measurement).unwrap();
        assert_eq!(
            json,
            "{\"table\":\"exits\",\"name\":\"cpuid\",\"value\":400.5,\"unit\":\"instructions\"}"
        );
    }
}
