//! The exit device of test kernels (QEMU's `isa-debug-exit`): ports 0xf4 to 0xf7.
//!
//! Writing 0 says that the guest succeeded; any other value is its failure code. Reads return 0.

/// The first of the device's four ports.
pub const PORT: u16 = 0xf4;
/// The last of the device's four ports.
pub const LAST_PORT: u16 = 0xf7;
