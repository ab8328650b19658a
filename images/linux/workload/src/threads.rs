//! Threads: locks, condition variables, storage of their own, and memory that comes and goes.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;

use crate::mapping::{Mapping, PAGE};
use crate::random::Random;
use crate::{Failure, Outcome, expect};

const THREADS: u64 = 8;
const ROUNDS: u64 = 200;
const MESSAGES: u64 = 500;

thread_local! {
    /// Reached through the FS base, which each switch between threads must change.
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// Runs all parts.
pub fn threads() -> Outcome {
    counting()?;
    messages()?;
    Ok(format!(
        "{THREADS} threads of {ROUNDS} rounds, {MESSAGES} messages there and back"
    ))
}

/// Threads count together and each alone, while their memory comes and goes.
fn counting() -> Result<(), Failure> {
    let locked = Arc::new(Mutex::new(0_u64));
    let atomic = Arc::new(AtomicU64::new(0));
    let start = Arc::new(Barrier::new(THREADS as usize));
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let (locked, atomic, start) = (locked.clone(), atomic.clone(), start.clone());
            thread::spawn(move || -> Result<u64, Failure> {
                start.wait();
                let mut random = Random::new(number);
                for round in 0..ROUNDS {
                    *locked.lock().map_err(|_| "another thread has panicked")? += 1;
                    atomic.fetch_add(number, Ordering::Relaxed);
                    OWN.set(OWN.get() + number);
                    let memory = Mapping::anonymous(4)?;
                    let page = random.below(4);
                    memory.write(page * PAGE, number);
                    thread::yield_now();
                    let what = format!("memory of thread {number} in round {round}");
                    expect(&what, &memory.read(page * PAGE), &number)?;
                }
                Ok(OWN.get())
            })
        })
        .collect();
    for (number, thread) in (0..THREADS).zip(threads) {
        let own = thread
            .join()
            .map_err(|_| format!("thread {number} has panicked"))??;
        expect(
            &format!("thread {number}'s own count"),
            &own,
            &(number * ROUNDS),
        )?;
    }
    let locked = *locked.lock().map_err(|_| "a thread has panicked")?;
    expect("the locked count", &locked, &(THREADS * ROUNDS))?;
    let sum = (0..THREADS).sum::<u64>() * ROUNDS;
    expect("the atomic count", &atomic.load(Ordering::Relaxed), &sum)
}

/// Two threads send each other numbers, and so sleep and wake in turns.
fn messages() -> Result<(), Failure> {
    let (to_other, from_here) = mpsc::sync_channel::<u64>(1);
    let (to_here, from_other) = mpsc::sync_channel(1);
    let other = thread::spawn(move || {
        for number in from_here {
            if to_here.send(number * number).is_err() {
                return;
            }
        }
    });
    for number in 0..MESSAGES {
        to_other.send(number)?;
        expect("the answer", &from_other.recv()?, &(number * number))?;
    }
    drop(to_other);
    other
        .join()
        .map_err(|_| "the other thread has panicked".into())
}
