//! The ACPI root system description pointer (ACPI 6.5, 5.2.5.3).
//!
//! The kernel reads it where the device tree says, without mapping it. It lies in memory that
//! must stay unmapped for the kernel, so the stub hands a copy over.

use alloc::vec::Vec;

use crate::physical::PhysicalAddress;

/// Size of revision 0, which has no length field.
const FIRST_SIZE: usize = 20;
/// Size since revision 2.
const SIZE: usize = 36;

/// Copies the pointer at `address`.
pub fn copy(address: PhysicalAddress) -> Vec<u8> {
    let first = address.bytes(FIRST_SIZE as u64, "the ACPI root pointer");
    let size = if first[15] >= 2 { SIZE } else { FIRST_SIZE };
    address.bytes(size as u64, "the ACPI root pointer").to_vec()
}
