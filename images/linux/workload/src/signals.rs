//! Signals: handlers, timers, masks, and what they must leave alone.

use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, raise, sigaction, sigprocmask,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};

use crate::{Failure, Outcome, expect};

const RAISED: usize = 2000;
const TICKS: usize = 20;
const TICK: Duration = Duration::from_millis(10);
/// Far more time than the ticks take on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);
const ROUNDS: usize = 500;

static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Runs all parts.
pub fn signals() -> Outcome {
    handle(Signal::SIGUSR1)?;
    handle(Signal::SIGALRM)?;
    raised()?;
    blocked()?;
    timer()?;
    ping_pong()?;
    Ok(format!(
        "{RAISED} raised, {TICKS} ticks, {ROUNDS} between two processes"
    ))
}

fn handle(signal: Signal) -> Result<(), Failure> {
    let action = SigAction::new(
        SigHandler::Handler(count),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handler uses an atomic and floating-point registers only.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// Counts, and dirties the floating-point registers, which are the interrupted code's.
extern "C" fn count(_: c_int) {
    let before = COUNT.fetch_add(1, Ordering::SeqCst);
    let value = std::hint::black_box(f64::from(before as u32) + 0.5).sqrt();
    std::hint::black_box(value);
}

fn raised() -> Result<(), Failure> {
    COUNT.store(0, Ordering::SeqCst);
    for number in 1..=RAISED {
        raise(Signal::SIGUSR1)?;
        expect(
            "the number of signals handled",
            &COUNT.load(Ordering::SeqCst),
            &number,
        )?;
    }
    Ok(())
}

/// A blocked signal waits, and comes once.
fn blocked() -> Result<(), Failure> {
    COUNT.store(0, Ordering::SeqCst);
    let set = SigSet::from(Signal::SIGUSR1);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    for _ in 0..3 {
        raise(Signal::SIGUSR1)?;
    }
    expect(
        "signals handled while blocked",
        &COUNT.load(Ordering::SeqCst),
        &0,
    )?;
    sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&set), None)?;
    expect(
        "signals handled afterwards",
        &COUNT.load(Ordering::SeqCst),
        &1,
    )
}

/// A timer interrupts a computation, whose result stays what it was without.
fn timer() -> Result<(), Failure> {
    let undisturbed = harmonic_sum();
    COUNT.store(0, Ordering::SeqCst);
    set_timer(TICK)?;
    let start = Instant::now();
    while COUNT.load(Ordering::SeqCst) < TICKS {
        expect(
            "a sum under timer signals",
            &harmonic_sum().to_bits(),
            &undisturbed.to_bits(),
        )?;
        if start.elapsed() > PATIENCE {
            return Err(format!(
                "{} of {TICKS} ticks came in {PATIENCE:?}",
                COUNT.load(Ordering::SeqCst)
            )
            .into());
        }
    }
    let taken = start.elapsed();
    set_timer(Duration::ZERO)?;
    if taken < TICK * (TICKS as u32 - 1) {
        return Err(format!("{TICKS} ticks of {TICK:?} came in {taken:?}").into());
    }
    Ok(())
}

fn harmonic_sum() -> f64 {
    (1..5000)
        .map(|n| 1.0 / f64::from(std::hint::black_box(n)))
        .sum()
}

fn set_timer(period: Duration) -> Result<(), Failure> {
    let interval = libc::timeval {
        tv_sec: 0,
        tv_usec: i64::from(period.subsec_micros()),
    };
    let timer = libc::itimerval {
        it_interval: interval,
        it_value: interval,
    };
    // SAFETY: the structure is valid, and the old one is not asked for.
    let result =
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().into())
    }
}

/// Parent and child wake each other in turns.
fn ping_pong() -> Result<(), Failure> {
    let set = SigSet::from(Signal::SIGUSR2);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    // SAFETY: this program has one thread here, so the child may do as it likes.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let status = match answer(&set, getppid()) {
                Ok(()) => 0,
                Err(_) => 1,
            };
            // SAFETY: this ends the child at once.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => {
            for _ in 0..ROUNDS {
                kill(child, Signal::SIGUSR2)?;
                expect("the signal that came back", &set.wait()?, &Signal::SIGUSR2)?;
            }
            expect(
                "the child's end",
                &waitpid(child, None)?,
                &WaitStatus::Exited(child, 0),
            )
        }
    }
}

fn answer(set: &SigSet, parent: Pid) -> Result<(), Failure> {
    for _ in 0..ROUNDS {
        set.wait()?;
        kill(parent, Signal::SIGUSR2)?;
    }
    Ok(())
}
