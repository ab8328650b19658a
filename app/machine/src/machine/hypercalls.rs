//! KVM's hypercalls (Linux's Documentation/virt/kvm/x86/hypercalls.rst).

use umbra_vcpu::registers::CodeWidth;

use super::Machine;
use crate::devices::local_apic::{Destination, Message, Trigger, delivery};
use crate::processor::paravirtual::{CALL_SEND_IPI, call_error};

/// A hypercall of the guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercall {
    /// Which it is: RAX.
    pub number: u64,
    /// Its arguments: RBX, RCX, RDX and RSI.
    pub arguments: [u64; 4],
    /// The caller's mode: outside 64-bit mode registers have 32 bits.
    pub mode: CodeWidth,
}

impl Hypercall {
    /// Whether some mode's call has this number in RAX. All others are unknown in any mode.
    #[inline]
    pub const fn may_be_known(number: u64) -> bool {
        number as u32 as u64 == CALL_SEND_IPI
    }
}

impl Machine {
    /// Carries out a hypercall, and returns what the guest finds in RAX: zero or more on success, one
    /// of [`call_error`] otherwise.
    pub fn hypercall(&mut self, call: &Hypercall) -> i64 {
        let (mask, word_bits) = match call.mode {
            CodeWidth::Bits16 | CodeWidth::Bits32 => (u64::from(u32::MAX), 32),
            CodeWidth::Bits64 => (u64::MAX, 64),
        };
        let [low, high, first, command] = call.arguments.map(|argument| argument & mask);
        match call.number & mask {
            CALL_SEND_IPI => {
                let bits = u128::from(low) | u128::from(high) << word_bits;
                self.send_to_each(bits, first as u32, command)
            }
            _ => call_error::UNKNOWN,
        }
    }

    /// Interrupts the processors that `bits` names, of which bit 0 stands for the ID `first`. The
    /// command is that of the local APIC, without a destination; an illegal vector is the receivers' error. Returns how many there were.
    fn send_to_each(&mut self, bits: u128, first: u32, command: u64) -> i64 {
        const VECTOR_AND_MODE: u64 = 0x7ff;
        const ASSERT: u64 = 1 << 14;
        let vector = command as u8;
        let mode = (command >> 8 & 7) as u32;
        let is_known = matches!(mode, delivery::FIXED | delivery::NMI);
        if command & !(VECTOR_AND_MODE | ASSERT) != 0 || !is_known {
            return call_error::INVALID;
        }
        let mut receivers = 0;
        for number in 0..u32::from(self.processors()) {
            let position = number.checked_sub(first);
            let is_named =
                position.is_some_and(|position| bits.checked_shr(position).unwrap_or(0) & 1 != 0);
            if is_named {
                receivers += 1;
                self.send(Some(Message {
                    vector,
                    delivery: mode,
                    trigger: Trigger::Edge,
                    destination: Destination::Physical(number),
                }));
            }
        }
        self.update_processors();
        receivers
    }
}
