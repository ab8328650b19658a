//! The i8254 interval timer and system control port B (0x61) that gates its channel 2 (Intel 8254
//! data sheet; port 0x61 as in the ICH9 data sheet, 13.7.1).
//!
//! No counter ticks: each value follows from the time since its count was loaded. A count written to
//! a running periodic channel takes effect at the end of the period (for mode 3 too, whose data
//! sheet says half-period).

use crate::time::{GuestTime, nanoseconds_for, ticks_in};

use super::Level;

/// The first counter's port; the control port is the fourth.
pub const PORT: u16 = 0x40;
/// The control port.
pub const CONTROL_PORT: u16 = 0x43;
/// System control port B.
pub const SYSTEM_CONTROL_PORT: u16 = 0x61;
/// Channel 0's interrupt line.
pub const IRQ: u8 = 0;
/// Ticks per second.
pub const FREQUENCY: u64 = 1_193_182;

/// More rises than this are not remembered.
const MOST_RISES: u64 = 1000;
/// Nanoseconds between two toggles of the DRAM refresh bit.
const REFRESH_INTERVAL: u64 = 15_085;

mod system_control {
    pub const GATE_2: u8 = 1 << 0;
    pub const WRITABLE: u8 = 0x0f;
    pub const REFRESH: u8 = 1 << 4;
    pub const OUT_2: u8 = 1 << 5;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    InterruptOnTerminalCount,
    OneShot,
    RateGenerator,
    SquareWave,
    SoftwareStrobe,
    HardwareStrobe,
}

impl Mode {
    const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::InterruptOnTerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::RateGenerator,
            3 | 7 => Self::SquareWave,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    const fn is_periodic(self) -> bool {
        matches!(self, Self::RateGenerator | Self::SquareWave)
    }

    /// Counting starts with the gate's rising edge, not with the count.
    const fn is_triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Byte {
    Low,
    High,
}

/// Where the counting element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counting {
    /// No count has been loaded, or the trigger has not come.
    Waiting,
    /// Since this tick.
    Since(u64),
    /// Stopped by the gate after this many ticks.
    Suspended(u64),
}

#[derive(Clone, Debug)]
struct Channel {
    mode: Mode,
    access: Access,
    bcd: bool,
    gate: Level,
    /// The count in the counting element, 1 to 65536.
    count: u64,
    /// The count register, if it was not moved to the counting element yet.
    next_count: Option<u64>,
    counting: Counting,
    low_byte: u8,
    write_next: Byte,
    read_next: Byte,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    /// Mode 3 with the count 65536, as firmware leaves channel 0.
    const fn new(gate: Level) -> Self {
        Self {
            mode: Mode::SquareWave,
            access: Access::LowThenHigh,
            bcd: false,
            gate,
            count: 0x1_0000,
            next_count: None,
            counting: Counting::Since(0),
            low_byte: 0,
            write_next: Byte::Low,
            read_next: Byte::Low,
            latched_count: None,
            latched_status: None,
        }
    }

    const fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// Loads a count that waited for the end of a period before `tick`.
    fn settle(&mut self, tick: u64) {
        if self.mode.is_periodic()
            && let (Some(next), Counting::Since(start)) = (self.next_count, self.counting)
        {
            let end = start.saturating_add(self.count);
            if tick >= end {
                self.count = next;
                self.next_count = None;
                self.counting = Counting::Since(end);
            }
        }
    }

    fn elapsed(&self, tick: u64) -> Option<u64> {
        match self.counting {
            Counting::Waiting => None,
            Counting::Since(start) => Some(tick.saturating_sub(start)),
            Counting::Suspended(elapsed) => Some(elapsed),
        }
    }

    fn output(&self, tick: u64) -> Level {
        let idle = self.mode != Mode::InterruptOnTerminalCount;
        let Some(elapsed) = self.elapsed(tick) else {
            return Level::high_if(idle);
        };
        if self.mode.is_periodic() && !self.gate.is_high() {
            return Level::High;
        }
        Level::high_if(match self.mode {
            Mode::InterruptOnTerminalCount | Mode::OneShot => elapsed >= self.count,
            Mode::RateGenerator => elapsed % self.count != self.count - 1,
            Mode::SquareWave => elapsed % self.count < self.count.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != self.count,
        })
    }

    /// The first tick after `tick` at which the output rises.
    fn next_rise(&self, tick: u64) -> Option<u64> {
        let Counting::Since(start) = self.counting else {
            return None;
        };
        let once = |at: u64| (at > tick).then_some(at);
        match self.mode {
            Mode::InterruptOnTerminalCount | Mode::OneShot => {
                once(start.saturating_add(self.count))
            }
            Mode::SoftwareStrobe | Mode::HardwareStrobe => {
                once(start.saturating_add(self.count).saturating_add(1))
            }
            Mode::RateGenerator | Mode::SquareWave => {
                // The chip does not count from 1 in these modes.
                if !self.gate.is_high() || self.count == 1 {
                    return None;
                }
                let periods = tick.saturating_sub(start) / self.count + 1;
                Some(start.saturating_add(periods.saturating_mul(self.count)))
            }
        }
    }

    /// How often the output rises after `from` and not after `to`.
    fn rises_between(&self, from: u64, to: u64) -> u64 {
        match (self.next_rise(from), self.counting) {
            (Some(first), _) if first > to => 0,
            (Some(first), Counting::Since(_)) if self.mode.is_periodic() => {
                (to - first) / self.count + 1
            }
            (next, _) => u64::from(next.is_some()),
        }
    }

    fn current_count(&self, tick: u64) -> u16 {
        let elapsed = self.elapsed(tick).unwrap_or(0);
        let value = match self.mode {
            Mode::RateGenerator => self.count - elapsed % self.count,
            Mode::SquareWave => {
                let phase = elapsed % self.count;
                let high = self.count.div_ceil(2);
                let in_half = if phase < high { phase } else { phase - high };
                (self.count & !1).saturating_sub(2 * in_half)
            }
            _ => {
                let modulus = self.modulus();
                (self.count % modulus + modulus - elapsed % modulus) % modulus
            }
        };
        self.encode(value)
    }

    fn encode(&self, value: u64) -> u16 {
        let value = value % self.modulus();
        if self.bcd {
            let digit = |power: u64| (value / power % 10) as u16;
            digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
        } else {
            value as u16
        }
    }

    fn decode(&self, value: u16) -> u64 {
        let count = if self.bcd {
            let digit = |position: u32| u64::from(value >> (4 * position) & 0xf);
            (digit(3) * 1000 + digit(2) * 100 + digit(1) * 10 + digit(0)) % 10_000
        } else {
            u64::from(value)
        };
        if count == 0 { self.modulus() } else { count }
    }

    fn status(&self, tick: u64) -> u8 {
        let mode = match self.mode {
            Mode::InterruptOnTerminalCount => 0,
            Mode::OneShot => 1,
            Mode::RateGenerator => 2,
            Mode::SquareWave => 3,
            Mode::SoftwareStrobe => 4,
            Mode::HardwareStrobe => 5,
        };
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        };
        let null = self.next_count.is_some()
            || self.counting == Counting::Waiting && !self.mode.is_triggered();
        u8::from(self.output(tick).is_high()) << 7
            | u8::from(null) << 6
            | access << 4
            | mode << 1
            | u8::from(self.bcd)
    }

    fn set_mode(&mut self, control: u8) {
        self.mode = Mode::from_bits(control >> 1);
        self.bcd = control & 1 != 0;
        (self.access, self.write_next) = match control >> 4 & 3 {
            1 => (Access::Low, Byte::Low),
            2 => (Access::High, Byte::High),
            _ => (Access::LowThenHigh, Byte::Low),
        };
        self.read_next = self.write_next;
        self.counting = Counting::Waiting;
        self.next_count = None;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn latch_count(&mut self, tick: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.current_count(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            self.latched_status = Some(self.status(tick));
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self
            .latched_count
            .unwrap_or_else(|| self.current_count(tick));
        let [low, high] = count.to_le_bytes();
        let byte = match self.read_next {
            Byte::Low => low,
            Byte::High => high,
        };
        let last = self.access != Access::LowThenHigh || self.read_next == Byte::High;
        if self.access == Access::LowThenHigh {
            self.read_next = other(self.read_next);
        }
        if last {
            self.latched_count = None;
        }
        byte
    }

    fn write(&mut self, tick: u64, value: u8) {
        let count = match (self.access, self.write_next) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::LowThenHigh, Byte::Low) => {
                self.low_byte = value;
                self.write_next = Byte::High;
                if self.mode == Mode::InterruptOnTerminalCount {
                    // The first byte stops the count and lowers the output.
                    self.counting = Counting::Waiting;
                }
                return;
            }
            (Access::LowThenHigh, Byte::High) => {
                self.write_next = Byte::Low;
                u16::from_le_bytes([self.low_byte, value])
            }
        };
        self.load(tick, self.decode(count));
    }

    fn load(&mut self, tick: u64, count: u64) {
        let running = self.counting != Counting::Waiting;
        if self.mode.is_triggered() || self.mode.is_periodic() && running {
            self.next_count = Some(count);
            return;
        }
        self.count = count;
        self.next_count = None;
        self.counting = if self.gate.is_high() {
            Counting::Since(tick)
        } else {
            Counting::Suspended(0)
        };
    }

    fn set_gate(&mut self, tick: u64, gate: Level) {
        let rises = gate.is_high() && !self.gate.is_high();
        let falls = !gate.is_high() && self.gate.is_high();
        self.gate = gate;
        match self.mode {
            Mode::InterruptOnTerminalCount | Mode::SoftwareStrobe => match self.counting {
                Counting::Since(start) if falls => {
                    self.counting = Counting::Suspended(tick.saturating_sub(start));
                }
                Counting::Suspended(elapsed) if rises => {
                    self.counting = Counting::Since(tick.saturating_sub(elapsed));
                }
                _ => {}
            },
            Mode::OneShot | Mode::HardwareStrobe => {
                let loaded = self.next_count.is_some() || self.counting != Counting::Waiting;
                if rises && loaded {
                    self.restart(tick);
                }
            }
            Mode::RateGenerator | Mode::SquareWave => {
                if rises && self.counting != Counting::Waiting {
                    self.restart(tick);
                } else if falls && let Counting::Since(start) = self.counting {
                    self.counting = Counting::Suspended(tick.saturating_sub(start));
                }
            }
        }
    }

    fn restart(&mut self, tick: u64) {
        self.count = self.next_count.take().unwrap_or(self.count);
        self.counting = Counting::Since(tick);
    }
}

const fn other(byte: Byte) -> Byte {
    match byte {
        Byte::Low => Byte::High,
        Byte::High => Byte::Low,
    }
}

/// The three counters and port 0x61.
#[derive(Clone, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    system_control: u8,
    now: GuestTime,
    /// Rises of channel 0's output that nobody has taken.
    rises: u64,
}

impl Default for Pit {
    fn default() -> Self {
        Self {
            channels: [
                Channel::new(Level::High),
                Channel::new(Level::High),
                Channel::new(Level::Low),
            ],
            system_control: 0,
            now: GuestTime::START,
            rises: 0,
        }
    }
}

impl Pit {
    /// Lets time pass up to `now`.
    pub fn advance(&mut self, now: GuestTime) {
        let before = self.tick();
        self.now = self.now.max(now);
        let after = self.tick();
        let channel = &mut self.channels[0];
        // At most one new count waits, so two steps see every rise.
        let first = channel.next_rise(before).filter(|&rise| rise <= after);
        channel.settle(after);
        let rises =
            u64::from(first.is_some()) + channel.rises_between(first.unwrap_or(before), after);
        self.rises = self.rises.saturating_add(rises).min(MOST_RISES);
        self.channels[1].settle(after);
        self.channels[2].settle(after);
    }

    /// Whether [`Pit::take_rise`] has one to take.
    pub const fn has_rises(&self) -> bool {
        self.rises != 0
    }

    /// Takes one of the rises of channel 0's output, if there were any: an edge of its interrupt line,
    /// which may have fallen again.
    pub const fn take_rise(&mut self) -> bool {
        let rose = self.rises != 0;
        self.rises = self.rises.saturating_sub(1);
        rose
    }

    /// Forgets the rises that nobody has taken.
    pub const fn forget_rises(&mut self) {
        self.rises = 0;
    }

    /// Channel 0's output: the interrupt line.
    pub fn output(&self) -> Level {
        self.channels[0].output(self.tick())
    }

    /// When channel 0's output will rise next.
    pub fn next_deadline(&self) -> Option<GuestTime> {
        let rise = self.channels[0].next_rise(self.tick())?;
        Some(GuestTime::from_nanoseconds(nanoseconds_for(
            rise, FREQUENCY,
        )))
    }

    /// Reads a counter (0x40 to 0x42); the control port cannot be read.
    pub fn read(&mut self, port: u16) -> u8 {
        let tick = self.tick();
        match self.channels.get_mut(usize::from(port.wrapping_sub(PORT))) {
            Some(channel) => channel.read(tick),
            None => 0xff,
        }
    }

    /// Writes a counter or the control port.
    pub fn write(&mut self, port: u16, value: u8) {
        let tick = self.tick();
        let before = self.output();
        match self.channels.get_mut(usize::from(port.wrapping_sub(PORT))) {
            Some(channel) => channel.write(tick, value),
            None => self.write_control(tick, value),
        }
        if port == PORT || port == CONTROL_PORT && value & 0xf0 <= 0x30 && value & 0x30 != 0 {
            // What the old count owes is not the new one's.
            self.rises = 0;
        }
        self.rises += u64::from(!before.is_high() && self.output().is_high());
    }

    /// Reads port 0x61.
    pub fn read_system_control(&self) -> u8 {
        let mut value = self.system_control;
        let refreshes = self.now.as_nanoseconds() / REFRESH_INTERVAL;
        if !refreshes.is_multiple_of(2) {
            value |= system_control::REFRESH;
        }
        if self.channels[2].output(self.tick()).is_high() {
            value |= system_control::OUT_2;
        }
        value
    }

    /// Writes port 0x61.
    pub fn write_system_control(&mut self, value: u8) {
        let tick = self.tick();
        self.system_control = value & system_control::WRITABLE;
        let gate = Level::high_if(value & system_control::GATE_2 != 0);
        self.channels[2].set_gate(tick, gate);
    }

    fn write_control(&mut self, tick: u64, value: u8) {
        let selected = value >> 6;
        if let Some(channel) = self.channels.get_mut(usize::from(selected)) {
            if value & 0x30 == 0 {
                channel.latch_count(tick);
            } else {
                channel.set_mode(value);
            }
            return;
        }
        for (position, channel) in self.channels.iter_mut().enumerate() {
            if value & (2 << position) != 0 {
                if value & 0x10 == 0 {
                    channel.latch_status(tick);
                }
                if value & 0x20 == 0 {
                    channel.latch_count(tick);
                }
            }
        }
    }

    const fn tick(&self) -> u64 {
        ticks_in(self.now.as_nanoseconds(), FREQUENCY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_tick(tick: u64) -> GuestTime {
        GuestTime::from_nanoseconds(nanoseconds_for(tick, FREQUENCY))
    }

    fn programmed(channel: u16, control: u8, count: u16) -> Pit {
        let mut pit = Pit::default();
        pit.write(CONTROL_PORT, (channel as u8) << 6 | control);
        for byte in count.to_le_bytes() {
            pit.write(PORT + channel, byte);
        }
        pit.take_rise();
        pit
    }

    fn read_word(pit: &mut Pit, port: u16) -> u16 {
        let low = pit.read(port);
        u16::from_le_bytes([low, pit.read(port)])
    }

    #[test]
    fn mode_0_rises_once_at_terminal_count() {
        let mut pit = programmed(0, 0x30, 1000);
        assert_eq!(pit.output(), Level::Low);
        assert_eq!(pit.next_deadline(), Some(at_tick(1000)));
        pit.advance(at_tick(999));
        assert_eq!((pit.output(), pit.take_rise()), (Level::Low, false));
        assert_eq!(read_word(&mut pit, 0x40), 1);
        pit.advance(at_tick(1000));
        assert_eq!((pit.output(), pit.take_rise()), (Level::High, true));
        pit.advance(at_tick(70_000));
        assert!(!pit.take_rise());
        assert_eq!(pit.next_deadline(), None);
        assert_eq!(
            read_word(&mut pit, 0x40),
            1000_u16.wrapping_sub((70_000 % 0x1_0000) as u16)
        );
    }

    #[test]
    fn mode_2_rises_every_period_and_dips_for_one_tick() {
        let mut pit = programmed(0, 0x34, 100);
        pit.advance(at_tick(98));
        assert_eq!((pit.output(), read_word(&mut pit, 0x40)), (Level::High, 2));
        pit.advance(at_tick(99));
        assert_eq!((pit.output(), read_word(&mut pit, 0x40)), (Level::Low, 1));
        pit.advance(at_tick(100));
        assert_eq!(
            (pit.output(), read_word(&mut pit, 0x40)),
            (Level::High, 100)
        );
        assert!(pit.take_rise());
        assert_eq!(pit.next_deadline(), Some(at_tick(200)));
        pit.advance(at_tick(350));
        assert!(pit.take_rise() && pit.take_rise());
        assert!(!pit.take_rise(), "one for each period");
        pit.advance(at_tick(1 << 40));
        for _ in 0..MOST_RISES {
            assert!(pit.take_rise());
        }
        assert!(!pit.take_rise(), "but not for ever");
        pit.advance(at_tick((1 << 40) + 1000));
        pit.write(CONTROL_PORT, 0x30);
        assert!(!pit.take_rise(), "a new mode owes nothing");
    }

    #[test]
    fn mode_3_is_a_square_wave_that_counts_by_two() {
        for (count, high) in [(100, 50), (101, 51)] {
            let mut pit = programmed(0, 0x36, count);
            assert_eq!(read_word(&mut pit, 0x40), 100);
            pit.advance(at_tick(high - 1));
            assert_eq!(pit.output(), Level::High);
            pit.advance(at_tick(high));
            assert_eq!((pit.output(), read_word(&mut pit, 0x40)), (Level::Low, 100));
            assert!(!pit.take_rise());
            pit.advance(at_tick(u64::from(count)));
            assert_eq!((pit.output(), pit.take_rise()), (Level::High, true));
        }
    }

    #[test]
    fn a_new_count_waits_for_the_end_of_the_period() {
        let mut pit = programmed(0, 0x34, 100);
        pit.advance(at_tick(10));
        for byte in [50, 0] {
            pit.write(0x40, byte);
        }
        pit.write(CONTROL_PORT, 0xe2);
        assert_eq!(pit.read(0x40) & 0x40, 0x40, "null count");
        assert_eq!(pit.next_deadline(), Some(at_tick(100)));
        pit.advance(at_tick(100));
        assert!(pit.take_rise());
        assert_eq!(pit.next_deadline(), Some(at_tick(150)));
    }

    #[test]
    fn latched_counts_hold_until_read() {
        let mut pit = programmed(0, 0x34, 0x1234);
        pit.advance(at_tick(0x34));
        pit.write(CONTROL_PORT, 0x00);
        pit.advance(at_tick(0x134));
        pit.write(CONTROL_PORT, 0x00);
        assert_eq!(read_word(&mut pit, 0x40), 0x1200);
        assert_eq!(read_word(&mut pit, 0x40), 0x1100);
    }

    #[test]
    fn read_back_latches_status_before_count() {
        let mut pit = programmed(0, 0x34, 0x1234);
        pit.advance(at_tick(4));
        pit.write(CONTROL_PORT, 0xc2);
        assert_eq!(pit.read(0x40), 0xb4, "output high, low then high, mode 2");
        assert_eq!(read_word(&mut pit, 0x40), 0x1230);
        pit.write(CONTROL_PORT, 0xd2);
        assert_eq!(read_word(&mut pit, 0x40), 0x1230, "only the count");
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut pit = programmed(0, 0x31, 0x1000);
        pit.advance(at_tick(1));
        assert_eq!(read_word(&mut pit, 0x40), 0x0999);
        let mut pit = programmed(0, 0x35, 0);
        pit.advance(at_tick(1));
        assert_eq!(read_word(&mut pit, 0x40), 0x9999);
        let mut pit = programmed(0, 0x35, 0xffff);
        pit.advance(at_tick(1));
        assert_eq!(pit.read(0x40) & 0x0f, 4);
    }

    #[test]
    fn single_byte_access_modes() {
        let mut pit = Pit::default();
        pit.write(CONTROL_PORT, 0x14);
        pit.write(0x40, 0x80);
        assert_eq!((pit.read(0x40), pit.read(0x40)), (0x80, 0x80));
        pit.write(CONTROL_PORT, 0x24);
        pit.write(0x40, 0x80);
        assert_eq!(pit.read(0x40), 0x80);
        assert_eq!(pit.next_deadline(), Some(at_tick(0x8000)));
    }

    #[test]
    fn channel_2_calibrates_by_port_61() {
        // As Linux measures the time-stamp counter.
        let mut pit = Pit::default();
        pit.write_system_control(0x01);
        pit.write(CONTROL_PORT, 0xb0);
        for byte in 0x2e9c_u16.to_le_bytes() {
            pit.write(0x42, byte);
        }
        assert_eq!(pit.read_system_control() & 0x21, 0x01);
        pit.advance(at_tick(0x2e9b));
        assert_eq!(pit.read_system_control() & 0x20, 0);
        pit.advance(at_tick(0x2e9c));
        assert_eq!(pit.read_system_control() & 0x20, 0x20);
    }

    #[test]
    fn the_gate_suspends_mode_0_and_restarts_mode_2() {
        let mut pit = Pit::default();
        pit.write_system_control(1);
        pit.write(CONTROL_PORT, 0xb0);
        for byte in [100, 0] {
            pit.write(0x42, byte);
        }
        pit.advance(at_tick(40));
        pit.write_system_control(0);
        pit.advance(at_tick(1000));
        assert_eq!(read_word(&mut pit, 0x42), 60);
        pit.write_system_control(1);
        pit.advance(at_tick(1060));
        assert_eq!(pit.read_system_control() & 0x20, 0x20);

        pit.write(CONTROL_PORT, 0xb4);
        for byte in [100, 0] {
            pit.write(0x42, byte);
        }
        pit.advance(at_tick(1159));
        assert_eq!(pit.read_system_control() & 0x20, 0);
        pit.write_system_control(0);
        assert_eq!(
            pit.read_system_control() & 0x20,
            0x20,
            "a low gate raises the output"
        );
        pit.write_system_control(1);
        assert_eq!(read_word(&mut pit, 0x42), 100);
    }

    #[test]
    fn one_shot_needs_the_gate() {
        let mut pit = programmed(2, 0x32, 100);
        pit.advance(at_tick(500));
        assert_eq!(pit.read_system_control() & 0x20, 0x20, "not triggered");
        pit.write_system_control(1);
        assert_eq!(pit.read_system_control() & 0x20, 0);
        pit.advance(at_tick(600));
        assert_eq!(pit.read_system_control() & 0x20, 0x20);
    }
}
