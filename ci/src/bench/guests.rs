//! Runs our own guests under Umbra where time-stamp counters count instructions.

use std::fs;
use std::time::Duration;

use anyhow::{Result, bail};
use umbra_report::Report;

use crate::archive;
use crate::build::{Application, Builder, ImageFiles};
use crate::disk;
use crate::guest::{self, Source};
use crate::platform::{Boot, Clock, Console, Hardware, Platform, Show, UhyveSettings};
use crate::project::Project;
use crate::report;
use crate::run::{archive_memory_mib, host_memory_mib};
use crate::setup;
use crate::typing::Input;

const LIMIT: Duration = Duration::from_secs(900);

/// The image, ready to run guests.
pub(super) struct Runner<'a> {
    project: &'a Project,
    builder: Builder<'a>,
    image: ImageFiles,
}

/// What a run printed and reported.
pub(super) struct Finished {
    pub console: String,
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

    /// Runs so many guests of one kind with these options each.
    pub fn run(
        &self,
        platform: Platform,
        guest: &str,
        count: usize,
        options: &[String],
    ) -> Result<Finished> {
        setup::install(&platform.needs())?;
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
        arguments.extend(options.iter().cloned());
        arguments.extend((1..=count).map(|number| format!("--guest={guest}-{number}")));
        let console = Console::new(Show::Nothing);
        let boot = Boot {
            image: &self.image,
            arguments: &arguments,
            environment: &[],
            archive: Some(&path),
            memory_mib: host_memory_mib(&arguments)? + archive_memory_mib(&archive),
            hardware: Hardware::default(),
            uhyve: &UhyveSettings::default(),
            clock: Clock::Instructions,
            input: Input::Script(&[]),
            second_serial: None,
            limit: Some(LIMIT),
            disk: disk::Format::Raw,
            work: &work,
        };
        let ending = platform.run(self.project, &boot, &console)?;
        let console = console.text();
        let result = report::judge(ending, &console, Application::Umbra, count);
        if result.code != 0 || result.problem.is_some() {
            bail!(
                "{guest} on {platform} failed: {:?}\n{console}",
                result.problem
            );
        }
        Ok(Finished {
            console,
            reports: result.reports,
        })
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
