//! The `hello` guests: what the loader passed, line by line, for a loader's tests to compare.

use core::fmt;

use crate::boot::BootInfo;
use crate::check::Checks;
use crate::cpu::{cr0, read_cr0};
use crate::println;

/// Prints greeting, command line, modules and memory map, and checks that they are sane.
pub fn run(boot: &BootInfo, checks: &mut Checks) {
    println!("Hello from the guest, loaded by {:?}", boot.protocol);
    println!("command line: {}", Text(boot.command_line));
    println!("modules: {}", boot.modules().count());
    for (index, module) in boot.modules().enumerate() {
        println!(
            "module {index}: {} bytes, command line: {}, first bytes: {:02x?}",
            module.data.len(),
            Text(module.command_line),
            &module.data[..module.data.len().min(8)],
        );
    }
    println!(
        "memory map: {} entries, {} KiB of RAM",
        boot.memory_map_entries,
        boot.ram_bytes / 1024
    );
    checks.equal("CR0.PE", cr0::PE, read_cr0() & cr0::PE);
    let paging = if cfg!(target_arch = "x86_64") {
        cr0::PG
    } else {
        0
    };
    checks.equal("CR0.PG", paging, read_cr0() & cr0::PG);
    checks.equal(
        "a memory map with at least 32 MiB of RAM",
        true,
        boot.ram_bytes >= 32 << 20,
    );
    checks.ok("the loader's state");
}

/// Bytes as text, with what is no printable ASCII escaped.
struct Text<'a>(&'a [u8]);

impl fmt::Display for Text<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0.escape_ascii())
    }
}
