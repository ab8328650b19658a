//! What the processors of a guest share.
//!
//! Protocol: there is one machine, and who works with it has it. [`SharedMachine`] is one processor's
//! hand: it fetches the machine when it is first needed and then speaks for this processor, until
//! [`SharedMachine::release`] puts it back. Whoever waits for it is counted.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::cell::OnceCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;
use umbra_machine::{Machine, ProcessorNumber};

/// What there is once for all processors.
pub struct Shared {
    machine: Mutex<Option<Box<Machine>>>,
    /// The host's time-stamp counter at which the watchdog ends the guest; the largest for never.
    deadline: AtomicU64,
    /// How often a processor had to wait for the machine.
    waits: AtomicU64,
}

impl Shared {
    /// With a machine that nobody has, and a time limit by the host's time-stamp counter.
    pub fn new(machine: Box<Machine>, deadline: Option<u64>) -> Self {
        Self {
            machine: Mutex::new(Some(machine)),
            deadline: AtomicU64::new(deadline.unwrap_or(u64::MAX)),
            waits: AtomicU64::new(0),
        }
    }

    /// The host's time-stamp counter at which the watchdog ends the guest.
    pub fn deadline(&self) -> Option<u64> {
        let deadline = self.deadline.load(Ordering::Relaxed);
        (deadline != u64::MAX).then_some(deadline)
    }

    /// Puts the end off by so many ticks.
    pub fn extend_deadline(&self, ticks: u64) {
        if let Some(deadline) = self.deadline() {
            let later = deadline.saturating_add(ticks);
            self.deadline.store(later, Ordering::Relaxed);
        }
    }

    /// How often a processor had to wait for the machine.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// Takes the machine, once nobody has it.
    #[cold]
    fn fetch(&self, number: ProcessorNumber) -> Box<Machine> {
        let mut has_waited = false;
        loop {
            if let Some(mut machine) = self.machine.lock().take() {
                machine.serve(number);
                return machine;
            }
            if !has_waited {
                has_waited = true;
                self.waits.fetch_add(1, Ordering::Relaxed);
            }
            core::hint::spin_loop();
        }
    }
}

/// The machine in one processor's hand, or to be fetched.
pub struct SharedMachine {
    shared: Arc<Shared>,
    number: ProcessorNumber,
    held: OnceCell<Box<Machine>>,
}

impl SharedMachine {
    /// The hand of the processor with this number, empty.
    pub const fn new(shared: Arc<Shared>, number: ProcessorNumber) -> Self {
        Self {
            shared,
            number,
            held: OnceCell::new(),
        }
    }

    /// The processor's number.
    pub const fn number(&self) -> ProcessorNumber {
        self.number
    }

    /// What there is besides.
    pub const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether other processors have something new to see.
    #[inline]
    pub fn has_kicks(&self) -> bool {
        self.held.get().is_some_and(|machine| machine.has_kicks())
    }

    /// Lets others have the machine.
    pub fn release(&mut self) {
        if let Some(machine) = self.held.take() {
            *self.shared.machine.lock() = Some(machine);
        }
    }
}

impl Deref for SharedMachine {
    type Target = Machine;

    #[inline]
    fn deref(&self) -> &Machine {
        self.held.get_or_init(|| self.shared.fetch(self.number))
    }
}

impl DerefMut for SharedMachine {
    #[inline]
    fn deref_mut(&mut self) -> &mut Machine {
        if self.held.get().is_none() {
            self.held = OnceCell::from(self.shared.fetch(self.number));
        }
        match self.held.get_mut() {
            Some(machine) => machine,
            None => unreachable!("it was fetched above"),
        }
    }
}
