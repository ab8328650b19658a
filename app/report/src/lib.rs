//! What the image and the host tool must agree on: the report line, the exit codes, and the options
//! that the image takes as application arguments.
//!
//! Protocol: at the end of each guest the image prints one [`Report::line`] at the start of a
//! console line, then ends with the report's [`ExitCode`]. The host tool reads the line back with
//! [`Report::from_console`].

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod config;
mod exit_code;
mod file_error;
pub mod hermit_image;
pub mod options;
mod report;

pub use exit_code::{ExitCode, Outcome, UnknownExitCode};
pub use file_error::FileError;
pub use report::{
    Driver, Exhausted, FaultRates, HeapCounters, MARKER, MmuCounters, Report, ReportError,
};
