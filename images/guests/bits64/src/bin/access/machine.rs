//! The machine around the test: how much memory and how many processors, tables over all of the
//! memory, the local APIC.

use umbra_guest::memory::{self, FREE_END, PhysAddr, VirtAddr};
use umbra_guest::paging::space::{Mode, Space, bits, turn_on};
use umbra_guest::{BootInfo, Checks, apic, firmware};

const LARGE_PAGE: u64 = 2 << 20;
/// Tables for no more than this are built.
const MOST: u64 = 64 << 30;

/// Looks at the machine, and maps all of its memory for ring 0.
pub fn start(boot: &BootInfo, checks: &mut Checks) -> Space {
    let mut end = boot.ram_end.max(FREE_END);
    match firmware::read() {
        Some(found) => {
            checks.equal("there are processors", true, found.processors > 0);
            // A memory map leaves out what the firmware keeps for itself.
            let most = found.ram_bytes + (2 << 20);
            checks.equal("the map's memory is there", true, boot.ram_bytes <= most);
            checks.ok(format_args!(
                "{} MiB of memory and {} processors, says the firmware",
                found.ram_bytes >> 20,
                found.processors
            ));
        }
        None => checks.ok(format_args!(
            "{} MiB of memory, says the loader",
            boot.ram_bytes >> 20
        )),
    }
    end = end.min(MOST);
    let space = Space::new(Mode::Long);
    let flags = bits::P | bits::W;
    let mut address = FREE_END;
    while address < end {
        space.map(VirtAddr(address as usize), 2, PhysAddr(address), flags);
        address += LARGE_PAGE;
    }
    let apic = PhysAddr(apic::PAGE.0 as u64);
    if end <= apic.0 {
        space.map(apic::PAGE, 1, apic, flags | bits::PCD);
    }
    turn_on(space);
    let last = PhysAddr((boot.ram_end.clamp(FREE_END, MOST) - 8) & !7);
    let value = 0x0123_4567_89ab_cdef_u64;
    let old = memory::peek::<u64>(last);
    memory::poke(last, value);
    checks.equal("the last word of memory", value, memory::peek::<u64>(last));
    memory::poke(last, old);
    checks.ok("tables over all of the memory");
    apic::start(checks);
    space
}
