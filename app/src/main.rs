//! The Umbra unikernel: one Hermit application that is the hypervisor.
//!
//! It reads its options, takes the guest that the boot loader passed, runs it under whichever
//! virtualization extension the processor has, prints one report line, and ends the system with
//! the report's exit code.

#![no_std]
#![no_main]
#![deny(unsafe_code)]

extern crate alloc;

mod archive;
mod control;
#[allow(unsafe_code, reason = "switching virtualization on")]
mod driver;
mod emulation;
mod entry;
mod guest;
mod launch;
mod memory;
mod mmio;
mod paging;
#[allow(
    unsafe_code,
    reason = "frames are reached through their physical address"
)]
mod physical;
#[allow(unsafe_code, reason = "the edge to the kernel")]
mod platform;
mod ports;
mod pressure;
mod protection_keys;
#[allow(unsafe_code, reason = "measuring it needs ports")]
mod timestamp;

use core::ffi::c_char;

use umbra_report::options::{self, Request};
use umbra_report::{ExitCode, Outcome, Report};

/// Entry point that Hermit calls after it has booted. Never returns: it shuts the system down.
// SAFETY: the kernel declares exactly this function, and no other crate defines it.
#[allow(unsafe_code, reason = "the kernel finds the function by its name")]
#[unsafe(no_mangle)]
extern "C" fn main(_argc: i32, _argv: *const *const c_char, _env: *const *const c_char) {
    timestamp::calibrate();
    platform::exit(run());
}

fn run() -> ExitCode {
    let report = match options::parse(platform::arguments()) {
        Ok(Request::Help) => {
            platform::write_console(options::HELP.as_bytes());
            return ExitCode::Success;
        }
        Ok(Request::Run(options)) => launch::run_guest(&options),
        Err(error) => {
            hermit::println!("umbra: {error}");
            Report::new("", Outcome::BadOption, alloc::format!("{error}"))
        }
    };
    hermit::println!("{}", report.line());
    report.exit_code
}
