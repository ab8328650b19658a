//! The device tree that the Hermit kernel reads: memory, command line, modules, ACPI root pointer.

use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;

use vm_fdt::{FdtWriter, FdtWriterResult};

use crate::physical::Module;

/// Builds the device tree. `memory` is what the kernel may use, `rsdp` the address of the root
/// pointer's copy.
///
/// # Errors
///
/// An error of the writer: a string with a null byte, or a bug.
pub fn build(
    memory: &[Range<u64>],
    command_line: &str,
    modules: &[Module],
    rsdp: Option<u64>,
) -> FdtWriterResult<Vec<u8>> {
    let mut tree = FdtWriter::new()?;

    let root = tree.begin_node("")?;
    // The kernel wants one, and compares it with "hermit,uefi".
    tree.property_string("compatible", "umbra,pc")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;

    let chosen = tree.begin_node("chosen")?;
    tree.property_string("bootargs", command_line)?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    for module in modules {
        let Range { start, end } = module.range;
        let node = tree.begin_node(&format!("module@{start:x}"))?;
        tree.property_string("compatible", "multiboot,module")?;
        tree.property_array_u64("reg", &[start, end - start])?;
        tree.property_string("bootargs", &module.arguments)?;
        tree.end_node(node)?;
    }
    tree.end_node(chosen)?;

    for Range { start, end } in memory {
        let node = tree.begin_node(&format!("memory@{start:x}"))?;
        tree.property_string("device_type", "memory")?;
        tree.property_array_u64("reg", &[*start, end - start])?;
        tree.end_node(node)?;
    }

    if let Some(rsdp) = rsdp {
        let node = tree.begin_node(&format!("hermit,rsdp@{rsdp:x}"))?;
        tree.property_array_u64("reg", &[rsdp, 1])?;
        tree.end_node(node)?;
    }

    tree.end_node(root)?;
    tree.finish()
}
