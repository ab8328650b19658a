//! COM1, and the ways out when the stub cannot boot.
//!
//! Protocol: one processor, no interrupts, so nobody else has the port.

use core::fmt::{Arguments, Write};

use uart_16550::SerialPort;
use x86_64::instructions::port::Port;

/// I/O port of COM1.
pub const COM1: u16 = 0x3f8;

/// Exit codes, as Umbra documents them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// A bad image, module or command line.
    BadInput = 2,
    /// Too little memory.
    OutOfMemory = 5,
    /// The stub itself is wrong.
    Panic = 101,
}

/// Prints one line that says why the stub cannot boot, and ends with `code` by every way out that
/// a machine may have.
pub fn fail(code: ExitCode, reason: Arguments<'_>) -> ! {
    let status = code as u32;
    // SAFETY: COM1 of a PC is at this port, and nobody else uses it (see the module's protocol).
    let mut serial = unsafe { SerialPort::new(COM1) };
    serial.init();
    // Writing to the port cannot fail.
    let _ = writeln!(serial, "umbra-boot: {reason}\nexit status {status}");

    // A power-off loses what the port hasn't sent. The wait is bounded, in case there is no port.
    let mut line_status = Port::<u8>::new(COM1 + 5);
    for _ in 0..1_000_000 {
        // SAFETY: reading COM1's line status changes nothing.
        if unsafe { line_status.read() } & 0x40 != 0 {
            break;
        }
    }

    // SAFETY: this port ends QEMU if it has an isa-debug-exit device, and is unused otherwise.
    unsafe { Port::<u32>::new(0xf4).write(status) };
    let mut bochs = Port::<u8>::new(0x8900);
    for byte in *b"Shutdown" {
        // SAFETY: this port powers Bochs off, and is unused otherwise.
        unsafe { bochs.write(byte) };
    }
    loop {
        x86_64::instructions::hlt();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    fail(ExitCode::Panic, format_args!("{info}"))
}
