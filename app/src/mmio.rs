//! Accesses to guest-physical memory behind which there is no RAM.
//!
//! The hardware stops before anything of the instruction has happened; it is carried out here as a
//! whole, whatever of its operands is RAM and whatever is a device.

use alloc::format;

use umbra_inspect::trace::Event as TraceEvent;
use umbra_mmu::AccessKind;
use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::event::{Event, Window};

use crate::emulation;
use crate::guest::{End, Guest};

/// Carries out the guest's current instruction, which accesses `gva`, which is `gpa`.
pub fn access(guest: &mut Guest, gva: Gva, gpa: Gpa, kind: AccessKind) -> Result<(), End> {
    if kind == AccessKind::Execute {
        return Err(guest.unsupported(format!(
            "the guest executes at {gva}, guest-physical {gpa}, where it has no memory"
        )));
    }
    if is_delivering(guest) {
        return Err(guest.unsupported(format!(
            "an exception or interrupt is delivered through {gva}, guest-physical {gpa}, where the \
             guest has no memory"
        )));
    }
    guest.record(|| TraceEvent::DeviceMemory(gpa));
    emulation::run(guest, || {
        format!("{gva}, guest-physical {gpa}, is accessed, which is no memory")
    })
}

/// Whether the access was made for the delivery of an event instead of by an instruction. An
/// interrupt that waits for its window was not being delivered.
fn is_delivering(guest: &Guest) -> bool {
    let windows = guest.vcpu.windows();
    match guest.vcpu.events().restored() {
        None => false,
        Some(Event::ExternalInterrupt { .. }) => windows.interrupt == Window::Open,
        Some(Event::Nmi) => windows.nmi == Window::Open,
        Some(_) => true,
    }
}
