//! Several virtual CPUs fault on one MMU, another VM shares its pool, and the host zaps, shrinks, logs
//! writes and takes memory away in between, under random and adversarial schedules.
//!
//! What must hold in each: no frame is used after it was freed, no processor knows a freed frame as
//! a table, a read reaches only a page that its entry named since this processor's last flush of it,
//! memory that was taken away is reached by nobody, no write to logged memory is lost, no schedule
//! deadlocks, and in the end all structures are whole and every frame is free.
#![allow(missing_docs, reason = "a test")]
#![allow(
    clippy::precedence,
    reason = "bits are written as the manual draws them"
)]

mod guest;
mod host;
mod random;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest::{Guest, LOGGED, REMOVABLE, removable};
use host::{Flushes, Host};
use random::Random;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner, thread};
use umbra_mmu_interleavings::{MmuPool, SlotError};
use umbra_vcpu::address::Gfn;

/// Steps of each virtual CPU, and of the host at the same time.
const GUEST_STEPS: usize = 8;
const HOST_STEPS: usize = 6;
/// How often an adversarial schedule takes the processor from a thread that could go on.
const PREEMPTIONS: usize = 6;
/// Shadow pages of both VMs together: too few for all that they use.
const TOTAL: usize = 14;

/// One schedule's run: a VM with two virtual CPUs, one with a single one, and the host.
fn run(flushes: Flushes) {
    let pool = Arc::new(MmuPool::new(TOTAL));
    let guests = [(2, flushes), (1, Flushes::ReachAll)]
        .map(|(processors, flushes)| Guest::new(&pool, processors, flushes));
    let mut cpus = Vec::new();
    for (guest, number) in [(&guests[0], 0), (&guests[0], 1), (&guests[1], 0)] {
        let (guest, mut cpu) = (guest.clone(), guest.cpu(number, Random::new()));
        cpus.push(thread::spawn(move || {
            for _ in 0..GUEST_STEPS {
                guest.step(&mut cpu);
            }
            cpu
        }));
    }
    let done = Arc::new(AtomicBool::new(false));
    let host = {
        let (pool, guest, done) = (pool.clone(), guests[0].clone(), done.clone());
        let mut random = Random::new();
        thread::spawn(move || {
            for _ in 0..HOST_STEPS {
                if !done.load(Ordering::SeqCst) {
                    disturb(&pool, &guest, &mut random);
                }
            }
        })
    };
    let cpus: Vec<_> = cpus.into_iter().map(|cpu| cpu.join().unwrap()).collect();
    done.store(true, Ordering::SeqCst);
    host.join().unwrap();
    for guest in &guests {
        guest.mmu.audit().unwrap();
    }
    let used: usize = guests.iter().map(|guest| guest.mmu.used()).sum();
    assert_eq!(pool.count(), used);
    for (guest, cpu) in [&guests[0], &guests[0], &guests[1]].into_iter().zip(cpus) {
        guest.destroy(cpu);
    }
    let hosts = guests.map(|guest| guest.host.clone());
    assert_eq!(pool.count(), 0);
    assert!(hosts.iter().all(|host| host.frames_in_use() == 0));
}

/// Something that the host does to a VM whose processors run.
fn disturb(pool: &MmuPool<Host>, guest: &Guest, random: &mut Random) {
    let mmu = &guest.mmu;
    match random.below(10) {
        0 => mmu.zap_all(),
        1 => drop(mmu.unprotect(Gfn::new(1 + random.below(6)))),
        2 => mmu.set_limit(6 + random.below(7) as usize),
        3 | 4 => {
            let _ = pool.scan(1 + random.below(8) as usize);
        }
        5 => drop(mmu.release_caches()),
        6 | 7 => take_dirty(guest),
        8 => {
            mmu.remove_slot(REMOVABLE).unwrap();
            guest.is_removed.store(true, Ordering::SeqCst);
            thread::yield_now();
            guest.is_removed.store(false, Ordering::SeqCst);
            mmu.add_slot(removable()).unwrap();
        }
        _ => {
            let _ = mmu.take_accessed(Gfn::new(8), 8);
        }
    }
    mmu.audit().unwrap();
}

/// What was written between two calls is in the second one's answer.
fn take_dirty(guest: &Guest) {
    let take = || {
        let mut pages = Vec::new();
        let result: Result<(), SlotError> =
            guest.mmu.take_dirty(LOGGED, |gfn| pages.push(gfn.as_u64()));
        result.unwrap();
        pages
    };
    take();
    guest.is_written.store(false, Ordering::SeqCst);
    thread::yield_now();
    let was_written = guest.is_written.load(Ordering::SeqCst);
    let pages = take();
    assert!(
        !was_written || pages == [u64::from(LOGGED.0)],
        "a write to logged memory is lost"
    );
}

fn config(failures: FailurePersistence) -> Config {
    let mut config = Config::new();
    config.stack_size = 0x8_0000;
    config.max_steps = MaxSteps::FailAfter(2_000_000);
    config.failure_persistence = failures;
    // That weaker orderings are taken for sequential consistency is all that a walk of tables needs.
    config.silence_warnings = true;
    config
}

/// Schedules to try.
fn schedules() -> usize {
    match std::env::var_os("UMBRA_LONG") {
        Some(_) => 50_000,
        None => 500,
    }
}

fn check(scheduler: impl Scheduler + 'static) {
    Runner::new(scheduler, config(FailurePersistence::Print)).run(|| run(Flushes::ReachAll));
}

#[test]
fn random_schedules_keep_the_rules() {
    check(RandomScheduler::new(schedules()));
}

#[test]
fn few_preemptions_at_the_worst_moments_keep_the_rules() {
    check(PctScheduler::new(PREEMPTIONS, 2 * schedules()));
}

/// The schedules would show a broken rule: here the host breaks it. Ends at the first failure.
fn fails(flushes: Flushes) -> bool {
    let runner = Runner::new(
        PctScheduler::new(PREEMPTIONS, 100_000),
        config(FailurePersistence::None),
    );
    catch_unwind(AssertUnwindSafe(|| runner.run(move || run(flushes)))).is_err()
}

#[test]
fn a_flush_that_misses_a_processor_is_found() {
    assert!(fails(Flushes::MissOne));
}

#[test]
fn a_flush_that_does_not_wait_is_found() {
    assert!(fails(Flushes::DoNotWait));
}
