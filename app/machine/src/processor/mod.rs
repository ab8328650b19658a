//! What the guest's processor looks like beyond its registers: CPUID, the rules for control
//! registers, and model-specific registers.
//!
//! Protocol: everything here is a pure function of its arguments and of what the guest wrote
//! before. Nothing touches hardware; what must happen in hardware is returned as an effect.

pub mod control;
pub mod cpuid;
pub mod features;
pub mod msr;
pub mod mtrr;
pub mod paravirtual;
