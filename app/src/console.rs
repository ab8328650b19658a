//! The guest's serial output, handed to the host's console.
//!
//! Output is held back until the end of a line, because each write costs a hypercall on some
//! platforms, and at most until the end of the guest's turn: a prompt does not end a line. If there
//! are several guests, each line has the guest's name in front, and only whole lines are let out.

use alloc::format;
use alloc::vec::Vec;

use umbra_machine::ConsoleOutput;

use crate::platform;

/// The longest line that is held back.
const CAPACITY: usize = 256;

/// The guest's serial output.
pub struct Console {
    line: Vec<u8>,
    /// How much of the line is the name.
    prefix: usize,
    /// The last byte that was let out.
    last: u8,
}

impl Console {
    /// The output of the guest with this name, or of the only one.
    pub fn new(name: Option<&str>) -> Self {
        let line = name.map_or_else(Vec::new, |name| format!("{name}| ").into_bytes());
        let prefix = line.len();
        let last = b'\n';
        Self { line, prefix, last }
    }

    fn let_out(&mut self) {
        platform::write_console(&self.line);
        self.last = self.line.last().copied().unwrap_or(self.last);
        self.line.truncate(self.prefix);
    }
}

impl ConsoleOutput for Console {
    fn write(&mut self, byte: u8) {
        self.line.push(byte);
        if byte == b'\n' || self.line.len() - self.prefix >= CAPACITY {
            if byte != b'\n' && self.prefix != 0 {
                // Other guests' lines may follow.
                self.line.push(b'\n');
            }
            self.let_out();
        }
    }

    fn flush(&mut self) {
        if self.prefix == 0 && !self.line.is_empty() {
            self.let_out();
        }
    }
}

impl Drop for Console {
    /// The report line must begin a line of its own.
    fn drop(&mut self) {
        if self.line.len() > self.prefix || self.last != b'\n' {
            self.line.push(b'\n');
            self.let_out();
        }
    }
}
