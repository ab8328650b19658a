//! The Umbra unikernel: one Hermit application that is the hypervisor.

#![no_std]
#![no_main]

use core::ffi::c_char;

/// Entry point that Hermit calls after it has booted. Never returns: it shuts the system down.
// SAFETY: the kernel declares exactly this function, and no other crate defines it.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: i32, _argv: *const *const c_char, _env: *const *const c_char) {
    hermit::println!("Umbra {}", env!("CARGO_PKG_VERSION"));
    hermit::scheduler::shutdown(0);
}
