//! Events that enter a guest through its interrupt descriptor table, and the queue that decides
//! which one enters next.
//!
//! Protocol of [`EventQueue`]: the run loop queues what the guest must see; the driver takes one
//! event for each entry ([`EventQueue::next_event`]), and when an exit says that the delivery was cut
//! short, the driver puts it back ([`EventQueue::restore`]) before it returns the exit. An
//! exception raised while a restored event waits is combined with it as the processor would do
//! (SDM vol. 3A table 6-5): benign, double fault, or shutdown.

use x86_64::structures::idt::PageFaultErrorCode;

use crate::address::Gva;

/// Vectors that the architecture assigns (SDM vol. 3A table 6-1).
pub mod vector {
    #![allow(missing_docs, reason = "the manual's table is the documentation")]
    pub const DIVIDE_ERROR: u8 = 0;
    pub const DEBUG: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BREAKPOINT: u8 = 3;
    pub const OVERFLOW: u8 = 4;
    pub const BOUND_RANGE: u8 = 5;
    pub const INVALID_OPCODE: u8 = 6;
    pub const DEVICE_NOT_AVAILABLE: u8 = 7;
    pub const DOUBLE_FAULT: u8 = 8;
    pub const INVALID_TSS: u8 = 10;
    pub const SEGMENT_NOT_PRESENT: u8 = 11;
    pub const STACK_FAULT: u8 = 12;
    pub const GENERAL_PROTECTION: u8 = 13;
    pub const PAGE_FAULT: u8 = 14;
    pub const X87_FLOATING_POINT: u8 = 16;
    pub const ALIGNMENT_CHECK: u8 = 17;
    pub const MACHINE_CHECK: u8 = 18;
    pub const SIMD_FLOATING_POINT: u8 = 19;
    pub const VIRTUALIZATION: u8 = 20;
    pub const CONTROL_PROTECTION: u8 = 21;
}

/// How an event reaches the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception of the processor's own.
    Exception(Exception),
    /// INT n, or INT3/INTO when `instruction_length` bytes name them; on VMX the length moves the
    /// return address past the instruction.
    SoftwareInterrupt {
        /// The vector, 0 to 255.
        vector: u8,
        /// The length of the instruction in bytes, 1 to 15.
        instruction_length: u8,
    },
    /// INT3 or INTO: a trap with the vector 3 or 4.
    SoftwareException {
        /// 3 or 4.
        vector: u8,
        /// The length of the instruction in bytes, 1 to 15.
        instruction_length: u8,
    },
    /// ICEBP/INT1: a trap with vector 1.
    PrivilegedSoftwareException {
        /// The length of the instruction in bytes, 1 to 15.
        instruction_length: u8,
    },
    /// A maskable interrupt from the interrupt controller.
    ExternalInterrupt {
        /// The vector, 0 to 255.
        vector: u8,
    },
    /// The non-maskable interrupt.
    Nmi,
}

/// An exception with what comes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The vector, 0 to 31.
    pub vector: u8,
    /// The error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// CR2, for page faults.
    pub address: Option<Gva>,
}

impl Exception {
    /// An exception without an error code.
    pub const fn new(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            address: None,
        }
    }

    /// An exception with an error code.
    pub const fn with_error_code(vector: u8, error_code: u32) -> Self {
        Self {
            vector,
            error_code: Some(error_code),
            address: None,
        }
    }

    /// #UD.
    pub const INVALID_OPCODE: Self = Self::new(vector::INVALID_OPCODE);

    /// #GP(0).
    pub const GENERAL_PROTECTION: Self = Self::with_error_code(vector::GENERAL_PROTECTION, 0);

    /// #DF(0).
    pub const DOUBLE_FAULT: Self = Self::with_error_code(vector::DOUBLE_FAULT, 0);

    /// #PF with the faulting address.
    pub const fn page_fault(address: Gva, error_code: PageFaultErrorCode) -> Self {
        Self {
            vector: vector::PAGE_FAULT,
            error_code: Some(error_code.bits() as u32),
            address: Some(address),
        }
    }

    /// Whether the architecture pushes an error code for `vector` (SDM vol. 3A table 6-1).
    pub const fn has_error_code(vector: u8) -> bool {
        matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
    }

    const fn is_contributory(self) -> bool {
        matches!(self.vector, 0 | 10..=13 | 21)
    }

    const fn is_page_fault(self) -> bool {
        matches!(self.vector, vector::PAGE_FAULT | vector::VIRTUALIZATION)
    }
}

/// The second fault arrived while a double fault was being delivered: the guest shuts down
/// (SDM vol. 3A 6.15, "Interrupt 8").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a triple fault ends the guest"]
pub struct TripleFault;

/// What the guest will be given at its next entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventQueue {
    restored: Option<Event>,
    exception: Option<Exception>,
    nmi: bool,
}

impl EventQueue {
    /// An empty queue.
    pub const fn new() -> Self {
        Self {
            restored: None,
            exception: None,
            nmi: false,
        }
    }

    /// Whether nothing waits.
    pub const fn is_empty(&self) -> bool {
        self.restored.is_none() && self.exception.is_none() && !self.nmi
    }

    /// Queues an exception that the last instruction, or the delivery of the restored event,
    /// raised.
    ///
    /// # Errors
    /// [`TripleFault`] if it arose during the delivery of a double fault.
    pub fn raise(&mut self, second: Exception) -> Result<(), TripleFault> {
        let first = match (self.exception, self.restored) {
            (Some(exception), _) | (None, Some(Event::Exception(exception))) => Some(exception),
            // Delivery of an interrupt that faults is benign: the fault is delivered and, for
            // what an instruction raised, the instruction runs again.
            _ => None,
        };
        let combined = match first {
            Some(first) if first.vector == vector::DOUBLE_FAULT => {
                if second.is_contributory() || second.is_page_fault() {
                    return Err(TripleFault);
                }
                second
            }
            Some(first)
                if (first.is_contributory() && second.is_contributory())
                    || (first.is_page_fault()
                        && (second.is_contributory() || second.is_page_fault())) =>
            {
                Exception::DOUBLE_FAULT
            }
            _ => second,
        };
        // A benign first exception, and any software interrupt, is dropped: the instruction runs
        // again. An external interrupt or an NMI must not be lost and stays.
        if !matches!(
            self.restored,
            Some(Event::ExternalInterrupt { .. } | Event::Nmi)
        ) {
            self.restored = None;
        }
        self.exception = Some(combined);
        Ok(())
    }

    /// Queues a non-maskable interrupt; several before one is taken count as one.
    pub const fn raise_nmi(&mut self) {
        self.nmi = true;
    }

    /// Queues a maskable interrupt that the interrupt controller has handed over.
    ///
    /// Call it only when [`EventQueue::accepts_interrupt`]; the controller must not have been asked
    /// for the vector otherwise, because a second one has no place to wait.
    pub fn raise_interrupt(&mut self, vector: u8) {
        debug_assert!(
            self.accepts_interrupt(),
            "an interrupt without a place to wait"
        );
        self.restored = Some(Event::ExternalInterrupt { vector });
    }

    /// Whether no other event stands where a new maskable interrupt would wait.
    pub const fn accepts_interrupt(&self) -> bool {
        self.restored.is_none() && self.exception.is_none()
    }

    /// Puts back an event whose delivery an exit interrupted.
    pub const fn restore(&mut self, event: Event) {
        self.restored = Some(event);
    }

    /// The event whose delivery the last exit interrupted, if it still waits.
    pub const fn restored(&self) -> Option<Event> {
        self.restored
    }

    /// Whether the guest must exit as soon as it can take a maskable interrupt.
    pub const fn needs_interrupt_window(&self) -> bool {
        matches!(self.restored, Some(Event::ExternalInterrupt { .. }))
    }

    /// Whether the guest must exit as soon as it can take a non-maskable interrupt.
    pub const fn needs_nmi_window(&self) -> bool {
        self.nmi || matches!(self.restored, Some(Event::Nmi))
    }

    /// Takes the event for the next entry: an exception first, then what an exit interrupted, then
    /// an NMI. Interrupts stay queued while their window is closed.
    pub fn next_event(&mut self, windows: Windows) -> Option<Event> {
        if let Some(exception) = self.exception.take() {
            return Some(Event::Exception(exception));
        }
        let blocked = match self.restored {
            Some(Event::ExternalInterrupt { .. }) => windows.interrupt == Window::Closed,
            Some(Event::Nmi) => windows.nmi == Window::Closed,
            _ => false,
        };
        if !blocked && let Some(event) = self.restored.take() {
            return Some(event);
        }
        if self.nmi && windows.nmi == Window::Open {
            self.nmi = false;
            return Some(Event::Nmi);
        }
        None
    }
}

/// What keeps interrupts away from a guest besides RFLAGS.IF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// STI has just been carried out: maskable interrupts wait until the next instruction ends.
    Sti,
    /// SS has just been loaded: all interrupts wait until the next instruction ends.
    MovSs,
    /// A non-maskable interrupt is being handled: others wait until an IRET.
    Nmi,
}

/// What the guest can take at this instruction boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Maskable interrupts: RFLAGS.IF is set and no STI or MOV-SS shadow is active.
    pub interrupt: Window,
    /// Non-maskable interrupts: none is being handled and no MOV-SS shadow is active.
    pub nmi: Window,
}

/// Whether the guest can take an interrupt of a kind at this instruction boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// It can.
    Open,
    /// A flag, a shadow or an earlier event is in the way.
    Closed,
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Windows = Windows {
        interrupt: Window::Open,
        nmi: Window::Open,
    };
    const CLOSED: Windows = Windows {
        interrupt: Window::Closed,
        nmi: Window::Closed,
    };

    fn page_fault() -> Exception {
        Exception::page_fault(Gva::new(0x1000), PageFaultErrorCode::empty())
    }

    #[test]
    fn faults_combine_as_in_the_manuals_table() {
        let benign = Exception::new(vector::DEBUG);
        let contributory = Exception::GENERAL_PROTECTION;
        let expected = [
            // first, second, result
            (benign, benign, benign),
            (benign, contributory, contributory),
            (benign, page_fault(), page_fault()),
            (contributory, benign, benign),
            (contributory, contributory, Exception::DOUBLE_FAULT),
            (contributory, page_fault(), page_fault()),
            (page_fault(), benign, benign),
            (page_fault(), contributory, Exception::DOUBLE_FAULT),
            (page_fault(), page_fault(), Exception::DOUBLE_FAULT),
        ];
        for (first, second, result) in expected {
            let mut queue = EventQueue::new();
            queue.restore(Event::Exception(first));
            assert_eq!(queue.raise(second), Ok(()));
            assert_eq!(queue.next_event(OPEN), Some(Event::Exception(result)));
            assert_eq!(queue.next_event(OPEN), None, "{first:?} then {second:?}");
        }
    }

    #[test]
    fn a_fault_in_a_double_fault_shuts_down() {
        for second in [Exception::GENERAL_PROTECTION, page_fault()] {
            let mut queue = EventQueue::new();
            queue.restore(Event::Exception(Exception::DOUBLE_FAULT));
            assert_eq!(queue.raise(second), Err(TripleFault));
        }
    }

    #[test]
    fn an_interrupted_external_interrupt_is_not_lost() {
        let mut queue = EventQueue::new();
        queue.restore(Event::ExternalInterrupt { vector: 0x20 });
        assert_eq!(queue.raise(page_fault()), Ok(()));
        assert_eq!(
            queue.next_event(CLOSED),
            Some(Event::Exception(page_fault()))
        );
        // The handler of the page fault runs with interrupts off.
        assert_eq!(queue.next_event(CLOSED), None);
        assert!(queue.needs_interrupt_window());
        assert_eq!(
            queue.next_event(OPEN),
            Some(Event::ExternalInterrupt { vector: 0x20 })
        );
    }

    #[test]
    fn an_interrupted_software_interrupt_runs_again() {
        let mut queue = EventQueue::new();
        queue.restore(Event::SoftwareInterrupt {
            vector: 0x80,
            instruction_length: 2,
        });
        assert_eq!(queue.raise(page_fault()), Ok(()));
        assert_eq!(queue.next_event(OPEN), Some(Event::Exception(page_fault())));
        assert_eq!(queue.next_event(OPEN), None);
    }

    #[test]
    fn an_nmi_waits_for_its_window() {
        let mut queue = EventQueue::new();
        queue.raise_nmi();
        assert_eq!(queue.next_event(CLOSED), None);
        assert!(!queue.is_empty());
        assert_eq!(queue.next_event(OPEN), Some(Event::Nmi));
        assert!(!queue.needs_nmi_window());
        assert!(queue.is_empty());
    }
}
