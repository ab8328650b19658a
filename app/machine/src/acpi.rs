//! The ACPI tables that firmware would leave (ACPI 6.3, chapter 5): RSDP, XSDT, FADT, FACS, DSDT and
//! MADT, for the processors and devices of this machine.
//!
//! They lie in the BIOS area, where kernels that are told nothing look for the RSDP, on a 16-byte
//! boundary between 0xe0000 and 0xfffff. All of them are below 4 GiB, so the FADT's 32-bit fields
//! and their 64-bit successors hold the same addresses.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml, facs::FACS};
use umbra_vcpu::address::Gpa;

use crate::devices::{io_apic, pci, pit, power_management, reset_control, rtc, serial};
use crate::machine::ProcessorNumber;
use crate::processor::msr::ApicBase;

/// Where the tables go; the RSDP is first.
pub const ADDRESS: Gpa = Gpa::new(BASE as u64);

const BASE: u32 = 0xe_0000;
/// The FACS wants this; the other tables take it, too.
const ALIGNMENT: usize = 64;

const OEM: [u8; 6] = *b"UMBRA ";
const OEM_TABLE: [u8; 8] = *b"UMBRAPC ";
const OEM_REVISION: u32 = 1;

/// Revision 2 is the first whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;
const MADT_REVISION: u8 = 5;
const FADT_MINOR_REVISION: u8 = 3;

/// The tables as one block of bytes for [`ADDRESS`], for a machine with so many processors.
pub fn tables(processors: u8) -> Vec<u8> {
    let mut block = Block::default();
    // The RSDP is first, and knows the XSDT's address only at the end.
    block.push(&vec![0; Rsdp::len()]);
    let facs = block.put(&FACS::new());
    let dsdt = block.put(&dsdt(processors));
    let fadt = block.put(&fadt(facs, dsdt));
    let madt = block.put(&madt(processors));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt.into());
    xsdt.add_entry(madt.into());
    let xsdt = block.put(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt.into()).to_aml_bytes(&mut rsdp);
    block.0[..rsdp.len()].copy_from_slice(&rsdp);
    block.0
}

/// The bytes from [`ADDRESS`] on.
#[derive(Default)]
struct Block(Vec<u8>);

impl Block {
    /// Adds a table and returns its address.
    fn put(&mut self, table: &dyn Aml) -> u32 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.push(&bytes)
    }

    fn push(&mut self, bytes: &[u8]) -> u32 {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
        let address = BASE + self.0.len() as u32;
        self.0.extend_from_slice(bytes);
        address
    }
}

/// Fixed hardware (5.2.9).
fn fadt(facs: u32, dsdt: u32) -> impl Aml {
    /// There are devices on an ISA bus.
    const LEGACY_DEVICES: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;
    const NO_MESSAGE_SIGNALED_INTERRUPTS: u16 = 1 << 3;
    /// Latencies above these say that the processor has neither C2 nor C3.
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;

    use power_management as pm;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // These two say that there are no fixed buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.fadt_minor_version = FADT_MINOR_REVISION;
    fadt.firmware_ctrl = facs.into();
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = u16::from(pm::IRQ).into();
    fadt.smi_cmd = u32::from(pm::COMMAND_PORT).into();
    fadt.acpi_enable = pm::ENABLE;
    fadt.acpi_disable = pm::DISABLE;
    fadt.pm1a_evt_blk = u32::from(pm::EVENT_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(pm::CONTROL_PORT).into();
    fadt.pm_tmr_blk = u32::from(pm::TIMER_PORT).into();
    fadt.pm1_evt_len = pm::EVENT_LENGTH;
    fadt.pm1_cnt_len = pm::CONTROL_LENGTH;
    fadt.pm_tmr_len = pm::TIMER_LENGTH;
    fadt.x_pm1a_evt_blk = io_register(pm::EVENT_PORT, pm::EVENT_LENGTH, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io_register(pm::CONTROL_PORT, pm::CONTROL_LENGTH, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = io_register(pm::TIMER_PORT, pm::TIMER_LENGTH, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = rtc::CENTURY_INDEX;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_MESSAGE_SIGNALED_INTERRUPTS).into();
    fadt.reset_reg = io_register(reset_control::PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = reset_control::HARD_RESET;
    fadt.finalize()
}

fn io_register(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8 * bytes, 0, access, port.into())
}

/// Interrupt controllers (5.2.12): the processors, the I/O APIC, and what is wired unlike an ISA bus.
fn madt(processors: u8) -> impl Aml {
    /// There is an i8259 pair, too.
    const PC_AT_COMPATIBLE: u32 = 1;
    const HEADER: u32 = 36;
    /// Active high, level-triggered.
    const LEVEL_HIGH: u16 = 0b1101;
    let mut madt = Sdt::new(
        *b"APIC",
        HEADER,
        MADT_REVISION,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    );
    madt.append_slice(&(ApicBase::RESET_PAGE.as_u64() as u32).to_le_bytes());
    madt.append_slice(&PC_AT_COMPATIBLE.to_le_bytes());
    let mut structures = Vec::new();
    for number in ProcessorNumber::first(processors).map(ProcessorNumber::get) {
        ProcessorLocalApic::new(number, number, EnabledStatus::Enabled)
            .to_aml_bytes(&mut structures);
    }
    IoApic::new(0, io_apic::ADDRESS as u32, 0).to_aml_bytes(&mut structures);
    structures.extend_from_slice(&source_override(pit::IRQ, io_apic::TIMER_INPUT, 0));
    structures.extend_from_slice(&source_override(
        power_management::IRQ,
        power_management::IRQ,
        LEVEL_HIGH,
    ));
    structures.extend_from_slice(&local_nmi());
    madt.append_slice(&structures);
    madt
}

/// Interrupt source override (5.2.12.5): ISA line `irq` arrives at `input`; flags of zero mean as
/// usual on ISA, an edge to high.
fn source_override(irq: u8, input: u8, flags: u16) -> [u8; 10] {
    const TYPE: u8 = 2;
    const ISA: u8 = 0;
    let [flags_low, flags_high] = flags.to_le_bytes();
    let length = 10;
    [
        TYPE, length, ISA, irq, input, 0, 0, 0, flags_low, flags_high,
    ]
}

/// Local APIC NMI (5.2.12.7): LINT1 of every processor.
fn local_nmi() -> [u8; 6] {
    const TYPE: u8 = 4;
    const ALL_PROCESSORS: u8 = 0xff;
    const LINT1: u8 = 1;
    let length = 6;
    [TYPE, length, ALL_PROCESSORS, 0, 0, LINT1]
}

/// The devices that kernels find by name, and the one sleeping state.
fn dsdt(processors: u8) -> impl Aml {
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut code = Vec::new();
    let s5 = power_management::SLEEP_TYPE_S5;
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&s5, &0_u8, &0_u8, &0_u8]),
    )
    .to_aml_bytes(&mut code);

    let processor_id = aml::Name::new("_HID".into(), &"ACPI0007");
    let processor_numbers: Vec<_> = ProcessorNumber::first(processors)
        .map(|number| (number.get(), aml::Name::new("_UID".into(), &number.get())))
        .collect();
    let processors: Vec<_> = processor_numbers
        .iter()
        .map(|(number, unique)| {
            let name = format!("CPU{number}");
            aml::Device::new(name.as_str().into(), vec![&processor_id, unique])
        })
        .collect();

    let serial_id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501"));
    let serial_number = aml::Name::new("_UID".into(), &1_u8);
    let serial_ports = ports(serial::PORT, 8);
    let serial_interrupt = isa_interrupt(serial::IRQ);
    let serial_resources = aml::Name::new(
        "_CRS".into(),
        &aml::ResourceTemplate::new(vec![&serial_ports, &serial_interrupt]),
    );
    let serial = aml::Device::new(
        "COM1".into(),
        vec![&serial_id, &serial_number, &serial_resources],
    );

    let clock_id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0B00"));
    let clock_ports = ports(rtc::INDEX_PORT, 2);
    let clock_interrupt = isa_interrupt(rtc::IRQ);
    let clock_resources = aml::Name::new(
        "_CRS".into(),
        &aml::ResourceTemplate::new(vec![&clock_ports, &clock_interrupt]),
    );
    let clock = aml::Device::new("RTC_".into(), vec![&clock_id, &clock_resources]);

    // One bus, whose bridge passes nothing on: there is nothing behind it.
    let bus_id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A03"));
    let bus_numbers = aml::AddressSpace::new_bus_number(0_u16, 0_u16);
    let bus_ports = ports(pci::ADDRESS_PORT, 8);
    let bus_resources = aml::Name::new(
        "_CRS".into(),
        &aml::ResourceTemplate::new(vec![&bus_numbers, &bus_ports]),
    );
    let bus = aml::Device::new("PCI0".into(), vec![&bus_id, &bus_resources]);

    let mut devices: Vec<&dyn Aml> = vec![&serial, &clock, &bus];
    devices.extend(processors.iter().map(|processor| processor as &dyn Aml));
    aml::Scope::new("_SB_".into(), devices).to_aml_bytes(&mut code);
    dsdt.append_slice(&code);
    dsdt
}

fn ports(first: u16, count: u8) -> aml::IO {
    aml::IO::new(first, first, 1, count)
}

/// A resource that the device consumes: edge-triggered, active high, not shared.
fn isa_interrupt(irq: u8) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, irq.into())
}

#[cfg(test)]
mod tests;
