//! A Hermit application that runs as Umbra's guest, by version 1 of the uhyve interface.
//!
//! It prints what it was given, checks what the interface offers, and exits with the code of the
//! argument `exit=N`, or with 0; a check that fails exits with 99.

#![no_std]
#![no_main]

mod hypercall;

use core::ffi::{CStr, c_char};

use hermit::println;
use hermit::syscalls::{
    sys_clock_gettime, sys_exit, sys_open, sys_read, sys_unlink, sys_usleep, sys_write,
};
use hermit::time::timespec;

/// The exit code when a check fails.
const CHECK_FAILED: i32 = 99;
const STANDARD_INPUT: i32 = 0;
const STANDARD_OUTPUT: i32 = 1;
const CLOCK_REALTIME: i32 = 1;
const CLOCK_MONOTONIC: i32 = 4;
/// 2024-01-01, in seconds since 1970.
const LONG_AGO: i64 = 1_704_067_200;
const SLEEP_MICROSECONDS: i64 = 50_000;
/// Far more than the sleep takes on the slowest machine.
const PATIENCE_MICROSECONDS: i64 = 20_000_000;

/// Entry point that Hermit calls after it has booted.
// SAFETY: the kernel declares exactly this function, and no other crate defines it.
#[unsafe(no_mangle)]
extern "C" fn main(argc: i32, argv: *const *const c_char, env: *const *const c_char) {
    println!("Hello from Hermit");
    let mut checks = Checks { passed: 0 };
    let mut code = 0;
    for number in 1..usize::try_from(argc).unwrap_or_default() {
        // SAFETY: the kernel passes `argc` strings.
        let argument = unsafe { text(*argv.add(number)) };
        println!("argument {number}: {argument}");
        if let Some(exit) = argument.strip_prefix("exit=") {
            code = exit.parse().unwrap_or(CHECK_FAILED);
        }
    }
    print_environment(env);

    let line = "written to the standard output\n";
    // SAFETY: pointer and length are those of a live string.
    let written = unsafe { sys_write(STANDARD_OUTPUT, line.as_ptr(), line.len()) };
    checks.check("the bytes written", written == line.len().cast_signed());
    clocks(&mut checks);
    files(&mut checks);
    hypercall::arguments(&mut checks);
    println!("hermit: {} checks passed", checks.passed);
    sys_exit(code)
}

/// Counts checks, and ends the guest when one fails.
pub struct Checks {
    passed: u32,
}

impl Checks {
    /// Exits with [`CHECK_FAILED`] unless `holds`.
    pub fn check(&mut self, what: &str, holds: bool) {
        if !holds {
            println!("hermit: {what}: not as it should be");
            sys_exit(CHECK_FAILED);
        }
        self.passed += 1;
    }
}

/// # Safety
/// `string` must point to a string that ends with a zero byte and lives for ever.
unsafe fn text(string: *const c_char) -> &'static str {
    // SAFETY: the caller guarantees it.
    let string = unsafe { CStr::from_ptr(string) };
    string.to_str().unwrap_or("not UTF-8")
}

fn print_environment(env: *const *const c_char) {
    if env.is_null() {
        return;
    }
    for number in 0.. {
        // SAFETY: the kernel ends the list with a null pointer, at which the loop ends.
        let variable = unsafe { *env.add(number) };
        if variable.is_null() {
            return;
        }
        // SAFETY: the kernel passes strings.
        println!("environment: {}", unsafe { text(variable) });
    }
}

fn clocks(checks: &mut Checks) {
    let wall = now(CLOCK_REALTIME);
    println!("the time is {} s since 1970", wall.tv_sec);
    checks.check("the year", wall.tv_sec > LONG_AGO);
    let before = microseconds(&now(CLOCK_MONOTONIC));
    sys_usleep(SLEEP_MICROSECONDS.unsigned_abs());
    let slept = microseconds(&now(CLOCK_MONOTONIC)) - before;
    println!("slept for {slept} us");
    let range = SLEEP_MICROSECONDS..PATIENCE_MICROSECONDS;
    checks.check("the time slept", range.contains(&slept));
    let elapsed = microseconds(&now(CLOCK_REALTIME)) - microseconds(&wall);
    checks.check("the wall clock's pace", range.contains(&elapsed));
}

fn now(clock: i32) -> timespec {
    let mut now = timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is that of a live value which the kernel fills.
    unsafe { sys_clock_gettime(clock, &raw mut now) };
    now
}

fn microseconds(time: &timespec) -> i64 {
    time.tv_sec * 1_000_000 + i64::from(time.tv_nsec) / 1000
}

/// The host has no files.
fn files(checks: &mut Checks) {
    let name = c"/root/no-such-file";
    // SAFETY: the name is a string that ends with a zero byte.
    let opened = unsafe { sys_open(name.as_ptr(), 0, 0) };
    checks.check("the result of opening a missing file", opened < 0);
    // SAFETY: as above.
    let unlinked = unsafe { sys_unlink(name.as_ptr()) };
    checks.check("the result of removing a missing file", unlinked < 0);
    let mut buffer = [0; 8];
    // SAFETY: pointer and length are those of a live buffer.
    let read = unsafe { sys_read(STANDARD_INPUT, buffer.as_mut_ptr(), buffer.len()) };
    checks.check("the result of reading without input", read <= 0);
}
