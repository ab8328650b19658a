//! Scenarios as jobs: built, booted several at once, and judged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use umbra_inspect::trace::MARKER;
use umbra_report::Report;

use crate::archive;
use crate::build::{Application, Builder, GuestFiles, ImageFiles};
use crate::config::Config;
use crate::platform::{Boot, Console, Platform, Show};
use crate::project::Project;
use crate::report;
use crate::run::{archive_memory_mib, host_memory_mib};
use crate::scenario::Scenario;
use crate::second_serial::SecondSerial;
use crate::setup;

/// How much of a failed run's console is shown, in lines: a post-mortem and what came before it.
const LINES_SHOWN: usize = 140;

/// One scenario on one platform.
#[derive(Clone)]
pub struct Job {
    /// What is booted, and what must come of it.
    pub scenario: Scenario,
    /// Where.
    pub platform: Platform,
}

impl Job {
    /// A scenario on each of its platforms.
    pub fn of_scenario(scenario: &Scenario) -> impl Iterator<Item = Self> {
        scenario.platforms.iter().map(|&platform| Self {
            scenario: scenario.clone(),
            platform,
        })
    }

    /// The scenario's name and the platform's.
    pub fn name(&self) -> String {
        format!("{} on {}", self.scenario.name, self.platform)
    }
}

/// What every job boots: built once, before the first machine starts.
struct Images {
    guests: BTreeMap<String, GuestFiles>,
    /// The configurations of several guests, with their archives.
    configs: BTreeMap<String, (Config, Vec<u8>)>,
    umbra: Option<ImageFiles>,
    low_memory_callback: Option<ImageFiles>,
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
        let platforms: BTreeSet<_> = jobs.iter().map(|job| job.platform).collect();
        for platform in platforms {
            platform.set_up(project)?;
        }
        let builder = Builder::new(project)?;
        let build = |application| {
            let is_needed = jobs
                .iter()
                .any(|job| job.scenario.application == application);
            is_needed.then(|| builder.images(application)).transpose()
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

    fn of(&self, application: Application) -> Result<&ImageFiles> {
        let image = match application {
            Application::Umbra => &self.umbra,
            Application::LowMemoryCallback => &self.low_memory_callback,
        };
        image.as_ref().context("its image was not built")
    }
}

/// How a job went.
pub struct Verdict {
    /// What was booted.
    pub job: Job,
    /// How long it took.
    pub time: Duration,
    /// What is not as it should be; nothing if it passed.
    pub failures: Vec<String>,
    /// Umbra's reports.
    pub reports: Vec<Report>,
    /// What the machine printed.
    pub console: String,
}

impl Verdict {
    /// Whether all is as it should be.
    pub fn is_pass(&self) -> bool {
        self.failures.is_empty()
    }

    /// The last lines of the console, without those of a trace.
    pub fn last_lines(&self) -> String {
        let lines = self.console.lines();
        let lines: Vec<_> = lines.filter(|line| !line.starts_with(MARKER)).collect();
        lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n")
    }

    fn print(&self) {
        let (name, seconds) = (self.job.name(), self.time.as_secs_f32());
        if self.is_pass() {
            println!("ok   {name} ({seconds:.1} s)");
            return;
        }
        let mut message = vec![format!("FAIL {name} ({seconds:.1} s)")];
        message.extend(
            self.failures
                .iter()
                .map(|failure| format!("     {failure}")),
        );
        message.extend(self.last_lines().lines().map(|line| format!("   | {line}")));
        println!("{}", message.join("\n"));
    }
}

/// Builds what the jobs need and runs them, several at once, each printed as it ends.
///
/// # Errors
/// When something cannot be set up or built.
pub fn run(project: &Project, jobs: Vec<Job>) -> Result<Vec<Verdict>> {
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let images = Images::build(project, &jobs)?;
    let at_once = thread::available_parallelism().map_or(1, usize::from);
    let queue = Mutex::new(VecDeque::from(jobs));
    let verdicts = Mutex::new(Vec::new());
    let next = || queue.lock().ok()?.pop_front();
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(job) = next() {
                    let verdict = run_one(project, &images, job);
                    verdict.print();
                    if let Ok(mut verdicts) = verdicts.lock() {
                        verdicts.push(verdict);
                    }
                }
            });
        }
    });
    verdicts
        .into_inner()
        .context("a scenario's thread panicked")
}

fn run_one(project: &Project, images: &Images, job: Job) -> Verdict {
    let console = Console::new(Show::Nothing);
    let (failures, reports) = match boot(project, images, &job, &console) {
        Ok(result) => (
            job.scenario
                .failures(job.platform, &result, &console.text()),
            result.reports,
        ),
        Err(error) => (vec![format!("{error:#}")], Vec::new()),
    };
    Verdict {
        job,
        time: console.elapsed(),
        failures,
        reports,
        console: console.text(),
    }
}

/// Runs a scenario to its end.
fn boot(
    project: &Project,
    images: &Images,
    job: &Job,
    console: &Console,
) -> Result<report::Result> {
    let scenario = &job.scenario;
    job.platform.ensure_possible()?;
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
                Some((config, _)) => config.machine_memory_mib(),
                None => host_memory_mib(&scenario.memory_arguments())?,
            }
    };
    let guest = images.guests.get(&scenario.name);
    let guest = guest.map(|files| files.image.as_path());
    let second_serial = scenario.second_serial(guest, console)?;
    let boot = Boot {
        image: images.of(scenario.application)?,
        arguments: &scenario.umbra_arguments(),
        environment: &scenario.environment,
        archive: archive.as_ref().map(|(path, _)| path.as_path()),
        memory_mib,
        hardware: scenario.hardware(),
        uhyve: &scenario.uhyve,
        clock: scenario.clock,
        input: scenario.input(),
        second_serial: second_serial.as_ref(),
        limit: Some(scenario.limit()),
        disk: scenario.disk,
        work: &work,
    };
    let ending = job.platform.run(project, &boot, console)?;
    let mut failures = second_serial.map_or_else(Vec::new, SecondSerial::finish);
    let text = console.text();
    fs::write(work.join("console"), &text)?;
    let reports = config.map_or(1, |(config, _)| config.reports());
    let mut result = report::judge(ending, &text, scenario.application, reports);
    failures.splice(..0, result.problem.take());
    result.problem = (!failures.is_empty()).then(|| failures.join("; "));
    Ok(result)
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
