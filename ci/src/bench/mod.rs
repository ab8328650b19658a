//! `cargo xtask bench`: what the parts that matter cost, in instructions, beside what they may cost.
//!
//! Instructions are the same on every machine, so the numbers of two runs can be compared: the MMU's
//! are counted by callgrind on the host, those of exits by the guest itself, on emulated processors
//! whose time-stamp counters count instructions.

mod exits;
mod mmu;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::project::Project;

/// The options of `bench`.
#[derive(Args, Debug)]
pub struct Options {
    /// Write all that was measured to this file, as a JSON list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
    if wants(Part::Exits) {
        measured.extend(exits::measure(project)?);
    }
    print_tables(&measured);
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&measured)? + "\n";
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
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
        ..
    } = measurement;
    let verdict = target.map_or(String::new(), |target| {
        let word = if *value <= target { "met" } else { "MISSED" };
        format!("   at most {target:>8.0}   {word}")
    });
    format!("  {name:<44} {value:>10.1} {unit}{verdict}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_whether_the_target_is_met() {
        let mut measurement = Measurement {
            table: "exits".to_owned(),
            name: "cpuid".to_owned(),
            value: 399.5,
            unit: "instructions",
            target: Some(400.0),
        };
        assert!(row(&measurement).ends_with(" met"));
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
