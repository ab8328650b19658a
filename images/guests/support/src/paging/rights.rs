//! Who may do what: ring 3, execute-disable, SMEP, SMAP, reserved bits.

use super::space::{Mode, bits};
use super::suite::{Suite, error};
use crate::cpu::{self, Feature, cr0, cr4, efer, has, msr};
use crate::memory;
use crate::trap::catch;
use crate::user::Program;

const PROTECTION: u32 = error::PROTECTION;
const WRITE: u32 = error::WRITE;

pub fn run(suite: &mut Suite<'_>) {
    user_mode(suite);
    upper_levels_narrow(suite);
    execute_disable(suite);
    supervisor_execution_prevention(suite);
    supervisor_access_prevention(suite);
    reserved_bits(suite);
}

fn user_mode(suite: &mut Suite<'_>) {
    let (page, _) = suite.fresh(20, bits::PWU);
    suite.user_writes("a store to a user page", page, 0x77);
    suite.user_reads("a load from a user page", 0x77, page);
    suite.reads("ring 0's load from it", 0x77, page);
    let entry = suite.space.get(page, 1);
    suite
        .checks
        .equal("A and D", bits::A | bits::D, entry & (bits::A | bits::D));
    suite.change(page, 1, bits::W, 0);
    suite.user_reads("a load from a read-only user page", 0x77, page);
    suite.user_faults(
        "a store to a read-only user page",
        Program::Write,
        PROTECTION | WRITE,
        page,
    );
    cpu::clear_cr0(cr0::WP);
    suite.user_faults(
        "the same with WP = 0",
        Program::Write,
        PROTECTION | WRITE,
        page,
    );
    suite.writes("ring 0's store with WP = 0", page, 0x78);
    suite.user_reads("ring 3 sees it", 0x78, page);
    suite.user_faults(
        "ring 3 still may not",
        Program::Write,
        PROTECTION | WRITE,
        page,
    );
    cpu::set_cr0(cr0::WP);
    suite.change(page, 1, bits::U, bits::W);
    suite.user_faults("a load from a ring 0 page", Program::Read, PROTECTION, page);
    suite.user_faults(
        "a store to a ring 0 page",
        Program::Write,
        PROTECTION | WRITE,
        page,
    );
    suite.writes("ring 0's store to it", page, 1);
    let (code, _) = suite.fresh_code(21, bits::P | bits::U);
    suite.user_runs("code in a user page", code);
    suite.change(code, 1, bits::U, 0);
    suite.user_fetch_faults("a fetch from a ring 0 page", PROTECTION, code);
    suite.runs("ring 0's call to it", code);
    suite.checks.ok("ring 3 stays in its pages");
}

fn upper_levels_narrow(suite: &mut Suite<'_>) {
    let (page, _) = suite.fresh(22, bits::PWU);
    for level in 2..=suite.mode.highest_full_level() {
        for _ in 0..2 {
            suite.user_writes(format_args!("a store, level {level} wide"), page, level);
            suite.change(page, level, bits::U, 0);
            let what = format_args!("a load, level {level} for ring 0");
            suite.user_faults(what, Program::Read, PROTECTION, page);
            suite.reads("ring 0's load", level, page);
            suite.change(page, level, bits::W, bits::U);
            let what = format_args!("a store, level {level} read-only");
            suite.user_faults(what, Program::Write, PROTECTION | WRITE, page);
            suite.user_reads("a load", level, page);
            suite.change(page, level, 0, bits::W);
        }
    }
    suite.checks.ok("upper levels narrow and widen permissions");
}

fn execute_disable(suite: &mut Suite<'_>) {
    let what = "execute-disable";
    if !suite.mode.has_nx() {
        return suite.checks.skip(what, "not in this mode or processor");
    }
    let (code, _) = suite.fresh_code(23, bits::P | bits::U);
    for level in (1..=suite.mode.highest_full_level()).rev() {
        suite.runs(format_args!("a call, level {level} executable"), code);
        suite.change(code, level, 0, bits::NX);
        suite.fetch_faults(format_args!("a call, level {level} NX"), PROTECTION, code);
        suite.user_fetch_faults(format_args!("ring 3, level {level} NX"), PROTECTION, code);
        suite
            .checks
            .succeeds("a load from it", memory::read::<u8>(code));
        suite.change(code, level, bits::NX, 0);
        suite.user_runs(format_args!("ring 3, level {level} executable again"), code);
    }
    suite.change(code, 1, 0, bits::NX);
    let enabled = cpu::rdmsr(msr::EFER);
    cpu::wrmsr(msr::EFER, enabled & !efer::NXE);
    suite
        .checks
        .equal("EFER.NXE", 0, cpu::rdmsr(msr::EFER) & efer::NXE);
    cpu::reload_root();
    suite.read_faults(
        "a load, NXE = 0: NX is reserved",
        PROTECTION | error::RESERVED,
        code,
    );
    cpu::wrmsr(msr::EFER, enabled);
    cpu::reload_root();
    suite
        .checks
        .succeeds("a load, NXE = 1 again", memory::read::<u8>(code));
    suite.fetch_faults("a call, NXE = 1 again", PROTECTION, code);
    suite.checks.ok(what);
}

fn supervisor_execution_prevention(suite: &mut Suite<'_>) {
    let what = "supervisor-mode execution prevention";
    if !has(Feature::Smep) {
        return suite.checks.skip(what, "no SMEP");
    }
    let (code, _) = suite.fresh_code(24, bits::P | bits::U);
    for _ in 0..2 {
        suite.runs("a call, SMEP = 0", code);
        cpu::set_cr4(cr4::SMEP);
        suite.fetch_faults("a call, SMEP = 1", PROTECTION, code);
        suite.user_runs("ring 3's jump, SMEP = 1", code);
        suite
            .checks
            .succeeds("a load, SMEP = 1", memory::read::<u8>(code));
        suite.change(code, 1, bits::U, 0);
        suite.runs("a call to a ring 0 page, SMEP = 1", code);
        suite.change(code, 1, bits::P, 0);
        suite.fetch_faults("a call to a missing page, SMEP = 1", 0, code);
        suite.change(code, 1, 0, bits::P | bits::U);
        suite.change(code, 2, bits::U, 0);
        suite.runs("a call, SMEP = 1, upper level for ring 0", code);
        suite.change(code, 2, 0, bits::U);
        cpu::clear_cr4(cr4::SMEP);
    }
    suite.checks.ok(what);
}

fn supervisor_access_prevention(suite: &mut Suite<'_>) {
    let what = "supervisor-mode access prevention";
    if !has(Feature::Smap) {
        return suite.checks.skip(what, "no SMAP");
    }
    let (page, _) = suite.fresh(25, bits::PWU);
    for round in 0..2 {
        suite.writes("a store, SMAP = 0", page, round);
        cpu::set_cr4(cr4::SMAP);
        suite.read_faults("a load, SMAP = 1", PROTECTION, page);
        suite.write_faults("a store, SMAP = 1", PROTECTION | WRITE, page);
        suite.user_reads("ring 3's load, SMAP = 1", round, page);
        let loaded = catch(|| {
            // SAFETY: the page is mapped; AC is set around one load only.
            unsafe {
                let value: u32;
                core::arch::asm!("stac", "mov {v:e}, dword ptr [{p}]", "clac", v = out(reg) value,
                    p = in(reg) page.0, options(nostack));
                value
            }
        });
        let loaded = suite.checks.succeeds("a load, SMAP = 1, AC = 1", loaded);
        suite.checks.equal("what it loaded", round, loaded);
        suite.read_faults("a load after CLAC", PROTECTION, page);
        cpu::clear_cr0(cr0::WP);
        suite.write_faults("a store, SMAP = 1, WP = 0", PROTECTION | WRITE, page);
        cpu::set_cr0(cr0::WP);
        suite.change(page, 1, bits::U, 0);
        suite.writes("a store to a ring 0 page, SMAP = 1", page, round);
        suite.change(page, 1, 0, bits::U);
        cpu::clear_cr4(cr4::SMAP);
    }
    suite.checks.ok(what);
}

fn reserved_bits(suite: &mut Suite<'_>) {
    let what = "reserved bits";
    if suite.mode == Mode::Legacy {
        return suite.checks.skip(what, "not in this mode");
    }
    let (page, _) = suite.fresh(26, bits::PWU);
    suite.writes("a store before", page, 3);
    let code = PROTECTION | error::RESERVED;
    let reserve = |suite: &mut Suite<'_>, level: u32, bit: u64| {
        suite.change(page, level, 0, bit);
        suite.read_faults(
            format_args!("a load, bit {bit:#x} of level {level}"),
            code,
            page,
        );
        suite.write_faults(format_args!("a store, bit {bit:#x}"), code | WRITE, page);
        suite.user_faults(
            format_args!("ring 3, bit {bit:#x}"),
            Program::Read,
            code,
            page,
        );
        suite.change(page, level, bits::P, 0);
        suite.read_faults("not present comes before reserved", 0, page);
        suite.change(page, level, bit, bits::P);
        suite.reads("a load after clearing the bit", 3, page);
    };
    if !suite.mode.is_legacy() && cpu::physical_address_bits() < 52 {
        for level in 1..=suite.mode.highest_full_level() {
            reserve(suite, level, 1 << 51);
        }
    }
    if suite.mode == Mode::Pae {
        reserve(suite, 1, 1 << 62);
    }
    if suite.mode == Mode::Long {
        reserve(suite, 4, bits::PS);
        if !has(Feature::Gibibyte) {
            reserve(suite, 3, bits::PS);
        }
    }
    suite.checks.ok(what);
}
