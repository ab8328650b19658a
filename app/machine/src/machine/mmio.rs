//! Device memory: the local APIC's page in xAPIC mode, the I/O APIC's page and the test device's
//! memory.

use umbra_vcpu::address::Gpa;

use super::{Machine, NoDevice};
use crate::access_log::Sighting;
use crate::devices::local_apic::{ApicEffect, LocalApic};
use crate::devices::{io_apic, test_device};
use crate::processor::msr::ApicMode;

const TEST_DEVICE_END: u64 = test_device::ADDRESS + test_device::SIZE;

/// Who answers at a physical address, and the offset in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemoryDevice {
    LocalApic(u64),
    IoApic(u64),
    TestDevice(u64),
}

impl Machine {
    /// Reads device memory at `address` into `bytes`. An access never reaches past a device's page:
    /// what lies beyond reads as ones.
    ///
    /// # Errors
    /// [`NoDevice`] if nothing is there; `bytes` are all ones then.
    pub fn read_mmio(&mut self, address: Gpa, bytes: &mut [u8]) -> Result<(), NoDevice> {
        bytes.fill(0xff);
        let device = self.memory_device(address)?;
        let inside = inside_page(address, bytes.len());
        match device {
            MemoryDevice::LocalApic(offset) => {
                self.processor_mut()
                    .local_apic
                    .read_memory(offset, &mut bytes[..inside]);
                self.update_attention();
            }
            MemoryDevice::IoApic(offset) => {
                self.io_apic.read_memory(offset, &mut bytes[..inside]);
            }
            MemoryDevice::TestDevice(offset) => {
                if let Some(device) = &self.test_device {
                    device.read_memory(offset, &mut bytes[..inside]);
                }
            }
        }
        Ok(())
    }

    /// Whether an access at `address` depends on the time, so that the machine must be advanced
    /// before it.
    pub fn tells_time_at(&self, address: Gpa) -> bool {
        address.page_base() == self.msrs().apic_base().page()
            && LocalApic::tells_time((address.page_offset() >> 4) as u16)
    }

    /// Writes `bytes` to device memory at `address`; what lies beyond the device's page vanishes.
    ///
    /// # Errors
    /// [`NoDevice`] if nothing is there.
    pub fn write_mmio(&mut self, address: Gpa, bytes: &[u8]) -> Result<(), NoDevice> {
        let device = self.memory_device(address)?;
        let bytes = &bytes[..inside_page(address, bytes.len())];
        match device {
            MemoryDevice::LocalApic(offset) => {
                if LocalApic::tells_time((offset >> 4) as u16) {
                    self.touch_timers();
                }
                let effect = self.processor_mut().local_apic.write_memory(offset, bytes);
                self.apply(effect);
            }
            MemoryDevice::IoApic(offset) => {
                self.touch_timers();
                let message = self.io_apic.write_memory(offset, bytes);
                self.send(message);
            }
            MemoryDevice::TestDevice(offset) => {
                if let Some(device) = &mut self.test_device {
                    device.write_memory(offset, bytes);
                }
            }
        }
        self.update_lines();
        Ok(())
    }

    /// Carries out what a write of the local APIC asks of others.
    pub(super) fn apply(&mut self, effect: ApicEffect) {
        match effect {
            ApicEffect::None => {}
            ApicEffect::Send(message) => self.send(Some(message)),
            ApicEffect::EndOfLevel(vector) => {
                for message in self.io_apic.end_of_interrupt(vector) {
                    self.send(message);
                }
            }
        }
    }

    fn memory_device(&mut self, address: Gpa) -> Result<MemoryDevice, NoDevice> {
        let offset = address.page_offset();
        let apic_base = self.msrs().apic_base();
        if address.page_base() == apic_base.page() && apic_base.mode() == ApicMode::XApic {
            return Ok(MemoryDevice::LocalApic(offset));
        }
        match address.page_base().as_u64() {
            io_apic::ADDRESS => Ok(MemoryDevice::IoApic(offset)),
            page @ test_device::ADDRESS..TEST_DEVICE_END if self.test_device.is_some() => Ok(
                MemoryDevice::TestDevice(page - test_device::ADDRESS + offset),
            ),
            _ => {
                if self.unknown_addresses.record(address.page_base()) == Sighting::First {
                    log::warn!("the guest uses physical address {address:#x}, where nothing is");
                }
                Err(NoDevice)
            }
        }
    }
}

/// How many of `length` bytes at `address` lie in its page.
fn inside_page(address: Gpa, length: usize) -> usize {
    let rest = umbra_vcpu::address::PAGE_SIZE - address.page_offset();
    length.min(usize::try_from(rest).unwrap_or(usize::MAX))
}
