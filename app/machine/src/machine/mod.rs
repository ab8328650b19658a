//! The bus: which device answers at which port and address, and how their lines are connected.
//!
//! As on an ISA bus, an access wider than a device is cut into bytes that go to consecutive ports;
//! where nobody answers, reads float to all ones and writes vanish.

use alloc::boxed::Box;
use alloc::vec::Vec;

mod hypercalls;
mod interrupts;
mod mmio;
mod processors;
mod registers;

use umbra_vcpu::address::Gpa;
use umbra_vcpu::exit::IoWidth;

pub use self::hypercalls::Hypercall;
pub use self::processors::{ProcessorNumber, ProcessorSet, Startup};

use self::processors::Processor;
use crate::access_log::{AccessLog, Sighting};
use crate::devices::fw_cfg::{self, FwCfg};
use crate::devices::io_apic::IoApic;
use crate::devices::keyboard::{self, KeyboardReset};
use crate::devices::pci::{self, PciConfiguration};
use crate::devices::pic::{self, Pic};
use crate::devices::pit::{self, Pit};
use crate::devices::power_management::{self, PowerManagement};
use crate::devices::reset_control::{self, ResetControl};
use crate::devices::rtc::{self, Rtc};
use crate::devices::serial::{self, Serial};
use crate::devices::test_device::{self, Effect, TestDevice};
use crate::devices::{Level, debug_exit};
use crate::processor::cpuid::Identity;
use crate::processor::features::GuestFeatures;
use crate::processor::msr::Msrs;
use crate::processor::paravirtual::MemoryWrite;
use crate::time::{GuestTime, TimeBase};

/// Where the guest's serial output goes.
pub trait ConsoleOutput {
    /// Takes one byte.
    fn write(&mut self, byte: u8);

    /// Lets everything out that was held back.
    fn flush(&mut self) {}
}

/// How the guest ended itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// It wrote this value to the exit device; zero is success.
    DebugExit(u32),
    /// It asked for a reset.
    Reset,
    /// It switched the power off.
    PowerOff,
}

/// No device answers at a physical address: reads give all ones, writes vanish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoDevice;

/// What a machine is made of.
pub struct Configuration {
    /// The relation of guest time to the host's time-stamp counter.
    pub time_base: TimeBase,
    /// How many processors the guest has: 1 to [`ProcessorNumber::LIMIT`], and no others.
    pub processors: u8,
    /// What each of them can do.
    pub features: GuestFeatures,
    /// Where serial output goes.
    pub console: Box<dyn ConsoleOutput + Send>,
}

/// All devices of one guest. What is a processor's own is that of the processor which it serves.
pub struct Machine {
    now: GuestTime,
    time_base: TimeBase,
    console: Box<dyn ConsoleOutput + Send>,
    shutdown: Option<Shutdown>,
    processors: Vec<Processor>,
    /// Whose exit is being handled: one of `processors`.
    served: ProcessorNumber,
    /// Whom something has come for that they do not know of.
    kicks: ProcessorSet,
    pic: Pic,
    io_apic: IoApic,
    serial: Serial,
    pit: Pit,
    rtc: Rtc,
    power_management: PowerManagement,
    pci: PciConfiguration,
    fw_cfg: FwCfg,
    reset_control: ResetControl,
    keyboard: KeyboardReset,
    test_device: Option<TestDevice>,
    page_flush: Option<Gpa>,
    /// The interval timer's output since it last changed: it takes a division to ask for.
    pit_output: Level,
    /// The ISA lines that are high at the interrupt controllers, one bit each.
    high_lines: u16,
    unknown_ports: AccessLog<u16>,
    unknown_addresses: AccessLog<Gpa>,
    unknown_msrs: AccessLog<u32>,
}

/// Whether the run loop has to look at the machine before the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// An interrupt or an NMI waits for the guest, or the guest has ended itself.
    Wanted,
    /// Nothing waits.
    NotWanted,
}

/// Whether the machine's next deadline may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timers {
    /// It may have.
    Touched,
    /// It is as it was.
    Untouched,
}

/// Who answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PortDevice {
    Pic,
    Pit,
    SystemControl,
    Rtc,
    PowerManagement,
    Serial,
    DebugExit,
    FwCfg,
    ResetControl,
    PciAddress,
    PciData,
    Keyboard,
}

const fn find_device(port: u16) -> Option<PortDevice> {
    Some(match port {
        pic::MASTER_COMMAND_PORT
        | pic::MASTER_DATA_PORT
        | pic::SLAVE_COMMAND_PORT
        | pic::SLAVE_DATA_PORT
        | pic::MASTER_EDGE_LEVEL_PORT
        | pic::SLAVE_EDGE_LEVEL_PORT => PortDevice::Pic,
        pit::PORT..=pit::CONTROL_PORT => PortDevice::Pit,
        pit::SYSTEM_CONTROL_PORT => PortDevice::SystemControl,
        rtc::INDEX_PORT | rtc::DATA_PORT => PortDevice::Rtc,
        fw_cfg::SELECTOR_PORT | fw_cfg::DATA_PORT => PortDevice::FwCfg,
        keyboard::DATA_PORT | keyboard::COMMAND_PORT => PortDevice::Keyboard,
        debug_exit::PORT..=debug_exit::LAST_PORT => PortDevice::DebugExit,
        serial::PORT..=serial::LAST_PORT => PortDevice::Serial,
        reset_control::PORT => PortDevice::ResetControl,
        pci::ADDRESS_PORT..pci::DATA_PORT => PortDevice::PciAddress,
        pci::DATA_PORT..=pci::LAST_DATA_PORT => PortDevice::PciData,
        _ if power_management::owns(port) => PortDevice::PowerManagement,
        _ => return None,
    })
}

/// The ports of [`DEVICES`]: all devices but the PCI configuration space lie below.
const TABLED_PORTS: u16 = 0x800;

/// [`find_device`], looked up.
static DEVICES: [Option<PortDevice>; TABLED_PORTS as usize] = {
    let mut devices = [None; TABLED_PORTS as usize];
    let mut port = 0;
    while port < TABLED_PORTS {
        devices[port as usize] = find_device(port);
        port += 1;
    }
    devices
};

#[inline]
fn device_at(port: u16) -> Option<PortDevice> {
    match DEVICES.get(usize::from(port)) {
        Some(device) => *device,
        None => find_device(port),
    }
}

impl Machine {
    /// A machine that has just been switched on and left by its firmware.
    pub fn new(configuration: Configuration) -> Self {
        let Configuration {
            time_base,
            processors,
            features,
            console,
        } = configuration;
        // The guest's counter starts at zero.
        let tsc_offset = 0_i64.wrapping_sub_unsigned(time_base.counter_at(GuestTime::START));
        Self {
            now: GuestTime::START,
            time_base,
            console,
            shutdown: None,
            processors: ProcessorNumber::first(processors.max(1))
                .map(|number| Processor::new(number, features, tsc_offset))
                .collect(),
            served: ProcessorNumber::BOOT,
            kicks: ProcessorSet::EMPTY,
            pic: Pic::default(),
            io_apic: IoApic::default(),
            serial: Serial::new(),
            pit: Pit::default(),
            rtc: Rtc::new(0),
            power_management: PowerManagement::default(),
            pci: PciConfiguration::default(),
            fw_cfg: FwCfg::default(),
            reset_control: ResetControl::default(),
            keyboard: KeyboardReset::default(),
            test_device: None,
            page_flush: None,
            pit_output: Pit::default().output(),
            high_lines: 0,
            unknown_ports: AccessLog::new(),
            unknown_addresses: AccessLog::new(),
            unknown_msrs: AccessLog::new(),
        }
    }

    /// Sets the clock: `unix_time`, in seconds since 1970-01-01 UTC, was when the machine started.
    pub fn set_wall_clock(&mut self, unix_time: u64) {
        for processor in &mut self.processors {
            processor.paravirtual.set_start(unix_time);
        }
        self.rtc = Rtc::new(unix_time);
        self.rtc.advance(self.now);
    }

    /// The memory of the real-time clock, for what firmware leaves there.
    pub const fn rtc_mut(&mut self) -> &mut Rtc {
        &mut self.rtc
    }

    /// The firmware configuration device, to be filled before the guest starts.
    pub const fn fw_cfg_mut(&mut self) -> &mut FwCfg {
        &mut self.fw_cfg
    }

    /// Adds the device for kernels that test themselves.
    pub fn add_test_device(&mut self) {
        self.test_device = Some(TestDevice::default());
    }

    /// The page whose translations the guest had dropped through the test device since the last call.
    pub const fn take_page_flush(&mut self) -> Option<Gpa> {
        self.page_flush.take()
    }

    /// What a device writes to the guest's memory of itself, if anything waits. To be asked until
    /// nothing is left, after each access to a model-specific register.
    pub fn take_memory_write(&mut self) -> Option<MemoryWrite> {
        let (time_base, now) = (self.time_base, self.now);
        let processor = self.processor_mut();
        let offset = processor.msrs.tsc_offset();
        processor.paravirtual.take_write(&time_base, now, offset)
    }

    /// How the guest ended itself, if it did since the last call.
    pub fn take_shutdown(&mut self) -> Option<Shutdown> {
        let shutdown = self.shutdown.take()?;
        self.update_processors();
        Some(shutdown)
    }

    /// Speaks for this processor from now on.
    ///
    /// # Panics
    /// If the machine has no such processor.
    #[inline]
    pub fn serve(&mut self, number: ProcessorNumber) {
        assert!(number.index() < self.processors.len());
        self.served = number;
    }

    /// How many processors there are.
    pub fn processors(&self) -> u8 {
        self.processors.len() as u8
    }

    /// What CPUID tells the served processor of itself.
    pub fn identity(&self) -> Identity {
        self.processor().identity(self.processors())
    }

    /// Whether the served processor waits until another starts it. It executes nothing then.
    pub fn waits_for_startup(&self) -> bool {
        self.processor().waits_for_startup()
    }

    /// What starts or stops the served processor, if anything does: to be asked until nothing is
    /// left. An INIT for the first processor is a reset of the machine, see
    /// [`Machine::take_shutdown`], and nothing here.
    pub fn take_startup(&mut self) -> Option<Startup> {
        let startup = self.processor_mut().take_startup()?;
        self.update_attention();
        Some(startup)
    }

    /// Whether [`Machine::take_kicks`] has something to take.
    #[inline]
    pub const fn has_kicks(&self) -> bool {
        !self.kicks.is_empty()
    }

    /// The processors besides the served one for which something has come since the last call: they
    /// must see it before they enter the guest again, and leave it if they are inside.
    #[inline]
    pub const fn take_kicks(&mut self) -> ProcessorSet {
        core::mem::replace(&mut self.kicks, ProcessorSet::EMPTY)
    }

    /// Whether anything waits for the run loop of the served processor. Asking costs nothing.
    #[inline]
    pub fn attention(&self) -> Attention {
        self.processor().attention
    }

    /// Whether the next deadline may have changed since the last call for the served processor.
    #[inline]
    pub fn take_timers(&mut self) -> Timers {
        core::mem::replace(&mut self.processor_mut().timers, Timers::Untouched)
    }

    /// Whether an access to `width` at `port` depends on the time, so that the machine must be
    /// advanced before it.
    pub fn tells_time(port: u16, width: IoWidth) -> bool {
        let tells = |port| {
            matches!(
                device_at(port),
                Some(
                    PortDevice::Pit
                        | PortDevice::SystemControl
                        | PortDevice::Rtc
                        | PortDevice::PowerManagement
                )
            )
        };
        match width {
            IoWidth::Byte => tells(port),
            IoWidth::Word | IoWidth::DoubleWord => ports(port, width).flatten().any(tells),
        }
    }

    /// Shows a character that firmware prints for the guest.
    pub fn print(&mut self, byte: u8) {
        self.console.write(byte);
    }

    /// Whether the guest has ended itself.
    pub const fn is_shut_down(&self) -> bool {
        self.shutdown.is_some()
    }

    /// Lets all serial output out that was held back.
    pub fn flush_console(&mut self) {
        self.console.flush();
    }

    /// A byte arrives from the terminal.
    pub fn receive(&mut self, byte: u8) {
        self.serial.receive(byte);
        self.update_lines();
    }

    /// IN.
    pub fn read_port(&mut self, port: u16, width: IoWidth) -> u32 {
        if let Some(device) = &self.test_device
            && test_device::owns(port)
        {
            return device.read_port(port, width);
        }
        if width == IoWidth::Byte
            && let Some(device) = device_at(port)
        {
            let value = self.read_byte(device, port);
            self.update_after(device);
            return value.into();
        }
        if ports(port, width).all(|port| port.and_then(device_at).is_none()) {
            self.log_unknown_port(port, width);
            return width.mask();
        }
        if port == pci::ADDRESS_PORT && width == IoWidth::DoubleWord {
            return self.pci.read_address();
        }
        let value = ports(port, width)
            .zip([0, 8, 16, 24])
            .map(|(port, shift)| {
                let byte = match port.and_then(|port| Some((port, device_at(port)?))) {
                    Some((port, device)) => self.read_byte(device, port),
                    None => 0xff,
                };
                u32::from(byte) << shift
            })
            .fold(0, |value, byte| value | byte);
        self.update_lines();
        value
    }

    /// OUT.
    pub fn write_port(&mut self, port: u16, width: IoWidth, value: u32) {
        if let Some(device) = &mut self.test_device
            && test_device::owns(port)
        {
            match device.write_port(port, width, value) {
                Effect::None => {}
                Effect::FlushPage(page) => self.page_flush = Some(page),
            }
            return self.update_lines();
        }
        if width == IoWidth::Byte
            && let Some(device) = device_at(port)
        {
            self.write_byte(device, port, value as u8);
            return self.update_after(device);
        }
        if ports(port, width).all(|port| port.and_then(device_at).is_none()) {
            self.log_unknown_port(port, width);
            return;
        }
        match (port, width) {
            (debug_exit::PORT, _) => {
                self.end(Some(Shutdown::DebugExit(value & width.mask())));
            }
            (pci::ADDRESS_PORT, IoWidth::DoubleWord) => self.pci.write_address(value),
            (fw_cfg::SELECTOR_PORT, IoWidth::Word) => self.fw_cfg.select(value as u16),
            _ => {
                for (port, byte) in ports(port, width).zip(value.to_le_bytes()) {
                    if let Some(port) = port
                        && let Some(device) = device_at(port)
                    {
                        self.write_byte(device, port, byte);
                    }
                }
            }
        }
        self.update_lines();
    }

    /// The model-specific registers that software keeps.
    pub fn msrs(&self) -> &Msrs {
        &self.processor().msrs
    }

    /// The relation of guest time to the host's time-stamp counter.
    pub const fn time_base(&self) -> &TimeBase {
        &self.time_base
    }

    /// Accesses to ports where no device is.
    pub const fn unknown_ports(&self) -> &AccessLog<u16> {
        &self.unknown_ports
    }

    /// Accesses to physical addresses where neither memory nor a device is.
    pub const fn unknown_addresses(&self) -> &AccessLog<Gpa> {
        &self.unknown_addresses
    }

    /// Accesses to model-specific registers that do not exist.
    pub const fn unknown_msrs(&self) -> &AccessLog<u32> {
        &self.unknown_msrs
    }

    fn read_byte(&mut self, device: PortDevice, port: u16) -> u8 {
        match device {
            PortDevice::Pic => match self.pic.peek(port) {
                Some(value) => value,
                None => self.access_pic(|pic| pic.read(port)),
            },
            PortDevice::Pit => self.pit.read(port),
            PortDevice::SystemControl => self.pit.read_system_control(),
            // The index cannot be read.
            PortDevice::Rtc if port == rtc::DATA_PORT => {
                // Reading the flags clears them.
                self.touch_timers();
                self.rtc.read()
            }
            PortDevice::PowerManagement => self.power_management.read(port),
            PortDevice::Serial => self.serial.read(port - serial::PORT),
            PortDevice::DebugExit => 0,
            PortDevice::FwCfg if port == fw_cfg::DATA_PORT => self.fw_cfg.read(),
            PortDevice::ResetControl => self.reset_control.read(),
            PortDevice::PciData => self.pci.read_data(port),
            PortDevice::Rtc | PortDevice::FwCfg | PortDevice::PciAddress | PortDevice::Keyboard => {
                0xff
            }
        }
    }

    fn write_byte(&mut self, device: PortDevice, port: u16, value: u8) {
        match device {
            PortDevice::Pic => self.access_pic(|pic| pic.write(port, value)),
            PortDevice::Pit => {
                self.touch_timers();
                self.pit.write(port, value);
                self.pit_output = self.pit.output();
            }
            PortDevice::SystemControl => self.pit.write_system_control(value),
            PortDevice::Rtc if port == rtc::INDEX_PORT => self.rtc.select(value),
            PortDevice::Rtc => {
                self.touch_timers();
                self.rtc.write(value);
            }
            PortDevice::PowerManagement => {
                self.touch_timers();
                let shutdown = self.power_management.write(port, value);
                self.end(shutdown);
            }
            PortDevice::Serial => {
                if let Some(byte) = self.serial.write(port - serial::PORT, value) {
                    self.console.write(byte);
                }
            }
            PortDevice::DebugExit => self.end(Some(Shutdown::DebugExit(value.into()))),
            PortDevice::ResetControl => {
                let shutdown = self.reset_control.write(value);
                self.end(shutdown);
            }
            PortDevice::Keyboard => {
                let shutdown = if port == keyboard::DATA_PORT {
                    self.keyboard.data(value)
                } else {
                    self.keyboard.command(value)
                };
                self.end(shutdown);
            }
            // The selector takes words, the address register double words; data of items and of PCI
            // functions cannot be written.
            PortDevice::FwCfg | PortDevice::PciAddress | PortDevice::PciData => {}
        }
    }

    /// Carries on what an access to a device can have changed.
    fn update_after(&mut self, device: PortDevice) {
        match device {
            PortDevice::Pit
            | PortDevice::Rtc
            | PortDevice::PowerManagement
            | PortDevice::Serial => self.update_lines(),
            // These have no line; what else they change is noted at once.
            PortDevice::Pic
            | PortDevice::SystemControl
            | PortDevice::DebugExit
            | PortDevice::FwCfg
            | PortDevice::ResetControl
            | PortDevice::PciAddress
            | PortDevice::PciData
            | PortDevice::Keyboard => {}
        }
    }

    /// Accesses the i8259 pair, which changes no device's output: the processors look up only if the
    /// pair's own changes.
    #[inline]
    fn access_pic<R>(&mut self, access: impl FnOnce(&mut Pic) -> R) -> R {
        let (masks, pending) = (self.pic.masks(), self.pic.is_pending());
        let result = access(&mut self.pic);
        if self.pic.masks() != masks {
            self.touch_timers();
        }
        if self.deliver_tick() || self.pic.is_pending() != pending {
            self.update_processors();
        }
        result
    }

    /// Remembers the first way in which the guest ended itself.
    fn end(&mut self, shutdown: Option<Shutdown>) {
        self.shutdown = self.shutdown.or(shutdown);
        self.update_processors();
    }

    #[inline]
    fn processor(&self) -> &Processor {
        &self.processors[self.served.index()]
    }

    #[inline]
    fn processor_mut(&mut self) -> &mut Processor {
        &mut self.processors[self.served.index()]
    }

    /// Notes for every processor that the next deadline may have changed.
    fn touch_timers(&mut self) {
        for processor in &mut self.processors {
            processor.timers = Timers::Touched;
        }
    }

    fn log_unknown_port(&mut self, port: u16, width: IoWidth) {
        if self.unknown_ports.record(port) == Sighting::First {
            log::warn!("the guest uses port {port:#x} ({width:?}), where no device is");
        }
    }
}

/// The ports that an access touches; `None` past the last port.
fn ports(first: u16, width: IoWidth) -> impl Iterator<Item = Option<u16>> {
    (0..u16::from(width.bytes())).map(move |offset| first.checked_add(offset))
}

#[cfg(test)]
mod tests;
