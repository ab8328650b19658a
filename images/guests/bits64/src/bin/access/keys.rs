//! RDPKRU, WRPKRU and what goes with them (SDM vol. 2, their pages; vol. 3, 4.6.2).

use umbra_guest::cpu::{self, Feature, cr4, has};
use umbra_guest::trap::{catch, vector};
use umbra_guest::{BootInfo, Checks, trap};

/// Runs the checks, and leaves CR4.PKE clear and PKRU zero.
pub fn run(boot: &BootInfo, checks: &mut Checks) {
    let what = "protection keys' own instructions";
    if !has(Feature::Pku) {
        if !boot.is_lenient() {
            let set = catch(|| cpu::set_cr4(cr4::PKE));
            checks.raises("CR4.PKE without keys", vector::GP, 0, set);
        }
        checks.raises("RDPKRU", vector::UD, 0, catch(|| cpu::rdpkru(0)));
        return checks.skip(what, "the processor has no keys");
    }
    checks.succeeds("CR4.PKE", catch(|| cpu::set_cr4(cr4::PKE)));
    checks.equal("OSPKE follows CR4.PKE", true, has(Feature::OsPke));
    for value in [0, 0xaaaa_aaaa, 0x5555_5550, 0x1234_5678, 0] {
        checks.succeeds("WRPKRU", catch(|| cpu::wrpkru(0, 0, value)));
        // An exit in between must not lose it.
        let _ = cpu::cpuid(0, 0);
        let read = checks.succeeds("RDPKRU", catch(|| cpu::rdpkru(0)));
        checks.equal("EDX and EAX of RDPKRU", (0, value), read);
    }
    let refused = |checks: &mut Checks, what, result: Result<(), trap::Trap>| {
        checks.raises(what, vector::GP, 0, result);
    };
    let read = catch(|| drop_value(cpu::rdpkru(1)));
    refused(checks, "RDPKRU with ECX 1", read);
    refused(checks, "WRPKRU with ECX 1", catch(|| cpu::wrpkru(1, 0, 3)));
    refused(checks, "WRPKRU with EDX 1", catch(|| cpu::wrpkru(0, 1, 3)));
    checks.equal("PKRU after refusals", (0, 0), cpu::rdpkru(0));
    cpu::clear_cr4(cr4::PKE);
    checks.equal("OSPKE follows CR4.PKE", false, has(Feature::OsPke));
    let read = catch(|| cpu::rdpkru(0));
    checks.raises("RDPKRU with CR4.PKE clear", vector::UD, 0, read);
    let written = catch(|| cpu::wrpkru(0, 0, 0));
    checks.raises("WRPKRU with CR4.PKE clear", vector::UD, 0, written);
    checks.ok(what);
}

fn drop_value(_: (u32, u32)) {}
