//! The console: COM1 as a polled 16550.

use core::fmt::{self, Write};

use crate::cpu::{inb, outb};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// Sets 115200 baud, eight bits, no parity, one stop bit, no interrupts.
pub fn init() {
    for (register, value) in [
        (1, 0),
        (3, 0x80),
        (0, 1),
        (1, 0),
        (3, 0x03),
        (2, 0x07),
        (4, 0x03),
    ] {
        outb(COM1 + register, value);
    }
}

struct Com1;

impl Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            outb(COM1, byte);
        }
        Ok(())
    }
}

/// Prints formatted text; `println!` is the usual way in.
pub fn print(arguments: fmt::Arguments<'_>) {
    // `Com1` never fails.
    let _ = Com1.write_fmt(arguments);
}

/// Prints one line on COM1.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {
        $crate::console::print(format_args!("{}\n", format_args!($($argument)*)))
    };
}
