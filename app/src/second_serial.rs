//! The host's second serial port (COM2), for programs that talk to Umbra.
//!
//! Protocol: no interrupts. Whoever owns the port calls [`SecondSerial::receive`] and
//! [`SecondSerial::pump`] at least every [`PERIOD`], within which the port's FIFO cannot overflow.
//! Output waits in memory until the port takes it, so that no guest waits for a slow reader.

use alloc::collections::VecDeque;

use uart_16550::SerialPort;
use x86_64::instructions::port::Port;

use crate::platform;

/// The longest time between two looks at the port, in microseconds: at 115,200 baud its 16 bytes fill in
/// 1.4 ms.
pub const PERIOD: u64 = 1_000;

/// How long the end of the system waits for the port to send what is left, in microseconds.
const PATIENCE: u64 = 500_000;

/// The first of the port's registers.
const BASE: u16 = 0x2f8;
const INTERRUPT_ENABLE: u16 = BASE + 1;
const LINE_CONTROL: u16 = BASE + 3;
const SCRATCH: u16 = BASE + 7;
/// Line control: the divisor's bytes stand in the place of the first two registers.
const DIVISOR_ACCESS: u8 = 1 << 7;
/// Line control: 8 bits, no parity, one stop bit.
const EIGHT_BITS: u8 = 0b11;
/// The divisor for 115,200 baud.
const DIVISOR: [u8; 2] = [1, 0];
/// The port's transmit FIFO.
const FIFO_SIZE: usize = 16;

/// The port.
pub struct SecondSerial {
    port: SerialPort,
    output: VecDeque<u8>,
}

impl SecondSerial {
    /// The port, if the machine has one.
    pub fn find() -> Option<Self> {
        // Under uhyve, unknown ports are not for probing.
        if hermit::env::is_uhyve() || !is_present() {
            return None;
        }
        // SAFETY: the port answers, and nothing else in the image uses it.
        let mut port = unsafe { SerialPort::new(BASE) };
        port.init();
        write(INTERRUPT_ENABLE, 0);
        write(LINE_CONTROL, DIVISOR_ACCESS | EIGHT_BITS);
        write(BASE, DIVISOR[0]);
        write(BASE + 1, DIVISOR[1]);
        write(LINE_CONTROL, EIGHT_BITS);
        Some(Self {
            port,
            output: VecDeque::new(),
        })
    }

    /// A byte that has arrived.
    pub fn receive(&mut self) -> Option<u8> {
        self.port.try_receive().ok()
    }

    /// Sends `bytes` as soon as the port takes them.
    pub fn send(&mut self, bytes: &[u8]) {
        self.output.extend(bytes);
    }

    /// Whether something waits to be sent.
    pub fn is_busy(&self) -> bool {
        !self.output.is_empty()
    }

    /// Waits until all is sent, but not for a reader that does not read.
    pub fn drain(&mut self) {
        let patience = platform::ticks_in_microseconds(PATIENCE);
        let start = platform::timestamp();
        while self.is_busy() && platform::timestamp().wrapping_sub(start) < patience {
            self.pump();
        }
        // The port's own FIFO empties within one period more.
        let fifo = platform::ticks_in_microseconds(2 * PERIOD);
        let start = platform::timestamp();
        while platform::timestamp().wrapping_sub(start) < fifo {
            core::hint::spin_loop();
        }
    }

    /// Gives the port as much as it takes.
    pub fn pump(&mut self) {
        for _ in 0..FIFO_SIZE {
            let Some(&byte) = self.output.front() else {
                return;
            };
            if self.port.try_send_raw(byte).is_err() {
                return;
            }
            self.output.pop_front();
        }
    }
}

/// Whether the scratch register keeps what is written to it.
fn is_present() -> bool {
    [0x55, 0xaa].into_iter().all(|pattern| {
        write(SCRATCH, pattern);
        // SAFETY: reading this register of a serial port changes nothing, and nothing else of a PC is
        // there.
        unsafe { Port::<u8>::new(SCRATCH).read() == pattern }
    })
}

fn write(register: u16, value: u8) {
    // SAFETY: these ports are a serial port's or nobody's, and the image uses them nowhere else.
    unsafe { Port::new(register).write(value) };
}
