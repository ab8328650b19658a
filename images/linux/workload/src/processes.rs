//! Processes: copy-on-write memory after `fork`, `exec`, exit statuses, and deaths by exceptions.

use std::arch::asm;
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::process::ExitCode;

use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, execv, fork};

use crate::mapping::{Mapping, PAGE};
use crate::random::Random;
use crate::{Failure, Outcome, expect};

/// The command by which `fork_and_exec` runs this program.
pub const CHILD: &str = "child";

const FORKS: usize = 500;
/// Pages that parent and child share until one of them writes.
const SHARED_PAGES: usize = 64;
const WRITES_PER_CHILD: usize = 8;
/// The statuses of children that fail before `exec`.
const MEMORY_DIFFERS: i32 = 253;
const EXEC_FAILED: i32 = 254;
/// Statuses below this are what `exec`ed children end with.
const STATUSES: usize = 251;

/// Forks and executes this program many times. Parent and child write to the memory that both
/// inherit, and neither may see the other's writes.
pub fn fork_and_exec() -> Outcome {
    let memory = Mapping::anonymous(SHARED_PAGES)?;
    let mut random = Random::new(1);
    let mut expected: Vec<u64> = (0..SHARED_PAGES).map(|_| random.number()).collect();
    for (page, value) in expected.iter().enumerate() {
        memory.write(page * PAGE, *value);
    }
    let program = c"/proc/self/exe";
    for number in 0..FORKS {
        let argument = CString::new(number.to_string())?;
        // SAFETY: this program has one thread here, so the child may do as it likes.
        match unsafe { fork() }.map_err(|error| format!("fork {number}: {error}"))? {
            ForkResult::Child => {
                let status = match in_child(&memory, &expected, number, program, &argument) {
                    Ok(never) => match never {},
                    Err(status) => status,
                };
                // SAFETY: this ends the child at once.
                unsafe { libc::_exit(status) };
            }
            ForkResult::Parent { child } => {
                // The parent writes while the child shares the page.
                let page = random.below(SHARED_PAGES);
                expected[page] = random.number();
                memory.write(page * PAGE, expected[page]);
                match waitpid(child, None)? {
                    WaitStatus::Exited(_, MEMORY_DIFFERS) => {
                        return Err(
                            format!("child {number} sees other memory than it should").into()
                        );
                    }
                    WaitStatus::Exited(_, status) => {
                        let expected = i32::try_from(number % STATUSES)?;
                        expect(&format!("the status of child {number}"), &status, &expected)?;
                    }
                    other => return Err(format!("child {number} ended with {other:?}").into()),
                }
                check(&memory, &expected)
                    .map_err(|error| format!("after child {number}: {error}"))?;
            }
        }
    }
    Ok(format!("{FORKS} forks and execs"))
}

fn in_child(
    memory: &Mapping,
    inherited: &[u64],
    number: usize,
    program: &CStr,
    argument: &CStr,
) -> Result<Infallible, i32> {
    let mut random = Random::new(number as u64);
    // The parent may write before or after the child reads, but to its own copy.
    for _ in 0..WRITES_PER_CHILD {
        let page = random.below(SHARED_PAGES);
        let differs = memory.read(page * PAGE) != inherited[page];
        memory.write(page * PAGE + 8, number as u64);
        if differs || memory.read(page * PAGE + 8) != number as u64 {
            return Err(MEMORY_DIFFERS);
        }
    }
    execv(program, &[c"workload", c"child", argument]).map_err(|_| EXEC_FAILED)
}

fn check(memory: &Mapping, expected: &[u64]) -> Result<(), Failure> {
    for (page, value) in expected.iter().enumerate() {
        expect(&format!("page {page}"), &memory.read(page * PAGE), value)?;
        let beside = memory.read(page * PAGE + 8);
        expect(
            &format!("what only children write to page {page}"),
            &beside,
            &0,
        )?;
    }
    Ok(())
}

/// What an executed child does: it ends with a status that says which one it is.
pub fn child(number: &str) -> ExitCode {
    match number.parse::<usize>() {
        Ok(number) => ExitCode::from((number % STATUSES) as u8),
        Err(_) => ExitCode::from(u8::MAX),
    }
}

/// Has children raise exceptions of the processor that end them, each by its signal.
pub fn exceptions() -> Outcome {
    const ROUNDS: usize = 10;
    let deaths: [(&str, Signal, fn()); 7] = [
        ("an invalid opcode", Signal::SIGILL, invalid_opcode),
        ("a division by zero", Signal::SIGFPE, divide_by_zero),
        ("a breakpoint", Signal::SIGTRAP, breakpoint),
        ("a read of page 0", Signal::SIGSEGV, read_page_zero),
        ("a write to code", Signal::SIGSEGV, write_to_code),
        ("a non-canonical address", Signal::SIGSEGV, non_canonical),
        ("a privileged instruction", Signal::SIGSEGV, privileged),
    ];
    for round in 0..ROUNDS {
        for (what, expected, die) in &deaths {
            // SAFETY: this program has one thread here, and the child only dies.
            match unsafe { fork() }? {
                ForkResult::Child => {
                    // SAFETY: the default action is a valid one.
                    let _ = unsafe { signal(Signal::SIGSEGV, SigHandler::SigDfl) };
                    die();
                    // SAFETY: this ends the child at once.
                    unsafe { libc::_exit(0) };
                }
                ForkResult::Parent { child } => match waitpid(child, None)? {
                    WaitStatus::Signaled(_, signal, _) if signal == *expected => {}
                    other => {
                        return Err(format!("{what} in round {round} ended with {other:?}").into());
                    }
                },
            }
        }
    }
    Ok(format!(
        "{} children died as they should",
        ROUNDS * deaths.len()
    ))
}

fn invalid_opcode() {
    // SAFETY: this child is here to die.
    unsafe { asm!("ud2") };
}

fn divide_by_zero() {
    // SAFETY: as above.
    unsafe {
        asm!("xor edx, edx", "xor ecx, ecx", "mov eax, 1", "div ecx", out("eax") _, out("ecx") _, out("edx") _);
    };
}

fn breakpoint() {
    // SAFETY: as above.
    unsafe { asm!("int3") };
}

fn read_page_zero() {
    // SAFETY: as above.
    unsafe { asm!("xor ecx, ecx", "mov al, [rcx]", out("eax") _, out("ecx") _) };
}

fn write_to_code() {
    // SAFETY: as above.
    unsafe { asm!("mov byte ptr [{}], 0x90", in(reg) write_to_code as fn()) };
}

fn non_canonical() {
    // SAFETY: as above.
    unsafe { asm!("mov al, [rcx]", out("eax") _, in("rcx") 1_u64 << 63) };
}

fn privileged() {
    // SAFETY: as above.
    unsafe { asm!("cli") };
}
