//! The processor's checks on guest state, made by ourselves first so that a refusal has a name
//! (APM vol. 2 15.5.1, "Canonicalization and Consistency Checks", and 15.20).

use umbra_vcpu::registers::SegmentAttributes;
use umbra_vcpu::{EntryFailure, ShadowMode, ShadowPaging};

use crate::capability::{Capabilities, efer};
use crate::vmcb::{Intercepts4, Vmcb};

/// What VMRUN looks at, as plain values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// CR0 of the save area.
    pub cr0: u64,
    /// CR3 of the save area.
    pub cr3: u64,
    /// CR4 of the save area.
    pub cr4: u64,
    /// EFER of the save area.
    pub efer: u64,
    /// DR6 of the save area.
    pub dr6: u64,
    /// DR7 of the save area.
    pub dr7: u64,
    /// CS's attributes.
    pub cs: SegmentAttributes,
    /// The address-space identifier.
    pub asid: u32,
    /// The intercepts at offset 0x010.
    pub intercepts4: Intercepts4,
    /// The physical address of the I/O permission map.
    pub iopm_base: u64,
    /// The physical address of the MSR permission map.
    pub msrpm_base: u64,
    /// EVENTINJ.
    pub event_injection: u64,
    /// The shape of the shadow tables.
    pub mode: ShadowMode,
}

impl GuestState {
    /// The values that `vmcb` holds.
    pub fn of(vmcb: &Vmcb, paging: ShadowPaging) -> Self {
        Self {
            cr0: vmcb.save.cr0,
            cr3: vmcb.save.cr3,
            cr4: vmcb.save.cr4,
            efer: vmcb.save.efer,
            dr6: vmcb.save.dr6,
            dr7: vmcb.save.dr7,
            cs: vmcb.save.cs.to_segment().attributes,
            asid: vmcb.control.asid,
            intercepts4: vmcb.control.intercepts4,
            iopm_base: vmcb.control.iopm_base,
            msrpm_base: vmcb.control.msrpm_base,
            event_injection: vmcb.control.event_injection,
            mode: paging.mode,
        }
    }
}

const CR0_PE: u64 = 1 << 0;
const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;

/// Checks `state` as VMRUN would.
///
/// # Errors
/// [`EntryFailure`] with the first rule that is broken.
pub fn check(state: &GuestState, capabilities: &Capabilities) -> Result<(), EntryFailure> {
    control_area(state, capabilities)?;
    control_registers(state, capabilities)?;
    long_mode(state)?;
    shadow_paging(state, capabilities)
}

/// Fails with `field`, `value` and `rule` unless `holds`.
fn rule(
    holds: bool,
    field: &'static str,
    value: u64,
    rule: &'static str,
) -> Result<(), EntryFailure> {
    if holds {
        Ok(())
    } else {
        Err(EntryFailure { field, rule, value })
    }
}

fn control_area(state: &GuestState, capabilities: &Capabilities) -> Result<(), EntryFailure> {
    let end = 1_u64 << capabilities.physical_address_bits.min(52);
    rule(
        state.intercepts4.contains(Intercepts4::VMRUN),
        "VMRUN intercept",
        state.intercepts4.bits().into(),
        "the VMRUN intercept bit must be set (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.asid != 0 && state.asid < capabilities.asid_count,
        "ASID",
        state.asid.into(),
        "the ASID must not be 0 and must exist (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.msrpm_base <= end - 0x2000,
        "MSRPM_BASE_PA",
        state.msrpm_base,
        "the MSR permission map must lie below the physical address limit (APM vol. 2 15.11)",
    )?;
    rule(
        state.iopm_base <= end - 0x3000,
        "IOPM_BASE_PA",
        state.iopm_base,
        "the I/O permission map must lie below the physical address limit (APM vol. 2 15.10.1)",
    )?;
    event_injection(state.event_injection)
}

fn event_injection(event: u64) -> Result<(), EntryFailure> {
    if event & (1 << 31) == 0 {
        return Ok(());
    }
    let (vector, kind) = (event as u8, (event >> 8) & 7);
    rule(
        matches!(kind, 0 | 2 | 3 | 4),
        "EVENTINJ.TYPE",
        event,
        "the type must not be reserved (APM vol. 2 15.20)",
    )?;
    rule(
        kind != 3 || (vector != 2 && vector < 31),
        "EVENTINJ.VECTOR",
        event,
        "an exception's vector must be an exception's and not 2 (APM vol. 2 15.20)",
    )
}

fn control_registers(state: &GuestState, capabilities: &Capabilities) -> Result<(), EntryFailure> {
    rule(
        state.cr0 >> 32 == 0,
        "CR0",
        state.cr0,
        "bits 63:32 must be zero (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.cr0 & CR0_NW == 0 || state.cr0 & CR0_CD != 0,
        "CR0",
        state.cr0,
        "NW must not be set while CD is clear (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.cr4 & !capabilities.cr4_bits == 0,
        "CR4",
        state.cr4,
        "bits that the processor does not have must be zero (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.efer & efer::SVME != 0,
        "EFER",
        state.efer,
        "SVME must be set (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.efer & !(capabilities.efer_bits | efer::LME | efer::LMA | efer::SVME) == 0,
        "EFER",
        state.efer,
        "bits that the processor does not have must be zero (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.dr6 >> 32 == 0,
        "DR6",
        state.dr6,
        "bits 63:32 must be zero (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.dr7 >> 32 == 0,
        "DR7",
        state.dr7,
        "bits 63:32 must be zero (APM vol. 2 15.5.1)",
    )
}

fn long_mode(state: &GuestState) -> Result<(), EntryFailure> {
    if state.efer & efer::LME == 0 || state.cr0 & CR0_PG == 0 {
        return Ok(());
    }
    rule(
        state.cr4 & CR4_PAE != 0,
        "CR4",
        state.cr4,
        "PAE must be set while EFER.LME and CR0.PG are (APM vol. 2 15.5.1)",
    )?;
    rule(
        state.cr0 & CR0_PE != 0,
        "CR0",
        state.cr0,
        "PE must be set while EFER.LME and CR0.PG are (APM vol. 2 15.5.1)",
    )?;
    rule(
        !state
            .cs
            .contains(SegmentAttributes::LONG | SegmentAttributes::DEFAULT_32),
        "CS.attributes",
        state.cs.bits().into(),
        "L and D must not both be set in long mode (APM vol. 2 15.5.1)",
    )
}

/// What only a guest under shadow paging needs.
fn shadow_paging(state: &GuestState, capabilities: &Capabilities) -> Result<(), EntryFailure> {
    let needed = CR0_PG | CR0_WP;
    rule(
        state.cr0 & needed == needed && state.cr4 & CR4_PAE != 0,
        "CR0",
        state.cr0,
        "the shadow tables need CR0.PG, CR0.WP and CR4.PAE (APM vol. 2 15.5)",
    )?;
    rule(
        state.efer & efer::NXE != 0,
        "EFER",
        state.efer,
        "the shadow tables need NXE (APM vol. 2 15.5)",
    )?;
    let long = state.efer & efer::LMA != 0;
    rule(
        long == (state.mode != ShadowMode::Pae) && long == (state.efer & efer::LME != 0),
        "EFER",
        state.efer,
        "four- and five-level shadow tables go with LMA and LME, PAE ones without (APM vol. 2 5.1)",
    )?;
    rule(
        (state.cr4 & CR4_LA57 != 0) == (state.mode == ShadowMode::FiveLevel),
        "CR4",
        state.cr4,
        "LA57 goes with five-level shadow tables (APM vol. 2 5.3)",
    )?;
    let (aligned, end) = match state.mode {
        ShadowMode::Pae => (state.cr3.trailing_zeros() >= 5, 1 << 32),
        ShadowMode::FourLevel | ShadowMode::FiveLevel => (
            state.cr3.trailing_zeros() >= 12,
            1_u64 << capabilities.physical_address_bits.min(52),
        ),
    };
    rule(
        aligned && state.cr3 != 0 && state.cr3 < end,
        "CR3",
        state.cr3,
        "the root must be aligned, below the physical address limit (4 GiB for PAE) and not 0 \
         (APM vol. 2 5.2.1, 5.3.2)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability::{Features, Instructions};

    const CAPABILITIES: Capabilities = Capabilities {
        features: Features::empty(),
        instructions: Instructions::empty(),
        asid_count: 16,
        physical_address_bits: 40,
        efer_bits: efer::SCE | efer::NXE,
        cr4_bits: 0x17ff,
    };

    fn pae() -> GuestState {
        GuestState {
            cr0: CR0_PE | CR0_WP | CR0_PG,
            cr3: 0x20,
            cr4: CR4_PAE,
            efer: efer::SVME | efer::NXE,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            cs: SegmentAttributes::from_bits_retain(0xc09b),
            asid: 1,
            intercepts4: Intercepts4::VMRUN,
            iopm_base: 0x3000,
            msrpm_base: 0x6000,
            event_injection: 0,
            mode: ShadowMode::Pae,
        }
    }

    fn long() -> GuestState {
        GuestState {
            cr3: 0x1000,
            efer: efer::SVME | efer::NXE | efer::LME | efer::LMA,
            cs: SegmentAttributes::from_bits_retain(0xa09b),
            mode: ShadowMode::FourLevel,
            ..pae()
        }
    }

    #[test]
    fn good_states_pass() {
        let five = GuestState {
            cr4: CR4_PAE | CR4_LA57,
            mode: ShadowMode::FiveLevel,
            ..long()
        };
        let real = GuestState {
            cr0: CR0_WP | CR0_PG,
            ..pae()
        };
        for state in [pae(), long(), five, real] {
            assert_eq!(check(&state, &CAPABILITIES), Ok(()));
        }
    }

    #[test]
    #[allow(clippy::too_many_lines, reason = "one line for each rule")]
    fn every_broken_rule_is_named() {
        let cases: &[(GuestState, &str, &str)] = &[
            (
                GuestState {
                    intercepts4: Intercepts4::VMMCALL,
                    ..pae()
                },
                "VMRUN intercept",
                "set",
            ),
            (GuestState { asid: 0, ..pae() }, "ASID", "not be 0"),
            (GuestState { asid: 16, ..pae() }, "ASID", "exist"),
            (
                GuestState {
                    msrpm_base: 1 << 40,
                    ..pae()
                },
                "MSRPM_BASE_PA",
                "limit",
            ),
            (
                GuestState {
                    iopm_base: (1 << 40) - 0x2000,
                    ..pae()
                },
                "IOPM_BASE_PA",
                "limit",
            ),
            (
                GuestState {
                    event_injection: 0x8000_0120,
                    ..pae()
                },
                "EVENTINJ.TYPE",
                "reserved",
            ),
            (
                GuestState {
                    event_injection: 0x8000_0302,
                    ..pae()
                },
                "EVENTINJ.VECTOR",
                "not 2",
            ),
            (
                GuestState {
                    event_injection: 0x8000_0340,
                    ..pae()
                },
                "EVENTINJ.VECTOR",
                "exception",
            ),
            (
                GuestState {
                    cr0: pae().cr0 | 1 << 32,
                    ..pae()
                },
                "CR0",
                "63:32",
            ),
            (
                GuestState {
                    cr0: pae().cr0 | CR0_NW,
                    ..pae()
                },
                "CR0",
                "NW",
            ),
            (
                GuestState {
                    cr4: CR4_PAE | 1 << 13,
                    ..pae()
                },
                "CR4",
                "does not have",
            ),
            (
                GuestState {
                    efer: efer::NXE,
                    ..pae()
                },
                "EFER",
                "SVME",
            ),
            (
                GuestState {
                    efer: pae().efer | 1 << 63,
                    ..pae()
                },
                "EFER",
                "does not have",
            ),
            (
                GuestState {
                    dr6: 1 << 32,
                    ..pae()
                },
                "DR6",
                "63:32",
            ),
            (
                GuestState {
                    dr7: 1 << 63,
                    ..pae()
                },
                "DR7",
                "63:32",
            ),
            (GuestState { cr4: 0, ..long() }, "CR4", "PAE"),
            (
                GuestState {
                    cr0: CR0_PG | CR0_WP,
                    ..long()
                },
                "CR0",
                "PE",
            ),
            (
                GuestState {
                    cs: SegmentAttributes::from_bits_retain(0xe09b),
                    ..long()
                },
                "CS.attributes",
                "both",
            ),
            (
                GuestState {
                    cr0: CR0_PE | CR0_PG,
                    ..pae()
                },
                "CR0",
                "WP",
            ),
            (
                GuestState {
                    efer: efer::SVME,
                    ..pae()
                },
                "EFER",
                "NXE",
            ),
            (
                GuestState {
                    mode: ShadowMode::Pae,
                    ..long()
                },
                "EFER",
                "LMA",
            ),
            (
                GuestState {
                    mode: ShadowMode::FourLevel,
                    ..pae()
                },
                "EFER",
                "LMA",
            ),
            (
                GuestState {
                    mode: ShadowMode::FiveLevel,
                    ..long()
                },
                "CR4",
                "LA57",
            ),
            (GuestState { cr3: 0x30, ..pae() }, "CR3", "aligned"),
            (
                GuestState {
                    cr3: 1 << 32,
                    ..pae()
                },
                "CR3",
                "4 GiB",
            ),
            (
                GuestState {
                    cr3: 0x1800,
                    ..long()
                },
                "CR3",
                "aligned",
            ),
            (
                GuestState {
                    cr3: 1 << 40,
                    ..long()
                },
                "CR3",
                "limit",
            ),
            (GuestState { cr3: 0, ..long() }, "CR3", "not 0"),
        ];
        for (state, field, words) in cases {
            let failure = check(state, &CAPABILITIES).expect_err(words);
            assert_eq!(failure.field, *field, "{words}");
            assert!(
                failure.rule.contains(words),
                "{} lacks {words}",
                failure.rule
            );
            assert!(failure.rule.contains("APM vol. 2"));
        }
    }
}
