//! `cargo xtask test`: the host tests, then every scenario on each of its platforms.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::command::{self, Step};
use crate::input::BadInput;
use crate::jobs::{self, Job, Verdict};
use crate::keys;
use crate::project::{Project, invocation};
use crate::scenario::Scenario;

/// Set for host tests that have a long form, to run that.
const LONG: &str = "UMBRA_LONG";

/// The options of `test`.
#[derive(Args, Debug)]
pub struct Options {
    /// Only tests and scenarios whose name contains this
    filter: Option<String>,
    /// Also what takes long: ten million steps of the MMU's random machines, and scenarios marked so
    #[arg(long)]
    long: bool,
    /// List what would run, and run nothing
    #[arg(long)]
    list: bool,
}

/// Whether what takes long is run, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Ordinary,
    Long,
}

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
}

impl Count {
    fn of(verdicts: &[Verdict]) -> Self {
        let failed = verdicts.iter().filter(|verdict| !verdict.is_pass()).count();
        Self {
            passed: verdicts.len() - failed,
            failed,
        }
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Runs them; the exit code is 0 if all passed.
///
/// # Errors
/// When a scenario cannot be read, or nothing matches the filter.
pub fn test(project: &Project, options: &Options) -> Result<u8> {
    let filter = options.filter.as_deref().unwrap_or_default();
    let length = if options.long {
        Length::Long
    } else {
        Length::Ordinary
    };
    let Selected { jobs, skipped } = select(all_jobs(project)?, filter, length);
    // Where only the host tests can match, they are asked before anything runs.
    if options.list || jobs.is_empty() {
        let host_tests = list_host_tests(project, filter)?;
        if jobs.is_empty() && host_tests.is_empty() {
            return Err(no_match(project, filter, skipped));
        }
        if options.list {
            for test in host_tests {
                println!("host test: {test}");
            }
            for job in &jobs {
                println!("scenario: {}", job.name());
            }
            print_skipped(skipped);
            return Ok(0);
        }
    }
    let mut count = host_tests(project, filter, length)?;
    let jobs = possible(jobs);
    let scenarios = jobs.len();
    match jobs::run(project, jobs) {
        Ok(verdicts) => count += Count::of(&verdicts),
        Err(error) => {
            println!("FAIL scenarios: {error:#}");
            count += Count {
                passed: 0,
                failed: scenarios,
            };
        }
    }
    print_skipped(skipped);
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(u8::from(count.failed > 0 || count.passed == 0))
}

fn print_skipped(skipped: usize) {
    if skipped > 0 {
        println!("{skipped} long scenarios skipped; --long runs them");
    }
}

/// What matches a filter.
struct Selected {
    jobs: Vec<Job>,
    /// How many more match, but only run when asked for.
    skipped: usize,
}

fn all_jobs(project: &Project) -> Result<Vec<Job>> {
    Ok(Scenario::all(project)?
        .iter()
        .flat_map(Job::of_scenario)
        .collect())
}

fn select(mut jobs: Vec<Job>, filter: &str, length: Length) -> Selected {
    jobs.retain(|job| job.name().contains(filter));
    let matching = jobs.len();
    jobs.retain(|job| length == Length::Long || !job.scenario.long);
    // The slow platform goes first, so that the last machine does not run alone for long.
    jobs.sort_by_key(|job| std::cmp::Reverse(job.platform));
    Selected {
        skipped: matching - jobs.len(),
        jobs,
    }
}

/// The jobs that this host can run; the others are named, with the reason.
fn possible(jobs: Vec<Job>) -> Vec<Job> {
    let platforms: BTreeSet<_> = jobs.iter().map(|job| job.platform).collect();
    let obstacles: BTreeMap<_, _> = platforms
        .into_iter()
        .filter_map(|platform| Some((platform, platform.obstacle()?)))
        .collect();
    let (impossible, possible): (Vec<_>, Vec<_>) = jobs
        .into_iter()
        .partition(|job| obstacles.contains_key(&job.platform));
    for job in impossible {
        println!("skip {}: {}", job.name(), obstacles[&job.platform]);
    }
    possible
}

/// The error of a filter that matches nothing: what the user may have meant.
fn no_match(project: &Project, filter: &str, skipped: usize) -> anyhow::Error {
    if skipped > 0 {
        let message = format!("`{filter}` matches only scenarios that take long; add --long");
        return BadInput(message).into();
    }
    let names = all_jobs(project).and_then(|jobs| {
        let scenarios = jobs.into_iter().map(|job| job.scenario.name);
        let tests = list_host_tests(project, "")?;
        Ok(scenarios.chain(tests).collect::<Vec<_>>())
    });
    match names {
        Ok(names) => BadInput(unmatched(filter, &names)).into(),
        Err(error) => error,
    }
}

fn unmatched(filter: &str, names: &[String]) -> String {
    // A test is known by its whole path or by its last part, and either is a filter.
    let last = |name: &str| name.rsplit("::").next().unwrap_or_default().to_owned();
    let candidates: Vec<_> = names
        .iter()
        .flat_map(|name| [name.clone(), last(name)])
        .collect();
    let nearest = keys::nearest(filter, candidates.iter().map(String::as_str));
    let hint = nearest.map_or_else(
        || format!("`{} test --list` shows all", invocation()),
        |name| format!("did you mean `{name}`?"),
    );
    format!("no scenario and no test has a name that contains `{filter}`; {hint}")
}

fn cargo_test(project: &Project, filter: &str) -> Command {
    let mut command = command::cargo();
    command
        .current_dir(project.root())
        .args(["test", "--workspace", "--no-fail-fast"]);
    if !filter.is_empty() {
        command.arg(filter);
    }
    command
}

fn list_host_tests(project: &Project, filter: &str) -> Result<Vec<String>> {
    let mut command = cargo_test(project, filter);
    let output = Step::new("listing the host tests").run(command.args(["--", "--list"]))?;
    let tests = output.lines().filter(|line| line.ends_with(": test"));
    Ok(tests
        .map(|line| line.trim_end_matches(": test").to_owned())
        .collect())
}

fn host_tests(project: &Project, filter: &str, length: Length) -> Result<Count> {
    let mut command = cargo_test(project, filter);
    match length {
        Length::Ordinary => command.env_remove(LONG),
        Length::Long => command.env(LONG, "1"),
    };
    let finished = Step::new("host tests").finish(&mut command)?;
    let mut count = count_host_tests(&finished.output());
    let succeeded = finished.status.is_some_and(|status| status.success());
    if !succeeded {
        for line in finished.lines().filter(|line| !is_uneventful(line)) {
            println!("{line}");
        }
        // Whatever did not even compile is one failure.
        count.failed = count.failed.max(1);
    }
    println!(
        "host tests: {} passed, {} failed",
        count.passed, count.failed
    );
    Ok(count)
}

/// Lines that nobody misses in the output of tests that failed.
fn is_uneventful(line: &str) -> bool {
    line.is_empty() || line.ends_with(" ... ok") || line.trim_start().starts_with("Compiling ")
}

/// Sums libtest's `test result: ok. 3 passed; 0 failed; …` lines.
fn count_host_tests(output: &str) -> Count {
    let mut count = Count::default();
    for line in output
        .lines()
        .filter(|line| line.starts_with("test result: "))
    {
        let number = |what: &str| {
            let before = line.split_once(what)?.0;
            before.split_whitespace().last()?.parse().ok()
        };
        count += Count {
            passed: number(" passed;").unwrap_or(0),
            failed: number(" failed;").unwrap_or(0),
        };
    }
    count
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::platform::Platform;

    #[test]
    fn libtest_s_results_are_summed() {
        let output = "running 2 tests\ntest a ... ok\n\
            test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n\
            the guest said: 5 passed; 5 failed;\n\
            test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(
            count_host_tests(output),
            Count {
                passed: 13,
                failed: 1
            }
        );
        assert_eq!(
            count_host_tests("error: could not compile"),
            Count::default()
        );
    }

    fn job(text: &str, name: &str) -> Job {
        Job {
            scenario: Scenario::parse(Path::new(&format!("{name}.toml")), text).unwrap(),
            platform: Platform::Qemu,
        }
    }

    #[test]
    fn long_scenarios_run_only_when_asked_for() {
        let jobs = || {
            vec![
                job("exit_code = 0", "hello"),
                job("exit_code = 0\nlong = true", "hello-for-hours"),
            ]
        };
        let names = |selected: &Selected| selected.jobs.iter().map(Job::name).collect::<Vec<_>>();
        let ordinary = select(jobs(), "hello", Length::Ordinary);
        assert_eq!(names(&ordinary), ["hello on qemu"]);
        assert_eq!(ordinary.skipped, 1);
        let long = select(jobs(), "hello", Length::Long);
        assert_eq!(long.jobs.len(), 2);
        assert_eq!(long.skipped, 0);
        let others = select(jobs(), "hello on", Length::Ordinary);
        assert_eq!((others.jobs.len(), others.skipped), (1, 0));
    }

    #[test]
    fn a_filter_that_matches_nothing_names_the_nearest() {
        let names = ["few-mmu-pages", "tests::a_package_is_named_once"].map(str::to_owned);
        let hint = |filter| unmatched(filter, &names);
        assert!(hint("few-mmu-page s").ends_with("did you mean `few-mmu-pages`?"));
        assert!(hint("a_package_is_nemed").ends_with("did you mean `a_package_is_named_once`?"));
        assert!(hint("zzz").ends_with("--list` shows all"));
    }
}
