//! The bus: which device answers at which port and address, and how their lines are connected.
//!
//! As on an ISA bus, an access wider than a device is cut into bytes that go to consecutive ports;
//! where nobody answers, reads float to all ones and writes vanish.

use alloc::boxed::Box;

use umbra_vcpu::address::Gpa;
use umbra_vcpu::event::Exception;
use umbra_vcpu::exit::IoWidth;

use crate::access_log::{AccessLog, Sighting};
use crate::devices::debug_exit;
use crate::devices::keyboard::{self, KeyboardReset};
use crate::devices::reset_control::{self, ResetControl};
use crate::devices::serial::{self, Serial};
use crate::processor::features::GuestFeatures;
use crate::processor::msr::{MsrAccess, MsrContext, MsrEffect, Msrs};
use crate::time::{GuestTime, TimeBase};

/// Where the guest's serial output goes.
pub trait ConsoleOutput {
    /// Takes one byte.
    fn write(&mut self, byte: u8);
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
    /// The guest's processor.
    pub features: GuestFeatures,
    /// Where serial output goes.
    pub console: Box<dyn ConsoleOutput + Send>,
}

/// All devices of one guest.
pub struct Machine {
    now: GuestTime,
    time_base: TimeBase,
    console: Box<dyn ConsoleOutput + Send>,
    shutdown: Option<Shutdown>,
    msrs: Msrs,
    serial: Serial,
    reset_control: ResetControl,
    keyboard: KeyboardReset,
    unknown_ports: AccessLog<u16>,
    unknown_addresses: AccessLog<Gpa>,
    unknown_msrs: AccessLog<u32>,
}

/// Who answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PortDevice {
    Serial,
    DebugExit,
    ResetControl,
    Keyboard,
}

fn device_at(port: u16) -> Option<PortDevice> {
    Some(match port {
        keyboard::DATA_PORT | keyboard::COMMAND_PORT => PortDevice::Keyboard,
        debug_exit::PORT..=debug_exit::LAST_PORT => PortDevice::DebugExit,
        serial::PORT..=serial::LAST_PORT => PortDevice::Serial,
        reset_control::PORT => PortDevice::ResetControl,
        _ => return None,
    })
}

impl Machine {
    /// A machine that has just been switched on and left by its firmware.
    pub fn new(configuration: Configuration) -> Self {
        let Configuration {
            time_base,
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
            msrs: Msrs::new(features, tsc_offset),
            serial: Serial::new(),
            reset_control: ResetControl::default(),
            keyboard: KeyboardReset::default(),
            unknown_ports: AccessLog::new(),
            unknown_addresses: AccessLog::new(),
            unknown_msrs: AccessLog::new(),
        }
    }

    /// Lets time pass up to `now`; an earlier time than the last is that of the last.
    pub fn advance(&mut self, now: GuestTime) {
        self.now = self.now.max(now);
    }

    /// When the machine must be advanced again though the guest does not touch it.
    pub fn next_deadline(&self) -> Option<GuestTime> {
        None
    }

    /// Whether an interrupt waits for the guest.
    pub fn pending_interrupt(&self) -> bool {
        false
    }

    /// Hands the interrupt over: the vector that the guest takes now.
    pub fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    /// How the guest ended itself, if it did since the last call.
    pub fn take_shutdown(&mut self) -> Option<Shutdown> {
        self.shutdown.take()
    }

    /// A byte arrives from the terminal.
    pub fn receive(&mut self, byte: u8) {
        self.serial.receive(byte);
    }

    /// IN.
    pub fn read_port(&mut self, port: u16, width: IoWidth) -> u32 {
        if ports(port, width).all(|port| port.and_then(device_at).is_none()) {
            self.log_unknown_port(port, width);
            return width.mask();
        }
        ports(port, width)
            .enumerate()
            .fold(0, |value, (position, port)| {
                let byte = match port.and_then(|port| Some((port, device_at(port)?))) {
                    Some((port, device)) => self.read_byte(device, port),
                    None => 0xff,
                };
                value | u32::from(byte) << (8 * position)
            })
    }

    /// OUT.
    pub fn write_port(&mut self, port: u16, width: IoWidth, value: u32) {
        if ports(port, width).all(|port| port.and_then(device_at).is_none()) {
            self.log_unknown_port(port, width);
            return;
        }
        if port == debug_exit::PORT {
            self.shutdown = Some(Shutdown::DebugExit(value & width.mask()));
            return;
        }
        for (port, byte) in ports(port, width).zip(value.to_le_bytes()) {
            if let Some(port) = port
                && let Some(device) = device_at(port)
            {
                self.write_byte(device, port, byte);
            }
        }
    }

    /// Reads device memory at `address` into `bytes`.
    ///
    /// # Errors
    /// [`NoDevice`] if nothing is there; `bytes` are all ones then.
    pub fn read_mmio(&mut self, address: Gpa, bytes: &mut [u8]) -> Result<(), NoDevice> {
        bytes.fill(0xff);
        self.log_unknown_address(address);
        Err(NoDevice)
    }

    /// Writes `bytes` to device memory at `address`.
    ///
    /// # Errors
    /// [`NoDevice`] if nothing is there.
    pub fn write_mmio(&mut self, address: Gpa, _bytes: &[u8]) -> Result<(), NoDevice> {
        self.log_unknown_address(address);
        Err(NoDevice)
    }

    /// RDMSR.
    ///
    /// # Errors
    /// The exception that the guest gets instead.
    pub fn read_msr(&mut self, index: u32, context: &MsrContext<'_>) -> Result<u64, Exception> {
        let result = self.msrs.read(index, context);
        result.map_err(|error| self.msr_exception(index, error))
    }

    /// WRMSR.
    ///
    /// # Errors
    /// The exception that the guest gets instead.
    pub fn write_msr(
        &mut self,
        index: u32,
        value: u64,
        context: &MsrContext<'_>,
    ) -> Result<MsrEffect, Exception> {
        let result = self.msrs.write(index, value, context);
        result.map_err(|error| self.msr_exception(index, error))
    }

    /// The model-specific registers that software keeps.
    pub const fn msrs(&self) -> &Msrs {
        &self.msrs
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
            PortDevice::Serial => self.serial.read(port - serial::PORT),
            PortDevice::DebugExit => 0,
            PortDevice::ResetControl => self.reset_control.read(),
            PortDevice::Keyboard => 0xff,
        }
    }

    fn write_byte(&mut self, device: PortDevice, port: u16, value: u8) {
        let shutdown = match device {
            PortDevice::Serial => {
                if let Some(byte) = self.serial.write(port - serial::PORT, value) {
                    self.console.write(byte);
                }
                None
            }
            PortDevice::DebugExit => Some(Shutdown::DebugExit(value.into())),
            PortDevice::ResetControl => self.reset_control.write(value),
            PortDevice::Keyboard if port == keyboard::DATA_PORT => self.keyboard.data(value),
            PortDevice::Keyboard => self.keyboard.command(value),
        };
        self.shutdown = self.shutdown.or(shutdown);
    }

    fn log_unknown_port(&mut self, port: u16, width: IoWidth) {
        if self.unknown_ports.record(port) == Sighting::First {
            log::warn!("the guest uses port {port:#x} ({width:?}), where no device is");
        }
    }

    fn log_unknown_address(&mut self, address: Gpa) {
        if self.unknown_addresses.record(address.page_base()) == Sighting::First {
            log::warn!("the guest uses physical address {address:#x}, where nothing is");
        }
    }

    fn msr_exception(&mut self, index: u32, error: MsrAccess) -> Exception {
        if error == MsrAccess::Unknown && self.unknown_msrs.record(index) == Sighting::First {
            log::warn!("the guest uses model-specific register {index:#x}, which it does not have");
        }
        Exception::GENERAL_PROTECTION
    }
}

/// The ports that an access touches; `None` past the last port.
fn ports(first: u16, width: IoWidth) -> impl Iterator<Item = Option<u16>> {
    (0..u16::from(width.bytes())).map(move |offset| first.checked_add(offset))
}
