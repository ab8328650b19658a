//! Large pages.

use super::space::{PAGE, bits, take, take_frame};
use super::suite::{Suite, error};
use crate::cpu::{self, invlpg};
use crate::memory::{PhysAddr, VirtAddr, peek, poke};
use crate::user::Program;

pub fn run(suite: &mut Suite<'_>) {
    if suite.mode.has_large(2) {
        directory_level(suite);
        split_and_merge(suite);
        reserved_bits(suite);
    } else {
        ignored_size_bit(suite);
    }
    if suite.mode.has_large(3) {
        gibibyte(suite);
    }
}

fn window(suite: &Suite<'_>, index: u64) -> VirtAddr {
    suite
        .mode
        .window()
        .plus((suite.mode.span(2) * (16 + index)) as usize)
}

fn directory_level(suite: &mut Suite<'_>) {
    let span = suite.mode.span(2);
    let (start, memory) = (window(suite, 0), take(span, span));
    let last = start.plus((span - 4) as usize);
    suite.space.map(start, 2, memory, bits::PWU);
    invlpg(start);
    suite.reads("a large page", 0, start);
    suite.checks.equal(
        "A, no D",
        bits::A,
        suite.space.get(start, 2) & (bits::A | bits::D),
    );
    suite.writes("its last dword", last, 5);
    suite
        .checks
        .equal("D", bits::D, suite.space.get(start, 2) & bits::D);
    suite.checks.equal(
        "the memory behind it",
        5,
        peek::<u32>(memory.plus(span - 4)),
    );
    suite.user_reads("ring 3's load", 5, last);
    for offset in (0..span).step_by(0x8000) {
        suite.writes("a store", start.plus(offset as usize), offset as u32);
        suite
            .checks
            .equal("behind it", offset as u32, peek::<u32>(memory.plus(offset)));
    }
    let alias = suite.page(40);
    suite
        .space
        .map(alias, 1, memory.plus(span - PAGE), bits::PWU);
    suite.writes(
        "a store through a small alias",
        alias.plus(PAGE as usize - 4),
        6,
    );
    suite.reads("a load through the large page", 6, last);
    suite.change(start, 2, bits::W, 0);
    suite.write_faults(
        "a read-only large page",
        error::PROTECTION | error::WRITE,
        last,
    );
    suite.reads("a load", 6, last);
    suite.change(start, 2, bits::U, bits::W);
    suite.user_faults(
        "a large page of ring 0",
        Program::Read,
        error::PROTECTION,
        last,
    );
    suite.change(start, 2, bits::P, 0);
    suite.read_faults("a large page not present", 0, last);
    if suite.mode.has_nx() {
        let code = [0xb8, 0xde, 0xc0, 0x0d, 0x60, 0xc3];
        crate::memory::copy_to(memory, &code);
        suite.change(start, 2, 0, bits::P);
        suite.runs("code in a large page", start);
        suite.change(start, 2, 0, bits::NX);
        suite.fetch_faults("code in a large NX page", error::PROTECTION, start);
    }
    suite.space.set(start, 2, 0);
    invlpg(start);
    suite
        .checks
        .ok("large pages: loads, stores, A, D, permissions");
}

fn split_and_merge(suite: &mut Suite<'_>) {
    let mode = suite.mode;
    let span = mode.span(2);
    let (start, memory, table) = (window(suite, 1), take(span, span), take_frame());
    let pages = span / PAGE;
    for index in 0..pages {
        poke(memory.plus(index * PAGE), index as u32);
        let entry = table.plus(index * mode.entry_bytes());
        super::space::poke_entry(mode, entry, memory.plus(index * PAGE).0 | bits::PWU);
    }
    let elsewhere = take_frame();
    poke(elsewhere, 0xffff_u32);
    for round in 0..3 {
        suite.space.map(start, 2, memory, bits::PWU);
        cpu::reload_root();
        for index in (0..pages).step_by(37) {
            suite.reads("merged", index as u32, start.plus((index * PAGE) as usize));
        }
        suite.space.set(start, 2, table.0 | bits::PWU);
        suite.space.map(start, 1, elsewhere, bits::PWU);
        cpu::reload_root();
        suite.reads(format_args!("split, round {round}"), 0xffff, start);
        for index in (1..pages).step_by(37) {
            suite.reads("split", index as u32, start.plus((index * PAGE) as usize));
        }
        suite.change(start.plus(PAGE as usize), 1, bits::W, 0);
        let page = start.plus(PAGE as usize);
        suite.write_faults(
            "a small page of its own",
            error::PROTECTION | error::WRITE,
            page,
        );
        suite.change(page, 1, 0, bits::W);
    }
    suite.space.set(start, 2, 0);
    cpu::reload_root();
    suite.checks.ok("large pages split and merge");
}

fn reserved_bits(suite: &mut Suite<'_>) {
    let span = suite.mode.span(2);
    let start = window(suite, 2);
    // SDM vol. 3, 4.3 and 4.4: bit 21 of a 4 MiB page, bits 20 to 13 of a 2 MiB page.
    let reserved: &[u64] = if suite.mode.is_legacy() {
        &[1 << 21]
    } else {
        &[1 << 13, 1 << 20]
    };
    suite.space.map(start, 2, PhysAddr(span * 2), bits::PWU);
    invlpg(start);
    for bit in reserved {
        suite.change(start, 2, 0, *bit);
        let code = error::PROTECTION | error::RESERVED;
        suite.read_faults(format_args!("bit {bit:#x} of a large page"), code, start);
        suite.write_faults("a store", code | error::WRITE, start);
        suite.change(start, 2, *bit, 0);
    }
    suite.space.set(start, 2, 0);
    invlpg(start);
    suite.checks.ok("reserved bits of large pages");
}

/// Without CR4.PSE the size bit means nothing.
fn ignored_size_bit(suite: &mut Suite<'_>) {
    let (page, _) = suite.fresh(40, bits::P | bits::W);
    suite.writes("a store before", page, 4);
    suite.change(page, 2, 0, bits::PS);
    suite.reads("a load, PS = 1 and CR4.PSE = 0", 4, page);
    suite.change(page, 2, bits::PS, 0);
    suite.checks.ok("the page size bit without CR4.PSE");
}

fn gibibyte(suite: &mut Suite<'_>) {
    let span = suite.mode.span(3);
    let start = suite.mode.window().plus(span as usize);
    let frame = take_frame();
    let inside = start.plus(frame.0 as usize);
    suite.space.map(start, 3, PhysAddr(0), bits::P | bits::W);
    invlpg(start);
    poke(frame, 0x61_u32);
    suite.reads("a 1 GiB page", 0x61, inside);
    suite.checks.equal(
        "A, no D",
        bits::A,
        suite.space.get(start, 3) & (bits::A | bits::D),
    );
    suite.writes("a store to it", inside, 0x62);
    suite
        .checks
        .equal("D", bits::D, suite.space.get(start, 3) & bits::D);
    suite.checks.equal("behind it", 0x62, peek::<u32>(frame));
    suite.change(start, 3, bits::W, 0);
    suite.write_faults(
        "a read-only 1 GiB page",
        error::PROTECTION | error::WRITE,
        inside,
    );
    suite.change(start, 3, 0, 1 << 13);
    suite.read_faults(
        "its reserved bits",
        error::PROTECTION | error::RESERVED,
        inside,
    );
    suite.space.set(start, 3, 0);
    invlpg(start);
    suite.read_faults("it removed", 0, inside);
    suite.checks.ok("1 GiB pages");
}
