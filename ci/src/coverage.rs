//! `cargo xtask coverage`: which lines of the MMU its own tests reach.
//!
//! Only the workspace's crates are instrumented, by a wrapper around the compiler, so their
//! dependencies need no second build. The counts are read with the LLVM tools of the compiler's own
//! version: rustup's component `llvm-tools`, or Debian's package `llvm-N`.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;

use crate::command::{Step, answer, clean, find_program};
use crate::project::{Project, write_if_changed};
use crate::setup::{self, Need};
use crate::toolchain::Version;

/// The options of `coverage`.
#[derive(Args, Debug)]
pub struct Options {
    /// Fail if less than this share of the lines is reached, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 95)]
    minimum: u8,
    /// Only say so where no LLVM tools of the compiler's version can be had
    #[arg(long)]
    if_possible: bool,
    /// Also list each line that no test reaches
    #[arg(long)]
    missing: bool,
}

/// The package that is measured, and its sources.
const PACKAGE: &str = "umbra-mmu";
const SOURCES: &str = "mmu/src";
/// Steps of the random machines: the counters make each slow, and more reach hardly any other line.
const STEPS: &str = "8000";
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);

/// Measures it, and prints a table; the exit code is 0 if the share is large enough.
///
/// # Errors
/// When the tests fail, or there are no LLVM tools of the compiler's version.
pub fn coverage(project: &Project, options: &Options) -> Result<u8> {
    let tools = match Tools::set_up() {
        Ok(tools) => tools,
        Err(error) if options.if_possible => {
            println!("coverage of mmu: not measured, because {error:#}");
            return Ok(0);
        }
        Err(error) => return Err(error),
    };
    let directory = project.target("coverage")?;
    let profiles = directory.join("profiles");
    if profiles.exists() {
        fs::remove_dir_all(&profiles).context("cannot remove the last run's counts")?;
    }
    fs::create_dir_all(&profiles)?;
    let programs = run_tests(project, &directory, &profiles)?;
    let counts = directory.join("counts");
    tools.merge(&profiles, &counts)?;
    let report = tools.export(&counts, &programs)?;
    let files = lines_by_file(&report, &project.root().join(SOURCES))?;
    let total = print_table(&files);
    if options.missing {
        print_missing(&files);
    }
    let minimum = f64::from(options.minimum);
    println!(
        "coverage of mmu: {:.1} % of {} lines, at least {minimum} % wanted",
        total.percent(),
        total.lines
    );
    Ok(u8::from(total.percent() < minimum))
}

/// Builds the tests with counters and runs them. Returns the programs, which name what was counted.
fn run_tests(project: &Project, directory: &Path, profiles: &Path) -> Result<Vec<PathBuf>> {
    let wrapper = directory.join("instrumenting-rustc");
    write_if_changed(&wrapper, b"#!/bin/sh\nexec \"$@\" -C instrument-coverage\n")?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let test = |arguments: &[&str]| {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut command = Command::new(cargo);
        command
            .current_dir(project.root())
            .args(["test", "--package", PACKAGE, "--lib", "--tests"])
            .args(arguments)
            .env("RUSTC_WORKSPACE_WRAPPER", &wrapper)
            .env("LLVM_PROFILE_FILE", profiles.join("%p-%m.profraw"))
            .env("UMBRA_STEPS", STEPS);
        command
    };
    let built = Step::new("building the tests with counters")
        .run(&mut test(&["--no-run", "--message-format=json"]))?;
    Step::new("running the tests with counters").run(&mut test(&[]))?;
    Ok(programs(&built))
}

/// The test programs that cargo's messages name.
fn programs(messages: &str) -> Vec<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable)
        .collect()
}

/// LLVM's programs for reading counts.
struct Tools {
    profdata: PathBuf,
    cov: PathBuf,
}

impl Tools {
    fn set_up() -> Result<Self> {
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
        let version = Version::of(Path::new(&rustc)).context("rustc does not run")?;
        if let Some(found) = Self::of_rustup(&rustc).or_else(|| Self::of_debian(version.llvm)) {
            return Ok(found);
        }
        if find_program("rustup").is_some() {
            eprintln!("Installing the component llvm-tools into rustup's active toolchain");
            let step = Step::new("rustup component add llvm-tools").within(RUSTUP_LIMIT);
            let added = step.run(Command::new("rustup").args(["component", "add", "llvm-tools"]));
            if added.is_ok()
                && let Some(found) = Self::of_rustup(&rustc)
            {
                return Ok(found);
            }
            eprintln!("rustup cannot get it from here; looking for Debian's package");
        }
        let package = format!("llvm-{}", version.llvm);
        let probe = format!("/usr/bin/llvm-cov-{}", version.llvm);
        setup::install(&[Need::new(&probe, &package, "reads coverage counts")])
            .with_context(|| format!("there are no LLVM {} tools for this rustc", version.llvm))?;
        Self::of_debian(version.llvm).context("llvm-profdata is missing")
    }

    fn in_directory(directory: &Path) -> Option<Self> {
        let [profdata, cov] = ["llvm-profdata", "llvm-cov"].map(|program| directory.join(program));
        (profdata.is_file() && cov.is_file()).then_some(Self { profdata, cov })
    }

    fn of_rustup(rustc: &OsString) -> Option<Self> {
        let sysroot = answer(Command::new(rustc).args(["--print", "sysroot"]))?;
        let mut targets = fs::read_dir(Path::new(&sysroot).join("lib/rustlib")).ok()?;
        targets.find_map(|target| Self::in_directory(&target.ok()?.path().join("bin")))
    }

    fn of_debian(version: u32) -> Option<Self> {
        Self::in_directory(Path::new(&format!("/usr/lib/llvm-{version}/bin")))
    }

    fn merge(&self, profiles: &Path, counts: &Path) -> Result<()> {
        let mut command = clean(&self.profdata);
        command.args(["merge", "--sparse", "-o"]).arg(counts);
        for profile in fs::read_dir(profiles)? {
            command.arg(profile?.path());
        }
        Step::new("merging counts").run(&mut command).map(|_| ())
    }

    /// The counts line by line, in the format of `lcov`.
    fn export(&self, counts: &Path, programs: &[PathBuf]) -> Result<String> {
        let mut command = clean(&self.cov);
        command.args(["export", "--format=lcov", "--instr-profile"]);
        command.arg(counts);
        for program in programs {
            command.arg("--object").arg(program);
        }
        Step::new("reading counts").run(&mut command)
    }
}

/// How often each line of a file was reached.
type Lines = BTreeMap<u32, u64>;

/// Reads `lcov`'s format: `SF:` names a file, `DA:` gives a line and its count.
fn lines_by_file(report: &str, sources: &Path) -> Result<BTreeMap<String, Lines>> {
    let mut files = BTreeMap::<String, Lines>::new();
    let mut current = None;
    for line in report.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            let name = Path::new(path).strip_prefix(sources).ok();
            current = name.map(|name| name.to_string_lossy().into_owned());
        } else if let (Some(file), Some(data)) = (&current, line.strip_prefix("DA:")) {
            let mut numbers = data.split(',');
            let mut number = || numbers.next()?.parse::<u64>().ok();
            let (Some(at), Some(count)) = (number(), number()) else {
                bail!("llvm-cov says `{line}`");
            };
            let lines = files.entry(file.clone()).or_default();
            *lines.entry(at as u32).or_default() += count;
        }
    }
    if files.is_empty() {
        bail!("llvm-cov names no file in {}", sources.display());
    }
    Ok(files)
}

/// A share of lines.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Share {
    lines: u32,
    reached: u32,
}

impl Share {
    fn of(lines: &Lines) -> Self {
        let reached = lines.values().filter(|count| **count > 0).count();
        Self {
            lines: lines.len() as u32,
            reached: reached as u32,
        }
    }

    fn percent(self) -> f64 {
        f64::from(self.reached) * 100.0 / f64::from(self.lines.max(1))
    }
}

fn print_table(files: &BTreeMap<String, Lines>) -> Share {
    let mut total = Share::default();
    println!("{:<16} {:>6} {:>8} {:>7}", "file", "lines", "reached", "%");
    for (file, lines) in files {
        let share = Share::of(lines);
        total.lines += share.lines;
        total.reached += share.reached;
        print_row(file, share);
    }
    print_row("all", total);
    total
}

fn print_row(name: &str, share: Share) {
    let Share { lines, reached } = share;
    println!(
        "{name:<16} {lines:>6} {reached:>8} {:>7.1}",
        share.percent()
    );
}

fn print_missing(files: &BTreeMap<String, Lines>) {
    for (file, lines) in files {
        let missing = lines.iter().filter(|(_, count)| **count == 0);
        let missing: Vec<_> = missing.map(|(line, _)| line.to_string()).collect();
        if !missing.is_empty() {
            println!("not reached in {file}: {}", missing.join(" "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_summed_by_file() {
        let report = "SF:/x/mmu/src/a.rs\nDA:1,0\nDA:2,3\nend_of_record\n\
                      SF:/x/vcpu/src/b.rs\nDA:1,0\nend_of_record\n\
                      SF:/x/mmu/src/a.rs\nDA:1,0\nDA:2,0\nDA:7,1\nend_of_record\n";
        let files = lines_by_file(report, Path::new("/x/mmu/src")).unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!(files["a.rs"], BTreeMap::from([(1, 0), (2, 3), (7, 1)]));
        let share = Share::of(&files["a.rs"]);
        assert_eq!((share.lines, share.reached), (3, 2));
        assert!(lines_by_file("SF:/y/a.rs\nDA:1,1\n", Path::new("/x")).is_err());
        assert!(lines_by_file("SF:/x/a.rs\nDA:one\n", Path::new("/x")).is_err());
    }

    #[test]
    fn cargo_s_messages_name_the_programs() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/machine-1\"}\n\
                        {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(programs(messages), [PathBuf::from("/t/machine-1")]);
    }
}
