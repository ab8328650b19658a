//! The Umbra unikernel: one Hermit application that is the hypervisor.
//!
//! It reads its options, takes the guests that the boot loader passed, runs them under whichever
//! virtualization extension the processor has, prints one report line for each, and ends the system
//! with the exit code of the first that failed.

#![no_std]
#![no_main]
#![deny(unsafe_code)]

extern crate alloc;

mod advice;
mod alarm;
mod archive;
mod bios;
mod console;
mod control;
#[allow(unsafe_code, reason = "switching virtualization on")]
mod driver;
mod emulation;
mod entry;
mod gdb;
mod guest;
#[allow(unsafe_code, reason = "hypercalls")]
mod host_files;
mod injection;
mod launch;
mod memory;
mod mmio;
mod monitor;
mod paging;
#[allow(
    unsafe_code,
    reason = "frames are reached through their physical address"
)]
mod physical;
#[allow(unsafe_code, reason = "the edge to the kernel")]
mod platform;
mod ports;
mod post_mortem;
mod pressure;
mod protection_keys;
mod rates;
mod schedule;
#[allow(unsafe_code, reason = "a serial port is reached by I/O ports")]
mod second_serial;
mod shared;
mod shortage;
#[allow(unsafe_code, reason = "measuring it needs ports")]
mod timestamp;
mod uhyve;
mod vm;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ffi::c_char;

use umbra_report::options::{self, Request};
use umbra_report::{ExitCode, FileError, Outcome, Report, config};

use crate::archive::BootFiles;
use crate::host_files::ReadError;

/// Entry point that Hermit calls after it has booted. Never returns: it shuts the system down.
// SAFETY: the kernel declares exactly this function, and no other crate defines it.
#[allow(unsafe_code, reason = "the kernel finds the function by its name")]
#[unsafe(no_mangle)]
extern "C" fn main(_argc: i32, _argv: *const *const c_char, _env: *const *const c_char) {
    timestamp::calibrate();
    platform::exit(run());
}

fn run() -> ExitCode {
    match read_options() {
        Ok((Request::Help, _)) => {
            platform::write_console(options::HELP.as_bytes());
            ExitCode::Success
        }
        Ok((Request::PrintConfig(options), _)) => {
            platform::write_console(config::text(&options).as_bytes());
            ExitCode::Success
        }
        Ok((Request::Run(options), files)) => launch::run_guests(&options, &files),
        Err(report) => {
            hermit::println!("umbra: {}", report.message);
            hermit::println!("{}", report.line());
            report.exit_code
        }
    }
}

/// What the command line, the environment and the configuration file ask for, and the files that were
/// passed.
fn read_options() -> Result<(Request, BootFiles), Report> {
    let bad_option = |message| Report::new("", Outcome::BadOption, message);
    let mut files = BootFiles::new(platform::boot_modules()).map_err(unreadable)?;
    files.check_hermit_image().map_err(bad_option)?;
    let refuse = |error: FileError| bad_option(error.to_string());
    let arguments: Vec<String> = platform::arguments();
    let mut arguments =
        config::merge_environment(platform::environment(), &arguments).map_err(refuse)?;
    if let Some(text) = files.configuration().map_err(bad_option)? {
        arguments = config::merge(text, &arguments).map_err(refuse)?;
    }
    let request = options::parse(arguments.iter().map(String::as_str))
        .map_err(|error| bad_option(error.to_string()))?;
    if let Request::Run(options) = &request {
        advice::prepare(options);
        files.fetch(options).map_err(unreadable)?;
    }
    Ok((request, files))
}

fn unreadable(error: ReadError) -> Report {
    match error {
        ReadError::Failed(message) => Report::new("", Outcome::BadImage, message),
        ReadError::NoMemory(length) => advice::complete(Report::new(
            "",
            Outcome::HostOutOfMemory,
            format!("a file of {length} bytes does not fit the image's heap"),
        )),
    }
}
