//! `cargo xtask assert`: boots the user's own scenarios and says what came of them, for people and for
//! CI systems.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use quick_junit::{NonSuccessKind, TestCase, TestCaseStatus, TestSuite};
use serde::Serialize;
use umbra_report::Report;

use crate::input::BadInput;
use crate::jobs::{self, Job, Verdict};
use crate::platform::Platform;
use crate::project::{Project, invocation};
use crate::scenario::Scenario;

/// The options of `assert`.
#[derive(Args, Debug)]
pub struct Options {
    /// Scenario files
    #[arg(required = true, value_name = "SCENARIO.toml")]
    scenarios: Vec<PathBuf>,
    /// Only on this platform
    #[arg(long, value_name = "NAME")]
    on: Option<Platform>,
    /// Write a JUnit report, which CI systems show
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the scenarios; the exit code is 0 if all are as they should be.
///
/// # Errors
/// When a scenario cannot be read, or something cannot be set up or built.
pub fn assert(project: &Project, options: &Options) -> Result<u8> {
    let scenarios = Scenario::read_files(project, &options.scenarios)?;
    let mut jobs: Vec<_> = scenarios.iter().flat_map(Job::of_scenario).collect();
    if let Some(platform) = options.on {
        jobs.retain(|job| job.platform == platform);
    }
    if jobs.is_empty() {
        return Err(BadInput("no scenario runs on that platform".into()).into());
    }
    let mut verdicts = jobs::run(project, jobs)?;
    verdicts.sort_by_key(|verdict| verdict.job.name());
    if let Some(path) = &options.junit {
        write(path, &junit(&verdicts)?)?;
    }
    if let Some(path) = &options.json {
        write(path, &json(&verdicts)?)?;
    }
    let failed: Vec<_> = verdicts
        .iter()
        .filter(|verdict| !verdict.is_pass())
        .collect();
    for verdict in &failed {
        println!("to repeat: {}", repeat(verdict, &options.scenarios));
    }
    println!(
        "{} passed, {} failed",
        verdicts.len() - failed.len(),
        failed.len()
    );
    Ok(u8::from(!failed.is_empty()))
}

/// The command that runs one scenario again.
fn repeat(verdict: &Verdict, files: &[PathBuf]) -> String {
    let name = verdict.job.scenario.name.as_str();
    let is_its_file = |file: &&PathBuf| file.file_stem().is_some_and(|stem| stem == name);
    let file = files.iter().find(is_its_file);
    let file = file.map_or(name.into(), |file| file.display().to_string());
    let file = shell_words::quote(&file);
    format!(
        "{} assert --on {} {file}",
        invocation(),
        verdict.job.platform
    )
}

fn junit(verdicts: &[Verdict]) -> Result<String> {
    let mut by_platform: BTreeMap<String, TestSuite> = BTreeMap::new();
    for verdict in verdicts {
        let platform = verdict.job.platform.to_string();
        let mut status = TestCaseStatus::success();
        if !verdict.is_pass() {
            status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status
                .set_message(verdict.failures.join("; "))
                .set_description(verdict.failures.join("\n"));
        }
        let mut case = TestCase::new(verdict.job.scenario.name.clone(), status);
        case.set_time(verdict.time)
            .set_classname(platform.clone())
            .set_system_out(verdict.console.clone());
        by_platform
            .entry(platform.clone())
            .or_insert_with(|| TestSuite::new(platform))
            .add_test_case(case);
    }
    let mut report = quick_junit::Report::new("umbra");
    report.add_test_suites(by_platform.into_values());
    Ok(report.to_string()?)
}

/// One result, as JSON.
#[derive(Serialize)]
struct Entry<'a> {
    scenario: &'a str,
    platform: String,
    passed: bool,
    seconds: f64,
    failures: &'a [String],
    reports: &'a [Report],
}

fn json(verdicts: &[Verdict]) -> Result<String> {
    let entries: Vec<_> = verdicts
        .iter()
        .map(|verdict| Entry {
            scenario: &verdict.job.scenario.name,
            platform: verdict.job.platform.to_string(),
            passed: verdict.is_pass(),
            seconds: verdict.time.as_secs_f64(),
            failures: &verdict.failures,
            reports: &verdict.reports,
        })
        .collect();
    Ok(serde_json::to_string_pretty(&entries)? + "\n")
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use umbra_report::Outcome;

    use super::*;

    fn verdict(name: &str, failures: &[&str]) -> Verdict {
        let file = format!("{name}.toml");
        let scenario = Scenario::parse(Path::new(&file), "exit_code = 0").unwrap();
        Verdict {
            job: Job {
                scenario,
                platform: Platform::Qemu,
            },
            time: Duration::from_millis(1500),
            failures: failures.iter().map(|&failure| failure.to_owned()).collect(),
            reports: vec![Report::new(name, Outcome::Failed, "")],
            console: "a <guest>\u{1b}[1m\n".into(),
        }
    }

    #[test]
    fn a_failure_is_in_both_files() {
        let verdicts = [
            verdict("good", &[]),
            verdict("bad", &["exit code 1, expected 0"]),
        ];
        let junit = junit(&verdicts).unwrap();
        assert!(junit.contains("tests=\"2\"") && junit.contains("failures=\"1\""));
        assert!(junit.contains("exit code 1, expected 0") && junit.contains("a &lt;guest&gt;"));
        assert!(!junit.contains('\u{1b}'), "XML has no such character");
        let json: serde_json::Value = serde_json::from_str(&json(&verdicts).unwrap()).unwrap();
        assert_eq!(
            (&json[0]["passed"], &json[1]["passed"]),
            (&true.into(), &false.into())
        );
        assert_eq!(json[1]["failures"][0], "exit code 1, expected 0");
        assert_eq!(json[1]["reports"][0]["outcome"], "failed");
    }

    #[test]
    fn a_failure_can_be_repeated() {
        let files = ["other.toml".into(), "my dir/bad.toml".into()];
        let command = repeat(&verdict("bad", &["x"]), &files);
        assert_eq!(
            command.strip_prefix(invocation()),
            Some(" assert --on qemu 'my dir/bad.toml'")
        );
    }
}
