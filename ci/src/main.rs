//! Umbra's host tool: sets up what is missing, builds the image, boots it, and tests it.

#![deny(unsafe_code)]

mod archive;
mod assert;
mod bench;
mod build;
mod command;
mod config;
mod coverage;
mod debian;
mod disk;
mod doctor;
mod first_guest;
mod grub;
mod guest;
mod image;
mod input;
mod iso;
mod jobs;
mod kernel;
mod keys;
mod kvm;
mod linux;
mod memtest;
mod platform;
mod project;
mod ram_disk;
mod report;
mod run;
mod scenario;
mod schema;
mod second_serial;
mod setup;
mod terminal;
mod test;
mod toolchain;
mod trace;
mod typing;
mod uhyve;
mod vmlinux;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::input::BadInput;
use crate::project::{Project, invocation};

#[derive(Parser, Debug)]
#[command(about = "Builds, boots and tests Umbra", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Boot a guest under Umbra; ends with the run's exit code
    Run(Box<run::Options>),
    /// Run the host tests, then every scenario
    Test(test::Options),
    /// Boot scenarios of your own, and say whether they went as they should
    Assert(assert::Options),
    /// Measure what the parts that matter cost, in instructions
    Bench(bench::Options),
    /// Measure which lines of the MMU its tests reach
    Coverage(coverage::Options),
    /// Make the image as a file
    Image(image::Options),
    /// Write the JSON schemas of umbra.toml and of scenarios, which editors know
    Schema,
    /// Say what this host can run, and why not
    Doctor,
}

fn main() -> ExitCode {
    let command = Cli::command().name(invocation()).bin_name(invocation());
    let cli = match Cli::from_arg_matches(&command.get_matches()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    match execute(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            let is_input = error.chain().any(<dyn std::error::Error>::is::<BadInput>);
            ExitCode::from(if is_input { 2 } else { 1 })
        }
    }
}

fn execute(cli: &Cli) -> Result<u8> {
    let project = Project::find()?;
    match &cli.verb {
        Verb::Run(options) => run::run(&project, options),
        Verb::Test(options) => test::test(&project, options),
        Verb::Assert(options) => assert::assert(&project, options),
        Verb::Bench(options) => bench::bench(&project, options).map(|()| 0),
        Verb::Coverage(options) => coverage::coverage(&project, options),
        Verb::Image(options) => image::image(&project, options).map(|()| 0),
        Verb::Schema => schema::schema(&project).map(|()| 0),
        Verb::Doctor => doctor::doctor(&project).map(|()| 0),
    }
}
