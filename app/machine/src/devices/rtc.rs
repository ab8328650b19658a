//! The CMOS real-time clock (Motorola MC146818A data sheet, with the PC's century at 0x32).
//!
//! The clock starts at the time that the machine's maker gives and runs with guest time. While the
//! SET bit or the divider holds it, the time registers are plain memory; when it is let go, it runs on
//! from what they hold.

use crate::time::GuestTime;

use super::Level;

/// The port that selects a register.
pub const INDEX_PORT: u16 = 0x70;
/// The port of the selected register.
pub const DATA_PORT: u16 = 0x71;
/// The register that holds the century.
pub const CENTURY_INDEX: u8 = register::CENTURY as u8;
/// The clock's interrupt line.
pub const IRQ: u8 = 8;

const SECOND: u64 = 1_000_000_000;
/// The update-in-progress bit is set this long before the registers change, and while they do.
const UPDATE_TIME: u64 = 2_228_000;
/// The first second after the divider is let go comes after half a second.
const AFTER_DIVIDER_RESET: u64 = SECOND / 2;
const SECONDS_PER_DAY: i64 = 86_400;

mod register {
    pub const SECONDS: usize = 0x00;
    pub const SECONDS_ALARM: usize = 0x01;
    pub const MINUTES: usize = 0x02;
    pub const MINUTES_ALARM: usize = 0x03;
    pub const HOURS: usize = 0x04;
    pub const HOURS_ALARM: usize = 0x05;
    pub const DAY_OF_WEEK: usize = 0x06;
    pub const DAY: usize = 0x07;
    pub const MONTH: usize = 0x08;
    pub const YEAR: usize = 0x09;
    pub const A: usize = 0x0a;
    pub const B: usize = 0x0b;
    pub const C: usize = 0x0c;
    pub const D: usize = 0x0d;
    pub const CENTURY: usize = 0x32;
}

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const A_DIVIDER: u8 = 0x70;
const A_DIVIDER_RESET: u8 = 0x60;
const A_RATE: u8 = 0x0f;

const B_SET: u8 = 1 << 7;
const B_INTERRUPTS: u8 = C_PERIODIC | C_ALARM | C_UPDATE;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;

const C_INTERRUPT: u8 = 1 << 7;
const C_PERIODIC: u8 = 1 << 6;
const C_ALARM: u8 = 1 << 5;
const C_UPDATE: u8 = 1 << 4;

const D_VALID: u8 = 1 << 7;
const HOURS_AFTERNOON: u8 = 1 << 7;

/// A broken-down time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: i64,
    month: i64,
    day: i64,
    seconds_of_day: u64,
}

impl Calendar {
    /// Days since 1970-01-01 in the Gregorian calendar; out-of-range days carry over.
    fn days(self) -> i64 {
        let (year, month) = if self.month <= 2 {
            (self.year - 1, self.month + 9)
        } else {
            (self.year, self.month - 3)
        };
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * month + 2) / 5 + self.day - 1;
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year
            - 719_468
    }

    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_PER_DAY) + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * day_of_year + 2) / 153;
        let (year_carry, calendar_month) = if month < 10 {
            (0, month + 3)
        } else {
            (1, month - 9)
        };
        Self {
            year: year_of_era + era * 400 + year_carry,
            month: calendar_month,
            day: day_of_year - (153 * month + 2) / 5 + 1,
            seconds_of_day: seconds.rem_euclid(SECONDS_PER_DAY).unsigned_abs(),
        }
    }

    fn to_unix(self) -> i64 {
        self.days() * SECONDS_PER_DAY + self.seconds_of_day.cast_signed()
    }
}

/// The clock with its 128 bytes of memory.
#[derive(Clone, Debug)]
pub struct Rtc {
    memory: [u8; 128],
    index: u8,
    flags: u8,
    /// Unix time at `second_start`, the last start of a second before which all was accounted for.
    unix_time: i64,
    second_start: GuestTime,
    periodic_from: GuestTime,
    day_of_week_shift: i64,
    now: GuestTime,
}

impl Rtc {
    /// A clock that shows `unix_time`, in seconds since 1970-01-01 UTC, when the machine starts.
    pub fn new(unix_time: u64) -> Self {
        // The registers hold the years 0000 to 9999.
        let last = Calendar {
            year: 9999,
            month: 12,
            day: 31,
            seconds_of_day: 0,
        };
        let mut rtc = Self {
            memory: [0; 128],
            index: 0,
            flags: 0,
            unix_time: last
                .to_unix()
                .min(i64::try_from(unix_time).unwrap_or(i64::MAX)),
            second_start: GuestTime::START,
            periodic_from: GuestTime::START,
            day_of_week_shift: 0,
            now: GuestTime::START,
        };
        rtc.memory[register::A] = 0x26;
        rtc.memory[register::B] = B_24_HOURS;
        rtc.memory[register::D] = D_VALID;
        rtc.store_time();
        rtc
    }

    /// Sets a byte of the memory that firmware leaves; the clock's own registers stay.
    pub fn set_memory(&mut self, index: u8, value: u8) {
        if index > register::D as u8 && usize::from(index) != register::CENTURY {
            self.memory[usize::from(index & 0x7f)] = value;
        }
    }

    /// Lets time pass up to `now`.
    pub fn advance(&mut self, now: GuestTime) {
        let before = self.now;
        self.now = before.max(now);
        if let Some(period) = self.period() {
            let periods = |time: GuestTime| time.since(self.periodic_from) / period;
            if periods(self.now) != periods(before) {
                self.flags |= C_PERIODIC;
            }
        }
        if self.is_divider_reset() {
            return;
        }
        let seconds = self.now.since(self.second_start) / SECOND;
        if seconds == 0 {
            return;
        }
        self.second_start = self.second_start.after(seconds * SECOND);
        if self.is_set() {
            return;
        }
        self.flags |= C_UPDATE;
        if self.alarm_in_next(seconds) {
            self.flags |= C_ALARM;
        }
        self.unix_time = self.unix_time.saturating_add_unsigned(seconds);
        self.store_time();
    }

    /// The interrupt line.
    pub const fn interrupt(&self) -> Level {
        Level::high_if(self.flags & self.memory[register::B] & B_INTERRUPTS != 0)
    }

    /// When an enabled interrupt may come next.
    pub fn next_deadline(&self) -> Option<GuestTime> {
        let enabled = self.memory[register::B] & B_INTERRUPTS & !self.flags;
        let periodic = self
            .period()
            .filter(|_| enabled & C_PERIODIC != 0)
            .map(|period| {
                let periods = self.now.since(self.periodic_from) / period + 1;
                self.periodic_from.after(period.saturating_mul(periods))
            });
        let runs = !self.is_set() && !self.is_divider_reset();
        let second =
            (runs && enabled & (C_UPDATE | C_ALARM) != 0).then(|| self.second_start.after(SECOND));
        periodic.into_iter().chain(second).min()
    }

    /// Writes [`INDEX_PORT`]. Bit 7 would mask the NMI, which no device here raises.
    pub const fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads [`DATA_PORT`].
    pub fn read(&mut self) -> u8 {
        match usize::from(self.index) {
            register::A => {
                let running = !self.is_set() && !self.is_divider_reset();
                let until_update = SECOND.saturating_sub(self.now.since(self.second_start));
                let updating = running && until_update <= UPDATE_TIME;
                self.memory[register::A] | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            register::C => {
                let interrupt = self.interrupt().is_high();
                core::mem::take(&mut self.flags) | if interrupt { C_INTERRUPT } else { 0 }
            }
            index => self.memory[index],
        }
    }

    /// Writes [`DATA_PORT`].
    pub fn write(&mut self, value: u8) {
        let index = usize::from(self.index);
        match index {
            register::A => self.write_a(value),
            register::B => self.write_b(value),
            register::C | register::D => {}
            register::SECONDS
            | register::MINUTES
            | register::HOURS
            | register::DAY_OF_WEEK..=register::YEAR
            | register::CENTURY => {
                self.memory[index] = value;
                if !self.is_set() {
                    self.load_time();
                }
            }
            _ => self.memory[index] = value,
        }
    }

    fn write_a(&mut self, value: u8) {
        let was_reset = self.is_divider_reset();
        let rate = self.memory[register::A] & A_RATE;
        self.memory[register::A] = value & (A_DIVIDER | A_RATE);
        if was_reset && !self.is_divider_reset() {
            let phase = SECOND - AFTER_DIVIDER_RESET;
            let start = self.now.as_nanoseconds().saturating_sub(phase);
            self.second_start = GuestTime::from_nanoseconds(start);
        }
        if was_reset || rate != value & A_RATE {
            self.periodic_from = self.now;
        }
    }

    fn write_b(&mut self, value: u8) {
        let was_set = self.is_set();
        // Setting SET also takes back the update interrupt's enable.
        let value = if value & B_SET != 0 {
            value & !C_UPDATE
        } else {
            value
        };
        self.memory[register::B] = value;
        if was_set && !self.is_set() {
            self.load_time();
        }
    }

    const fn is_set(&self) -> bool {
        self.memory[register::B] & B_SET != 0
    }

    const fn is_divider_reset(&self) -> bool {
        self.memory[register::A] & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    /// The period of the periodic interrupt in nanoseconds.
    const fn period(&self) -> Option<u64> {
        if self.is_divider_reset() {
            return None;
        }
        match self.memory[register::A] & A_RATE {
            0 => None,
            // With a 32 kHz crystal the two fastest rates are those of 8 and 9.
            rate @ 1..=2 => Some((SECOND << (rate + 6)) / 32_768),
            rate => Some((SECOND << (rate - 1)) / 32_768),
        }
    }

    fn is_binary(&self) -> bool {
        self.memory[register::B] & B_BINARY != 0
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.is_binary() {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> i64 {
        if self.is_binary() {
            value.into()
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u64) -> u8 {
        if self.memory[register::B] & B_24_HOURS != 0 {
            return self.encode(hour.cast_signed());
        }
        let half_day = match hour % 12 {
            0 => 12,
            hour => hour.cast_signed(),
        };
        self.encode(half_day) | if hour >= 12 { HOURS_AFTERNOON } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.memory[register::B] & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & HOURS_AFTERNOON != 0 { 12 } else { 0 };
        self.decode(value & !HOURS_AFTERNOON) % 12 + afternoon
    }

    /// Time → registers.
    fn store_time(&mut self) {
        let calendar = Calendar::from_unix(self.unix_time);
        let time = calendar.seconds_of_day;
        self.memory[register::SECONDS] = self.encode((time % 60).cast_signed());
        self.memory[register::MINUTES] = self.encode((time / 60 % 60).cast_signed());
        self.memory[register::HOURS] = self.encode_hour(time / 3600);
        // 1970-01-01 was a Thursday, day 5 of 1 to 7.
        let day_of_week = (calendar.days() + 4 + self.day_of_week_shift).rem_euclid(7) + 1;
        self.memory[register::DAY_OF_WEEK] = self.encode(day_of_week);
        self.memory[register::DAY] = self.encode(calendar.day);
        self.memory[register::MONTH] = self.encode(calendar.month);
        self.memory[register::YEAR] = self.encode(calendar.year);
        self.memory[register::CENTURY] = self.encode(calendar.year.div_euclid(100));
    }

    /// Registers → time. What no clock shows, such as month 0, counts as the nearest that exists.
    fn load_time(&mut self) {
        let field = |index: usize| self.decode(self.memory[index]);
        let calendar = Calendar {
            year: field(register::CENTURY).min(99) * 100 + field(register::YEAR).min(99),
            month: field(register::MONTH).clamp(1, 12),
            day: field(register::DAY).clamp(1, 31),
            seconds_of_day: (self.decode_hour(self.memory[register::HOURS]).min(23) * 3600
                + field(register::MINUTES).min(59) * 60
                + field(register::SECONDS).min(59))
            .unsigned_abs(),
        };
        let shift = field(register::DAY_OF_WEEK) - 1 - (calendar.days() + 4);
        self.day_of_week_shift = shift.rem_euclid(7);
        self.unix_time = calendar.to_unix();
    }

    /// Whether the alarm matches one of the next `seconds` seconds.
    fn alarm_in_next(&self, seconds: u64) -> bool {
        let now = Calendar::from_unix(self.unix_time).seconds_of_day;
        // An alarm field of 0xc0 or more matches anything.
        let matches = |alarm: usize, value: u8| {
            let alarm = self.memory[alarm];
            alarm >= 0xc0 || alarm == value
        };
        (1..=seconds.min(SECONDS_PER_DAY.unsigned_abs())).any(|later| {
            let time = (now + later) % SECONDS_PER_DAY.unsigned_abs();
            matches(
                register::SECONDS_ALARM,
                self.encode((time % 60).cast_signed()),
            ) && matches(
                register::MINUTES_ALARM,
                self.encode((time / 60 % 60).cast_signed()),
            ) && matches(register::HOURS_ALARM, self.encode_hour(time / 3600))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-28 23:59:58 UTC, a Wednesday.
    const LEAP_EVE: u64 = 1_709_164_798;

    fn at(nanoseconds: u64) -> GuestTime {
        GuestTime::from_nanoseconds(nanoseconds)
    }

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.select(index);
        rtc.read()
    }

    fn write(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.select(index);
        rtc.write(value);
    }

    /// Century, year, month, day, hours, minutes, seconds.
    fn time(rtc: &mut Rtc) -> [u8; 7] {
        [0x32, 9, 8, 7, 4, 2, 0].map(|index| read(rtc, index))
    }

    #[test]
    fn shows_bcd_and_rolls_over_into_a_leap_day() {
        let mut rtc = Rtc::new(LEAP_EVE);
        assert_eq!(time(&mut rtc), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58]);
        assert_eq!(read(&mut rtc, 6), 4);
        rtc.advance(at(2 * SECOND));
        assert_eq!(time(&mut rtc), [0x20, 0x24, 0x02, 0x29, 0x00, 0x00, 0x00]);
        assert_eq!(read(&mut rtc, 6), 5);
    }

    #[test]
    fn binary_and_twelve_hours() {
        let mut rtc = Rtc::new(LEAP_EVE);
        write(&mut rtc, 0x0b, 0x04);
        rtc.advance(at(SECOND));
        assert_eq!(time(&mut rtc), [20, 24, 2, 28, 0x8b, 59, 59]);
        rtc.advance(at(2 * SECOND));
        assert_eq!(read(&mut rtc, 4), 12, "midnight is 12 AM");
    }

    #[test]
    fn the_set_bit_holds_the_clock() {
        let mut rtc = Rtc::new(LEAP_EVE);
        write(&mut rtc, 0x0b, 0x92);
        assert_eq!(read(&mut rtc, 0x0b), 0x82, "setting SET clears UIE");
        rtc.advance(at(10 * SECOND));
        assert_eq!(read(&mut rtc, 0), 0x58);
        for (index, value) in [
            (0x32, 0x19),
            (9, 0x99),
            (8, 0x12),
            (7, 0x31),
            (4, 0x23),
            (2, 0x59),
            (0, 0x59),
        ] {
            write(&mut rtc, index, value);
        }
        write(&mut rtc, 0x0b, 0x02);
        rtc.advance(at(11 * SECOND));
        assert_eq!(time(&mut rtc), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn the_divider_reset_starts_a_second_in_its_middle() {
        let mut rtc = Rtc::new(LEAP_EVE);
        write(&mut rtc, 0x0a, 0x70);
        rtc.advance(at(5 * SECOND));
        assert_eq!(read(&mut rtc, 0), 0x58);
        write(&mut rtc, 0x0a, 0x26);
        rtc.advance(at(5 * SECOND + SECOND / 2 - 1));
        assert_eq!(read(&mut rtc, 0), 0x58);
        rtc.advance(at(5 * SECOND + SECOND / 2));
        assert_eq!(read(&mut rtc, 0), 0x59);
    }

    #[test]
    fn update_in_progress_precedes_the_update() {
        let mut rtc = Rtc::new(LEAP_EVE);
        assert_eq!(read(&mut rtc, 0x0a), 0x26);
        rtc.advance(at(SECOND - 1_000_000));
        assert_eq!(read(&mut rtc, 0x0a), 0xa6);
        assert_eq!(read(&mut rtc, 0), 0x58);
        rtc.advance(at(SECOND));
        assert_eq!(read(&mut rtc, 0x0a), 0x26);
        assert_eq!(read(&mut rtc, 0), 0x59);
    }

    #[test]
    fn update_interrupts_until_the_flags_are_read() {
        let mut rtc = Rtc::new(LEAP_EVE);
        assert_eq!(rtc.next_deadline(), None);
        write(&mut rtc, 0x0b, 0x12);
        assert_eq!(rtc.next_deadline(), Some(at(SECOND)));
        rtc.advance(at(SECOND));
        assert_eq!(rtc.interrupt(), Level::High);
        assert_eq!(
            read(&mut rtc, 0x0c),
            0xd0,
            "the periodic flag too, though not enabled"
        );
        assert_eq!(rtc.interrupt(), Level::Low);
        assert_eq!(read(&mut rtc, 0x0c), 0x00);
    }

    #[test]
    fn the_periodic_interrupt_has_the_chosen_rate() {
        let mut rtc = Rtc::new(LEAP_EVE);
        write(&mut rtc, 0x0b, 0x42);
        for period in [976_562_u64, 2 * 976_562] {
            assert_eq!(rtc.next_deadline(), Some(at(period)));
            rtc.advance(at(period - 1));
            assert_eq!(rtc.interrupt(), Level::Low);
            rtc.advance(at(period));
            assert_eq!(rtc.interrupt(), Level::High);
            assert_eq!(read(&mut rtc, 0x0c) & 0xc0, 0xc0);
        }
    }

    #[test]
    fn the_alarm_matches_with_wildcards() {
        for (alarm, fires) in [
            ([0x00, 0x00, 0x00], true),
            ([0x00, 0xc0, 0xff], true),
            ([0x59, 0x59, 0xff], true),
            ([0x57, 0x59, 0x23], false),
        ] {
            let mut rtc = Rtc::new(LEAP_EVE);
            for (index, value) in [1, 3, 5].into_iter().zip(alarm) {
                write(&mut rtc, index, value);
            }
            write(&mut rtc, 0x0b, 0x22);
            rtc.advance(at(2 * SECOND));
            assert_eq!(rtc.interrupt().is_high(), fires, "{alarm:x?}");
        }
    }

    #[test]
    fn read_only_registers_and_memory() {
        let mut rtc = Rtc::new(LEAP_EVE);
        rtc.set_memory(0x34, 0x12);
        rtc.set_memory(0x00, 0x12);
        write(&mut rtc, 0x0c, 0xff);
        write(&mut rtc, 0x0d, 0x00);
        write(&mut rtc, 0x8f, 0x5a);
        assert_eq!(
            [0x34, 0x00, 0x0c, 0x0d, 0x0f].map(|index| read(&mut rtc, index)),
            [0x12, 0x58, 0x00, 0x80, 0x5a]
        );
    }

    #[test]
    fn days_and_dates_agree_for_ten_thousand_years() {
        for day in (-719_528..2_932_897).step_by(7) {
            let calendar = Calendar::from_unix(day * SECONDS_PER_DAY);
            assert_eq!(calendar.days(), day);
        }
        assert_eq!(Calendar::from_unix(951_782_400).day, 29, "2000-02-29");
    }
}
