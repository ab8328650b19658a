//! Runs our own guests under Umbra where time-stamp counters count instructions.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use umbra_report::{ExitCode, Report};

use crate::archive;
use crate::build::{Application, Builder, ImageFiles};
use crate::disk;
use crate::guest::{self, Source};
use crate::platform::{Boot, Clock, Console, Hardware, Platform, Show, UhyveSettings};
use crate::project::Project;
use crate::report;
use crate::run::{archive_memory_mib, host_memory_mib};
use crate::second_serial::{Exchange, SecondSerial};
use crate::setup;
use crate::typing::Input;

/// Between two looks at the console.
const PERIOD: Duration = Duration::from_millis(2);
const LIMIT: Duration = Duration::from_secs(900);

/// The image, ready to run guests.
pub(super) struct Runner<'a> {
    project: &'a Project,
    builder: Builder<'a>,
    image: ImageFiles,
}

/// What is run.
pub(super) struct Run<'a> {
    pub platform: Platform,
    pub guest: &'a str,
    /// So many guests of the kind.
    pub count: usize,
    /// Options for each.
    pub options: &'a [String],
    /// What the machine needs besides the guests' memory and the usual, in MiB.
    pub more_memory_mib: u64,
    /// What the monitor is asked. If it is asked anything, the last command stops the guest.
    pub commands: &'a [Exchange],
    pub hardware: Hardware,
    pub clock: Clock,
    /// A text on the console whose time is taken.
    pub awaited: Option<&'a str>,
}

impl<'a> Run<'a> {
    /// One guest without options.
    pub fn new(platform: Platform, guest: &'a str) -> Self {
        Self {
            platform,
            guest,
            count: 1,
            options: &[],
            more_memory_mib: 0,
            commands: &[],
            hardware: Hardware::default(),
            clock: Clock::Instructions,
            awaited: None,
        }
    }
}

/// What a run printed and reported.
pub(super) struct Finished {
    pub console: String,
    /// How long after the machine's start the awaited text came.
    pub awaited_after: Option<Duration>,
    /// The monitor's, one for each command.
    pub replies: Vec<String>,
    /// One for each guest.
    pub reports: Vec<Report>,
}

impl<'a> Runner<'a> {
    pub fn new(project: &'a Project) -> Result<Self> {
        let builder = Builder::new(project)?;
        let image = builder.images(Application::Umbra)?;
        Ok(Self {
            project,
            builder,
            image,
        })
    }

    /// Runs guests to their end.
    pub fn run(&self, run: &Run<'_>) -> Result<Finished> {
        let &Run {
            platform,
            guest,
            count,
            ..
        } = run;
        setup::install(&platform.needs())?;
        platform.set_up(self.project)?;
        let source = Source::find(&guest::own(self.project)?, guest)?;
        let archive = archive::guest(&fs::read(self.builder.guest_files(&source)?.image)?, None)?;
        let work = self
            .project
            .target("runs")?
            .join(format!("bench-{platform}"));
        fs::create_dir_all(&work)?;
        let path = work.join("guest.tar");
        fs::write(&path, &archive)?;
        let mut arguments = vec!["--image=guest".to_owned()];
        arguments.extend(run.options.iter().cloned());
        arguments.extend((1..=count).map(|number| format!("--guest={guest}-{number}")));
        let console = Console::new(Show::Nothing);
        let (sender, replies) = mpsc::channel();
        let monitor = match run.commands {
            [] => None,
            commands => Some(SecondSerial::conversation(
                commands,
                &console,
                move |reply| {
                    let _ = sender.send(reply.to_owned());
                },
            )?),
        };
        let memory_mib = host_memory_mib(&arguments)? + archive_memory_mib(&archive);
        let boot = Boot {
            image: &self.image,
            arguments: &arguments,
            environment: &[],
            archive: Some(&path),
            memory_mib: memory_mib + run.more_memory_mib,
            hardware: run.hardware.clone(),
            uhyve: &UhyveSettings::default(),
            clock: run.clock,
            input: Input::Script(&[]),
            second_serial: monitor.as_ref(),
            limit: Some(LIMIT),
            disk: disk::Format::Raw,
            work: &work,
        };
        let is_over = AtomicBool::new(false);
        let (ending, awaited_after) = thread::scope(|scope| {
            let watch = run.awaited.map(|text| {
                let (console, is_over) = (&console, &is_over);
                scope.spawn(move || await_text(console, text, is_over))
            });
            let ending = platform.run(self.project, &boot, &console);
            is_over.store(true, Ordering::Relaxed);
            (ending, watch.and_then(|watch| watch.join().ok().flatten()))
        });
        let ending = ending?;
        let complaints = monitor.map_or_else(Vec::new, SecondSerial::finish);
        let console = console.text();
        let result = report::judge(ending, &console, Application::Umbra, count);
        let expected = match run.commands {
            [] => ExitCode::Success,
            _ => ExitCode::GuestFailed,
        };
        if result.code != expected as u8 || result.problem.is_some() || !complaints.is_empty() {
            bail!(
                "{guest} on {platform} failed: {:?} {complaints:?}\n{console}",
                result.problem
            );
        }
        Ok(Finished {
            console,
            awaited_after,
            replies: replies.try_iter().collect(),
            reports: result.reports,
        })
    }
}

/// How long after the machine's start a text comes, if it comes.
fn await_text(console: &Console, text: &str, is_over: &AtomicBool) -> Option<Duration> {
    loop {
        // What was printed last is there when all is over.
        let is_last = is_over.load(Ordering::Relaxed);
        if console.find(text, 0).is_some() {
            return console.since_start_of_machine();
        }
        if is_last {
            return None;
        }
        thread::sleep(PERIOD);
    }
}

/// Reads the guests' lines `cost NAME: NUMBER`.
pub(super) fn costs(console: &str) -> Vec<(String, f64)> {
    let lines = console.lines().filter_map(|line| {
        let start = line.find("cost ")?;
        line[start..].strip_prefix("cost ")
    });
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
        let console = "boot\ncost cpuid: 722.50\ncost port-write: 9\ncosts nothing\ncost x\n";
        assert_eq!(
            costs(console),
            [("cpuid".to_owned(), 722.5), ("port-write".to_owned(), 9.0)]
        );
    }
}
