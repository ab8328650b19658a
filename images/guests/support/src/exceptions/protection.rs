//! #TS, #NP, #SS, #GP, #PF, #NM: descriptors, selectors, control registers.

use super::attempt;
use crate::boot::{BootInfo, LENIENT};
use crate::check::Checks;
use crate::cpu::{self, cr0, cr4};
#[cfg(target_arch = "x86_64")]
use crate::memory::VirtAddr;
use crate::tables::{self, FREE_SLOT, KERNEL_DATA, TSS, USER_DATA};
use crate::trap::vector;

/// A data segment that is not present.
const ABSENT_DATA: u64 = 0x00cf_1300_0000_ffff;

/// A 32-bit code segment that is not present.
const ABSENT_CODE: u64 = 0x00cf_1b00_0000_ffff;

pub fn run(boot: &BootInfo, checks: &mut Checks) {
    segment_loads(checks);
    far_jumps(checks);
    task_state(checks);
    control_registers(boot, checks);
    device_not_available(checks);
    #[cfg(target_arch = "x86")]
    limits(boot, checks);
    #[cfg(target_arch = "x86_64")]
    {
        canonical(boot, checks);
        page_fault(checks);
    }
    table_registers(checks);
}

fn segment_loads(checks: &mut Checks) {
    tables::set_descriptor(FREE_SLOT, ABSENT_DATA);
    let selector = u32::from(FREE_SLOT);
    let result = attempt!(=> "mov es, eax" =>; in("eax") selector);
    checks.faults("ES not present", vector::NP, selector, result);
    let result = attempt!(=> "mov fs, eax" =>; in("eax") selector);
    checks.faults("FS not present", vector::NP, selector, result);
    checks.ok("#NP");
    let result = attempt!(=> "mov ss, eax" =>; in("eax") selector);
    checks.faults("SS not present", vector::SS, selector, result);
    let beyond = 0xfff8;
    let result = attempt!(=> "mov es, eax" =>; in("eax") beyond);
    checks.faults("ES beyond the GDT", vector::GP, beyond, result);
    let local = 0x14;
    let result = attempt!("xor ecx, ecx", "lldt cx" => "mov es, eax" =>; in("eax") local,
        out("ecx") _);
    checks.faults("ES in an empty LDT", vector::GP, local, result);
    let user = u32::from(USER_DATA);
    let result = attempt!(=> "mov ss, eax" =>; in("eax") user);
    checks.faults("SS of ring 3", vector::GP, user & !3, result);
    let task = u32::from(TSS);
    let result = attempt!(=> "mov es, eax" =>; in("eax") task);
    checks.faults("ES with a TSS", vector::GP, task, result);
    let result = attempt!(=> "ltr ax" =>; in("eax") task);
    checks.faults("LTR of a busy TSS", vector::GP, task, result);
    checks.ok("#GP and #SS of selectors");
}

fn far_jumps(checks: &mut Checks) {
    tables::set_descriptor(FREE_SLOT, ABSENT_CODE);
    let slot = u32::from(FREE_SLOT);
    let data = u32::from(KERNEL_DATA);
    let targets = [
        (slot, vector::NP, slot),
        (data, vector::GP, data),
        (0, vector::GP, 0),
    ];
    for (selector, number, error_code) in targets {
        let pointer = [0x1000_u32, selector];
        let result = attempt!(=> "jmp fword ptr [{p}]" =>; p = in(reg) &raw const pointer);
        checks.faults("a far jump", number, error_code, result);
    }
    checks.ok("far jumps to bad selectors");
}

fn task_state(checks: &mut Checks) {
    #[cfg(target_arch = "x86")]
    {
        tables::set_task_back_link(KERNEL_DATA);
        let result = attempt!("pushfd", "or dword ptr [esp], 0x4000", "popfd" => "iretd" =>;);
        let selector = u32::from(KERNEL_DATA);
        checks.faults("IRET to a task that is none", vector::TS, selector, result);
    }
    #[cfg(target_arch = "x86_64")]
    {
        // The TSS ends before its seventh interrupt stack.
        tables::load_task(43);
        tables::set_gate(0x61, 0x61, 0, tables::GateStack::Ist7);
        let result = attempt!("int 0x61");
        checks.faults(
            "an interrupt stack beyond the TSS",
            vector::TS,
            u32::from(TSS),
            result,
        );
        tables::restore_gate(0x61);
        tables::load_task(103);
    }
    checks.ok("#TS");
}

fn control_registers(boot: &BootInfo, checks: &mut Checks) {
    let (zero, four) = (cpu::read_cr0(), cpu::read_cr4());
    if boot.is_lenient() {
        checks.skip("reserved combinations of control register bits", LENIENT);
    } else {
        refused_control_bits(checks, zero, four);
    }
    for bit in [cr0::MP, cr0::NE, cr0::WP, cr0::AM, cr0::TS] {
        cpu::write_cr0(zero ^ bit);
        checks.equal(
            format_args!("CR0 with bit {bit:#x} changed"),
            zero ^ bit,
            cpu::read_cr0(),
        );
        cpu::write_cr0(zero);
    }
    for bit in [cr4::TSD, cr4::DE] {
        cpu::write_cr4(four ^ bit);
        checks.equal(
            format_args!("CR4 with bit {bit:#x} changed"),
            four ^ bit,
            cpu::read_cr4(),
        );
        cpu::write_cr4(four);
    }
    cpu::set_cr0(cr0::TS);
    checks.succeeds("CLTS", attempt!("clts"));
    checks.equal("CR0.TS after CLTS", 0, cpu::read_cr0() & cr0::TS);
    let result = attempt!(=> "lmsw {v:x}" =>; v = in(reg) zero | cr0::TS);
    checks.succeeds("LMSW", result);
    checks.equal("CR0.TS after LMSW", cr0::TS, cpu::read_cr0() & cr0::TS);
    cpu::write_cr0(zero);
    for address in [0x1234_5000_usize, 0x7654_3210] {
        cpu::write_cr2(address);
        checks.equal("CR2", address, cpu::read_cr2());
    }
    checks.ok("control registers");
}

fn refused_control_bits(checks: &mut Checks, zero: usize, four: usize) {
    let result = attempt!(=> "mov cr0, {v}" =>; v = in(reg) zero & !cr0::PE | cr0::PG);
    checks.faults("CR0.PG without PE", vector::GP, 0, result);
    // NW without CD.
    let result = attempt!(=> "mov cr0, {v}" =>; v = in(reg) (zero | 1 << 29) & !(1 << 30));
    checks.faults("CR0.NW without CD", vector::GP, 0, result);
    #[cfg(target_arch = "x86_64")]
    {
        let result = attempt!(=> "mov cr0, {v}" =>; v = in(reg) zero | 1 << 40);
        checks.faults("a high bit of CR0", vector::GP, 0, result);
        let result = attempt!(=> "mov cr4, {v}" =>; v = in(reg) four & !cr4::PAE);
        checks.faults("CR4.PAE = 0 in long mode", vector::GP, 0, result);
    }
    checks.equal("CR0 is as before", zero, cpu::read_cr0());
    checks.equal("CR4 is as before", four, cpu::read_cr4());
    checks.ok("reserved combinations of control register bits");
}

fn device_not_available(checks: &mut Checks) {
    let zero = cpu::read_cr0();
    cpu::write_cr0((zero | cr0::TS) & !cr0::EM);
    checks.faults("x87 with CR0.TS", vector::NM, 0, attempt!("fninit"));
    cpu::write_cr0((zero | cr0::TS | cr0::MP) & !cr0::EM);
    checks.faults("FWAIT with CR0.TS and MP", vector::NM, 0, attempt!("fwait"));
    cpu::write_cr0((zero | cr0::EM) & !cr0::TS);
    checks.faults("x87 with CR0.EM", vector::NM, 0, attempt!("fninit"));
    cpu::write_cr0(zero & !(cr0::EM | cr0::TS));
    checks.succeeds("x87", attempt!("fninit"));
    cpu::write_cr0(zero);
    checks.ok("#NM");
}

#[cfg(target_arch = "x86")]
fn limits(boot: &BootInfo, checks: &mut Checks) {
    // 4 KiB, writable; 4 KiB, read-only; code that cannot be read; 16 MiB.
    let descriptors = [
        0x0040_9300_0000_0fff,
        0x0040_9100_0000_0fff,
        0x00cf_9900_0000_ffff,
        0x00c0_9300_0000_0fff,
    ];
    let execute_only = FREE_SLOT + 16;
    for (index, descriptor) in descriptors.into_iter().enumerate() {
        tables::set_descriptor(FREE_SLOT + index as u16 * 8, descriptor);
    }
    let read = |selector: u16, address: u32| {
        attempt!("mov es, ecx" => "mov al, es:[edx]" => "mov ecx, ss", "mov es, ecx";
            in("edx") address, inout("ecx") u32::from(selector) => _, out("eax") _)
    };
    let write = |selector: u16, address: u32| {
        attempt!("mov es, ecx", "mov al, es:[edx]" => "mov es:[edx], al" => "mov ecx, ss", "mov es, ecx";
            in("edx") address, inout("ecx") u32::from(selector) => _, out("eax") _)
    };
    checks.succeeds("a load at the limit", read(FREE_SLOT, 0xfff));
    let above = read(FREE_SLOT, 0x1000);
    if above.is_ok() && !boot.is_strict() {
        return checks.skip(
            "#GP and #SS of limits and types",
            "this processor does not check them",
        );
    }
    checks.faults("a load above the limit", vector::GP, 0, above);
    checks.succeeds("a store at the limit", write(FREE_SLOT, 0xfff));
    checks.faults(
        "a store to read-only data",
        vector::GP,
        0,
        write(FREE_SLOT + 8, 0xf00),
    );
    let result = attempt!(=> "mov es, eax" =>; in("eax") u32::from(execute_only));
    checks.faults(
        "ES with execute-only code",
        vector::GP,
        u32::from(execute_only),
        result,
    );
    checks.faults("a load with a null selector", vector::GP, 0, read(0, 0));
    checks.ok("#GP of limits and types");
    let result = attempt!("mov ss, eax" => "mov al, ss:[0x1800000]" => "mov ss, ecx";
        inout("eax") u32::from(FREE_SLOT + 24) => _, in("ecx") u32::from(KERNEL_DATA));
    checks.faults("a load above SS's limit", vector::SS, 0, result);
    checks.ok("#SS of limits");
}

#[cfg(target_arch = "x86_64")]
fn canonical(boot: &BootInfo, checks: &mut Checks) {
    let bad = 0x8000_0000_0000_u64;
    let result = attempt!(=> "mov rax, [{p}]" =>; p = in(reg) bad, out("rax") _);
    checks.faults("a load that is not canonical", vector::GP, 0, result);
    let result = attempt!(=> "mov [{p}], rax" =>; p = in(reg) bad, out("rax") _);
    checks.faults("a store that is not canonical", vector::GP, 0, result);
    let result = attempt!("push rbp", "mov rbp, {p}" => "mov rax, [rbp]" => "pop rbp";
        p = in(reg) bad, out("rax") _)
    .map_err(|mut trap| {
        if !boot.is_strict() && trap.vector == vector::GP {
            trap.vector = vector::SS;
        }
        trap
    });
    checks.faults("a load by RBP that is not canonical", vector::SS, 0, result);
    let result = attempt!(=> "jmp {p}" =>; p = in(reg) bad);
    checks.raises("a jump that is not canonical", vector::GP, 0, result);
    checks.ok("#GP and #SS of addresses that are not canonical");
}

#[cfg(target_arch = "x86_64")]
fn page_fault(checks: &mut Checks) {
    for (address, number) in [(0x1234_5678_9abc_usize, 0), (usize::MAX - 0xfff_ffff, 1)] {
        let result = attempt!(=> "mov al, [{p}]" =>; p = in(reg) address, out("rax") _);
        let trap = checks.faults("a load from nowhere", vector::PF, 0, result);
        checks.equal("CR2", address, trap.cr2);
        let result = attempt!(=> "mov [{p}], al" =>; p = in(reg) address + number);
        let trap = checks.faults("a store to nowhere", vector::PF, 2, result);
        checks.equal("CR2", address + number, trap.cr2);
    }
    let target = VirtAddr(0x2345_6789_a000);
    let trap = checks.raises(
        "a jump to nowhere",
        vector::PF,
        0,
        crate::paging::call(target),
    );
    checks.equal("its instruction pointer", target.0, trap.ip);
    tables::break_gate(vector::PF);
    let result = attempt!(=> "mov al, [{p}]" =>; p = in(reg) target.0, out("rax") _);
    checks.raises("#PF through a gate not present", vector::DF, 0, result);
    tables::restore_gate(vector::PF);
    checks.ok("#PF");
}

fn table_registers(checks: &mut Checks) {
    checks.equal("SGDT", tables::gdt_pointer(), tables::read_gdt());
    checks.equal("SIDT", tables::idt_pointer(), tables::read_idt());
    checks.equal("STR", TSS, tables::read_task());
    let busy = tables::descriptor(TSS) >> 40 & 0xff;
    checks.equal("the TSS is busy", 0x8b, busy);
    checks.ok("descriptor table registers");
}
