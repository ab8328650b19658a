//! The local APIC in xAPIC and x2APIC mode, with its timer (SDM vol. 3A chapter 11).
//!
//! Its ID is the number of its processor. A message that it sends is returned to the machine, which
//! gives it to its receivers. The timer counts 1 GHz before its divider. Firmware has left the first
//! processor the virtual wire: LINT0 passes the i8259 pair's interrupts on, LINT1 is the NMI, and the
//! APIC's software enable is off.

use crate::machine::ProcessorNumber;
use crate::processor::msr::ApicMode;
use crate::time::GuestTime;

/// The size of the register page in bytes.
pub const SIZE: u64 = 0x1000;

/// Version 0x14 with six local vector table entries.
const VERSION: u32 = 5 << 16 | 0x14;
const SPURIOUS_WRITABLE: u32 = 0x3ff;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const ICR_WRITABLE: u32 = 0x000c_cfff;

const LVT_MASKED: u32 = 1 << 16;
const ERROR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ERROR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Delivery modes: how a message or an event of the local vector table is taken.
pub(crate) mod delivery {
    pub const FIXED: u32 = 0;
    pub const LOWEST_PRIORITY: u32 = 1;
    pub const NMI: u32 = 4;
    pub const INIT: u32 = 5;
    pub const START_UP: u32 = 6;
    pub const EXTERNAL: u32 = 7;
}

/// Register numbers: the offset in the page divided by 16, and the MSR number less 0x800.
mod register {
    pub const ID: u16 = 0x02;
    pub const VERSION: u16 = 0x03;
    pub const TASK_PRIORITY: u16 = 0x08;
    pub const ARBITRATION_PRIORITY: u16 = 0x09;
    pub const PROCESSOR_PRIORITY: u16 = 0x0a;
    pub const END_OF_INTERRUPT: u16 = 0x0b;
    pub const REMOTE_READ: u16 = 0x0c;
    pub const LOGICAL_DESTINATION: u16 = 0x0d;
    pub const DESTINATION_FORMAT: u16 = 0x0e;
    pub const SPURIOUS: u16 = 0x0f;
    pub const IN_SERVICE: u16 = 0x10;
    pub const IN_SERVICE_LAST: u16 = 0x17;
    pub const TRIGGER_MODE: u16 = 0x18;
    pub const TRIGGER_MODE_LAST: u16 = 0x1f;
    pub const REQUEST: u16 = 0x20;
    pub const REQUEST_LAST: u16 = 0x27;
    pub const ERROR_STATUS: u16 = 0x28;
    pub const COMMAND: u16 = 0x30;
    pub const COMMAND_HIGH: u16 = 0x31;
    pub const LVT_TIMER: u16 = 0x32;
    pub const LVT_ERROR: u16 = 0x37;
    pub const INITIAL_COUNT: u16 = 0x38;
    pub const CURRENT_COUNT: u16 = 0x39;
    pub const DIVIDE: u16 = 0x3e;
    pub const SELF_IPI: u16 = 0x3f;
}

/// Positions in the local vector table, in the order of the registers.
mod lvt {
    pub const TIMER: usize = 0;
    pub const LINT0: usize = 3;
    pub const LINT1: usize = 4;
    pub const ERROR: usize = 5;
    /// What software may change of each entry: vector and mask, and where they exist the timer's
    /// mode, the delivery mode, and the pins' polarity and trigger.
    pub const WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
    /// What may be written without effect: the delivery status, and the pins' remote IRR.
    pub const READ_ONLY: [u32; 6] = [0x1000, 0x1000, 0x1000, 0x5000, 0x5000, 0x1000];
}

/// How the line of an interrupt behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// One request for each rise.
    Edge,
    /// A request as long as the line is active; the end of interrupt is told to the I/O APIC.
    Level,
}

/// A message on the APIC bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The vector, 0 to 255.
    pub vector: u8,
    /// The delivery mode's three bits.
    pub delivery: u32,
    /// Edge or level.
    pub trigger: Trigger,
    /// Whom it is for.
    pub destination: Destination,
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The local APIC with this ID.
    Physical(u32),
    /// The local APICs that a logical address names.
    Logical(u32),
    /// The sender.
    Myself,
    /// All.
    All,
    /// All but the sender.
    Others,
}

/// What a write of a register asks of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicEffect {
    /// Nothing.
    None,
    /// This message is to be sent.
    Send(Message),
    /// A level-triggered interrupt with this vector has ended: tell the I/O APIC.
    EndOfLevel(u8),
}

/// The access has no register to go to, or the value sets reserved bits: #GP(0) in x2APIC mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidAccess;

/// 256 bits, one for each vector.
#[derive(Clone, Copy, Debug, Default)]
struct VectorSet {
    words: [u32; 8],
    /// Which words are not zero, one bit each: the highest vector is asked for after each access.
    used: u8,
}

impl VectorSet {
    const EMPTY: Self = Self {
        words: [0; 8],
        used: 0,
    };

    fn insert(&mut self, vector: u8) {
        let word = usize::from(vector / 32);
        self.words[word] |= 1 << (vector % 32);
        self.used |= 1 << word;
    }

    fn remove(&mut self, vector: u8) {
        let word = usize::from(vector / 32);
        self.words[word] &= !(1 << (vector % 32));
        if self.words[word] == 0 {
            self.used &= !(1 << word);
        }
    }

    fn contains(&self, vector: u8) -> bool {
        self.words[usize::from(vector / 32)] & 1 << (vector % 32) != 0
    }

    fn highest(&self) -> Option<u8> {
        let word = self.used.checked_ilog2()?;
        let bit = self.words[word as usize].checked_ilog2()?;
        Some((32 * word + bit) as u8)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    Deadline,
}

/// The local APIC.
#[derive(Clone, Debug)]
pub struct LocalApic {
    number: ProcessorNumber,
    mode: ApicMode,
    task_priority: u8,
    logical_destination: u32,
    destination_format: u32,
    spurious: u32,
    in_service: VectorSet,
    level_triggered: VectorSet,
    requests: VectorSet,
    error_status: u32,
    new_errors: u32,
    command: u64,
    lvt: [u32; 6],
    divide: u32,
    initial_count: u32,
    /// When the initial count was written.
    count_start: GuestTime,
    /// When the timer fires next.
    timer_deadline: Option<GuestTime>,
    /// The time-stamp counter that fires the timer; zero if disarmed.
    tsc_deadline: u64,
    now: GuestTime,
    nmi: bool,
}

impl LocalApic {
    /// The local APIC of a processor as firmware leaves it.
    pub fn new(number: ProcessorNumber) -> Self {
        let mut apic = Self::reset(number, ApicMode::XApic);
        if number == ProcessorNumber::BOOT {
            apic.lvt[lvt::LINT0] = delivery::EXTERNAL << 8;
            apic.lvt[lvt::LINT1] = delivery::NMI << 8;
        }
        apic
    }

    const fn reset(number: ProcessorNumber, mode: ApicMode) -> Self {
        Self {
            number,
            mode,
            task_priority: 0,
            logical_destination: 0,
            destination_format: u32::MAX,
            spurious: 0xff,
            in_service: VectorSet::EMPTY,
            level_triggered: VectorSet::EMPTY,
            requests: VectorSet::EMPTY,
            error_status: 0,
            new_errors: 0,
            command: 0,
            lvt: [LVT_MASKED; 6],
            divide: 0,
            initial_count: 0,
            count_start: GuestTime::START,
            timer_deadline: None,
            tsc_deadline: 0,
            now: GuestTime::START,
            nmi: false,
        }
    }

    /// Changes the mode as IA32_APIC_BASE says; disabling resets all registers (SDM vol. 3A 11.4.3).
    pub fn set_mode(&mut self, mode: ApicMode) {
        if mode == ApicMode::Disabled && self.mode != mode {
            *self = Self {
                now: self.now,
                ..Self::reset(self.number, mode)
            };
        }
        if mode == ApicMode::X2Apic {
            // The ID in use has a fixed logical address (SDM vol. 3A 11.12.10.2).
            let id = self.id();
            self.logical_destination = id >> 4 << 16 | 1 << (id & 0xf);
            self.command &= 0xffff_ffff;
        }
        self.mode = mode;
    }

    /// INIT: all registers take their first values, the mode stays (SDM vol. 3A 11.4.7.3,
    /// 11.12.5.1).
    pub fn initialize(&mut self) {
        let mode = self.mode;
        *self = Self {
            now: self.now,
            ..Self::reset(self.number, mode)
        };
        self.set_mode(mode);
    }

    const fn id(&self) -> u32 {
        self.number.get() as u32
    }

    /// Lets time pass up to `now`.
    pub fn advance(&mut self, now: GuestTime) {
        self.now = self.now.max(now);
        let Some(deadline) = self.timer_deadline.filter(|&deadline| deadline <= self.now) else {
            return;
        };
        self.timer_deadline = match self.timer_mode() {
            TimerMode::Periodic => {
                let period = self.period();
                let missed = self.now.since(deadline) / period;
                Some(deadline.after(period.saturating_mul(missed + 1)))
            }
            TimerMode::OneShot => None,
            TimerMode::Deadline => {
                self.tsc_deadline = 0;
                None
            }
        };
        self.deliver_local(lvt::TIMER);
    }

    /// When the timer fires next, if anybody would notice.
    pub fn next_deadline(&self) -> Option<GuestTime> {
        let masked = self.lvt[lvt::TIMER] & LVT_MASKED != 0;
        self.timer_deadline.filter(|_| !masked)
    }

    /// Whether the i8259 pair's output passes through LINT0.
    pub const fn passes_ext_int(&self) -> bool {
        let lint0 = self.lvt[lvt::LINT0];
        lint0 & LVT_MASKED == 0 && lint0 >> 8 & 7 == delivery::EXTERNAL
    }

    /// The vector that the processor would be given now.
    pub fn pending(&self) -> Option<u8> {
        if !self.accepts_interrupts() {
            return None;
        }
        let vector = self.requests.highest()?;
        (vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    /// Hands the pending vector over to the processor.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.requests.remove(vector);
        self.in_service.insert(vector);
        Some(vector)
    }

    /// Whether `vector` waits for the processor.
    pub fn is_requested(&self, vector: u8) -> bool {
        self.requests.contains(vector)
    }

    /// Whether [`LocalApic::take_nmi`] has one to take.
    pub const fn has_nmi(&self) -> bool {
        self.nmi
    }

    /// Whether an NMI came since the last call.
    pub fn take_nmi(&mut self) -> bool {
        core::mem::take(&mut self.nmi)
    }

    /// Whether software has enabled it, so that it takes vectors.
    pub fn accepts_interrupts(&self) -> bool {
        self.mode != ApicMode::Disabled && self.spurious & SOFTWARE_ENABLE != 0
    }

    /// CR8: the upper half of the task priority.
    pub const fn task_priority_class(&self) -> u8 {
        self.task_priority >> 4
    }

    /// MOV to CR8.
    pub const fn set_task_priority_class(&mut self, class: u8) {
        self.task_priority = class << 4;
    }

    /// IA32_TSC_DEADLINE: zero if disarmed.
    pub const fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// WRMSR to IA32_TSC_DEADLINE; `time` is when the time-stamp counter reaches `value`. In other
    /// timer modes the write has no effect (SDM vol. 3A 11.5.4.1).
    pub fn set_tsc_deadline(&mut self, value: u64, time: GuestTime) {
        if self.timer_mode() != TimerMode::Deadline {
            return;
        }
        self.tsc_deadline = value;
        self.timer_deadline = (value != 0).then_some(time);
        self.advance(self.now);
    }

    /// Takes a message that is for this local APIC. INIT and start-up are the processor's.
    pub fn receive(&mut self, message: &Message) {
        match message.delivery {
            delivery::FIXED | delivery::LOWEST_PRIORITY if self.accepts_interrupts() => {
                self.request(message.vector, message.trigger);
            }
            delivery::NMI if self.mode != ApicMode::Disabled => self.nmi = true,
            // SMI is the firmware's, and external interrupts come by their own wire.
            _ => {}
        }
    }

    /// Whether reading or writing a register depends on the time, or can change when the timer fires
    /// or whether anybody notices.
    pub const fn tells_time(number: u16) -> bool {
        !matches!(
            number,
            register::ID
                | register::VERSION
                | register::TASK_PRIORITY
                | register::END_OF_INTERRUPT
                | register::LOGICAL_DESTINATION
                | register::DESTINATION_FORMAT
                | register::COMMAND
                | register::COMMAND_HIGH
                | register::SELF_IPI
        )
    }

    /// Reads memory in the register page at `offset`. Registers are 32 bits at multiples of 16.
    pub fn read_memory(&mut self, offset: u64, bytes: &mut [u8]) {
        for (position, byte) in (offset..).zip(bytes.iter_mut()) {
            let number = (position >> 4 & 0xff) as u16;
            *byte = match position & 0xf {
                lane @ 0..4 => self.read_x(number).to_le_bytes()[lane as usize],
                _ => 0,
            };
        }
    }

    /// Writes memory in the register page. Only aligned 32-bit writes reach a register.
    pub fn write_memory(&mut self, offset: u64, bytes: &[u8]) -> ApicEffect {
        match (offset & 0xf, <[u8; 4]>::try_from(bytes)) {
            (0, Ok(bytes)) => self.write_x((offset >> 4 & 0xff) as u16, u32::from_le_bytes(bytes)),
            _ => ApicEffect::None,
        }
    }

    /// RDMSR of register 0x800 + `number` in x2APIC mode.
    ///
    /// # Errors
    /// [`InvalidAccess`] if there is no such register to read.
    pub fn read_msr(&mut self, number: u16) -> Result<u64, InvalidAccess> {
        match number {
            register::COMMAND => Ok(self.command),
            register::COMMAND_HIGH
            | register::DESTINATION_FORMAT
            | register::END_OF_INTERRUPT
            | register::SELF_IPI
            | register::ARBITRATION_PRIORITY
            | register::REMOTE_READ => Err(InvalidAccess),
            register::ID => Ok(self.id().into()),
            _ => self.read(number).map(u64::from).ok_or(InvalidAccess),
        }
    }

    /// WRMSR of register 0x800 + `number` in x2APIC mode.
    ///
    /// # Errors
    /// [`InvalidAccess`] if there is no such register to write, or `value` sets reserved bits.
    pub fn write_msr(&mut self, number: u16, value: u64) -> Result<ApicEffect, InvalidAccess> {
        let writable = match number {
            register::TASK_PRIORITY | register::SELF_IPI => 0xff,
            register::END_OF_INTERRUPT | register::ERROR_STATUS => 0,
            register::SPURIOUS => u64::from(SPURIOUS_WRITABLE & !(1 << 9)),
            register::COMMAND => 0xffff_ffff_0000_0000 | u64::from(ICR_WRITABLE),
            register::LVT_TIMER..=register::LVT_ERROR => {
                let entry = usize::from(number - register::LVT_TIMER);
                u64::from(lvt::WRITABLE[entry] | lvt::READ_ONLY[entry])
            }
            register::INITIAL_COUNT => 0xffff_ffff,
            register::DIVIDE => 0xb,
            _ => return Err(InvalidAccess),
        };
        if value & !writable != 0 {
            return Err(InvalidAccess);
        }
        match number {
            register::COMMAND => {
                self.command = value;
                Ok(self.send())
            }
            register::SELF_IPI => {
                self.request(value as u8, Trigger::Edge);
                Ok(ApicEffect::None)
            }
            _ => Ok(self.write(number, value as u32).unwrap_or(ApicEffect::None)),
        }
    }

    fn read_x(&mut self, number: u16) -> u32 {
        match number {
            register::ID => self.id() << 24,
            register::COMMAND => self.command as u32,
            register::COMMAND_HIGH => (self.command >> 32) as u32,
            register::DESTINATION_FORMAT => self.destination_format,
            register::ARBITRATION_PRIORITY => self.processor_priority().into(),
            register::END_OF_INTERRUPT | register::REMOTE_READ => 0,
            _ => self.read(number).unwrap_or_else(|| {
                self.raise_error(ERROR_ILLEGAL_REGISTER);
                0
            }),
        }
    }

    fn write_x(&mut self, number: u16, value: u32) -> ApicEffect {
        match number {
            register::LOGICAL_DESTINATION => self.logical_destination = value & 0xff00_0000,
            register::DESTINATION_FORMAT => self.destination_format = value | 0x0fff_ffff,
            register::COMMAND => {
                self.command = self.command & !0xffff_ffff | u64::from(value & ICR_WRITABLE);
                return self.send();
            }
            register::COMMAND_HIGH => {
                self.command = self.command & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            // Read-only registers ignore writes.
            register::ID
            | register::VERSION
            | register::ARBITRATION_PRIORITY
            | register::PROCESSOR_PRIORITY
            | register::REMOTE_READ
            | register::CURRENT_COUNT
            | register::IN_SERVICE..=register::REQUEST_LAST => {}
            _ => {
                return self.write(number, value).unwrap_or_else(|| {
                    self.raise_error(ERROR_ILLEGAL_REGISTER);
                    ApicEffect::None
                });
            }
        }
        ApicEffect::None
    }

    /// What both modes read in the same way.
    fn read(&self, number: u16) -> Option<u32> {
        Some(match number {
            register::VERSION => VERSION,
            register::TASK_PRIORITY => self.task_priority.into(),
            register::PROCESSOR_PRIORITY => self.processor_priority().into(),
            register::LOGICAL_DESTINATION => self.logical_destination,
            register::SPURIOUS => self.spurious,
            register::IN_SERVICE..=register::IN_SERVICE_LAST => {
                self.in_service.words[usize::from(number - register::IN_SERVICE)]
            }
            register::TRIGGER_MODE..=register::TRIGGER_MODE_LAST => {
                self.level_triggered.words[usize::from(number - register::TRIGGER_MODE)]
            }
            register::REQUEST..=register::REQUEST_LAST => {
                self.requests.words[usize::from(number - register::REQUEST)]
            }
            register::ERROR_STATUS => self.error_status,
            register::LVT_TIMER..=register::LVT_ERROR => {
                self.lvt[usize::from(number - register::LVT_TIMER)]
            }
            register::INITIAL_COUNT => self.initial_count,
            register::CURRENT_COUNT => self.current_count(),
            register::DIVIDE => self.divide,
            _ => return None,
        })
    }

    /// What both modes write in the same way.
    fn write(&mut self, number: u16, value: u32) -> Option<ApicEffect> {
        match number {
            register::TASK_PRIORITY => self.task_priority = value as u8,
            register::END_OF_INTERRUPT => return Some(self.end_of_interrupt()),
            register::SPURIOUS => self.write_spurious(value),
            register::ERROR_STATUS => {
                self.error_status = core::mem::take(&mut self.new_errors);
            }
            register::LVT_TIMER..=register::LVT_ERROR => {
                self.write_lvt(usize::from(number - register::LVT_TIMER), value);
            }
            register::INITIAL_COUNT => {
                if self.timer_mode() != TimerMode::Deadline {
                    self.initial_count = value;
                    self.count_start = self.now;
                    self.timer_deadline = (value != 0).then(|| self.now.after(self.period()));
                }
            }
            register::DIVIDE => {
                let remaining = self.current_count();
                self.divide = value & 0xb;
                if self.timer_mode() != TimerMode::Deadline && self.timer_deadline.is_some() {
                    let rest = u64::from(remaining) << self.divide_shift();
                    self.timer_deadline = Some(self.now.after(rest));
                }
            }
            _ => return None,
        }
        Some(ApicEffect::None)
    }

    fn write_spurious(&mut self, value: u32) {
        self.spurious = value & SPURIOUS_WRITABLE;
        if self.spurious & SOFTWARE_ENABLE == 0 {
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
        }
    }

    fn write_lvt(&mut self, entry: usize, value: u32) {
        let mut value = value & lvt::WRITABLE[entry];
        if self.spurious & SOFTWARE_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        let mode = self.timer_mode();
        self.lvt[entry] = value;
        if entry == lvt::TIMER {
            let new = self.timer_mode();
            // Changing to or from TSC-deadline mode disarms (SDM vol. 3A 11.5.4.1).
            if (mode == TimerMode::Deadline) != (new == TimerMode::Deadline) {
                self.timer_deadline = None;
                self.tsc_deadline = 0;
                self.initial_count = 0;
            }
        }
    }

    fn end_of_interrupt(&mut self) -> ApicEffect {
        let Some(vector) = self.in_service.highest() else {
            return ApicEffect::None;
        };
        self.in_service.remove(vector);
        if self.level_triggered.contains(vector) {
            ApicEffect::EndOfLevel(vector)
        } else {
            ApicEffect::None
        }
    }

    /// The priority of what the processor does: the upper half is its class.
    pub fn processor_priority(&self) -> u8 {
        let served = self.in_service.highest().unwrap_or(0);
        if self.task_priority >> 4 >= served >> 4 {
            self.task_priority
        } else {
            served & 0xf0
        }
    }

    fn request(&mut self, vector: u8, trigger: Trigger) {
        if vector < 16 {
            self.raise_error(ERROR_RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        self.requests.insert(vector);
        match trigger {
            Trigger::Level => self.level_triggered.insert(vector),
            Trigger::Edge => self.level_triggered.remove(vector),
        }
    }

    fn raise_error(&mut self, error: u32) {
        let first = self.new_errors & error == 0;
        self.new_errors |= error;
        // An illegal vector of this very entry sets its bit once and goes no further.
        if first {
            self.deliver_local(lvt::ERROR);
        }
    }

    /// An event of the local vector table.
    fn deliver_local(&mut self, entry: usize) {
        let value = self.lvt[entry];
        if value & LVT_MASKED == 0 {
            self.request(value as u8, Trigger::Edge);
        }
    }

    /// Carries out the interrupt command.
    fn send(&mut self) -> ApicEffect {
        let command = self.command as u32;
        let delivery = command >> 8 & 7;
        let asserts = command & 1 << 14 != 0;
        let level = command & 1 << 15 != 0;
        if delivery == delivery::INIT && level && !asserts {
            // The de-assertion of INIT does nothing since the Pentium 4.
            return ApicEffect::None;
        }
        let vector = command as u8;
        if matches!(delivery, delivery::FIXED | delivery::LOWEST_PRIORITY) && vector < 16 {
            self.raise_error(ERROR_SEND_ILLEGAL_VECTOR);
            return ApicEffect::None;
        }
        let (address, broadcast) = match self.mode {
            ApicMode::X2Apic => ((self.command >> 32) as u32, u32::MAX),
            ApicMode::XApic | ApicMode::Disabled => ((self.command >> 56) as u32, 0xff),
        };
        let destination = match command >> 18 & 3 {
            1 => Destination::Myself,
            2 => Destination::All,
            3 => Destination::Others,
            _ if address == broadcast => Destination::All,
            _ if command & 1 << 11 != 0 => Destination::Logical(address),
            _ => Destination::Physical(address),
        };
        ApicEffect::Send(Message {
            vector,
            delivery,
            // IPIs are edges whatever the bit says.
            trigger: Trigger::Edge,
            destination,
        })
    }

    /// Whether an address, physical or logical, is this local APIC's.
    pub fn is_addressed(&self, destination: Destination) -> bool {
        match destination {
            Destination::Myself | Destination::All | Destination::Others => false,
            Destination::Physical(id) => id == self.id(),
            Destination::Logical(address) if self.mode == ApicMode::X2Apic => {
                address >> 16 == self.logical_destination >> 16
                    && address & self.logical_destination & 0xffff != 0
            }
            Destination::Logical(address) => {
                let own = self.logical_destination >> 24;
                let flat = self.destination_format >> 28 == 0xf;
                if flat {
                    address & own != 0
                } else {
                    let all_clusters = address >> 4 & 0xf == 0xf;
                    (all_clusters || address >> 4 & 0xf == own >> 4) && address & own & 0xf != 0
                }
            }
        }
    }

    const fn timer_mode(&self) -> TimerMode {
        match self.lvt[lvt::TIMER] >> 17 & 3 {
            1 => TimerMode::Periodic,
            2 | 3 => TimerMode::Deadline,
            _ => TimerMode::OneShot,
        }
    }

    /// log2 of the divisor (SDM vol. 3A figure 11-10).
    const fn divide_shift(&self) -> u32 {
        ((self.divide & 3) + (self.divide >> 1 & 4) + 1) & 7
    }

    /// The whole count in nanoseconds, at least one.
    const fn period(&self) -> u64 {
        let period = (self.initial_count as u64) << self.divide_shift();
        if period == 0 { 1 } else { period }
    }

    fn current_count(&self) -> u32 {
        match (self.timer_mode(), self.timer_deadline) {
            (TimerMode::Deadline, _) | (_, None) => 0,
            (_, Some(deadline)) => {
                let rest = deadline.since(self.now).div_ceil(1 << self.divide_shift());
                u32::try_from(rest).unwrap_or(u32::MAX)
            }
        }
    }
}
