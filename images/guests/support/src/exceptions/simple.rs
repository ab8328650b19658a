//! #DE, #BP, #OF, #BR, #UD, software interrupts, and exceptions on the way to a handler.

use super::attempt;
use crate::boot::BootInfo;
use crate::check::Checks;
use crate::tables::{self, GateStack, TablePointer};
use crate::trap::{Trap, vector};

const SPARE: u8 = 0x60;

/// Error code bit: the fault came up while another event was delivered.
const EXTERNAL: u32 = 1;

pub fn run(boot: &BootInfo, checks: &mut Checks) {
    divide(checks);
    traps(checks);
    undefined(checks);
    software_interrupts(checks);
    broken_gates(boot, checks);
}

/// Error code of a fault about the descriptor of `number` in the IDT.
pub fn gate_error(number: u8) -> u32 {
    u32::from(number) * 8 + 2
}

/// Unless strict, accepts QEMU's error code for the descriptor of `number` in a 64-bit IDT.
pub fn tidy(boot: &BootInfo, number: u8, mut trap: Trap) -> Trap {
    if !boot.is_strict() && trap.error_code == u32::from(number) * 16 + 2 {
        trap.error_code = gate_error(number);
    }
    trap
}

fn divide(checks: &mut Checks) {
    let by_zero = attempt!("xor edx, edx", "mov eax, 7", "xor ecx, ecx" => "div ecx" =>;
        out("eax") _, out("ecx") _, out("edx") _);
    checks.faults("DIV by zero", vector::DE, 0, by_zero);
    let overflow = attempt!("mov edx, 7", "xor eax, eax", "mov ecx, 7" => "div ecx" =>;
        out("eax") _, out("ecx") _, out("edx") _);
    checks.faults("DIV overflow", vector::DE, 0, overflow);
    let signed = attempt!("mov edx, 0x80000001", "xor eax, eax", "mov ecx, -1" => "idiv ecx" =>;
        out("eax") _, out("ecx") _, out("edx") _);
    checks.faults("IDIV overflow", vector::DE, 0, signed);
    checks.ok("#DE");
}

fn traps(checks: &mut Checks) {
    checks.traps("INT3", vector::BP, attempt!("int3"));
    checks.traps("INT 3", vector::BP, attempt!(".byte 0xcd, 3"));
    checks.ok("#BP");
    #[cfg(target_arch = "x86")]
    {
        let into = attempt!("mov al, 0x7f", "add al, 1" => ".byte 0xce" =>; out("eax") _);
        checks.traps("INTO", vector::OF, into);
        let none = attempt!("xor eax, eax" => ".byte 0xce" =>; out("eax") _);
        checks.succeeds("INTO without overflow", none);
        checks.ok("#OF");
        let bounds = [10_i32, 20];
        for (index, inside) in [(9, false), (10, true), (20, true), (21, false), (-1, false)] {
            let result = attempt!(=> "bound eax, [edx]" =>; in("eax") index, in("edx") &bounds);
            if inside {
                checks.succeeds("BOUND inside", result);
            } else {
                checks.faults("BOUND outside", vector::BR, 0, result);
            }
        }
        checks.ok("#BR");
    }
    checks.traps("INT 4", vector::OF, attempt!(".byte 0xcd, 4"));
}

fn undefined(checks: &mut Checks) {
    checks.faults("UD2", vector::UD, 0, attempt!("ud2"));
    checks.faults("LOCK NOP", vector::UD, 0, attempt!(".byte 0xf0, 0x90"));
    let load_cs = attempt!("xor eax, eax" => ".byte 0x8e, 0xc8" =>; out("eax") _);
    checks.faults("MOV CS", vector::UD, 0, load_cs);
    #[cfg(target_arch = "x86_64")]
    {
        checks.faults("INTO in 64-bit mode", vector::UD, 0, attempt!(".byte 0xce"));
        checks.faults(
            "PUSH ES in 64-bit mode",
            vector::UD,
            0,
            attempt!(".byte 0x06"),
        );
        checks.faults(
            "PUSHA in 64-bit mode",
            vector::UD,
            0,
            attempt!(".byte 0x60"),
        );
    }
    checks.ok("#UD");
}

fn software_interrupts(checks: &mut Checks) {
    for _ in 0..3 {
        checks.traps("INT 0x60", SPARE, attempt!("int 0x60"));
        checks.traps("INT 0xff", 0xff, attempt!("int 0xff"));
    }
    // INT n pushes no error code, whatever the vector.
    for number in [
        vector::DF,
        vector::TS,
        vector::NP,
        vector::SS,
        vector::GP,
        vector::PF,
    ] {
        tables::set_gate(number, SPARE, 0, GateStack::Ordinary);
    }
    for result in [
        attempt!("int 8"),
        attempt!("int 10"),
        attempt!("int 11"),
        attempt!("int 12"),
        attempt!("int 13"),
        attempt!("int 14"),
    ] {
        checks.raises("INT of a vector with an error code", SPARE, 0, result);
    }
    for number in 0..32 {
        tables::restore_gate(number);
    }
    checks.traps("INT 14", SPARE, {
        tables::set_gate(vector::PF, SPARE, 0, GateStack::Ordinary);
        attempt!("int 14")
    });
    tables::restore_gate(vector::PF);
    checks.ok("software interrupts");
}

fn broken_gates(boot: &BootInfo, checks: &mut Checks) {
    let whole = tables::idt_pointer();
    let up_to_0x50 = (usize::from(whole.limit) + 1) / 256 * 0x50 - 1;
    tables::load_idt(TablePointer {
        limit: up_to_0x50 as u16,
        base: whole.base,
    });
    let result = attempt!("int 0x60");
    tables::load_idt(whole);
    let result = result.map_err(|trap| tidy(boot, SPARE, trap));
    checks.faults("INT beyond the IDT", vector::GP, gate_error(SPARE), result);
    tables::break_gate(SPARE);
    let result = attempt!("int 0x60").map_err(|trap| tidy(boot, SPARE, trap));
    checks.faults(
        "INT through a gate not present",
        vector::NP,
        gate_error(SPARE),
        result,
    );
    tables::restore_gate(SPARE);
    tables::break_gate(vector::UD);
    let result = attempt!("ud2").map_err(|mut trap| {
        trap = tidy(boot, vector::UD, trap);
        trap.error_code |= if boot.is_strict() { 0 } else { EXTERNAL };
        trap
    });
    checks.faults(
        "#UD through a gate not present",
        vector::NP,
        gate_error(vector::UD) | EXTERNAL,
        result,
    );
    tables::restore_gate(vector::UD);
    checks.ok("#NP and #GP of gates");
    for _ in 0..2 {
        tables::break_gate(vector::DE);
        let result = attempt!("xor edx, edx", "xor ecx, ecx" => "div ecx" =>;
            out("eax") _, out("ecx") _, out("edx") _);
        checks.raises("#DE through a gate not present", vector::DF, 0, result);
        tables::restore_gate(vector::DE);
        tables::break_gate(vector::GP);
        let result = attempt!("mov eax, 0xfff8" => "mov es, eax" =>; out("eax") _);
        checks.raises("#GP through a gate not present", vector::DF, 0, result);
        tables::restore_gate(vector::GP);
    }
    checks.ok("#DF");
}
