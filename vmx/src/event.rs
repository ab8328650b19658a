//! Events in the VMCS's encoding: VM-entry interruption information (SDM vol. 3C 25.8.3), and
//! IDT-vectoring and VM-exit interruption information (25.9.2, 25.9.3).
#![deny(unsafe_code)]

use umbra_vcpu::address::Gva;
use umbra_vcpu::event::{Event, Exception, vector};

const VALID: u32 = 1 << 31;
const ERROR_CODE_VALID: u32 = 1 << 11;
/// "NMI unblocking due to IRET" in VM-exit interruption information.
const NMI_UNBLOCKING: u32 = 1 << 12;

const EXTERNAL_INTERRUPT: u32 = 0;
const NMI: u32 = 2;
const HARDWARE_EXCEPTION: u32 = 3;
const SOFTWARE_INTERRUPT: u32 = 4;
const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5;
const SOFTWARE_EXCEPTION: u32 = 6;

/// What VM entry needs to know of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// VM-entry interruption-information field.
    pub information: u32,
    /// VM-entry exception error code, if the event has one.
    pub error_code: Option<u32>,
    /// VM-entry instruction length, if the event needs one.
    pub instruction_length: Option<u32>,
}

impl Injection {
    /// Encodes `event`.
    pub fn new(event: &Event) -> Self {
        let (kind, vector, error_code, length) = match *event {
            Event::Exception(exception) => (
                HARDWARE_EXCEPTION,
                exception.vector,
                exception.error_code,
                None,
            ),
            Event::SoftwareInterrupt {
                vector,
                instruction_length,
            } => (SOFTWARE_INTERRUPT, vector, None, Some(instruction_length)),
            Event::SoftwareException {
                vector,
                instruction_length,
            } => (SOFTWARE_EXCEPTION, vector, None, Some(instruction_length)),
            Event::PrivilegedSoftwareException { instruction_length } => (
                PRIVILEGED_SOFTWARE_EXCEPTION,
                vector::DEBUG,
                None,
                Some(instruction_length),
            ),
            Event::ExternalInterrupt { vector } => (EXTERNAL_INTERRUPT, vector, None, None),
            Event::Nmi => (NMI, vector::NMI, None, None),
        };
        let error_bit = if error_code.is_some() {
            ERROR_CODE_VALID
        } else {
            0
        };
        Self {
            information: VALID | error_bit | kind << 8 | u32::from(vector),
            error_code,
            instruction_length: length.map(u32::from),
        }
    }
}

/// What the processor reports of an event: IDT-vectoring or VM-exit interruption information.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The information field.
    pub information: u32,
    /// The error-code field.
    pub error_code: u32,
    /// The VM-exit instruction length.
    pub instruction_length: u32,
}

impl Report {
    /// Whether the report describes an event at all.
    pub const fn is_valid(self) -> bool {
        self.information & VALID != 0
    }

    /// The vector, if the report is valid.
    pub const fn vector(self) -> u8 {
        self.information as u8
    }

    /// Whether the event is a non-maskable interrupt.
    pub const fn is_nmi(self) -> bool {
        self.is_valid() && (self.information >> 8) & 7 == NMI
    }

    /// Whether the event is the #DB of INT1, a trap that the instruction itself raised.
    pub const fn is_int1(self) -> bool {
        self.is_valid() && (self.information >> 8) & 7 == PRIVILEGED_SOFTWARE_EXCEPTION
    }

    /// Whether an instruction of the guest's own raised the event as a trap: INT1, INT3 or INTO.
    pub const fn is_software_trap(self) -> bool {
        self.is_valid()
            && matches!(
                (self.information >> 8) & 7,
                PRIVILEGED_SOFTWARE_EXCEPTION | SOFTWARE_EXCEPTION
            )
    }

    /// Whether an instruction raised the event: INT n besides the software traps.
    pub const fn is_raised_by_instruction(self) -> bool {
        self.is_software_trap()
            || self.is_valid() && (self.information >> 8) & 7 == SOFTWARE_INTERRUPT
    }

    /// Whether the exit happened in an IRET that had unblocked NMIs, so that they must be blocked
    /// again before it runs once more (SDM vol. 3C 28.2.3).
    pub const fn unblocked_nmis(self) -> bool {
        self.is_valid()
            && self.information & NMI_UNBLOCKING != 0
            && self.vector() != vector::DOUBLE_FAULT
    }

    /// Decodes the event; `cr2` is the guest's, which belongs to a page fault. `None` if the report is not
    /// valid.
    pub fn event(self, cr2: Gva) -> Option<Event> {
        if !self.is_valid() {
            return None;
        }
        let vector = self.vector();
        let instruction_length = self.instruction_length as u8;
        Some(match (self.information >> 8) & 7 {
            EXTERNAL_INTERRUPT => Event::ExternalInterrupt { vector },
            NMI => Event::Nmi,
            SOFTWARE_INTERRUPT => Event::SoftwareInterrupt {
                vector,
                instruction_length,
            },
            PRIVILEGED_SOFTWARE_EXCEPTION => {
                Event::PrivilegedSoftwareException { instruction_length }
            }
            SOFTWARE_EXCEPTION => Event::SoftwareException {
                vector,
                instruction_length,
            },
            _ => Event::Exception(self.exception((vector == vector::PAGE_FAULT).then_some(cr2))),
        })
    }

    /// The event as an exception.
    pub fn exception(self, address: Option<Gva>) -> Exception {
        Exception {
            vector: self.vector(),
            error_code: (self.information & ERROR_CODE_VALID != 0).then_some(self.error_code),
            address,
        }
    }
}

/// Whether `vector` is a fault: its handler returns to the instruction with RFLAGS.RF set
/// (SDM vol. 3B 18.3.1.1).
pub const fn is_fault(vector: u8) -> bool {
    !matches!(
        vector,
        vector::DEBUG
            | vector::BREAKPOINT
            | vector::OVERFLOW
            | vector::DOUBLE_FAULT
            | vector::MACHINE_CHECK
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0_u8..32, any::<u32>(), any::<u64>()).prop_map(|(vector, code, address)| {
                Event::Exception(Exception {
                    vector,
                    error_code: Exception::has_error_code(vector).then_some(code),
                    address: (vector == vector::PAGE_FAULT).then_some(Gva::new(address)),
                })
            }),
            (any::<u8>(), 1_u8..16).prop_map(|(vector, instruction_length)| {
                Event::SoftwareInterrupt {
                    vector,
                    instruction_length,
                }
            }),
            (3_u8..5, 1_u8..16).prop_map(|(vector, instruction_length)| {
                Event::SoftwareException {
                    vector,
                    instruction_length,
                }
            }),
            (1_u8..16).prop_map(|instruction_length| Event::PrivilegedSoftwareException {
                instruction_length
            }),
            any::<u8>().prop_map(|vector| Event::ExternalInterrupt { vector }),
            Just(Event::Nmi),
        ]
    }

    proptest! {
        #[test]
        fn what_is_injected_and_interrupted_comes_back(event in any_event()) {
            let injection = Injection::new(&event);
            let report = Report {
                information: injection.information,
                error_code: injection.error_code.unwrap_or(0xdead_beef),
                instruction_length: injection.instruction_length.unwrap_or(0),
            };
            let cr2 = match event {
                Event::Exception(Exception { address: Some(address), .. }) => address,
                _ => Gva::new(0x1234),
            };
            prop_assert_eq!(report.event(cr2), Some(event));
        }
    }

    #[test]
    fn the_manuals_encodings() {
        let general_protection = Injection::new(&Event::Exception(Exception::GENERAL_PROTECTION));
        assert_eq!(general_protection.information, 0x8000_0b0d);
        assert_eq!(general_protection.error_code, Some(0));
        assert_eq!(Injection::new(&Event::Nmi).information, 0x8000_0202);
        let interrupt = Injection::new(&Event::SoftwareInterrupt {
            vector: 0x80,
            instruction_length: 2,
        });
        assert_eq!(interrupt.information, 0x8000_0480);
        assert_eq!(interrupt.instruction_length, Some(2));
    }

    #[test]
    fn an_invalid_report_is_nothing() {
        let report = Report {
            information: 0x0000_0202,
            ..Report::default()
        };
        assert_eq!(report.event(Gva::new(0)), None);
        assert!(!report.is_nmi());
    }

    #[test]
    fn int1_differs_from_other_debug_exceptions() {
        let report = |kind: u32| Report {
            information: VALID | kind << 8 | u32::from(vector::DEBUG),
            ..Report::default()
        };
        assert!(report(PRIVILEGED_SOFTWARE_EXCEPTION).is_int1());
        assert!(!report(HARDWARE_EXCEPTION).is_int1());
    }

    #[test]
    fn nmi_unblocking_does_not_count_for_a_double_fault() {
        let report = |vector: u32| Report {
            information: VALID | NMI_UNBLOCKING | HARDWARE_EXCEPTION << 8 | vector,
            ..Report::default()
        };
        assert!(report(14).unblocked_nmis());
        assert!(!report(8).unblocked_nmis());
    }
}
