//! What this processor's VMX can do, read once from its capability registers (SDM vol. 3D
//! appendix A).
#![deny(unsafe_code)]

use umbra_vcpu::Unsupported;

use crate::controls::{
    ControlCapability, EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};

const IA32_VMX_BASIC: u32 = 0x480;
const IA32_VMX_MISC: u32 = 0x485;
const IA32_VMX_CR0_FIXED0: u32 = 0x486;
const IA32_VMX_CR0_FIXED1: u32 = 0x487;
const IA32_VMX_CR4_FIXED0: u32 = 0x488;
const IA32_VMX_CR4_FIXED1: u32 = 0x489;
const IA32_VMX_PROCBASED_CTLS2: u32 = 0x48b;
const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
/// The pin-based, primary, exit and entry capabilities without and with the TRUE variant.
const CONTROL_REGISTERS: [(u32, u32); 4] = [
    (0x481, 0x48d),
    (0x482, 0x48e),
    (0x483, 0x48f),
    (0x484, 0x490),
];

/// Which bits of a control register VMX operation fixes (SDM vol. 3D A.7, A.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedBits {
    /// Bits that must be 1.
    pub ones: u64,
    /// Bits that may be 1.
    pub allowed: u64,
}

impl FixedBits {
    /// Whether `value` is one that VMX operation takes.
    pub const fn accepts(self, value: u64) -> bool {
        self.ones & !value == 0 && value & !self.allowed == 0
    }
}

/// How to drop the translations of one virtual processor identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvvpidTypes {
    /// Whether single addresses can be dropped; otherwise the whole context is.
    pub individual_address: bool,
}

/// What this processor's VMX can do.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The identifier that a VMXON region and a VMCS begin with.
    pub revision: u32,
    /// The setting of the pin-based controls.
    pub pin: PinControls,
    /// The setting of the primary controls, without the windows.
    pub primary: PrimaryControls,
    /// What makes PAUSE exit, if anything does.
    pub pause_exiting: PrimaryControls,
    /// The setting of the secondary controls; `None` if there are none.
    pub secondary: Option<SecondaryControls>,
    /// The setting of the exit controls.
    pub exit: ExitControls,
    /// The setting of the entry controls for a guest outside long mode.
    pub entry: EntryControls,
    /// The bits of CR0 that are fixed in the host and, as there is no unrestricted guest, in the
    /// guest.
    pub cr0: FixedBits,
    /// The bits of CR4 that are fixed.
    pub cr4: FixedBits,
    /// The preemption timer counts once in 2^this ticks of the time-stamp counter, if it exists.
    pub preemption_timer_shift: Option<u8>,
    /// How to flush virtual processor identifiers, if they can be used.
    pub vpid: Option<InvvpidTypes>,
    /// Whether exits of INS and OUTS tell their address size.
    pub string_io_information: bool,
}

impl Capabilities {
    /// Reads the capabilities; `read` is RDMSR.
    ///
    /// # Errors
    /// [`Unsupported`] if something is missing without which no guest runs.
    pub fn discover(read: impl Fn(u32) -> u64) -> Result<Self, Unsupported> {
        const WRITE_BACK: u64 = 6;
        let basic = read(IA32_VMX_BASIC);
        if (basic >> 50) & 0xf != WRITE_BACK {
            return Err(Unsupported {
                reason: "this processor's VMX does not keep its structures in write-back memory",
            });
        }
        if basic & 1 << 48 != 0 {
            return Err(Unsupported {
                reason: "this processor's VMX takes 32-bit addresses only",
            });
        }
        let has_true_controls = basic & 1 << 55 != 0;
        let [
            pin_capability,
            primary_capability,
            exit_capability,
            entry_capability,
        ] = CONTROL_REGISTERS.map(|(plain, exact)| {
            ControlCapability::from_msr(read(if has_true_controls { exact } else { plain }))
        });

        let pin = pin_capability.select(
            PinControls::EXTERNAL_INTERRUPT_EXITING
                | PinControls::NMI_EXITING
                | PinControls::VIRTUAL_NMIS,
            PinControls::PREEMPTION_TIMER,
        )?;
        let (primary, pause_exiting) = primary_controls(primary_capability)?;
        let secondary_capability = primary
            .contains(PrimaryControls::SECONDARY_CONTROLS)
            .then(|| ControlCapability::from_msr(read(IA32_VMX_PROCBASED_CTLS2)));
        let vpid = secondary_capability
            .filter(|capability| capability.allows(SecondaryControls::ENABLE_VPID))
            .and_then(|_| invvpid_types(read(IA32_VMX_EPT_VPID_CAP)));
        let mut optional = SecondaryControls::ENABLE_RDTSCP
            | SecondaryControls::WBINVD_EXITING
            | SecondaryControls::PAUSE_LOOP_EXITING
            | SecondaryControls::ENABLE_INVPCID;
        if vpid.is_some() {
            optional |= SecondaryControls::ENABLE_VPID;
        }
        let secondary = match secondary_capability {
            Some(capability) => Some(capability.select(SecondaryControls::empty(), optional)?),
            None => None,
        };
        // Only an active timer can be saved.
        let timer = pin.contains(PinControls::PREEMPTION_TIMER);
        let mut exit = exit_capability.select(
            ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::SAVE_DEBUG_CONTROLS,
            if timer {
                ExitControls::LOAD_EFER | ExitControls::SAVE_PREEMPTION_TIMER
            } else {
                ExitControls::LOAD_EFER
            },
        )?;
        let mut entry = entry_capability
            .select(EntryControls::LOAD_DEBUG_CONTROLS, EntryControls::LOAD_EFER)?;
        // The guest's mode changes this control: it must exist.
        entry_capability.select(EntryControls::IA32E_MODE_GUEST, EntryControls::empty())?;
        // EFER is switched by both controls or by the MSR areas, never by a mixture.
        if !has_efer_controls(exit, entry) {
            exit.remove(ExitControls::LOAD_EFER);
            entry.remove(EntryControls::LOAD_EFER);
        }
        Ok(Self {
            revision: basic as u32 & 0x7fff_ffff,
            pin,
            primary,
            pause_exiting,
            secondary,
            exit,
            entry,
            cr0: FixedBits {
                ones: read(IA32_VMX_CR0_FIXED0),
                allowed: read(IA32_VMX_CR0_FIXED1),
            },
            cr4: FixedBits {
                ones: read(IA32_VMX_CR4_FIXED0),
                allowed: read(IA32_VMX_CR4_FIXED1),
            },
            preemption_timer_shift: timer.then(|| (read(IA32_VMX_MISC) & 0x1f) as u8),
            vpid,
            string_io_information: basic & 1 << 54 != 0,
        })
    }

    /// Whether EFER is switched by entry and exit controls; otherwise by the MSR areas.
    pub fn has_efer_controls(&self) -> bool {
        has_efer_controls(self.exit, self.entry)
    }
}

/// The setting of the primary controls, and of it what can be set later to exit at PAUSE.
fn primary_controls(
    capability: ControlCapability,
) -> Result<(PrimaryControls, PrimaryControls), Unsupported> {
    let primary = capability.select(
        PrimaryControls::TSC_OFFSETTING
            | PrimaryControls::HLT_EXITING
            | PrimaryControls::INVLPG_EXITING
            | PrimaryControls::MWAIT_EXITING
            | PrimaryControls::RDPMC_EXITING
            | PrimaryControls::CR3_LOAD_EXITING
            | PrimaryControls::CR3_STORE_EXITING
            | PrimaryControls::CR8_LOAD_EXITING
            | PrimaryControls::CR8_STORE_EXITING
            | PrimaryControls::UNCONDITIONAL_IO_EXITING
            | PrimaryControls::MSR_BITMAPS
            | PrimaryControls::MONITOR_EXITING,
        PrimaryControls::SECONDARY_CONTROLS,
    )?;
    // These are set later, when they are wanted: they must exist.
    capability.select(
        PrimaryControls::INTERRUPT_WINDOW_EXITING
            | PrimaryControls::NMI_WINDOW_EXITING
            | PrimaryControls::MOV_DR_EXITING,
        PrimaryControls::empty(),
    )?;
    let pause_exiting = if capability.allows(PrimaryControls::PAUSE_EXITING) {
        PrimaryControls::PAUSE_EXITING
    } else {
        PrimaryControls::empty()
    };
    Ok((primary, pause_exiting))
}

fn has_efer_controls(exit: ExitControls, entry: EntryControls) -> bool {
    exit.contains(ExitControls::LOAD_EFER) && entry.contains(EntryControls::LOAD_EFER)
}

/// The flush types in IA32_VMX_EPT_VPID_CAP (SDM vol. 3D A.10), if the one that is needed exists.
fn invvpid_types(capability: u64) -> Option<InvvpidTypes> {
    const INVVPID: u64 = 1 << 32;
    const INDIVIDUAL_ADDRESS: u64 = 1 << 40;
    const SINGLE_CONTEXT: u64 = 1 << 41;
    let needed = INVVPID | SINGLE_CONTEXT;
    (capability & needed == needed).then_some(InvvpidTypes {
        individual_address: capability & INDIVIDUAL_ADDRESS != 0,
    })
}

/// What IA32_FEATURE_CONTROL says about VMX (SDM vol. 3C 24.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureControl {
    /// The firmware has locked it with VMX on.
    Ready,
    /// It is unlocked: this value turns VMX on and locks it.
    Unlocked(u64),
}

impl FeatureControl {
    /// The number of the register.
    pub const MSR: u32 = 0x3a;

    /// Judges the register's value.
    ///
    /// # Errors
    /// [`Unsupported`] if the firmware has locked VMX off.
    pub const fn judge(value: u64) -> Result<Self, Unsupported> {
        const LOCK: u64 = 1 << 0;
        const VMX_OUTSIDE_SMX: u64 = 1 << 2;
        if value & LOCK == 0 {
            return Ok(Self::Unlocked(value | LOCK | VMX_OUTSIDE_SMX));
        }
        if value & VMX_OUTSIDE_SMX == 0 {
            return Err(Unsupported {
                reason: "the firmware has locked VMX off (IA32_FEATURE_CONTROL): \
                         turn it on in the firmware's settings",
            });
        }
        Ok(Self::Ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything allowed and nothing forced.
    fn generous(index: u32) -> u64 {
        match index {
            IA32_VMX_BASIC => 1 << 55 | 1 << 54 | 6 << 50 | 0x1234,
            IA32_VMX_MISC => 5,
            IA32_VMX_EPT_VPID_CAP => u64::MAX,
            _ => 0xffff_ffff << 32,
        }
    }

    #[test]
    fn all_options_are_found() {
        let capabilities = Capabilities::discover(generous).expect("usable");
        assert_eq!(capabilities.revision, 0x1234);
        assert_eq!(capabilities.preemption_timer_shift, Some(5));
        assert!(capabilities.has_efer_controls());
        assert!(capabilities.string_io_information);
        assert_eq!(
            capabilities.vpid,
            Some(InvvpidTypes {
                individual_address: true
            })
        );
        assert!(!capabilities.entry.contains(EntryControls::IA32E_MODE_GUEST));
    }

    #[test]
    fn efer_controls_are_used_in_pairs_only() {
        let capabilities = Capabilities::discover(|index| match index {
            0x490 => u64::from(!EntryControls::LOAD_EFER.bits()) << 32,
            _ => generous(index),
        })
        .expect("usable");
        assert!(!capabilities.has_efer_controls());
        assert!(!capabilities.exit.contains(ExitControls::LOAD_EFER));
    }

    #[test]
    fn vpid_needs_a_flush_of_one_context() {
        let capabilities = Capabilities::discover(|index| match index {
            IA32_VMX_EPT_VPID_CAP => 1 << 32 | 1 << 40,
            _ => generous(index),
        })
        .expect("usable");
        assert_eq!(capabilities.vpid, None);
        let secondary = capabilities.secondary.expect("allowed");
        assert!(!secondary.contains(SecondaryControls::ENABLE_VPID));
    }

    #[test]
    fn a_processor_without_virtual_nmis_is_refused() {
        let error = Capabilities::discover(|index| match index {
            0x48d => u64::from(!PinControls::VIRTUAL_NMIS.bits()) << 32,
            _ => generous(index),
        })
        .expect_err("needed");
        assert!(error.reason.contains("virtual NMIs"));
    }

    #[test]
    fn feature_control_in_all_its_states() {
        assert_eq!(FeatureControl::judge(5), Ok(FeatureControl::Ready));
        assert_eq!(FeatureControl::judge(0), Ok(FeatureControl::Unlocked(5)));
        assert!(FeatureControl::judge(1).is_err());
        assert!(FeatureControl::judge(3).is_err(), "only inside SMX");
    }
}
