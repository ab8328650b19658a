//! The guest's virtual PC: devices behind one bus, and the policy for CPUID, control registers and
//! model-specific registers.
//!
//! | module | what |
//! | --- | --- |
//! | [`machine`] | the bus: all devices, ports, MMIO, time, interrupts |
//! | [`devices`] | one module for each device |
//! | [`acpi`] | the tables that describe the machine to kernels |
//! | [`processor`] | CPUID, control registers and MSRs as the guest sees them |
//! | [`time`] | guest time and the time-stamp counter |
//! | [`access_log`] | counts of accesses to what is not there |
//!
//! A machine has 1 to [`ProcessorNumber::LIMIT`] processors. It speaks for the one that it was told to
//! serve ([`Machine::serve`]), and says which others have to be told of something
//! ([`Machine::take_kicks`]).
//!
//! Protocol: after each exit the run loop tells the machine the time ([`Machine::advance`]), then
//! carries out the access, then asks for what follows: an end of the guest
//! ([`Machine::take_shutdown`]), a processor's start ([`Machine::take_startup`]), an interrupt ([`Machine::pending_interrupt`], and
//! [`Machine::acknowledge_interrupt`] when the guest can take it), and the time at which the machine
//! needs it again ([`Machine::next_deadline`]). The machine touches no hardware and no guest memory.
//! Guests are hostile: every port, address, width and value is answered, in bounded memory.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod access_log;
pub mod acpi;
pub mod devices;
pub mod machine;
pub mod processor;
pub mod time;

pub use machine::{
    Attention, Configuration, ConsoleOutput, Hypercall, Machine, NoDevice, ProcessorNumber,
    ProcessorSet, Shutdown, Startup, Timers,
};
pub use time::{GuestTime, TimeBase};
