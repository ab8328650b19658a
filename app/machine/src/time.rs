//! Guest time, and its relation to the host's time-stamp counter.
//!
//! All devices share one time line: nanoseconds since the machine was made. It never runs
//! backwards. Only [`TimeBase`] knows the time-stamp counter.

const NANOSECONDS_PER_SECOND: u128 = 1_000_000_000;

/// A moment in guest time: nanoseconds since the machine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestTime(u64);

impl GuestTime {
    /// The moment in which the machine was made.
    pub const START: Self = Self(0);

    /// The moment this many nanoseconds after the start.
    pub const fn from_nanoseconds(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    /// The moment this many seconds after the start.
    pub const fn from_seconds(seconds: u64) -> Self {
        Self(seconds.saturating_mul(1_000_000_000))
    }

    /// Nanoseconds since the start.
    pub const fn as_nanoseconds(self) -> u64 {
        self.0
    }

    /// Nanoseconds since `earlier`, zero if that is later.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The moment `nanoseconds` later, at most the end of time.
    pub const fn after(self, nanoseconds: u64) -> Self {
        Self(self.0.saturating_add(nanoseconds))
    }
}

/// Ticks of an oscillator of `frequency` hertz in `nanoseconds`, rounded down.
pub(crate) const fn ticks_in(nanoseconds: u64, frequency: u64) -> u64 {
    saturate(nanoseconds as u128 * frequency as u128 / NANOSECONDS_PER_SECOND)
}

/// The first nanosecond in which `ticks` ticks of an oscillator of `frequency` hertz have passed.
pub(crate) const fn nanoseconds_for(ticks: u64, frequency: u64) -> u64 {
    let frequency = if frequency == 0 { 1 } else { frequency };
    saturate((ticks as u128 * NANOSECONDS_PER_SECOND).div_ceil(frequency as u128))
}

const fn saturate(value: u128) -> u64 {
    if value > u64::MAX as u128 {
        u64::MAX
    } else {
        value as u64
    }
}

/// Converts between the host's time-stamp counter and guest time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeBase {
    origin: u64,
    frequency: u64,
}

impl TimeBase {
    /// Guest time starts when the host's counter is at `origin`; it counts `frequency` ticks a
    /// second (zero counts as one).
    pub const fn new(origin: u64, frequency: u64) -> Self {
        Self {
            origin,
            frequency: if frequency == 0 { 1 } else { frequency },
        }
    }

    /// Ticks of the time-stamp counter per second.
    pub const fn frequency(&self) -> u64 {
        self.frequency
    }

    /// The guest time at which the host's counter stands at `counter`.
    pub const fn time_at(&self, counter: u64) -> GuestTime {
        let ticks = counter.saturating_sub(self.origin);
        GuestTime(saturate(
            ticks as u128 * NANOSECONDS_PER_SECOND / self.frequency as u128,
        ))
    }

    /// The first guest time at which the host's counter has reached `counter`.
    pub const fn deadline_at(&self, counter: u64) -> GuestTime {
        GuestTime(nanoseconds_for(
            counter.saturating_sub(self.origin),
            self.frequency,
        ))
    }

    /// The value of the host's counter at which `time` has come.
    pub const fn counter_at(&self, time: GuestTime) -> u64 {
        let ticks = (time.0 as u128 * self.frequency as u128).div_ceil(NANOSECONDS_PER_SECOND);
        self.origin.saturating_add(saturate(ticks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_deadline_has_come_when_the_counter_says_so(
            origin in 0..u64::MAX / 4,
            frequency in 1..10_000_000_000_u64,
            ticks in 0..1_u64 << 50,
        ) {
            let base = TimeBase::new(origin, frequency);
            let deadline = base.deadline_at(origin + ticks);
            prop_assert!(base.time_at(base.counter_at(deadline)) >= deadline);
            prop_assert!(base.counter_at(deadline) >= origin + ticks);
        }

        #[test]
        fn any_values_convert_without_overflow(a: u64, b: u64, c: u64) {
            let base = TimeBase::new(a, b);
            let _ = base.deadline_at(c);
            let _ = base.counter_at(base.time_at(c));
            prop_assert!(base.time_at(c) <= base.time_at(c.saturating_add(1)));
        }
    }

    #[test]
    fn one_second_of_ticks_is_one_second() {
        let base = TimeBase::new(77, 2_400_000_000);
        assert_eq!(base.time_at(77 + 2_400_000_000), GuestTime::from_seconds(1));
        assert_eq!(
            base.counter_at(GuestTime::from_seconds(1)),
            77 + 2_400_000_000
        );
        assert_eq!(ticks_in(1_000_000_000, 1_193_182), 1_193_182);
    }
}
