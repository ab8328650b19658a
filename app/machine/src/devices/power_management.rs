//! ACPI's fixed hardware: the PM1a event and control registers, the power management timer, and the
//! SMI command port that takes the machine into ACPI mode and back (ACPI 6.3, 4.8.2 and 4.8.3).
//!
//! Registers are bytes to the bus. Status bits are cleared by writing ones to them. There is no
//! power button, no wake event and no sleeping state but S5, in which the machine is off.

use crate::Shutdown;
use crate::time::{GuestTime, nanoseconds_for, ticks_in};

use super::Level;

/// The first port of the PM1a event registers: status, then enable, two bytes each.
pub const EVENT_PORT: u16 = 0x600;
/// The size of the PM1a event registers in bytes.
pub const EVENT_LENGTH: u8 = 4;
/// The first port of the PM1a control register.
pub const CONTROL_PORT: u16 = 0x604;
/// The size of the PM1a control register in bytes.
pub const CONTROL_LENGTH: u8 = 2;
/// The first port of the timer.
pub const TIMER_PORT: u16 = 0x608;
/// The size of the timer in bytes: it counts 32 bits.
pub const TIMER_LENGTH: u8 = 4;
/// The SMI command port.
pub const COMMAND_PORT: u16 = 0xb2;
/// What to write to [`COMMAND_PORT`] for ACPI mode.
pub const ENABLE: u8 = 0xf1;
/// What to write to [`COMMAND_PORT`] for legacy mode.
pub const DISABLE: u8 = 0xf0;
/// The interrupt line of ACPI's events: level-triggered, active high.
pub const IRQ: u8 = 9;
/// Ticks of the timer per second.
pub const FREQUENCY: u64 = 3_579_545;
/// The sleep type that switches off.
pub const SLEEP_TYPE_S5: u8 = 0;

const LAST_TIMER_PORT: u16 = TIMER_PORT + TIMER_LENGTH as u16 - 1;
/// The timer's status bit is set whenever its highest bit changes.
const TICKS_PER_EVENT: u64 = 1 << 31;

const STATUS_TIMER: u16 = 1 << 0;
/// The timer, the global lock, and power button, sleep button and clock, which never come.
const ENABLE_WRITABLE: u16 = STATUS_TIMER | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;

const CONTROL_SCI_ENABLE: u16 = 1 << 0;
/// Bus master reload and the sleep type are kept; global release and sleep enable read as zero.
const CONTROL_WRITABLE: u16 = 1 << 1 | 0b111 << SLEEP_TYPE_SHIFT;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Which port of the device: the bus cuts accesses into bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Status,
    Enable,
    Control,
    Timer,
}

/// The register at a port and the number of its byte.
const fn register_at(port: u16) -> Option<(Register, usize)> {
    let (register, first) = match port {
        0x600..=0x601 => (Register::Status, EVENT_PORT),
        0x602..=0x603 => (Register::Enable, EVENT_PORT + 2),
        0x604..=0x605 => (Register::Control, CONTROL_PORT),
        TIMER_PORT..=LAST_TIMER_PORT => (Register::Timer, TIMER_PORT),
        _ => return None,
    };
    Some((register, (port - first) as usize))
}

/// Whether the device answers at `port`.
pub const fn owns(port: u16) -> bool {
    port == COMMAND_PORT || register_at(port).is_some()
}

/// The power management registers.
#[derive(Clone, Debug, Default)]
pub struct PowerManagement {
    now: GuestTime,
    status: u16,
    enable: u16,
    control: u16,
    command: u8,
}

impl PowerManagement {
    /// Lets time pass up to `now`.
    pub fn advance(&mut self, now: GuestTime) {
        let before = self.ticks();
        self.now = self.now.max(now);
        if before / TICKS_PER_EVENT != self.ticks() / TICKS_PER_EVENT {
            self.status |= STATUS_TIMER;
        }
    }

    /// The interrupt line: it goes nowhere but in ACPI mode.
    pub const fn interrupt(&self) -> Level {
        Level::high_if(self.control & CONTROL_SCI_ENABLE != 0 && self.status & self.enable != 0)
    }

    /// When the timer interrupts next, if it may.
    pub fn next_deadline(&self) -> Option<GuestTime> {
        let waits = self.control & CONTROL_SCI_ENABLE != 0
            && self.enable & !self.status & STATUS_TIMER != 0;
        waits.then(|| {
            let events = self.ticks() / TICKS_PER_EVENT + 1;
            let ticks = events.saturating_mul(TICKS_PER_EVENT);
            GuestTime::from_nanoseconds(nanoseconds_for(ticks, FREQUENCY))
        })
    }

    /// Reads the byte at `port`.
    pub fn read(&self, port: u16) -> u8 {
        match register_at(port) {
            Some((Register::Status, byte)) => self.status.to_le_bytes()[byte],
            Some((Register::Enable, byte)) => self.enable.to_le_bytes()[byte],
            Some((Register::Control, byte)) => self.control.to_le_bytes()[byte],
            Some((Register::Timer, byte)) => (self.ticks() as u32).to_le_bytes()[byte],
            None if port == COMMAND_PORT => self.command,
            None => 0xff,
        }
    }

    /// Writes the byte at `port`.
    pub fn write(&mut self, port: u16, value: u8) -> Option<Shutdown> {
        let shifted = |byte: usize| u16::from(value) << (8 * byte);
        let kept = |byte: usize| !(0xff << (8 * byte));
        match register_at(port) {
            Some((Register::Status, byte)) => self.status &= !shifted(byte),
            Some((Register::Enable, byte)) => {
                self.enable = (self.enable & kept(byte) | shifted(byte)) & ENABLE_WRITABLE;
            }
            Some((Register::Control, byte)) => {
                let written = self.control & kept(byte) | shifted(byte);
                let mode = self.control & CONTROL_SCI_ENABLE;
                self.control = written & CONTROL_WRITABLE | mode;
                let sleep_type = (written >> SLEEP_TYPE_SHIFT & 7) as u8;
                let sleeps = shifted(byte) & SLEEP_ENABLE != 0;
                return (sleeps && sleep_type == SLEEP_TYPE_S5).then_some(Shutdown::PowerOff);
            }
            None if port == COMMAND_PORT => {
                self.command = value;
                match value {
                    ENABLE => self.control |= CONTROL_SCI_ENABLE,
                    DISABLE => self.control &= !CONTROL_SCI_ENABLE,
                    _ => {}
                }
            }
            Some((Register::Timer, _)) | None => {}
        }
        None
    }

    const fn ticks(&self) -> u64 {
        ticks_in(self.now.as_nanoseconds(), FREQUENCY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_word(device: &mut PowerManagement, port: u16, value: u16) -> Option<Shutdown> {
        let [low, high] = value.to_le_bytes();
        let first = device.write(port, low);
        first.or(device.write(port + 1, high))
    }

    fn read_word(device: &PowerManagement, port: u16) -> u16 {
        u16::from_le_bytes([device.read(port), device.read(port + 1)])
    }

    fn timer(device: &PowerManagement) -> u32 {
        u32::from_le_bytes(core::array::from_fn(|byte| {
            device.read(TIMER_PORT + byte as u16)
        }))
    }

    #[test]
    fn the_timer_counts_its_frequency_in_32_bits() {
        let mut device = PowerManagement::default();
        device.advance(GuestTime::from_seconds(1));
        assert_eq!(timer(&device), 3_579_545);
        device.advance(GuestTime::from_seconds(0));
        assert_eq!(timer(&device), 3_579_545, "never backwards");
        device.advance(GuestTime::from_seconds(1200));
        assert_eq!(u64::from(timer(&device)), 1200 * FREQUENCY - (1 << 32));
    }

    #[test]
    fn the_highest_bit_interrupts_in_acpi_mode() {
        let mut device = PowerManagement::default();
        assert_eq!(device.next_deadline(), None);
        write_word(&mut device, 0x602, 0xffff);
        assert_eq!(read_word(&device, 0x602), ENABLE_WRITABLE);
        assert_eq!(device.next_deadline(), None, "not in ACPI mode");
        device.write(COMMAND_PORT, ENABLE);
        assert_eq!(read_word(&device, 0x604), 1);
        for event in 1..4 {
            let deadline = device.next_deadline().expect("the timer is enabled");
            device.advance(GuestTime::from_nanoseconds(deadline.as_nanoseconds() - 1));
            assert_eq!(device.interrupt(), Level::Low);
            device.advance(deadline);
            assert_eq!(
                u64::from(timer(&device)),
                event * TICKS_PER_EVENT % (1 << 32)
            );
            assert_eq!(device.interrupt(), Level::High);
            assert_eq!(
                device.next_deadline(),
                None,
                "nothing new until it is served"
            );
            write_word(&mut device, 0x600, STATUS_TIMER);
            assert_eq!(device.interrupt(), Level::Low);
        }
        device.write(COMMAND_PORT, DISABLE);
        assert_eq!(
            (read_word(&device, 0x604), device.next_deadline()),
            (0, None)
        );
    }

    #[test]
    fn only_s5_switches_off() {
        let mut device = PowerManagement::default();
        device.write(COMMAND_PORT, ENABLE);
        assert_eq!(
            write_word(&mut device, CONTROL_PORT, 1 << 10 | SLEEP_ENABLE),
            None
        );
        assert_eq!(
            read_word(&device, CONTROL_PORT),
            1 << 10 | 1,
            "sleep enable reads as zero and the mode stays"
        );
        assert_eq!(write_word(&mut device, CONTROL_PORT, 0x0004), None);
        assert_eq!(
            write_word(&mut device, CONTROL_PORT, SLEEP_ENABLE),
            Some(Shutdown::PowerOff)
        );
    }
}
