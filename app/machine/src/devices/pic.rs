//! The i8259A interrupt controller pair with its edge/level control registers (Intel 8259A data
//! sheet; the ELCRs as in the ICH9 data sheet, 13.4.10).
//!
//! The slave's output drives input 2 of the master. An edge stays requested until it is taken, even
//! if the line falls again. Firmware has left vectors 0x08 and 0x70 and masked every line.

use super::Level;

/// The master's command port.
pub const MASTER_COMMAND_PORT: u16 = 0x20;
/// The master's data port.
pub const MASTER_DATA_PORT: u16 = 0x21;
/// The slave's command port.
pub const SLAVE_COMMAND_PORT: u16 = 0xa0;
/// The slave's data port.
pub const SLAVE_DATA_PORT: u16 = 0xa1;
/// The master's edge/level control register.
pub const MASTER_EDGE_LEVEL_PORT: u16 = 0x4d0;
/// The slave's edge/level control register.
pub const SLAVE_EDGE_LEVEL_PORT: u16 = 0x4d1;

/// The master's input that the slave is wired to.
pub const CASCADE: u8 = 2;
/// The pair's inputs, with the one between them.
pub const INPUTS: u8 = 16;
/// The request that stands for none: the input went away before it was acknowledged.
const SPURIOUS: u8 = 7;
/// IRQ 0 to 2, 8 and 13 are always edge-triggered.
const EDGE_LEVEL_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// The next word that the initialization sequence expects at the data port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Initialization {
    Done,
    Word2,
    Word3,
    Word4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadRegister {
    Request,
    InService,
}

#[derive(Clone, Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "the data sheet's independent mode bits"
)]
struct Chip {
    lines: u8,
    level_triggered: u8,
    requests: u8,
    in_service: u8,
    mask: u8,
    vector_base: u8,
    lowest_priority: u8,
    initialization: Initialization,
    single: bool,
    expects_word4: bool,
    automatic_end: bool,
    rotate_on_automatic_end: bool,
    special_mask: bool,
    special_fully_nested: bool,
    poll: bool,
    read_register: ReadRegister,
}

impl Chip {
    const fn new(vector_base: u8) -> Self {
        Self {
            lines: 0,
            level_triggered: 0,
            requests: 0,
            in_service: 0,
            mask: 0xff,
            vector_base,
            lowest_priority: 7,
            initialization: Initialization::Done,
            single: false,
            expects_word4: false,
            automatic_end: false,
            rotate_on_automatic_end: false,
            special_mask: false,
            special_fully_nested: false,
            poll: false,
            read_register: ReadRegister::Request,
        }
    }

    fn set_line(&mut self, input: u8, level: Level) {
        let bit = 1 << input;
        let was_high = self.lines & bit != 0;
        if level.is_high() {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.level_triggered & bit != 0 {
            self.requests = self.requests & !bit | self.lines & bit;
        } else if level.is_high() && !was_high {
            self.requests |= bit;
        }
    }

    /// The highest-priority input among `inputs`.
    fn highest(&self, inputs: u8) -> Option<u8> {
        if inputs == 0 {
            return None;
        }
        (1..=8)
            .map(|distance| (self.lowest_priority + distance) & 7)
            .find(|input| inputs & (1 << input) != 0)
    }

    const fn priority(&self, input: u8) -> u8 {
        input.wrapping_sub(self.lowest_priority + 1) & 7
    }

    /// The request that the output line stands for.
    fn pending(&self) -> Option<u8> {
        if self.initialization != Initialization::Done {
            return None;
        }
        let request = self.highest(self.requests & !self.mask)?;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.special_fully_nested && request == CASCADE {
            blocking &= !(1 << CASCADE);
        }
        match self.highest(blocking) {
            Some(served) if self.priority(served) <= self.priority(request) => None,
            _ => Some(request),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level_triggered & bit == 0 {
            self.requests &= !bit;
        }
        if self.automatic_end {
            if self.rotate_on_automatic_end {
                self.lowest_priority = input;
            }
        } else {
            self.in_service |= bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            *self = Self {
                lines: self.lines,
                level_triggered: self.level_triggered,
                requests: self.lines & self.level_triggered,
                mask: 0,
                initialization: Initialization::Word2,
                single: value & 0x02 != 0,
                expects_word4: value & 0x01 != 0,
                ..Self::new(self.vector_base)
            };
        } else if value & 0x08 != 0 {
            self.poll = value & 0x04 != 0;
            match value & 0x03 {
                2 => self.read_register = ReadRegister::Request,
                3 => self.read_register = ReadRegister::InService,
                _ => {}
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.end_of_interrupt(value >> 5, value & 7);
        }
    }

    fn end_of_interrupt(&mut self, command: u8, input: u8) {
        const ROTATE: u8 = 0b100;
        match command {
            0b000 => self.rotate_on_automatic_end = false,
            0b100 => self.rotate_on_automatic_end = true,
            0b001 | 0b101 => {
                // In special mask mode a masked input's service is not ended.
                let served = if self.special_mask {
                    self.in_service & !self.mask
                } else {
                    self.in_service
                };
                if let Some(input) = self.highest(served) {
                    self.in_service &= !(1 << input);
                    if command & ROTATE != 0 {
                        self.lowest_priority = input;
                    }
                }
            }
            0b011 | 0b111 => {
                self.in_service &= !(1 << input);
                if command & ROTATE != 0 {
                    self.lowest_priority = input;
                }
            }
            0b110 => self.lowest_priority = input,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let fourth = if self.expects_word4 {
            Initialization::Word4
        } else {
            Initialization::Done
        };
        self.initialization = match self.initialization {
            Initialization::Done => {
                self.mask = value;
                Initialization::Done
            }
            Initialization::Word2 => {
                self.vector_base = value & 0xf8;
                if self.single {
                    fourth
                } else {
                    Initialization::Word3
                }
            }
            // Who is wired to whom is fixed on a PC.
            Initialization::Word3 => fourth,
            Initialization::Word4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.automatic_end = value & 0x02 != 0;
                Initialization::Done
            }
        };
    }

    const fn read_command(&self) -> u8 {
        match self.read_register {
            ReadRegister::Request => self.requests,
            ReadRegister::InService => self.in_service,
        }
    }
}

/// The master and the slave.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Default for Pic {
    fn default() -> Self {
        Self {
            // The timer's output is high when it is switched on; that is no edge.
            master: Chip {
                lines: 1,
                ..Chip::new(0x08)
            },
            slave: Chip::new(0x70),
        }
    }
}

impl Pic {
    /// Sets the level of interrupt line `irq`, 0 to 15; the cascade, 2, has no line.
    pub fn set_line(&mut self, irq: u8, level: Level) {
        match irq {
            CASCADE | 16.. => {}
            0..8 => self.master.set_line(irq, level),
            8.. => self.slave.set_line(irq - 8, level),
        }
        self.update_cascade();
    }

    /// Whether the pair asks the processor for an interrupt.
    pub fn is_pending(&self) -> bool {
        self.master.pending().is_some()
    }

    /// Whether `irq` has a request that the processor has not taken.
    pub const fn is_requested(&self, irq: u8) -> bool {
        match irq {
            0..8 => self.master.requests & (1 << irq) != 0,
            8..16 => self.slave.requests & (1 << (irq - 8)) != 0,
            _ => false,
        }
    }

    /// Both interrupt masks.
    pub const fn masks(&self) -> [u8; 2] {
        [self.master.mask, self.slave.mask]
    }

    /// Whether requests of `irq` can reach the processor.
    pub const fn is_unmasked(&self, irq: u8) -> bool {
        match irq {
            0..8 => self.master.mask & (1 << irq) == 0,
            8..16 => self.slave.mask & (1 << (irq - 8)) == 0 && self.master.mask & 4 == 0,
            _ => false,
        }
    }

    /// The processor's interrupt acknowledge cycle: returns the vector, a spurious one if nothing is
    /// pending.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.pending() else {
            return self.master.vector_base | SPURIOUS;
        };
        self.master.acknowledge(input);
        let vector = if input == CASCADE {
            let request = self.slave.pending();
            if let Some(input) = request {
                self.slave.acknowledge(input);
            }
            self.slave.vector_base | request.unwrap_or(SPURIOUS)
        } else {
            self.master.vector_base | input
        };
        self.update_cascade();
        vector
    }

    /// What [`Pic::read`] finds, where reading changes nothing: `None` for a chip that is polled.
    #[inline]
    pub const fn peek(&self, port: u16) -> Option<u8> {
        let chip = match port {
            MASTER_EDGE_LEVEL_PORT => return Some(self.master.level_triggered),
            SLAVE_EDGE_LEVEL_PORT => return Some(self.slave.level_triggered),
            ..SLAVE_COMMAND_PORT => &self.master,
            SLAVE_COMMAND_PORT.. => &self.slave,
        };
        if chip.poll {
            None
        } else if port & 1 == 0 {
            Some(chip.read_command())
        } else {
            Some(chip.mask)
        }
    }

    /// Reads one of the six ports.
    pub fn read(&mut self, port: u16) -> u8 {
        if let Some(value) = self.peek(port) {
            return value;
        }
        let chip = self.chip(port);
        chip.poll = false;
        let value = match chip.pending() {
            Some(input) => {
                chip.acknowledge(input);
                0x80 | input
            }
            None => 0,
        };
        self.update_cascade();
        value
    }

    /// Writes one of the six ports.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            MASTER_EDGE_LEVEL_PORT => {
                set_level_triggered(&mut self.master, value & EDGE_LEVEL_WRITABLE[0]);
            }
            SLAVE_EDGE_LEVEL_PORT => {
                set_level_triggered(&mut self.slave, value & EDGE_LEVEL_WRITABLE[1]);
            }
            _ if port & 1 == 0 => self.chip(port).write_command(value),
            _ => self.chip(port).write_data(value),
        }
        self.update_cascade();
    }

    const fn chip(&mut self, port: u16) -> &mut Chip {
        if port < SLAVE_COMMAND_PORT {
            &mut self.master
        } else {
            &mut self.slave
        }
    }

    /// The cascade input follows the slave's output, whatever the master's trigger mode.
    fn update_cascade(&mut self) {
        let bit = 1 << CASCADE;
        if self.slave.pending().is_some() {
            self.master.requests |= bit;
        } else {
            self.master.requests &= !bit;
        }
    }
}

fn set_level_triggered(chip: &mut Chip, inputs: u8) {
    chip.level_triggered = inputs;
    chip.requests = chip.requests & !inputs | chip.lines & inputs;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialized as PC kernels do: vectors 0x20 and 0x28, everything unmasked.
    fn initialized(word4: u8) -> Pic {
        let mut pic = Pic::default();
        for (port, value) in [
            (0x20, 0x11),
            (0xa0, 0x11),
            (0x21, 0x20),
            (0xa1, 0x28),
            (0x21, 0x04),
            (0xa1, 0x02),
            (0x21, word4),
            (0xa1, word4),
        ] {
            pic.write(port, value);
        }
        pic
    }

    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_line(irq, Level::High);
        pic.set_line(irq, Level::Low);
    }

    #[test]
    fn firmware_masks_everything() {
        let mut pic = Pic::default();
        for irq in 0..16 {
            pulse(&mut pic, irq);
        }
        assert!(!pic.is_pending());
        assert_eq!((pic.read(0x21), pic.read(0xa1)), (0xff, 0xff));
    }

    #[test]
    fn initialization_unmasks_and_sets_the_vectors() {
        let mut pic = initialized(0x01);
        pulse(&mut pic, 3);
        assert!(pic.is_pending());
        assert_eq!(pic.acknowledge(), 0x23);
        assert!(!pic.is_pending());
        pic.write(0x20, 0x20);
        pulse(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x2c);
    }

    #[test]
    fn lower_priority_waits_for_the_end_of_interrupt() {
        let mut pic = initialized(0x01);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x24);
        pulse(&mut pic, 6);
        pulse(&mut pic, 4);
        assert!(!pic.is_pending(), "equal and lower priorities wait");
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x21, "a higher one nests");
        pic.write(0x20, 0x20);
        assert!(!pic.is_pending());
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x24);
        pic.write(0x20, 0x64);
        assert_eq!(pic.acknowledge(), 0x26, "after the specific end of 4");
    }

    #[test]
    fn slave_interrupts_rank_between_1_and_3_and_need_two_ends() {
        let mut pic = initialized(0x01);
        pulse(&mut pic, 3);
        pulse(&mut pic, 8);
        assert_eq!(pic.acknowledge(), 0x28);
        pic.write(0x20, 0x20);
        pulse(&mut pic, 9);
        assert_eq!(pic.acknowledge(), 0x23, "the slave still serves IRQ 8");
        pic.write(0x20, 0x20);
        pic.write(0xa0, 0x20);
        assert_eq!(pic.acknowledge(), 0x29);
    }

    #[test]
    fn spurious_interrupts_leave_no_service() {
        let mut pic = initialized(0x01);
        assert_eq!(pic.acknowledge(), 0x27);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0);
        pic.write(0x4d1, 0x04);
        pic.set_line(10, Level::High);
        pic.set_line(10, Level::Low);
        assert!(!pic.is_pending(), "a level goes away with its line");
    }

    #[test]
    fn request_and_service_registers_can_be_read() {
        let mut pic = initialized(0x01);
        pic.write(0x21, 0xfb);
        pulse(&mut pic, 5);
        assert_eq!(pic.read(0x20), 0x20, "requests are the default");
        pic.write(0x21, 0x00);
        pic.acknowledge();
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x20);
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), 0x00);
    }

    #[test]
    fn level_triggered_lines_repeat_until_they_fall() {
        let mut pic = initialized(0x01);
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), 0xf8);
        pic.set_line(5, Level::High);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.set_line(5, Level::Low);
        pic.write(0x20, 0x20);
        assert!(!pic.is_pending());
    }

    #[test]
    fn an_edge_counts_once() {
        let mut pic = initialized(0x01);
        pic.set_line(5, Level::High);
        pic.set_line(5, Level::High);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0x20, 0x20);
        assert!(
            !pic.is_pending(),
            "the line is still high, but no edge came"
        );
    }

    #[test]
    fn automatic_end_of_interrupt() {
        let mut pic = initialized(0x03);
        pulse(&mut pic, 4);
        pic.acknowledge();
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn rotation_makes_the_served_input_the_lowest() {
        let mut pic = initialized(0x01);
        pulse(&mut pic, 4);
        pic.acknowledge();
        pic.write(0x20, 0xa0);
        pulse(&mut pic, 4);
        pulse(&mut pic, 7);
        assert_eq!(pic.acknowledge(), 0x27);
        pic.write(0x20, 0xc2);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn special_mask_lets_lower_priorities_through() {
        let mut pic = initialized(0x01);
        pulse(&mut pic, 1);
        pic.acknowledge();
        pulse(&mut pic, 6);
        assert!(!pic.is_pending());
        pic.write(0x21, 0x02);
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x26);
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = initialized(0x01);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
        pulse(&mut pic, 6);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x86);
        assert!(!pic.is_pending());
    }

    #[test]
    fn nothing_interrupts_during_initialization() {
        let mut pic = initialized(0x01);
        pic.write(0x20, 0x11);
        pic.set_line(0, Level::Low);
        pulse(&mut pic, 0);
        assert!(!pic.is_pending());
        for value in [0x40, 0x04, 0x01] {
            pic.write(0x21, value);
        }
        assert_eq!(pic.acknowledge(), 0x40);
    }
}
