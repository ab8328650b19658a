//! KVM's paravirtual clock, by which guests know the time-stamp counter's frequency without
//! measuring it (Linux's Documentation/virt/kvm/x86: cpuid.rst and msr.rst).
//!
//! A guest finds KVM's signature at [`LEAF`], the first of the hypervisor's leaves. It also learns
//! there that it need not wait between accesses to ports, and by which call it interrupts several
//! processors at once.
//!
//! Protocol: the guest names a place in its memory by a model-specific register. What must be written
//! there waits in [`Paravirtual::take_write`]; the run loop carries it out before the guest goes on.

use core::arch::x86_64::CpuidResult;

use umbra_vcpu::address::Gpa;

use super::msr::MsrAccess;
use crate::time::{GuestTime, TimeBase};

/// The leaf that holds the signature; the next holds the features.
pub const LEAF: u32 = 0x4000_0000;
/// What [`LEAF`] says in EBX, ECX and EDX.
const SIGNATURE: [u32; 3] = [
    u32::from_le_bytes(*b"KVMK"),
    u32::from_le_bytes(*b"VMKV"),
    u32::from_le_bytes(*b"M\0\0\0"),
];
/// Accesses to ports need no delay.
const FEATURE_NO_IO_DELAY: u32 = 1 << 1;
/// The clock is there, at [`WALL_CLOCK`] and [`SYSTEM_TIME`].
const FEATURE_CLOCK: u32 = 1 << 3;
/// [`CALL_SEND_IPI`] is there.
const FEATURE_SEND_IPI: u32 = 1 << 11;
/// The clock is the same on all processors.
const FEATURE_CLOCK_STABLE: u32 = 1 << 24;

/// The hypercall that interrupts several processors.
pub const CALL_SEND_IPI: u64 = 10;
/// Results of hypercalls that failed, as KVM numbers them.
pub mod call_error {
    /// There is no such call.
    pub const UNKNOWN: i64 = -1000;
    /// An argument is not allowed.
    pub const INVALID: i64 = -22;
    /// Only the kernel may call.
    pub const NOT_PERMITTED: i64 = -1;
}

/// Where to write the wall clock of the machine's start.
pub const WALL_CLOCK: u32 = 0x4b56_4d00;
/// Where to keep the relation of the time-stamp counter to the time since the machine's start.
pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
/// In [`SYSTEM_TIME`]: the clock is on.
const ENABLE: u64 = 1;
/// The flag in the clock that says the same as [`FEATURE_CLOCK_STABLE`].
const STABLE: u8 = 1;
const WALL_CLOCK_SIZE: usize = 12;
const SYSTEM_TIME_SIZE: usize = 32;
const NANOSECONDS_PER_SECOND: u128 = 1_000_000_000;

const FEATURES: u32 = FEATURE_NO_IO_DELAY | FEATURE_CLOCK | FEATURE_CLOCK_STABLE;

/// Answers CPUID for KVM's leaves, in a machine with so many processors.
pub const fn cpuid(leaf: u32, processors: u8) -> Option<CpuidResult> {
    match leaf {
        LEAF => Some(CpuidResult {
            eax: LEAF + 1,
            ebx: SIGNATURE[0],
            ecx: SIGNATURE[1],
            edx: SIGNATURE[2],
        }),
        _ if leaf == LEAF + 1 => Some(CpuidResult {
            eax: if processors > 1 {
                FEATURES | FEATURE_SEND_IPI
            } else {
                FEATURES
            },
            ebx: 0,
            ecx: 0,
            edx: 0,
        }),
        _ => None,
    }
}

/// Bytes that must be written to the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryWrite {
    /// Where they go.
    pub at: Gpa,
    bytes: [u8; SYSTEM_TIME_SIZE],
    length: usize,
}

impl MemoryWrite {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The clock's registers.
#[derive(Clone, Debug, Default)]
pub struct Paravirtual {
    start_unix_time: u64,
    wall_clock: u64,
    system_time: u64,
    /// Grows by two with every write of the clock: an odd version would be one in the making.
    version: u32,
    wall_clock_due: bool,
    system_time_due: bool,
}

impl Paravirtual {
    /// Sets the time at which the machine started, in seconds since 1970-01-01 UTC.
    pub const fn set_start(&mut self, unix_time: u64) {
        self.start_unix_time = unix_time;
    }

    /// Whether `number` is one of the registers here.
    pub const fn has(number: u32) -> bool {
        matches!(number, WALL_CLOCK | SYSTEM_TIME)
    }

    /// RDMSR.
    ///
    /// # Errors
    /// [`MsrAccess::Unknown`] if the register is none of these.
    pub const fn read(&self, number: u32) -> Result<u64, MsrAccess> {
        match number {
            WALL_CLOCK => Ok(self.wall_clock),
            SYSTEM_TIME => Ok(self.system_time),
            _ => Err(MsrAccess::Unknown),
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    /// [`MsrAccess::Unknown`] if the register is none of these.
    pub const fn write(&mut self, number: u32, value: u64) -> Result<(), MsrAccess> {
        match number {
            WALL_CLOCK => {
                self.wall_clock = value;
                self.wall_clock_due = true;
            }
            SYSTEM_TIME => {
                self.system_time = value;
                self.system_time_due = value & ENABLE != 0;
            }
            _ => return Err(MsrAccess::Unknown),
        }
        Ok(())
    }

    /// The guest's time-stamp counter has jumped.
    pub const fn counter_jumped(&mut self) {
        self.system_time_due = self.system_time & ENABLE != 0;
    }

    /// What must be written to the guest's memory now, if anything: the guest's counter is the
    /// host's plus `tsc_offset`.
    pub fn take_write(
        &mut self,
        time_base: &TimeBase,
        now: GuestTime,
        tsc_offset: i64,
    ) -> Option<MemoryWrite> {
        if core::mem::take(&mut self.wall_clock_due) {
            let version = self.next_version();
            let seconds = self.start_unix_time as u32;
            return Some(memory_write::<WALL_CLOCK_SIZE>(
                self.wall_clock,
                &[&version.to_le_bytes(), &seconds.to_le_bytes(), &[0; 4]],
            ));
        }
        if core::mem::take(&mut self.system_time_due) {
            let version = self.next_version();
            let counter = time_base.counter_at(now).wrapping_add_signed(tsc_offset);
            let (multiplier, shift) = scale(time_base.frequency());
            return Some(memory_write::<SYSTEM_TIME_SIZE>(
                self.system_time & !ENABLE,
                &[
                    &version.to_le_bytes(),
                    &[0; 4],
                    &counter.to_le_bytes(),
                    &now.as_nanoseconds().to_le_bytes(),
                    &multiplier.to_le_bytes(),
                    &shift.to_le_bytes(),
                    &[STABLE, 0, 0],
                ],
            ));
        }
        None
    }

    const fn next_version(&mut self) -> u32 {
        self.version = self.version.wrapping_add(2);
        self.version
    }
}

fn memory_write<const N: usize>(at: u64, fields: &[&[u8]]) -> MemoryWrite {
    let mut bytes = [0; SYSTEM_TIME_SIZE];
    let values = fields.iter().flat_map(|field| field.iter());
    for (byte, value) in bytes.iter_mut().zip(values) {
        *byte = *value;
    }
    MemoryWrite {
        at: Gpa::new(at),
        bytes,
        length: N,
    }
}

/// A multiplier and a shift: nanoseconds are ticks, shifted left by `shift` (right if it is
/// negative), times the multiplier, divided by 2^32. The multiplier is as large, so as exact, as 32
/// bits allow.
fn scale(frequency: u64) -> (u32, i8) {
    const SMALLEST: i8 = -31;
    const LARGEST: i8 = 31;
    for shift in SMALLEST..LARGEST {
        let shifted = NANOSECONDS_PER_SECOND << (32 - i32::from(shift));
        if let Ok(multiplier) = u32::try_from(shifted / u128::from(frequency.max(1))) {
            return (multiplier, shift);
        }
    }
    (u32::MAX, LARGEST)
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use proptest::prelude::*;

    const FREQUENCY: u64 = 2_400_000_123;

    fn word(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(*bytes[offset..].first_chunk().expect("enough bytes"))
    }

    fn double(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(*bytes[offset..].first_chunk().expect("enough bytes"))
    }

    /// What a guest makes of its counter.
    fn nanoseconds(ticks: u64, multiplier: u32, shift: i8) -> u64 {
        let ticks = if shift < 0 {
            ticks >> -shift
        } else {
            ticks << shift
        };
        ((u128::from(ticks) * u128::from(multiplier)) >> 32) as u64
    }

    #[test]
    fn the_signature_is_kvm_s() {
        let leaf = cpuid(LEAF, 1).expect("the signature");
        let signature: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(signature, b"KVMKVMKVM\0\0\0");
        assert_eq!(leaf.eax, LEAF + 1);
        let features = |processors| cpuid(LEAF + 1, processors).expect("features").eax;
        assert_eq!((features(1), features(2)), (0x100_000a, 0x100_080a));
        assert_eq!(cpuid(LEAF + 2, 1), None);
    }

    #[test]
    fn nothing_is_written_before_it_is_asked_for() {
        let mut clock = Paravirtual::default();
        let base = TimeBase::new(1000, FREQUENCY);
        clock.counter_jumped();
        assert_eq!(clock.take_write(&base, GuestTime::START, 0), None);
        assert_eq!(clock.write(SYSTEM_TIME, 0x5000), Ok(()));
        assert_eq!(clock.take_write(&base, GuestTime::START, 0), None, "off");
        assert_eq!(clock.read(SYSTEM_TIME), Ok(0x5000));
        assert_eq!(clock.write(SYSTEM_TIME + 1, 0), Err(MsrAccess::Unknown));
    }

    #[test]
    fn the_clock_is_written_on_and_after_a_jump() {
        let mut clock = Paravirtual::default();
        let base = TimeBase::new(1000, FREQUENCY);
        let now = GuestTime::from_seconds(3);
        assert_eq!(clock.write(SYSTEM_TIME, 0x5001), Ok(()));
        let write = clock.take_write(&base, now, -1000).expect("the clock");
        let bytes = write.bytes();
        assert_eq!((write.at, bytes.len()), (Gpa::new(0x5000), 32));
        assert_eq!(word(bytes, 0), 2);
        assert_eq!(double(bytes, 8), 3 * FREQUENCY);
        assert_eq!(double(bytes, 16), 3_000_000_000);
        assert_eq!(bytes[29], 1);
        assert_eq!(clock.take_write(&base, now, -1000), None);
        clock.counter_jumped();
        let write = clock.take_write(&base, now, 77).expect("the clock");
        assert_eq!(word(write.bytes(), 0), 4);
        assert_eq!(double(write.bytes(), 8), 3 * FREQUENCY + 1077);
    }

    #[test]
    fn the_wall_clock_is_that_of_the_start() {
        let mut clock = Paravirtual::default();
        clock.set_start(1_700_000_000);
        assert_eq!(clock.write(WALL_CLOCK, 0x6000), Ok(()));
        let base = TimeBase::new(0, FREQUENCY);
        let write = clock.take_write(&base, GuestTime::from_seconds(9), 0);
        let write = write.expect("the wall clock");
        assert_eq!((write.at, write.bytes().len()), (Gpa::new(0x6000), 12));
        assert_eq!(word(write.bytes(), 0), 2);
        assert_eq!(word(write.bytes(), 4), 1_700_000_000);
        assert_eq!(word(write.bytes(), 8), 0);
    }

    proptest! {
        #[test]
        fn an_hour_is_an_hour(frequency in 1_000_000..10_000_000_000_u64) {
            let (multiplier, shift) = scale(frequency);
            let hour = nanoseconds(frequency * 3600, multiplier, shift);
            prop_assert!(hour.abs_diff(3_600_000_000_000) < 10_000, "{hour}");
            prop_assert!(multiplier >= 1 << 31);
        }

        #[test]
        fn any_frequency_has_a_scale(frequency: u64) {
            let _ = scale(frequency);
        }
    }
}
