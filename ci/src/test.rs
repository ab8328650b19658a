//! `cargo xtask test`: the host tests, then every scenario on each of its platforms.

use std::collections::{BTreeMap, VecDeque};
use std::env;
use std::ffi::OsString;
use std::fs;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result};
use clap::Args;

use crate::archive;
use crate::build::{Application, Builder, GuestFiles};
use crate::command::Step;
use crate::config::Config;
use crate::input::BadInput;
use crate::keys;
use crate::platform::{Boot, Clock, Console, Platform, Show};
use crate::project::Project;
use crate::report;
use crate::run::{archive_memory_mib, host_memory_mib, machine_memory_mib};
use crate::scenario::Scenario;
use crate::setup;

/// How many machines run at once.
const AT_ONCE: usize = 2;
/// How much of a failed run's console is shown, in lines.
const LINES_SHOWN: usize = 40;

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

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// One scenario on one platform.
#[derive(Clone)]
struct Job {
    scenario: Scenario,
    platform: Platform,
}

impl Job {
    fn name(&self) -> String {
        format!("{} on {}", self.scenario.name, self.platform)
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
    let scenarios = jobs.len();
    match run_jobs(project, jobs) {
        Ok(result) => count += result,
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
    let scenarios = Scenario::all(project)?;
    let jobs = scenarios.into_iter().flat_map(|scenario| {
        let platforms = scenario.platforms.clone();
        platforms.into_iter().map(move |platform| Job {
            scenario: scenario.clone(),
            platform,
        })
    });
    Ok(jobs.collect())
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
    let hint = nearest.map_or("`cargo xtask test --list` shows all".to_owned(), |name| {
        format!("did you mean `{name}`?")
    });
    format!("no scenario and no test has a name that contains `{filter}`; {hint}")
}

fn cargo_test(project: &Project, filter: &str) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
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

/// What every job boots: built once, before the first machine starts.
struct Images {
    guests: BTreeMap<String, GuestFiles>,
    /// The configurations of several guests, with their archives.
    configs: BTreeMap<String, (Config, Vec<u8>)>,
    umbra: Option<PathBuf>,
    low_memory_callback: Option<PathBuf>,
}

impl Images {
    fn build(project: &Project, jobs: &[Job]) -> Result<Self> {
        let mut needs = Vec::new();
        for job in jobs {
            let more = [job.platform.needs(), job.scenario.needs()].concat();
            needs.extend(
                more.into_iter()
                    .filter(|need| !needs.contains(need))
                    .collect::<Vec<_>>(),
            );
        }
        setup::install(&needs)?;
        let builder = Builder::new(project)?;
        let build = |application| {
            let is_needed = jobs
                .iter()
                .any(|job| job.scenario.application == application);
            is_needed.then(|| builder.boot_elf(application)).transpose()
        };
        let umbra = build(Application::Umbra)?;
        let low_memory_callback = build(Application::LowMemoryCallback)?;
        let mut guests = BTreeMap::new();
        let mut configs = BTreeMap::new();
        for scenario in jobs.iter().map(|job| &job.scenario) {
            if let Some(source) = &scenario.source
                && !guests.contains_key(&scenario.name)
            {
                guests.insert(scenario.name.clone(), builder.guest_files(source)?);
            }
            if let Some(config) = scenario.config(project)? {
                let archive = config.archive(&builder)?;
                configs.insert(scenario.name.clone(), (config, archive));
            }
        }
        Ok(Self {
            guests,
            configs,
            umbra,
            low_memory_callback,
        })
    }

    fn of(&self, application: Application) -> Result<&Path> {
        let image = match application {
            Application::Umbra => &self.umbra,
            Application::LowMemoryCallback => &self.low_memory_callback,
        };
        image.as_deref().context("its image was not built")
    }
}

fn run_jobs(project: &Project, jobs: Vec<Job>) -> Result<Count> {
    if jobs.is_empty() {
        return Ok(Count::default());
    }
    let images = Images::build(project, &jobs)?;
    let queue = Mutex::new(VecDeque::from(jobs));
    let count = Mutex::new(Count::default());
    let next = || queue.lock().ok()?.pop_front();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(job) = next() {
                    let result = run_job(project, &images, &job);
                    if let Ok(mut count) = count.lock() {
                        *count += result;
                    }
                }
            });
        }
    });
    count.into_inner().context("a scenario's thread panicked")
}

fn run_job(project: &Project, images: &Images, job: &Job) -> Count {
    let console = Console::new(Show::Nothing);
    let failures = match boot(project, images, job, &console) {
        Ok(failures) => failures,
        Err(error) => vec![format!("{error:#}")],
    };
    let seconds = console.elapsed().as_secs_f32();
    if failures.is_empty() {
        println!("ok   {} ({seconds:.1} s)", job.name());
        return Count {
            passed: 1,
            failed: 0,
        };
    }
    let text = console.text();
    let lines: Vec<_> = text.lines().collect();
    let mut message = vec![format!("FAIL {} ({seconds:.1} s)", job.name())];
    message.extend(failures.iter().map(|failure| format!("     {failure}")));
    let shown = &lines[lines.len().saturating_sub(LINES_SHOWN)..];
    message.extend(shown.iter().map(|line| format!("   | {line}")));
    println!("{}", message.join("\n"));
    Count {
        passed: 0,
        failed: 1,
    }
}

/// Runs a scenario, and returns what is not as it should be.
fn boot(project: &Project, images: &Images, job: &Job, console: &Console) -> Result<Vec<String>> {
    let scenario = &job.scenario;
    let work = project
        .target("runs")?
        .join(format!("{}-{}", scenario.name, job.platform));
    fs::create_dir_all(&work)?;
    let config = images.configs.get(&scenario.name);
    let archive = pack_guest(images, scenario, &work)?;
    let memory_mib = if let Some(mib) = scenario.machine_memory_mib {
        mib
    } else {
        let archive = archive.as_ref().map_or(0, |(_, mib)| *mib);
        archive
            + match config {
                Some((config, _)) => machine_memory_mib(config.memory()),
                None => host_memory_mib(&scenario.memory_arguments())?,
            }
    };
    let boot = Boot {
        image: images.of(scenario.application)?,
        arguments: &scenario.umbra_arguments(),
        archive: archive.as_ref().map(|(path, _)| path.as_path()),
        memory_mib,
        clock: Clock::Time,
        input: scenario.input(),
        limit: Some(scenario.limit()),
        disk: scenario.disk,
        work: &work,
    };
    let ending = job.platform.run(project, &boot, console)?;
    let text = console.text();
    fs::write(work.join("console"), &text)?;
    let reports = config.map_or(1, |(config, _)| config.reports());
    let result = report::judge(ending, &text, scenario.application, reports);
    Ok(scenario.failures(job.platform, &result, &text))
}

/// Writes the guest's archive, and returns its path and the memory that it takes in MiB.
fn pack_guest(images: &Images, scenario: &Scenario, work: &Path) -> Result<Option<(PathBuf, u64)>> {
    let path = work.join("guest.tar");
    if let Some((_, archive)) = images.configs.get(&scenario.name) {
        fs::write(&path, archive)?;
        return Ok(Some((path, archive_memory_mib(archive))));
    }
    let Some(files) = images.guests.get(&scenario.name) else {
        return Ok(None);
    };
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let guest = scenario.guest_bytes(read(&files.image)?)?;
    let initrd = match (&scenario.initrd, &files.initrd) {
        (Some(initrd), _) => Some(read(&scenario.path(initrd))?),
        (None, Some(path)) => Some(read(path)?),
        (None, None) => None,
    };
    let archive = archive::guest(&guest, initrd.as_deref())?;
    fs::write(&path, &archive)?;
    Ok(Some((path, archive_memory_mib(&archive))))
}

#[cfg(test)]
mod tests {
    use super::*;

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
