//! #DB: single steps, breakpoints, watchpoints, INT1, and the debug registers.

use super::attempt;
use crate::boot::BootInfo;
use crate::check::Checks;
use crate::cpu::{self, Feature, cr4, flags, has};
use crate::trap::{Disposition, Frame, Global, Trap, vector, with_hook};

const DR6_CLEAR: usize = 0xffff_0ff0;
const DR7_CLEAR: usize = 0x400;
const SINGLE_STEP: usize = 1 << 14;

static COUNT: Global<u32> = Global::new(0);
static WATCHED: Global<[u32; 2]> = Global::new([0; 2]);

pub fn run(boot: &BootInfo, checks: &mut Checks) {
    single_step(checks);
    breakpoint(checks);
    watchpoint(checks);
    registers(checks);
    if boot.has_word("int1") {
        checks.traps("INT1", vector::DB, attempt!(".byte 0xf1"));
        checks.ok("INT1");
    }
}

fn clear() {
    cpu::write_dr7(DR7_CLEAR);
    cpu::write_dr6(DR6_CLEAR);
}

fn count(trap: &Trap, frame: &mut Frame) -> Disposition {
    if trap.vector != vector::DB {
        return Disposition::GiveUp;
    }
    COUNT.set(COUNT.get() + 1);
    frame.flags |= flags::RF;
    Disposition::Resume
}

fn single_step(checks: &mut Checks) {
    clear();
    #[cfg(target_arch = "x86_64")]
    let result = attempt!("pushfq", "or qword ptr [rsp], 0x100", "popfq" => "nop" =>;);
    #[cfg(target_arch = "x86")]
    let result = attempt!("pushfd", "or dword ptr [esp], 0x100", "popfd" => "nop" =>;);
    let trap = checks.traps("a single step", vector::DB, result);
    checks.equal("DR6.BS", SINGLE_STEP, trap.dr6 & (SINGLE_STEP | 0xf));
    clear();
    #[cfg(target_arch = "x86_64")]
    let result = attempt!("pushfq", "or qword ptr [rsp], 0x100", "xor eax, eax", "popfq"
        => "cpuid" => "nop"; out("eax") _, out("ecx") _, out("edx") _);
    #[cfg(target_arch = "x86")]
    let result = attempt!("pushfd", "or dword ptr [esp], 0x100", "xor eax, eax", "popfd"
        => "cpuid" => "nop"; out("eax") _, out("ecx") _, out("edx") _);
    checks.traps("a single step over CPUID", vector::DB, result);
    clear();
    COUNT.set(0);
    let stepped = with_hook(count, || {
        #[cfg(target_arch = "x86_64")]
        let result = attempt!("mov r8, rbx", "pushfq", "or qword ptr [rsp], 0x100",
            "mov edx, 0x3fd", "popfq", "nop", "in al, dx", "xor eax, eax", "cpuid", "mov rax, cr3",
            "mov cr3, rax"
            => "pushfq" => "and qword ptr [rsp], ~0x100", "popfq", "mov rbx, r8";
            out("rax") _, out("rcx") _, out("rdx") _, out("r8") _);
        #[cfg(target_arch = "x86")]
        let result = attempt!("push ebx", "pushfd", "or dword ptr [esp], 0x100",
            "mov edx, 0x3fd", "popfd", "nop", "in al, dx", "xor eax, eax", "cpuid", "mov eax, cr3",
            "mov cr3, eax"
            => "pushfd" => "and dword ptr [esp], ~0x100", "popfd", "pop ebx";
            out("eax") _, out("ecx") _, out("edx") _);
        result
    });
    checks.succeeds("stepping through", stepped);
    checks.equal(
        "single steps, also over instructions that exit",
        9,
        COUNT.get(),
    );
    clear();
    checks.ok("single steps");
}

fn breakpoint(checks: &mut Checks) {
    clear();
    #[cfg(target_arch = "x86_64")]
    let result = attempt!("lea {t}, [rip + 2f]", "mov dr0, {t}", "mov {t:e}, 0x402", "mov dr7, {t}"
        => "nop" =>;);
    #[cfg(target_arch = "x86")]
    let result = attempt!("lea {t}, [2f]", "mov dr0, {t}", "mov {t}, 0x402", "mov dr7, {t}"
        => "nop" =>;);
    let trap = checks.faults("a breakpoint", vector::DB, 0, result);
    checks.equal("DR6.B0", 1, trap.dr6 & (SINGLE_STEP | 0xf));
    clear();
    COUNT.set(0);
    let result = with_hook(count, || {
        #[cfg(target_arch = "x86_64")]
        let result = attempt!("lea {t}, [rip + 2f]", "mov dr3, {t}", "mov {t:e}, 0x480",
            "mov dr7, {t}" => "nop" =>;);
        #[cfg(target_arch = "x86")]
        let result = attempt!("lea {t}, [2f]", "mov dr3, {t}", "mov {t}, 0x480", "mov dr7, {t}"
            => "nop" =>;);
        result
    });
    checks.succeeds("resuming with RF", result);
    checks.equal("breakpoints hit", 1, COUNT.get());
    checks.equal("DR6.B3", 8, cpu::read_dr6() & 0xf);
    clear();
    checks.ok("breakpoints");
}

fn watchpoint(checks: &mut Checks) {
    let at = (&raw const WATCHED) as usize;
    let store = |offset: usize| attempt!(=> "mov dword ptr [{p}], 1" =>; p = in(reg) at + offset);
    let load =
        |offset: usize| attempt!(=> "mov eax, [{p}]" =>; p = in(reg) at + offset, out("eax") _);
    clear();
    cpu::write_dr1(at);
    // L1, stores of 4 bytes.
    cpu::write_dr7(DR7_CLEAR | 1 << 2 | 0b1101 << 20);
    let trap = checks.traps("a store to a watched dword", vector::DB, store(0));
    checks.equal("DR6.B1", 2, trap.dr6 & 0xf);
    checks.succeeds("a load from it", load(0));
    checks.succeeds("a store beside it", store(4));
    checks.equal("the store came through", 1, WATCHED.get()[0]);
    // L1, loads and stores of 4 bytes.
    cpu::write_dr6(DR6_CLEAR);
    cpu::write_dr7(DR7_CLEAR | 1 << 2 | 0b1111 << 20);
    checks.traps("a load from a watched dword", vector::DB, load(0));
    cpu::write_dr7(DR7_CLEAR);
    checks.succeeds("a store without watchpoints", store(0));
    clear();
    checks.ok("watchpoints");
}

fn registers(checks: &mut Checks) {
    let values = [0x1111_1110_usize, 0x2222_2220, 0x3333_3330, 0x4444_4440];
    cpu::write_dr0(values[0]);
    cpu::write_dr1(values[1]);
    cpu::write_dr2(values[2]);
    cpu::write_dr3(values[3]);
    for _ in 0..3 {
        let _ = cpu::cpuid(0, 0);
        let _ = cpu::inb(0x3fd);
        let read = [
            cpu::read_dr0(),
            cpu::read_dr1(),
            cpu::read_dr2(),
            cpu::read_dr3(),
        ];
        checks.equal("DR0 to DR3", values, read);
        checks.equal("DR7", DR7_CLEAR, cpu::read_dr7());
        checks.equal("DR6", DR6_CLEAR, cpu::read_dr6());
    }
    if has(Feature::DebugExtensions) {
        cpu::set_cr4(cr4::DE);
        let result = attempt!(=> "mov {v}, dr4" =>; v = out(reg) _);
        checks.faults("DR4 with CR4.DE", vector::UD, 0, result);
        cpu::clear_cr4(cr4::DE);
        let result = attempt!(=> "mov {v}, dr4" =>; v = out(reg) _);
        checks.succeeds("DR4 without CR4.DE", result);
    }
    clear();
    checks.ok("debug registers");
}
