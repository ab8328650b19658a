//! The edge to the Hermit kernel: console, clock, boot modules, arguments, and the way out.
//!
//! Nothing else in the image calls the kernel, but for `physical`, which asks it for memory.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use umbra_report::ExitCode;

/// Writes raw bytes to the console.
pub fn write_console(bytes: &[u8]) {
    hermit::console::write_now(bytes);
}

/// A byte from the terminal, if one has arrived.
pub fn read_console() -> Option<u8> {
    hermit::console::try_read()
}

/// The words after `--` on the kernel's command line.
pub fn arguments() -> Vec<String> {
    hermit::env::args().to_vec()
}

/// The environment variables, as names and values.
pub fn environment() -> impl Iterator<Item = (&'static str, &'static str)> {
    hermit::env::vars().map(|(name, value)| (name.as_str(), value.as_str()))
}

/// The memory that the boot loader has given the kernel, by physical addresses.
pub fn memory_ranges() -> Vec<Range<u64>> {
    let Some(tree) = hermit::env::fdt() else {
        return Vec::new();
    };
    let nodes = tree.find_all_nodes("/memory");
    let ranges = nodes.filter_map(|node| {
        let region = node.reg()?.next()?;
        let start = region.starting_address as u64;
        Some(start..start + region.size? as u64)
    });
    ranges.collect()
}

/// Has the kernel print a text when the heap is exhausted and that ends the system.
pub fn advise_when_out_of_memory(advice: &'static str) {
    hermit::mm::set_out_of_memory_advice(advice);
}

/// A file that the boot loader has put into memory.
pub struct BootModule {
    /// What the boot loader calls it: a path, or nothing.
    pub name: String,
    /// Its content.
    pub data: &'static [u8],
}

/// The boot loader's modules, in its order; uhyve's is the `.hermit` image, if it hands that over.
pub fn boot_modules() -> Vec<BootModule> {
    let Some(tree) = hermit::env::fdt() else {
        return Vec::new();
    };
    let Some(chosen) = tree.find_node("/chosen") else {
        return Vec::new();
    };
    let hermit_image = || {
        let address = |name| chosen.property(name)?.as_usize();
        let (start, end) = (address("linux,initrd-start")?, address("linux,initrd-end")?);
        let length = end.checked_sub(start)?;
        // SAFETY: uhyve has put the image there, reserves the memory for it, and has mapped it; it lets
        // nobody write to it.
        let data = unsafe { core::slice::from_raw_parts(start as *const u8, length) };
        let name = String::from("the Hermit image");
        Some(BootModule { name, data })
    };
    let modules = chosen
        .children()
        .filter(|node| {
            node.compatible()
                .is_some_and(|names| names.all().any(|name| name == "multiboot,module"))
        })
        .filter_map(|node| {
            let region = node.reg()?.next()?;
            // SAFETY: the boot loader has put the module there, keeps it out of the memory that it
            // gives the kernel, and has mapped it; nothing ever writes to it.
            let data =
                unsafe { core::slice::from_raw_parts(region.starting_address, region.size?) };
            let name = node
                .property("bootargs")
                .and_then(|property| property.as_str())
                .unwrap_or_default();
            Some(BootModule {
                name: name.into(),
                data,
            })
        });
    modules.chain(hermit_image()).collect()
}

pub use crate::timestamp::{now as timestamp, ticks_in_microseconds};

/// The host's wall clock in seconds since 1970.
pub fn unix_time() -> u64 {
    const CLOCK_REALTIME: i32 = 1;
    let mut now = hermit::time::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is that of a live value which the kernel fills.
    unsafe { hermit::syscalls::sys_clock_gettime(CLOCK_REALTIME, &raw mut now) };
    now.tv_sec.try_into().unwrap_or(0)
}

/// Has the host's timer interrupt this core after so many ticks of the time-stamp counter.
pub fn interrupt_after(ticks: u64) {
    let microseconds = crate::timestamp::nanoseconds_in_ticks(ticks).div_ceil(1000);
    hermit::time::set_oneshot_timer_us(Some(microseconds.max(1)));
}

/// Keeps the host's interrupts waiting.
pub fn hold_interrupts() {
    x86_64::instructions::interrupts::disable();
}

/// Lets the host take its interrupts again.
pub fn release_interrupts() {
    x86_64::instructions::interrupts::enable();
}

/// Lets the host take the interrupts that wait, and holds further ones.
pub fn take_interrupts() {
    release_interrupts();
    x86_64::instructions::nop();
    hold_interrupts();
}

/// Waits for any interrupt, lets the host take it, and holds further ones.
pub fn wait_for_interrupt() {
    x86_64::instructions::interrupts::enable_and_hlt();
    hold_interrupts();
}

/// Ends the whole system with `code`, by whichever way out the platform has.
pub fn exit(code: ExitCode) -> ! {
    hermit::scheduler::shutdown(i32::from(code.as_u8()))
}
