//! `msr-cpuid`: MSRs, the instructions that they steer, and CPUID.

#![no_std]
#![no_main]

use umbra_guest::{guest, registers};

guest!("msr-cpuid", kludge_and_pvh, registers::run);
