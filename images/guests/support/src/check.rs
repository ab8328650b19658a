//! Checks: each compares one value, each group of checks prints one line, and the first check that
//! fails ends the guest with a line that says which one and the values.

use core::fmt::{Debug, Display};

use crate::cpu::exit;
use crate::println;
use crate::trap::Trap;

/// The exit code of a guest with a failed check.
pub const FAILED: u32 = 1;

/// Counts what was checked.
#[derive(Default)]
pub struct Checks {
    passed: u32,
    groups: u32,
}

impl Checks {
    /// Checks that `got` is what the manual promises.
    pub fn equal<T: PartialEq + Debug>(&mut self, what: impl Display, expected: T, got: T) {
        if expected != got {
            println!("FAIL {what}: expected {expected:#x?}, got {got:#x?}");
            exit(FAILED);
        }
        self.passed += 1;
    }

    /// Checks that an access or instruction went through, and returns its value.
    pub fn succeeds<T>(&mut self, what: impl Display, result: Result<T, Trap>) -> T {
        match result {
            Ok(value) => {
                self.passed += 1;
                value
            }
            Err(trap) => {
                println!("FAIL {what}: expected no exception, got {trap:#x?}");
                exit(FAILED)
            }
        }
    }

    /// Checks that an access or instruction raised `vector` with `error_code` (zero for vectors
    /// that have none), and returns the trap for further checks.
    pub fn raises<T>(
        &mut self,
        what: impl Display,
        vector: u8,
        error_code: u32,
        result: Result<T, Trap>,
    ) -> Trap {
        match result {
            Err(trap) if (trap.vector, trap.error_code) == (vector, error_code) => {
                self.passed += 1;
                trap
            }
            Err(trap) => {
                println!(
                    "FAIL {what}: expected vector {vector} error {error_code:#x}, got {trap:#x?}"
                );
                exit(FAILED)
            }
            Ok(_) => {
                println!("FAIL {what}: expected vector {vector}, got no exception");
                exit(FAILED)
            }
        }
    }

    /// Ends a group: prints `ok N WHAT`.
    pub fn ok(&mut self, what: impl Display) {
        self.groups += 1;
        println!("ok {} {what}", self.groups);
    }

    /// Says that a group was left out, and why.
    pub fn skip(&mut self, what: impl Display, why: impl Display) {
        self.groups += 1;
        println!("skip {} {what}: {why}", self.groups);
    }

    /// Prints the last line and ends the guest with success.
    pub fn finish(&self, name: &str) -> ! {
        println!("{name}: {} checks passed", self.passed);
        exit(0)
    }
}
