//! The shadow MMU's costs: the program `mmu/examples/cost.rs`, which does one thing many times, under
//! callgrind, and what it says about faults by itself.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Measurement, SPREAD_TARGET, spread};
use crate::command::{Step, clean};
use crate::project::Project;
use crate::setup;

const INSTRUCTIONS: &str = "instructions";

/// Pages held, and pages that go in one batch.
const ZAPS: [(u32, u32); 6] = [
    (1_000, 16),
    (10_000, 16),
    (100_000, 16),
    (10_000, 256),
    (100_000, 256),
    (100_000, 4096),
];
const ZAP_TABLE: &str = "batch zaps, callgrind";
/// An operation, the program's arguments for it, how many of it that counts, and how many instructions
/// one may take.
type Operation = (&'static str, &'static [&'static str], u32, Option<f64>);
const OPERATIONS: [Operation; 12] = [
    (
        "fill one 4 KiB mapping",
        &["fill", "10000"],
        10_000,
        Some(600.0),
    ),
    (
        "fill one with three tables to make",
        &["build", "250"],
        250,
        Some(2_500.0),
    ),
    ("CR0.WP off and on", &["wp", "500"], 500, None),
    ("CR4.PGE on and off", &["pge", "500"], 500, None),
    ("CR3 of a cached root", &["cr3", "500"], 1_000, None),
    (
        "two of these, one table of 64 mappings written",
        &["cr3", "100", "1", "64"],
        100,
        None,
    ),
    (
        "the same with eight such tables",
        &["cr3", "100", "8", "64"],
        100,
        None,
    ),
    (
        "the same with one table of 511 mappings",
        &["cr3", "100", "1", "511"],
        100,
        None,
    ),
    ("INVLPG", &["invlpg", "500"], 500, None),
    (
        "INVLPG, eight other tables written",
        &["invlpg", "500", "8"],
        500,
        None,
    ),
    ("first write to a table", &["write", "500"], 500, None),
    (
        "fill one and seven neighbours",
        &["fill", "1000", "8"],
        1_000,
        None,
    ),
];
/// What share of FIFO's faults CLOCK may take, in percent.
const CLOCK_TARGET: f64 = 35.0;

pub(super) fn measure(project: &Project) -> Result<Vec<Measurement>> {
    setup::install(&setup::for_benchmarks())?;
    let program = build(project)?;
    let mut measured = Vec::new();
    for (name, arguments, times, target) in OPERATIONS {
        measured.push(Measurement {
            target,
            ..Measurement::new(
                "shadow MMU, callgrind",
                name,
                count(&program, arguments)?.instructions / f64::from(times),
                INSTRUCTIONS,
            )
        });
    }
    let mut a_page = Vec::new();
    for (pages, batch) in ZAPS {
        let zap = zap(&program, pages, batch)?;
        a_page.push(zap[0].value);
        measured.extend(zap);
    }
    measured.push(Measurement {
        target: Some(SPREAD_TARGET),
        ..Measurement::new(
            ZAP_TABLE,
            "a page, largest distance from the mean",
            spread(&a_page),
            "%",
        )
    });
    for reads in [Reads::AnyPage, Reads::OnePage] {
        for kind in ["hot", "scan"] {
            for pages in ["64", "128"] {
                measured.extend(trace(&program, kind, pages, reads)?);
            }
        }
    }
    Ok(measured)
}

fn build(project: &Project) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .current_dir(project.root())
        .args(["build", "--release", "--package", "umbra-mmu"])
        .args(["--example", "cost", "--target-dir"])
        .arg(project.target("bench")?);
    Step::new("building the MMU's benchmark").run(&mut command)?;
    Ok(project.target("bench")?.join("release/examples/cost"))
}

/// What callgrind counted inside of the program's `measured`, and what the program printed.
struct Counted {
    instructions: f64,
    output: String,
}

fn count(program: &Path, arguments: &[&str]) -> Result<Counted> {
    let mut command = clean("valgrind");
    command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        // Each round of a repeated instruction counts, so memory is better cleared in another way.
        .env(
            "GLIBC_TUNABLES",
            "glibc.cpu.x86_rep_stosb_threshold=1000000",
        )
        .arg("--toggle-collect=cost::measured*")
        .arg(program)
        .args(arguments);
    let what = format!("counting {}", arguments.join(" "));
    let finished = Step::new(&what).finish(&mut command)?;
    let instructions = finished
        .status
        .filter(std::process::ExitStatus::success)
        .and_then(|_| finished.lines().find_map(collected))
        .with_context(|| format!("{what}: callgrind has no count\n{}", finished.tail()))?;
    Ok(Counted {
        instructions,
        output: finished.output(),
    })
}

/// The number in callgrind's line `==PID== Collected : N`.
fn collected(line: &str) -> Option<f64> {
    let number = line.split_once("Collected :")?.1.trim();
    number.parse().ok().filter(|count| *count > 0.0)
}

fn zap(program: &Path, pages: u32, batch: u32) -> Result<[Measurement; 3]> {
    let counted = count(program, &["zap", &pages.to_string(), &batch.to_string()])?;
    let zapped = Zapped::parse(&counted.output)
        .with_context(|| format!("the benchmark printed `{}`", counted.output))?;
    let measurement = |name: &str, value: f64, unit, target| Measurement {
        target,
        ..Measurement::new(
            ZAP_TABLE,
            format!("{name}, {pages} held, batches of {batch}"),
            value,
            unit,
        )
    };
    let per_page = counted.instructions / zapped.pages;
    let flushes = zapped.flushes / zapped.batches;
    Ok([
        measurement("a page", per_page, INSTRUCTIONS, None),
        measurement("a batch", flushes, "flushes", Some(1.0)),
        measurement("in all", zapped.allocations, "allocations", Some(0.0)),
    ])
}

/// What the program says of its zaps.
#[derive(Debug, PartialEq)]
struct Zapped {
    pages: f64,
    batches: f64,
    flushes: f64,
    allocations: f64,
}

impl Zapped {
    /// Reads "90 of 100 pages zapped in 9 batches, 9 flushes, 0 allocations".
    fn parse(output: &str) -> Option<Self> {
        let line = output
            .lines()
            .find(|line| line.contains(" pages zapped "))?;
        Some(Self {
            pages: number_before(line, "of")?,
            batches: number_before(line, "batches,")?,
            flushes: number_before(line, "flushes,")?,
            allocations: number_before(line, "allocations")?,
        })
    }
}

/// The number that stands before a word.
fn number_before(line: &str, word: &str) -> Option<f64> {
    let words: Vec<_> = line.split_whitespace().collect();
    let at = words.iter().position(|found| *found == word)?;
    words[at.checked_sub(1)?].parse().ok()
}

/// Which page of a region of 2 MiB a trace reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    /// Any: a table that was taken away costs the faults of all its pages.
    AnyPage,
    /// Always the same, without prefetch: each fault is a table that was missing. The best of all
    /// policies cannot meet the target here, so none is set.
    OnePage,
}

/// Faults of a guest with fewer pages than it needs, by both policies, and the tables that the best of
/// all, which knows the future, could not avoid to make.
fn trace(program: &Path, kind: &str, pages: &str, reads: Reads) -> Result<[Measurement; 4]> {
    let (table, options, target) = match reads {
        Reads::AnyPage => (
            "victims, 100,000 reads of any page",
            ["any", "8"],
            Some(CLOCK_TARGET),
        ),
        Reads::OnePage => (
            "victims, 100,000 reads of one page a region",
            ["one", "1"],
            None,
        ),
    };
    let run = |policy: &str| {
        let mut command = clean(program);
        command.args(["trace", kind, pages, policy]).args(options);
        Step::new("counting a trace's faults").run(&mut command)
    };
    let number = |output: &str, word: &str| {
        number_before(output, word).with_context(|| format!("the benchmark printed `{output}`"))
    };
    let (fifo, clock) = (run("fifo")?, run("clock")?);
    let optimum = number(&clock, "by")?;
    let (fifo, clock) = (number(&fifo, "faults")?, number(&clock, "faults")?);
    let measurement = |name: &str, value, unit, target| Measurement {
        target,
        ..Measurement::new(
            table,
            format!("{kind} trace, {pages} pages, {name}"),
            value,
            unit,
        )
    };
    let share = clock * 100.0 / fifo.max(1.0);
    Ok([
        measurement("FIFO", fifo, "faults", None),
        measurement("CLOCK", clock, "faults", None),
        measurement("the optimum", optimum, "tables", None),
        measurement("CLOCK of FIFO", share, "%", target),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callgrind_s_count_is_read() {
        assert_eq!(collected("==7== Collected : 5512"), Some(5512.0));
        assert_eq!(collected("==7== Collected : 0"), None);
        assert_eq!(collected("==7== Events    : Ir"), None);
    }

    #[test]
    fn the_program_s_words_are_read() {
        let output = "90 of 101 pages zapped in 9 batches, 8 flushes, 0 allocations";
        let zapped = Zapped {
            pages: 90.0,
            batches: 9.0,
            flushes: 8.0,
            allocations: 0.0,
        };
        assert_eq!(Zapped::parse(output), Some(zapped));
        assert_eq!(Zapped::parse("all zapped"), None);
        let trace = "hot trace, one page, 64 pages, prefetch 1, Clock: 42 faults in 100 reads, 3 in hot regions; 9 tables made, 7 by the optimum";
        assert_eq!(number_before(trace, "faults"), Some(42.0));
        assert_eq!(number_before(trace, "by"), Some(7.0));
    }
}
