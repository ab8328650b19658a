//! The five groups of VMX controls, and the one function that chooses them.
//!
//! Protocol: nobody writes a control field with bits that [`ControlCapability::select`] has not
//! passed. It sets what the processor forces, refuses what the processor lacks, and names it.
#![deny(unsafe_code)]

use umbra_vcpu::Unsupported;

/// A group of controls in one VMCS field.
pub trait Controls: bitflags::Flags<Bits = u32> + Copy {
    /// The error that names the lowest control in `self`.
    fn missing(self) -> Unsupported;
}

macro_rules! controls {
    ($(#[$doc:meta])* $group:ident, $group_name:literal {
        $($name:ident = $bit:literal, $text:literal;)*
    }) => {
        bitflags::bitflags! {
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub struct $group: u32 {
                $(#[doc = concat!("\"", $text, "\"")] const $name = 1 << $bit;)*
            }
        }

        impl Controls for $group {
            fn missing(self) -> Unsupported {
                $(if self.contains(Self::$name) {
                    return Unsupported {
                        reason: concat!(
                            "this processor's VMX lacks the ", $group_name, " control \"", $text, "\""
                        ),
                    };
                })*
                Unsupported {
                    reason: concat!("this processor's VMX lacks a ", $group_name, " control"),
                }
            }
        }
    };
}

controls! {
    /// Pin-based controls (SDM vol. 3C 25.6.1).
    PinControls, "pin-based" {
        EXTERNAL_INTERRUPT_EXITING = 0, "external-interrupt exiting";
        NMI_EXITING = 3, "NMI exiting";
        VIRTUAL_NMIS = 5, "virtual NMIs";
        PREEMPTION_TIMER = 6, "activate VMX-preemption timer";
    }
}

controls! {
    /// Primary processor-based controls (SDM vol. 3C 25.6.2).
    PrimaryControls, "primary processor-based" {
        INTERRUPT_WINDOW_EXITING = 2, "interrupt-window exiting";
        TSC_OFFSETTING = 3, "use TSC offsetting";
        HLT_EXITING = 7, "HLT exiting";
        INVLPG_EXITING = 9, "INVLPG exiting";
        MWAIT_EXITING = 10, "MWAIT exiting";
        RDPMC_EXITING = 11, "RDPMC exiting";
        CR3_LOAD_EXITING = 15, "CR3-load exiting";
        CR3_STORE_EXITING = 16, "CR3-store exiting";
        CR8_LOAD_EXITING = 19, "CR8-load exiting";
        CR8_STORE_EXITING = 20, "CR8-store exiting";
        NMI_WINDOW_EXITING = 22, "NMI-window exiting";
        MOV_DR_EXITING = 23, "MOV-DR exiting";
        UNCONDITIONAL_IO_EXITING = 24, "unconditional I/O exiting";
        MSR_BITMAPS = 28, "use MSR bitmaps";
        MONITOR_EXITING = 29, "MONITOR exiting";
        PAUSE_EXITING = 30, "PAUSE exiting";
        SECONDARY_CONTROLS = 31, "activate secondary controls";
    }
}

controls! {
    /// Secondary processor-based controls (SDM vol. 3C 25.6.2).
    SecondaryControls, "secondary processor-based" {
        ENABLE_RDTSCP = 3, "enable RDTSCP";
        ENABLE_VPID = 5, "enable VPID";
        WBINVD_EXITING = 6, "WBINVD exiting";
        PAUSE_LOOP_EXITING = 10, "PAUSE-loop exiting";
        ENABLE_INVPCID = 12, "enable INVPCID";
    }
}

controls! {
    /// Primary VM-exit controls (SDM vol. 3C 25.7.1).
    ExitControls, "VM-exit" {
        SAVE_DEBUG_CONTROLS = 2, "save debug controls";
        HOST_ADDRESS_SPACE_SIZE = 9, "host address-space size";
        LOAD_EFER = 21, "load IA32_EFER";
        SAVE_PREEMPTION_TIMER = 22, "save VMX-preemption timer value";
    }
}

controls! {
    /// VM-entry controls (SDM vol. 3C 25.8.1).
    EntryControls, "VM-entry" {
        LOAD_DEBUG_CONTROLS = 2, "load debug controls";
        IA32E_MODE_GUEST = 9, "IA-32e mode guest";
        LOAD_EFER = 15, "load IA32_EFER";
    }
}

/// Which settings of a group the processor takes: one of the IA32_VMX_*_CTLS registers
/// (SDM vol. 3D A.3 to A.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlCapability {
    forced: u32,
    allowed: u32,
}

impl ControlCapability {
    /// The capability in the layout of the model-specific register: allowed 0-settings in the low
    /// half, allowed 1-settings in the high half.
    pub const fn from_msr(value: u64) -> Self {
        Self {
            forced: value as u32,
            allowed: (value >> 32) as u32,
        }
    }

    /// Whether every control in `controls` can be 1.
    pub fn allows<C: Controls>(self, controls: C) -> bool {
        controls.bits() & !self.allowed == 0
    }

    /// The setting with all of `required`, those of `optional` that exist, and what the processor
    /// forces to 1.
    ///
    /// # Errors
    /// [`Unsupported`] with the name of the first control in `required` that the processor lacks.
    pub fn select<C: Controls>(self, required: C, optional: C) -> Result<C, Unsupported> {
        let missing = required.bits() & !self.allowed;
        if missing != 0 {
            return Err(C::from_bits_retain(missing).missing());
        }
        let bits = required.bits() | (optional.bits() & self.allowed) | self.forced;
        Ok(C::from_bits_retain(bits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_control_is_named() {
        let capability = ControlCapability::from_msr(0);
        let error = capability
            .select(PrimaryControls::HLT_EXITING, PrimaryControls::empty())
            .expect_err("nothing is allowed");
        assert_eq!(
            error.reason,
            "this processor's VMX lacks the primary processor-based control \"HLT exiting\""
        );
    }

    #[test]
    fn forced_bits_are_set_and_absent_options_are_left_out() {
        // Bit 1 is forced, bits 1, 3 and 5 are allowed.
        let capability = ControlCapability::from_msr(0b10_1010 << 32 | 0b10);
        let pins = capability
            .select(
                PinControls::NMI_EXITING,
                PinControls::VIRTUAL_NMIS | PinControls::PREEMPTION_TIMER,
            )
            .expect("bit 3 is allowed");
        assert_eq!(pins.bits(), 0b10_1010);
        assert!(!capability.allows(PinControls::PREEMPTION_TIMER));
    }

    #[test]
    fn the_lowest_of_several_missing_controls_is_named() {
        let error = ControlCapability::from_msr(1 << 32)
            .select(
                PinControls::EXTERNAL_INTERRUPT_EXITING
                    | PinControls::NMI_EXITING
                    | PinControls::VIRTUAL_NMIS,
                PinControls::empty(),
            )
            .expect_err("two are missing");
        assert!(error.reason.ends_with("\"NMI exiting\""));
    }
}
