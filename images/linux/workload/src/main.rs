//! What a Linux guest is put through by its `/init`.
//!
//! `workload run all` or `workload run fork,memory` runs the tests of these names one after the
//! other. Each prints `ok NAME` or `FAILED NAME` with what differs, and the status says whether all
//! passed. `workload fail` ends the guest as a failed one.

#![deny(unsafe_code)]

mod files;
#[allow(unsafe_code, reason = "mapped memory is reached by addresses")]
mod mapping;
mod memory;
#[allow(unsafe_code, reason = "an I/O port")]
mod port;
#[allow(unsafe_code, reason = "fork and exec")]
mod processes;
mod programs;
mod random;
#[allow(unsafe_code, reason = "signal handlers")]
mod signals;
mod threads;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// What differs, in one line.
type Failure = Box<dyn Error + Send + Sync>;

/// What a test did, in a few words, or what differed.
type Outcome = Result<String, Failure>;

/// A test and its name.
type Test = (&'static str, fn() -> Outcome);

const TESTS: &[Test] = &[
    ("fork", processes::fork_and_exec),
    ("exceptions", processes::exceptions),
    ("memory", memory::anonymous),
    ("protect", memory::protections),
    ("unmap", memory::holes),
    ("code", memory::code),
    ("file", files::mapped),
    ("signals", signals::signals),
    ("threads", threads::threads),
    ("sha256", programs::sha256),
    ("tar", programs::tar),
];

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["run", names] => match select(names) {
            Ok(tests) => run(&tests),
            Err(error) => {
                println!("FAILED {error}");
                ExitCode::FAILURE
            }
        },
        ["fail"] => {
            let error = port::fail_guest();
            println!("FAILED to end the guest: {error}");
            ExitCode::FAILURE
        }
        [processes::CHILD, number] => processes::child(number),
        _ => {
            println!("usage: workload run all|NAME,NAME... | workload fail");
            ExitCode::FAILURE
        }
    }
}

fn select(names: &str) -> Result<Vec<Test>, String> {
    if names == "all" {
        return Ok(TESTS.to_vec());
    }
    let find = |name: &str| TESTS.iter().find(|test| test.0 == name).copied();
    let tests = names.split(',').map(|name| {
        find(name).ok_or_else(|| {
            let known: Vec<_> = TESTS.iter().map(|test| test.0).collect();
            format!("{name}: no such test; there are all, {}", known.join(", "))
        })
    });
    tests.collect()
}

fn run(tests: &[Test]) -> ExitCode {
    let start = Instant::now();
    let failed = tests.iter().filter(|test| !passes(test)).count();
    let passed = tests.len() - failed;
    let seconds = start.elapsed().as_secs_f32();
    println!("workload: {passed} passed, {failed} failed ({seconds:.1} s)");
    ExitCode::from(u8::from(failed > 0))
}

fn passes((name, test): &Test) -> bool {
    let start = Instant::now();
    match test() {
        Ok(what) => {
            let seconds = start.elapsed().as_secs_f32();
            println!("ok {name}: {what} ({seconds:.1} s)");
            true
        }
        Err(difference) => {
            println!("FAILED {name}: {difference}");
            false
        }
    }
}

/// Where a test may put files of its own.
fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("workload-{}-{name}", std::process::id()))
}

/// A failure unless `found` is `expected`.
fn expect<T: PartialEq + std::fmt::Debug>(
    what: &str,
    found: &T,
    expected: &T,
) -> Result<(), Failure> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what} is {found:x?}, expected {expected:x?}").into())
    }
}
