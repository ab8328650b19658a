//! The processors of one machine: what each has of its own, and how one starts another.
//!
//! Protocol: the machine answers for the processor that it serves, which is the one whose exit is
//! being handled. A processor other than the first waits until INIT and then a start-up message
//! reach it (SDM vol. 3A 9.4; APM vol. 2 16.5); while it waits, nothing else reaches it.

use super::{Attention, Timers};
use crate::devices::local_apic::{LocalApic, Message, delivery};
use crate::processor::cpuid::Identity;
use crate::processor::features::GuestFeatures;
use crate::processor::msr::Msrs;
use crate::processor::paravirtual::Paravirtual;

/// The number of a processor, which is also the ID of its local APIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessorNumber(u8);

impl ProcessorNumber {
    /// The processor that firmware runs on, and that starts the others.
    pub const BOOT: Self = Self(0);
    /// How many processors a machine has at most.
    pub const LIMIT: u8 = 4;

    /// Processor `number`, if there can be one.
    pub const fn new(number: u8) -> Option<Self> {
        if number < Self::LIMIT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The first `count` processors.
    pub fn first(count: u8) -> impl DoubleEndedIterator<Item = Self> {
        (0..count.min(Self::LIMIT)).map(Self)
    }

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The number as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Some of a machine's processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessorSet(u8);

impl ProcessorSet {
    /// None.
    pub const EMPTY: Self = Self(0);

    /// Whether there is none in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `number` is in it.
    pub const fn contains(self, number: ProcessorNumber) -> bool {
        self.0 >> number.0 & 1 != 0
    }

    /// Adds `number`.
    pub const fn insert(&mut self, number: ProcessorNumber) {
        self.0 |= 1 << number.0;
    }

    /// Takes `number` out.
    pub const fn remove(&mut self, number: ProcessorNumber) {
        self.0 &= !(1 << number.0);
    }

    /// Those in it, in the order of their numbers.
    pub fn iter(self) -> impl Iterator<Item = ProcessorNumber> {
        ProcessorNumber::first(ProcessorNumber::LIMIT).filter(move |&number| self.contains(number))
    }
}

impl FromIterator<ProcessorNumber> for ProcessorSet {
    fn from_iter<T: IntoIterator<Item = ProcessorNumber>>(numbers: T) -> Self {
        let mut set = Self::EMPTY;
        for number in numbers {
            set.insert(number);
        }
        set
    }
}

/// What starts a processor or stops it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Startup {
    /// It takes the state after INIT (SDM vol. 3A table 9-1) and waits.
    Init,
    /// It begins in real mode at physical address `vector` × 4096: CS has this base and the selector
    /// `vector` × 256, and RIP is zero.
    Begin {
        /// The page, 0 to 255.
        vector: u8,
    },
}

/// How far a processor's start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It runs.
    Running,
    /// It waits for a start-up message.
    Waiting,
    /// One has come, for this page, and the run loop has not taken it.
    Beginning(u8),
}

/// What a message means for its receiver besides an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reception {
    /// Nothing that cannot wait for a window.
    Ordinary,
    /// An NMI, an INIT or a start-up has come: the processor must be interrupted.
    Urgent,
}

/// What each processor has of its own.
pub(super) struct Processor {
    pub number: ProcessorNumber,
    pub msrs: Msrs,
    pub paravirtual: Paravirtual,
    pub local_apic: LocalApic,
    stage: Stage,
    /// An INIT has come, and the run loop has not taken it.
    init: bool,
    pub interrupt_pending: bool,
    pub attention: Attention,
    pub timers: Timers,
}

impl Processor {
    pub fn new(number: ProcessorNumber, features: GuestFeatures, tsc_offset: i64) -> Self {
        Self {
            number,
            msrs: Msrs::new(number, features, tsc_offset),
            paravirtual: Paravirtual::default(),
            local_apic: LocalApic::new(number),
            stage: if number == ProcessorNumber::BOOT {
                Stage::Running
            } else {
                Stage::Waiting
            },
            init: false,
            interrupt_pending: false,
            attention: Attention::NotWanted,
            timers: Timers::Touched,
        }
    }

    /// Takes a message that is for this processor.
    pub fn receive(&mut self, message: &Message) -> Reception {
        if !self.msrs.apic_base().is_enabled() {
            return Reception::Ordinary;
        }
        match (message.delivery, self.stage) {
            (delivery::INIT, _) => {
                self.local_apic.initialize();
                self.init = true;
                self.stage = Stage::Waiting;
                self.timers = Timers::Touched;
                Reception::Urgent
            }
            (delivery::START_UP, Stage::Waiting) => {
                self.stage = Stage::Beginning(message.vector);
                Reception::Urgent
            }
            (_, Stage::Waiting) | (delivery::START_UP, _) => Reception::Ordinary,
            (delivery::NMI, _) => {
                self.local_apic.receive(message);
                Reception::Urgent
            }
            _ => {
                self.local_apic.receive(message);
                Reception::Ordinary
            }
        }
    }

    /// What starts or stops the processor, the oldest first.
    pub fn take_startup(&mut self) -> Option<Startup> {
        if core::mem::take(&mut self.init) {
            return Some(Startup::Init);
        }
        let Stage::Beginning(vector) = self.stage else {
            return None;
        };
        self.stage = Stage::Running;
        Some(Startup::Begin { vector })
    }

    /// Whether [`Processor::take_startup`] has something to take.
    pub const fn has_startup(&self) -> bool {
        self.init || matches!(self.stage, Stage::Beginning(_))
    }

    /// Whether it waits for its start, so that no interrupt reaches it.
    pub const fn waits_for_startup(&self) -> bool {
        !matches!(self.stage, Stage::Running)
    }

    /// What CPUID tells it of itself.
    pub const fn identity(&self, processors: u8) -> Identity {
        Identity {
            number: self.number,
            processors,
            apic_base: self.msrs.apic_base(),
        }
    }
}
