//! COM1: a 16550A with FIFOs (National Semiconductor PC16550D data sheet).
//!
//! Bytes are sent in no time: the transmitter is always empty, and its interrupt rises as soon as
//! it is enabled or a byte has been written. Bytes received while the FIFO is full wait in a
//! bounded backlog, as if the sender honoured flow control; past that they are lost and counted
//! as an overrun. The character time-out of the receiver counts as passed at once.

use alloc::collections::VecDeque;

use super::Level;

/// The first of COM1's eight ports.
pub const PORT: u16 = 0x3f8;
/// The last of COM1's eight ports.
pub const LAST_PORT: u16 = 0x3ff;
/// COM1's interrupt line.
pub const IRQ: u8 = 4;

const FIFO_SIZE: usize = 16;
/// Bytes that may wait before the receiver.
const BACKLOG_SIZE: usize = 4096;

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct InterruptEnable: u8 {
        const RECEIVED_DATA = 1 << 0;
        const TRANSMITTER_EMPTY = 1 << 1;
        const LINE_STATUS = 1 << 2;
        const MODEM_STATUS = 1 << 3;
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct LineStatus: u8 {
        const DATA_READY = 1 << 0;
        const OVERRUN = 1 << 1;
        const TRANSMITTER_HOLDING_EMPTY = 1 << 5;
        const TRANSMITTER_EMPTY = 1 << 6;
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct ModemControl: u8 {
        const DATA_TERMINAL_READY = 1 << 0;
        const REQUEST_TO_SEND = 1 << 1;
        const OUT1 = 1 << 2;
        const OUT2 = 1 << 3;
        const LOOP = 1 << 4;
    }
}

/// Modem status: CTS, DSR, RI, DCD in the upper half, what changed in the lower.
mod modem_status {
    pub const CLEAR_TO_SEND: u8 = 1 << 4;
    pub const DATA_SET_READY: u8 = 1 << 5;
    pub const RING_INDICATOR: u8 = 1 << 6;
    pub const CARRIER_DETECT: u8 = 1 << 7;
    /// Of the ring indicator only the trailing edge counts as a change.
    pub const TRAILING_EDGE_RING: u8 = 1 << 2;
    pub const CONNECTED: u8 = CLEAR_TO_SEND | DATA_SET_READY | CARRIER_DETECT;
}

const LINE_CONTROL_BREAK: u8 = 1 << 6;
const LINE_CONTROL_DIVISOR_LATCH: u8 = 1 << 7;

const FIFO_ENABLE: u8 = 1 << 0;
const FIFO_CLEAR_RECEIVER: u8 = 1 << 1;

/// Interrupt identification without the FIFO bits, in falling priority.
mod identification {
    pub const LINE_STATUS: u8 = 0b0110;
    pub const RECEIVED_DATA: u8 = 0b0100;
    pub const TIME_OUT: u8 = 0b1100;
    pub const TRANSMITTER_EMPTY: u8 = 0b0010;
    pub const MODEM_STATUS: u8 = 0b0000;
    pub const NONE: u8 = 0b0001;
    pub const FIFOS_ENABLED: u8 = 0b1100_0000;
}

/// The 16550A.
#[derive(Clone, Debug)]
pub struct Serial {
    received: VecDeque<u8>,
    backlog: VecDeque<u8>,
    fifo_enabled: bool,
    trigger: usize,
    overrun: bool,
    transmitter_interrupt: bool,
    interrupt_enable: InterruptEnable,
    line_control: u8,
    modem_control: ModemControl,
    modem_status: u8,
    scratch: u8,
    divisor: u16,
}

impl Default for Serial {
    fn default() -> Self {
        Self::new()
    }
}

impl Serial {
    /// The chip after reset, with a terminal connected.
    pub fn new() -> Self {
        Self {
            received: VecDeque::with_capacity(FIFO_SIZE),
            backlog: VecDeque::new(),
            fifo_enabled: false,
            trigger: 1,
            overrun: false,
            transmitter_interrupt: false,
            interrupt_enable: InterruptEnable::empty(),
            line_control: 0,
            modem_control: ModemControl::empty(),
            modem_status: modem_status::CONNECTED,
            scratch: 0,
            divisor: 12,
        }
    }

    /// A byte arrives from the terminal.
    pub fn receive(&mut self, byte: u8) {
        if self.modem_control.contains(ModemControl::LOOP) {
            // The receiver is cut off from its input.
            return;
        }
        if self.backlog.len() < BACKLOG_SIZE {
            self.backlog.push_back(byte);
        } else {
            self.overrun = true;
        }
        self.refill();
    }

    /// Reads the register at `offset` (0 to 7) from [`PORT`].
    pub fn read(&mut self, offset: u16) -> u8 {
        match (offset, self.divisor_latch()) {
            (0, true) => self.divisor.to_le_bytes()[0],
            (1, true) => self.divisor.to_le_bytes()[1],
            (0, false) => {
                let byte = self.received.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            (1, false) => self.interrupt_enable.bits(),
            (2, _) => self.read_identification(),
            (3, _) => self.line_control,
            (4, _) => self.modem_control.bits(),
            (5, _) => self.read_line_status(),
            (6, _) => {
                let status = self.modem_status;
                self.modem_status &= 0xf0;
                status
            }
            (7, _) => self.scratch,
            _ => 0xff,
        }
    }

    /// Writes the register at `offset` (0 to 7) from [`PORT`]; returns the byte that goes out on
    /// the line, if one does.
    pub fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        match (offset, self.divisor_latch()) {
            (0, true) => self.divisor = self.divisor & 0xff00 | u16::from(value),
            (1, true) => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            (0, false) => return self.transmit(value),
            (1, false) => self.write_interrupt_enable(value),
            (2, _) => self.write_fifo_control(value),
            (3, _) => self.line_control = value,
            (4, _) => self.write_modem_control(value),
            (7, _) => self.scratch = value,
            // The status registers are for factory tests only when written.
            _ => {}
        }
        None
    }

    /// The interrupt pin, which PCs gate by OUT2; in loop mode the gate is closed.
    pub fn interrupt(&self) -> Level {
        let gate =
            self.modem_control & (ModemControl::OUT2 | ModemControl::LOOP) == ModemControl::OUT2;
        Level::high_if(gate && self.identification() != identification::NONE)
    }

    const fn divisor_latch(&self) -> bool {
        self.line_control & LINE_CONTROL_DIVISOR_LATCH != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled { FIFO_SIZE } else { 1 }
    }

    fn refill(&mut self) {
        while self.received.len() < self.capacity()
            && let Some(byte) = self.backlog.pop_front()
        {
            self.received.push_back(byte);
        }
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.transmitter_interrupt = true;
        if self.modem_control.contains(ModemControl::LOOP) {
            if self.received.len() < self.capacity() {
                self.received.push_back(byte);
            } else {
                self.overrun = true;
            }
            return None;
        }
        // A line held in the break state carries no characters.
        (self.line_control & LINE_CONTROL_BREAK == 0).then_some(byte)
    }

    fn write_interrupt_enable(&mut self, value: u8) {
        let enable = InterruptEnable::from_bits_truncate(value);
        let newly_enabled = enable - self.interrupt_enable;
        if newly_enabled.contains(InterruptEnable::TRANSMITTER_EMPTY) {
            self.transmitter_interrupt = true;
        }
        self.interrupt_enable = enable;
    }

    fn write_fifo_control(&mut self, value: u8) {
        let enabled = value & FIFO_ENABLE != 0;
        if enabled != self.fifo_enabled || (enabled && value & FIFO_CLEAR_RECEIVER != 0) {
            self.received.clear();
        }
        self.fifo_enabled = enabled;
        self.trigger = if enabled {
            [1, 4, 8, 14][usize::from(value >> 6)]
        } else {
            1
        };
        self.refill();
    }

    fn write_modem_control(&mut self, value: u8) {
        self.modem_control = ModemControl::from_bits_truncate(value);
        let control = self.modem_control;
        let lines = if control.contains(ModemControl::LOOP) {
            let loops = [
                (ModemControl::REQUEST_TO_SEND, modem_status::CLEAR_TO_SEND),
                (
                    ModemControl::DATA_TERMINAL_READY,
                    modem_status::DATA_SET_READY,
                ),
                (ModemControl::OUT1, modem_status::RING_INDICATOR),
                (ModemControl::OUT2, modem_status::CARRIER_DETECT),
            ];
            loops
                .into_iter()
                .filter(|(output, _)| control.contains(*output))
                .fold(0, |lines, (_, input)| lines | input)
        } else {
            modem_status::CONNECTED
        };
        let before = self.modem_status & 0xf0;
        let mut changed = (before ^ lines) >> 4;
        if lines & modem_status::RING_INDICATOR != 0 {
            changed &= !modem_status::TRAILING_EDGE_RING;
        }
        self.modem_status = lines | (self.modem_status & 0x0f) | changed;
    }

    fn read_line_status(&mut self) -> u8 {
        let mut status = LineStatus::TRANSMITTER_HOLDING_EMPTY | LineStatus::TRANSMITTER_EMPTY;
        status.set(LineStatus::DATA_READY, !self.received.is_empty());
        status.set(LineStatus::OVERRUN, core::mem::take(&mut self.overrun));
        status.bits()
    }

    fn identification(&self) -> u8 {
        let enabled = |source| self.interrupt_enable.contains(source);
        if enabled(InterruptEnable::LINE_STATUS) && self.overrun {
            identification::LINE_STATUS
        } else if enabled(InterruptEnable::RECEIVED_DATA) && self.received.len() >= self.trigger {
            identification::RECEIVED_DATA
        } else if enabled(InterruptEnable::RECEIVED_DATA) && !self.received.is_empty() {
            identification::TIME_OUT
        } else if enabled(InterruptEnable::TRANSMITTER_EMPTY) && self.transmitter_interrupt {
            identification::TRANSMITTER_EMPTY
        } else if enabled(InterruptEnable::MODEM_STATUS) && self.modem_status & 0x0f != 0 {
            identification::MODEM_STATUS
        } else {
            identification::NONE
        }
    }

    fn read_identification(&mut self) -> u8 {
        let source = self.identification();
        if source == identification::TRANSMITTER_EMPTY {
            self.transmitter_interrupt = false;
        }
        let fifos = if self.fifo_enabled {
            identification::FIFOS_ENABLED
        } else {
            0
        };
        source | fifos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u16 = 0;
    const IER: u16 = 1;
    const IIR_FCR: u16 = 2;
    const LCR: u16 = 3;
    const MCR: u16 = 4;
    const LSR: u16 = 5;
    const MSR: u16 = 6;
    const SCRATCH: u16 = 7;

    fn with_interrupts(enable: u8) -> Serial {
        let mut serial = Serial::new();
        serial.write(MCR, 0x0b);
        serial.write(IIR_FCR, 0x01);
        serial.write(IER, enable);
        serial
    }

    #[test]
    fn a_polled_driver_initializes_prints_and_reads() {
        let mut serial = Serial::new();
        serial.write(IER, 0x00);
        serial.write(LCR, 0x80);
        serial.write(DATA, 0x01);
        serial.write(IER, 0x00);
        assert_eq!(serial.read(DATA), 1, "the divisor reads back");
        serial.write(LCR, 0x03);
        serial.write(IIR_FCR, 0xc7);
        serial.write(MCR, 0x0b);
        assert_eq!(serial.read(IIR_FCR) & 0xc0, 0xc0, "a 16550A");
        assert_ne!(serial.read(LSR) & 0x20, 0);
        assert_eq!(serial.write(DATA, b'x'), Some(b'x'));
        assert_eq!(serial.read(LSR), 0x60);
        assert_eq!(serial.interrupt(), Level::Low);
        serial.receive(b'y');
        assert_eq!(serial.read(LSR), 0x61);
        assert_eq!(serial.read(DATA), b'y');
        assert_eq!(serial.read(LSR), 0x60);
    }

    #[test]
    fn the_divisor_latch_hides_data_and_interrupt_enable() {
        let mut serial = Serial::new();
        serial.write(IER, 0x05);
        serial.write(LCR, 0x83);
        assert_eq!(serial.write(DATA, 0x34), None);
        serial.write(IER, 0x12);
        assert_eq!((serial.read(DATA), serial.read(IER)), (0x34, 0x12));
        serial.write(LCR, 0x03);
        assert_eq!(serial.read(IER), 0x05);
    }

    #[test]
    fn the_transmitter_interrupts_when_enabled_and_after_each_byte() {
        let mut serial = with_interrupts(0x02);
        assert_eq!(serial.interrupt(), Level::High);
        assert_eq!(serial.read(IIR_FCR), 0xc2);
        assert_eq!(
            serial.interrupt(),
            Level::Low,
            "reading the reason clears it"
        );
        assert_eq!(serial.read(IIR_FCR), 0xc1);
        serial.write(DATA, b'a');
        assert_eq!(serial.read(IIR_FCR), 0xc2);
        serial.write(IER, 0x00);
        serial.write(IER, 0x02);
        assert_eq!(
            serial.read(IIR_FCR),
            0xc2,
            "enabling it again raises it again"
        );
    }

    #[test]
    fn the_receiver_comes_before_the_transmitter() {
        let mut serial = with_interrupts(0x03);
        serial.write(IIR_FCR, 0x41);
        for _ in 0..3 {
            serial.receive(b'r');
        }
        assert_eq!(
            serial.read(IIR_FCR),
            0xcc,
            "time-out below the trigger level of four"
        );
        serial.receive(b'r');
        assert_eq!(serial.read(IIR_FCR), 0xc4);
        for _ in 0..4 {
            assert_eq!(serial.read(DATA), b'r');
        }
        assert_eq!(
            serial.read(IIR_FCR),
            0xc2,
            "the transmitter's reason was not cleared"
        );
    }

    #[test]
    fn fifo_order_backlog_and_overrun() {
        let mut serial = with_interrupts(0x04);
        for byte in 0..FIFO_SIZE + BACKLOG_SIZE {
            serial.receive(byte as u8);
        }
        assert_eq!(serial.interrupt(), Level::Low);
        serial.receive(0);
        assert_eq!(serial.read(IIR_FCR), 0xc6);
        assert_eq!(serial.read(LSR), 0x63);
        assert_eq!(
            serial.read(LSR),
            0x61,
            "reading the status clears the overrun"
        );
        for byte in 0..FIFO_SIZE + BACKLOG_SIZE {
            assert_eq!(serial.read(DATA), byte as u8);
        }
        assert_eq!(serial.read(LSR), 0x60);
    }

    #[test]
    fn clearing_the_fifo_loses_its_bytes_only() {
        let mut serial = with_interrupts(0);
        for byte in 0..20 {
            serial.receive(byte);
        }
        serial.write(IIR_FCR, 0x03);
        assert_eq!(serial.read(DATA), 16);
    }

    #[test]
    fn loop_mode_connects_outputs_to_inputs() {
        let mut serial = with_interrupts(0x0f);
        serial.write(MCR, 0x1a);
        assert_eq!(serial.read(MSR) & 0xf0, 0x90, "as Linux's driver probes");
        assert_eq!(serial.write(DATA, 0x5a), None, "nothing leaves the chip");
        assert_eq!(serial.read(DATA), 0x5a);
        assert_eq!(serial.interrupt(), Level::Low, "OUT2 is cut off");
        serial.write(MCR, 0x0b);
        assert_eq!(serial.read(MSR) & 0xf0, 0xb0);
        assert_eq!(serial.read(MSR) & 0x0f, 0, "changes are cleared by reading");
    }

    #[test]
    fn modem_changes_interrupt_last() {
        let mut serial = with_interrupts(0x08);
        serial.write(MCR, 0x10);
        serial.write(MCR, 0x0b);
        assert_eq!(serial.read(IIR_FCR), 0xc0);
        assert_eq!(serial.interrupt(), Level::High);
        serial.read(MSR);
        assert_eq!(serial.interrupt(), Level::Low);
    }

    #[test]
    fn out2_gates_the_interrupt() {
        let mut serial = with_interrupts(0x02);
        serial.write(MCR, 0x03);
        assert_eq!(serial.interrupt(), Level::Low);
        serial.write(MCR, 0x0b);
        assert_eq!(serial.interrupt(), Level::High);
    }

    #[test]
    fn scratch_remembers_and_reserved_bits_read_zero() {
        let mut serial = Serial::new();
        serial.write(SCRATCH, 0xa5);
        serial.write(IER, 0xff);
        serial.write(MCR, 0xff);
        assert_eq!(
            (serial.read(SCRATCH), serial.read(IER), serial.read(MCR)),
            (0xa5, 0x0f, 0x1f)
        );
    }
}
