//! The I/O APIC with 24 inputs (Intel 82093AA data sheet).
//!
//! IRQ 0 arrives at input 2, every other ISA line at the input of its number. Input 0 is wired to the
//! i8259 pair, for guests that take it as an external interrupt.

use super::Level;
use super::local_apic::{Destination, Message, Trigger, delivery};

/// The first byte of the register page.
pub const ADDRESS: u64 = 0xfec0_0000;
/// The size of the register page in bytes.
pub const SIZE: u64 = 0x1000;
/// The input of ISA line 0, the timer's.
pub const TIMER_INPUT: u8 = 2;
/// The number of inputs.
pub const INPUTS: usize = 24;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REGISTER_ID: u8 = 0x00;
const REGISTER_VERSION: u8 = 0x01;
const REGISTER_ARBITRATION: u8 = 0x02;
const REGISTER_TABLE: u8 = 0x10;
const REGISTER_TABLE_LAST: u8 = REGISTER_TABLE + 2 * INPUTS as u8 - 1;

const VERSION: u32 = (INPUTS as u32 - 1) << 16 | 0x11;
const ID_MASK: u32 = 0x0f00_0000;

const MASKED: u64 = 1 << 16;
const LEVEL_TRIGGERED: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const ACTIVE_LOW: u64 = 1 << 13;
const DELIVERY_STATUS: u64 = 1 << 12;
const LOGICAL: u64 = 1 << 11;
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The destination, physical or logical, that means every processor.
const BROADCAST: u32 = 0xff;

/// The messages that one access or line change sends: one for each input at most.
pub type Messages = [Option<Message>; INPUTS];

/// The I/O APIC.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    table: [u64; INPUTS],
    lines: [Level; INPUTS],
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            id: 0,
            select: 0,
            table: [MASKED; INPUTS],
            lines: [Level::Low; INPUTS],
        }
    }
}

impl IoApic {
    /// Sets the level of an input (0 to 23) and returns the message that it sends.
    pub fn set_line(&mut self, input: usize, level: Level) -> Option<Message> {
        let line = self.lines.get_mut(input)?;
        let rises = level.is_high() && !line.is_high();
        *line = level;
        let entry = self.table[input];
        if entry & LEVEL_TRIGGERED != 0 {
            return self.service_level(input);
        }
        // An edge that comes while the input is masked is lost.
        (rises && entry & MASKED == 0).then(|| message(entry))
    }

    /// Whether input `input` can interrupt at all.
    pub fn is_unmasked(&self, input: usize) -> bool {
        self.table
            .get(input)
            .is_some_and(|entry| entry & MASKED == 0)
    }

    /// The vector that input `input` sends to a processor's local APIC, if it sends one.
    pub fn vector(&self, input: usize) -> Option<u8> {
        let entry = *self.table.get(input)?;
        let delivery = (entry >> 8 & 7) as u32;
        let sends_vector = matches!(delivery, delivery::FIXED | delivery::LOWEST_PRIORITY);
        (entry & MASKED == 0 && sends_vector).then_some(entry as u8)
    }

    /// To whom input 0 passes the i8259 pair's interrupts on, if it does.
    pub fn external_interrupt(&self) -> Option<Destination> {
        let message = message(self.table[0]);
        let passes = self.is_unmasked(0) && message.delivery == delivery::EXTERNAL;
        passes.then_some(message.destination)
    }

    /// A level-triggered interrupt with `vector` has ended; returns what is sent again.
    pub fn end_of_interrupt(&mut self, vector: u8) -> Messages {
        core::array::from_fn(|input| {
            let entry = &mut self.table[input];
            if *entry as u8 != vector || *entry & LEVEL_TRIGGERED == 0 {
                return None;
            }
            *entry &= !REMOTE_IRR;
            self.service_level(input)
        })
    }

    /// Reads memory in the register page at `offset`.
    pub fn read_memory(&self, offset: u64, bytes: &mut [u8]) {
        for (position, byte) in (offset..).zip(bytes.iter_mut()) {
            let lane = (position & 3) as usize;
            *byte = match position & !3 {
                SELECT => u32::from(self.select).to_le_bytes()[lane],
                WINDOW => self.read_register().to_le_bytes()[lane],
                _ => 0,
            };
        }
    }

    /// Writes memory in the register page. Only aligned 32-bit writes reach a register, and byte
    /// writes the select register. Returns the message that a changed input sends.
    pub fn write_memory(&mut self, offset: u64, bytes: &[u8]) -> Option<Message> {
        match (offset, bytes) {
            (SELECT, [select] | [select, _, _, _]) => {
                self.select = *select;
                None
            }
            (WINDOW, &[a, b, c, d]) => self.write_register(u32::from_le_bytes([a, b, c, d])),
            _ => None,
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            REGISTER_ID | REGISTER_ARBITRATION => self.id,
            REGISTER_VERSION => VERSION,
            REGISTER_TABLE..=REGISTER_TABLE_LAST => {
                let (input, shift) = table_position(self.select);
                (self.table[input] >> shift) as u32
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, value: u32) -> Option<Message> {
        match self.select {
            REGISTER_ID => {
                self.id = value & ID_MASK;
                None
            }
            REGISTER_TABLE..=REGISTER_TABLE_LAST => {
                let (input, shift) = table_position(self.select);
                let half = 0xffff_ffff << shift;
                let entry = &mut self.table[input];
                let writable = WRITABLE & half;
                *entry = *entry & !writable | u64::from(value) << shift & writable;
                if *entry & LEVEL_TRIGGERED == 0 {
                    *entry &= !REMOTE_IRR;
                    return None;
                }
                self.service_level(input)
            }
            _ => None,
        }
    }

    /// Sends a level-triggered input's message unless one is being served.
    fn service_level(&mut self, input: usize) -> Option<Message> {
        let entry = &mut self.table[input];
        let blocked = *entry & (MASKED | REMOTE_IRR) != 0 || *entry & LEVEL_TRIGGERED == 0;
        if blocked || !self.lines[input].is_high() {
            return None;
        }
        *entry |= REMOTE_IRR;
        Some(message(*entry))
    }
}

/// The input of a table register, and the shift of its half.
fn table_position(select: u8) -> (usize, u32) {
    let position = usize::from(select - REGISTER_TABLE);
    (position / 2, 32 * (position as u32 & 1))
}

/// Polarity is the board's business: [`Level::High`] means active, so the bit is only kept.
const fn message(entry: u64) -> Message {
    const { assert!(WRITABLE & (DELIVERY_STATUS | REMOTE_IRR) == 0 && WRITABLE & ACTIVE_LOW != 0) };
    let address = (entry >> 56) as u32;
    Message {
        vector: entry as u8,
        delivery: (entry >> 8 & 7) as u32,
        trigger: if entry & LEVEL_TRIGGERED != 0 {
            Trigger::Level
        } else {
            Trigger::Edge
        },
        destination: if address == BROADCAST {
            Destination::All
        } else if entry & LOGICAL != 0 {
            Destination::Logical(address)
        } else {
            Destination::Physical(address)
        },
    }
}
