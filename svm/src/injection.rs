//! EVENTINJ and EXITINTINFO (APM vol. 2 15.20 and 15.7.2): one layout, written before VMRUN and
//! read after #VMEXIT.

use umbra_vcpu::address::Gva;
use umbra_vcpu::event::{Event, Exception, vector};

const VALID: u64 = 1 << 31;
const ERROR_CODE_VALID: u64 = 1 << 11;
const TYPE_INTERRUPT: u64 = 0;
const TYPE_NMI: u64 = 2;
const TYPE_EXCEPTION: u64 = 3;
const TYPE_SOFTWARE: u64 = 4;

/// What the delivery that an exit interrupted was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// An event that must be delivered again.
    Event(Event),
    /// INT n, INT3 or INTO: RIP still points at the instruction, which raises it again.
    Instruction,
}

const fn encode_type(kind: u64, vector: u8) -> u64 {
    VALID | (kind << 8) | vector as u64
}

/// The EVENTINJ value that injects `event`.
pub fn encode(event: Event) -> u64 {
    match event {
        Event::Exception(exception) => {
            let error = exception.error_code.map_or(0, |error_code| {
                ERROR_CODE_VALID | (u64::from(error_code) << 32)
            });
            encode_type(TYPE_EXCEPTION, exception.vector) | error
        }
        Event::SoftwareInterrupt { vector, .. } => encode_type(TYPE_SOFTWARE, vector),
        Event::SoftwareException { vector, .. } => encode_type(TYPE_EXCEPTION, vector),
        Event::PrivilegedSoftwareException { .. } => encode_type(TYPE_EXCEPTION, vector::DEBUG),
        Event::ExternalInterrupt { vector } => encode_type(TYPE_INTERRUPT, vector),
        Event::Nmi => encode_type(TYPE_NMI, vector::NMI),
    }
}

/// How far injection moves RIP before VMRUN, in bytes: the processor pushes RIP as it stands.
pub const fn instruction_length(event: Event) -> u8 {
    match event {
        Event::SoftwareInterrupt {
            instruction_length, ..
        }
        | Event::SoftwareException {
            instruction_length, ..
        }
        | Event::PrivilegedSoftwareException { instruction_length } => instruction_length,
        Event::Exception(_) | Event::ExternalInterrupt { .. } | Event::Nmi => 0,
    }
}

/// What EXITINTINFO says. `cr2` is the guest's CR2, which belongs to a page fault.
pub fn decode(information: u64, cr2: Gva) -> Option<Interrupted> {
    if information & VALID == 0 {
        return None;
    }
    let number = information as u8;
    Some(match (information >> 8) & 7 {
        TYPE_INTERRUPT => Interrupted::Event(Event::ExternalInterrupt { vector: number }),
        TYPE_NMI => Interrupted::Event(Event::Nmi),
        TYPE_EXCEPTION if !matches!(number, vector::BREAKPOINT | vector::OVERFLOW) => {
            Interrupted::Event(Event::Exception(Exception {
                vector: number & 31,
                error_code: (information & ERROR_CODE_VALID != 0)
                    .then_some((information >> 32) as u32),
                address: (number == vector::PAGE_FAULT).then_some(cr2),
            }))
        }
        _ => Interrupted::Instruction,
    })
}

/// Whether EXITINTINFO holds an event at all.
pub const fn is_valid(information: u64) -> bool {
    information & VALID != 0
}

/// Whether INT n, INT3 or INTO raised the event.
pub const fn is_raised_by_instruction(information: u64) -> bool {
    let number = information as u8;
    is_valid(information)
        && match (information >> 8) & 7 {
            TYPE_SOFTWARE => true,
            TYPE_EXCEPTION => matches!(number, vector::BREAKPOINT | vector::OVERFLOW),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn events_survive_the_round_trip() {
        let cr2 = Gva::new(0x1234);
        for event in [
            Event::Exception(Exception::INVALID_OPCODE),
            Event::Exception(Exception::with_error_code(13, 0xfffe)),
            Event::Exception(Exception {
                vector: 14,
                error_code: Some(7),
                address: Some(cr2),
            }),
            Event::ExternalInterrupt { vector: 0xff },
            Event::Nmi,
        ] {
            assert_eq!(decode(encode(event), cr2), Some(Interrupted::Event(event)));
        }
    }

    #[test]
    fn instructions_raise_their_events_again() {
        for event in [
            Event::SoftwareInterrupt {
                vector: 0x80,
                instruction_length: 2,
            },
            Event::SoftwareException {
                vector: 3,
                instruction_length: 1,
            },
        ] {
            assert_eq!(
                decode(encode(event), Gva::new(0)),
                Some(Interrupted::Instruction)
            );
        }
    }

    #[test]
    fn an_error_code_stands_in_the_upper_half() {
        assert_eq!(
            encode(Event::Exception(Exception::with_error_code(13, 0x18))),
            0x18_8000_0b0d
        );
    }

    proptest! {
        #[test]
        fn nothing_without_the_valid_bit(information: u64) {
            prop_assert_eq!(decode(information & !VALID, Gva::new(0)), None);
            prop_assert!(decode(information | VALID, Gva::new(0)).is_some());
        }
    }
}
