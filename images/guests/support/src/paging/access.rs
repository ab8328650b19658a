//! Mapping, remapping, aliases, faults, accessed and dirty bits, flushes.

use super::space::{Mode, PAGE, Space, bits, take_frame};
use super::suite::{Suite, error};
use crate::cpu::{self, Feature, Invpcid, cr0, cr4, has, invlpg};
use crate::memory::{self, VirtAddr, peek, poke};
use crate::trap::{Disposition, Frame, Global, Trap, vector, with_hook};

pub fn run(suite: &mut Suite<'_>) {
    mapping(suite);
    aliases(suite);
    not_present(suite);
    upper_levels_not_present(suite);
    write_protection(suite);
    accessed_and_dirty(suite);
    crossing(suite);
    demand_paging(suite);
    widening(suite);
    root_switches(suite);
    global_pages(suite);
    process_context(suite);
    paging_off_and_on(suite);
}

fn mapping(suite: &mut Suite<'_>) {
    let (page, frame) = suite.fresh(0, bits::P | bits::W);
    suite.writes("a store through a mapping", page.plus(8), 0x1234_5678);
    suite.checks.equal(
        "the frame behind it",
        0x1234_5678,
        peek::<u32>(frame.plus(8)),
    );
    poke(frame.plus(0xffc), 0x9abc_def0_u32);
    suite.reads("a load through a mapping", 0x9abc_def0, page.plus(0xffc));
    for offset in [0, 1, 2, 3] {
        suite.checks.succeeds(
            "a byte store",
            memory::write(page.plus(offset), offset as u8 + 1),
        );
    }
    suite
        .checks
        .succeeds("a word store", memory::write(page.plus(2), 0xaabb_u16));
    suite.reads("bytes and words together", 0xaabb_0201, page);
    let other = take_frame();
    poke(other, 0x0bad_cafe_u32);
    suite.space.map(page, 1, other, bits::P | bits::W);
    invlpg(page);
    suite.reads("a load after remapping", 0x0bad_cafe, page);
    suite.writes("a store after remapping", page, 7);
    suite.checks.equal("the new frame", 7, peek::<u32>(other));
    suite
        .checks
        .equal("the old frame", 0xaabb_0201, peek::<u32>(frame));
    suite.checks.ok("pages map and remap");
}

fn aliases(suite: &mut Suite<'_>) {
    let (first, frame) = suite.fresh(1, bits::P | bits::W);
    let (second, far) = (suite.page(2), suite.page(300));
    suite.space.map(second, 1, frame, bits::P | bits::W);
    suite.space.map(far, 1, frame, bits::P);
    invlpg(second);
    invlpg(far);
    for value in 0..16 {
        suite.writes("a store through the first alias", first.plus(16), value);
        suite.reads("a load through the second alias", value, second.plus(16));
        suite.writes("a store through the second alias", second.plus(20), !value);
        suite.reads("a load through the read-only alias", !value, far.plus(20));
    }
    suite.write_faults(
        "the read-only alias",
        error::PROTECTION | error::WRITE,
        far.plus(20),
    );
    suite.checks.ok("aliases see each other's writes");
}

fn not_present(suite: &mut Suite<'_>) {
    let (page, _) = suite.fresh(3, bits::P | bits::W);
    suite.writes("a store before", page, 1);
    suite.change(page, 1, bits::P, 0);
    suite.read_faults("a load", 0, page.plus(0x123));
    suite.write_faults("a store", error::WRITE, page.plus(0xffc));
    suite.fetch_faults("a fetch", 0, page);
    suite.user_faults("ring 3's load", crate::user::Program::Read, 0, page);
    suite.user_faults(
        "ring 3's store",
        crate::user::Program::Write,
        error::WRITE,
        page,
    );
    suite.user_fetch_faults("ring 3's fetch", 0, page);
    // No flush: the processor does not remember what is not present.
    suite.space.change(page, 1, 0, bits::P);
    suite.reads("a load once it is present again, without a flush", 1, page);
    suite.space.set(page, 1, 0xffff_fffe & !bits::P);
    invlpg(page);
    suite.read_faults("any other bits of an entry that is not present", 0, page);
    suite
        .checks
        .ok("pages that are not present fault with their error code and CR2");
}

fn upper_levels_not_present(suite: &mut Suite<'_>) {
    let (page, _) = suite.fresh(4, bits::P | bits::W);
    suite.writes("a store before", page, 0x55);
    for level in 2..=suite.mode.levels() {
        suite.change(page, level, bits::P, 0);
        suite.read_faults(format_args!("a load, level {level} not present"), 0, page);
        suite.write_faults(
            format_args!("a store, level {level} not present"),
            error::WRITE,
            page,
        );
        suite.change(page, level, 0, bits::P);
        suite.reads(
            format_args!("a load, level {level} present again"),
            0x55,
            page,
        );
    }
    suite.checks.ok("upper levels go away and come back");
}

fn write_protection(suite: &mut Suite<'_>) {
    let (page, frame) = suite.fresh(5, bits::P | bits::W);
    suite.writes("a store before", page, 1);
    suite.change(page, 1, bits::W | bits::D | bits::A, 0);
    suite.reads("a load", 1, page);
    suite.write_faults(
        "a store, WP = 1",
        error::PROTECTION | error::WRITE,
        page.plus(4),
    );
    suite
        .checks
        .equal("the frame is unchanged", 0, peek::<u32>(frame.plus(4)));
    suite.checks.equal(
        "a refused store sets no D",
        0,
        suite.space.get(page, 1) & bits::D,
    );
    for round in 2..5 {
        cpu::clear_cr0(cr0::WP);
        suite.writes("a store, WP = 0", page, round);
        suite
            .checks
            .equal("it sets D", bits::D, suite.space.get(page, 1) & bits::D);
        cpu::set_cr0(cr0::WP);
        suite.write_faults(
            "a store, WP = 1 again",
            error::PROTECTION | error::WRITE,
            page,
        );
        suite.reads("what WP = 0 stored", round, page);
    }
    for level in 2..=suite.mode.highest_full_level() {
        suite.change(page, 1, 0, bits::W);
        suite.change(page, level, bits::W, 0);
        let what = format_args!("a store, level {level} read-only");
        suite.write_faults(what, error::PROTECTION | error::WRITE, page);
        cpu::clear_cr0(cr0::WP);
        suite.writes("a store, WP = 0 and an upper level read-only", page, level);
        cpu::set_cr0(cr0::WP);
        suite.reads("what it stored", level, page);
        suite.change(page, level, 0, bits::W);
        suite.writes("a store, all levels writable", page, 9);
    }
    suite
        .checks
        .ok("write protection at every level, with CR0.WP on and off");
}

fn accessed_and_dirty(suite: &mut Suite<'_>) {
    let (page, _) = suite.fresh(6, bits::P | bits::W);
    for round in 0..3 {
        for level in 1..=suite.mode.highest_full_level() {
            suite.change(page, level, bits::A | bits::D, 0);
        }
        suite.reads("a load", round, page);
        for level in 1..=suite.mode.highest_full_level() {
            let entry = suite.space.get(page, level);
            suite
                .checks
                .equal(format_args!("A at level {level}"), bits::A, entry & bits::A);
            suite
                .checks
                .equal(format_args!("no D at level {level}"), 0, entry & bits::D);
        }
        suite.writes("a store", page, round + 1);
        let entry = suite.space.get(page, 1);
        suite
            .checks
            .equal("A and D", bits::A | bits::D, entry & (bits::A | bits::D));
        suite.change(page, 1, bits::D, 0);
        suite.reads("a load after clearing D", round + 1, page);
        suite
            .checks
            .equal("still no D", 0, suite.space.get(page, 1) & bits::D);
        suite.writes("a store after clearing D", page, round + 1);
        suite
            .checks
            .equal("D again", bits::D, suite.space.get(page, 1) & bits::D);
    }
    let (first, frame) = suite.fresh(7, bits::P | bits::W);
    let second = suite.page(8);
    suite.space.map(second, 1, frame, bits::P | bits::W);
    suite.writes("a store through one alias", first, 1);
    suite.reads("a load through another", 1, second);
    suite
        .checks
        .equal("its D", bits::D, suite.space.get(first, 1) & bits::D);
    suite
        .checks
        .equal("not the other's", 0, suite.space.get(second, 1) & bits::D);
    suite
        .checks
        .ok("A and D bits are set by walks, D by stores only");
}

fn crossing(suite: &mut Suite<'_>) {
    let (_, below) = suite.fresh(10, bits::P | bits::W);
    let (second, above) = suite.fresh(11, bits::P | bits::W);
    let crossing = VirtAddr(second.0 - 2);
    suite.writes("a store across two pages", crossing, 0x4433_2211);
    suite
        .checks
        .equal("its low half", 0x2211, peek::<u16>(below.plus(PAGE - 2)));
    suite
        .checks
        .equal("its high half", 0x4433, peek::<u16>(above));
    suite.reads("a load across two pages", 0x4433_2211, crossing);
    suite.change(second, 1, bits::P, 0);
    let trap = memory::read::<u32>(crossing);
    suite.faults("a load whose second page is missing", 0, second, trap);
    let trap = memory::write(crossing, 0_u32);
    suite.faults(
        "a store whose second page is missing",
        error::WRITE,
        second,
        trap,
    );
    suite.checks.equal(
        "the first page is unchanged",
        0x2211,
        peek::<u16>(below.plus(PAGE - 2)),
    );
    suite.change(second, 1, bits::W, bits::P);
    let trap = memory::write(crossing, 0_u32);
    let code = error::WRITE | error::PROTECTION;
    suite.faults("a store whose second page is read-only", code, second, trap);
    suite.checks.ok("accesses across two pages");
}

static DEMAND: Global<Option<(Space, u32)>> = Global::new(None);

fn map_on_demand(trap: &Trap, _: &mut Frame) -> Disposition {
    let Some((space, count)) = DEMAND.get() else {
        return Disposition::GiveUp;
    };
    if trap.vector != vector::PF || trap.error_code & error::PROTECTION != 0 {
        return Disposition::GiveUp;
    }
    let frame = take_frame();
    poke(frame, count);
    space.map(VirtAddr(trap.cr2 & !0xfff), 1, frame, bits::P | bits::W);
    DEMAND.set(Some((space, count + 1)));
    Disposition::Resume
}

fn demand_paging(suite: &mut Suite<'_>) {
    // Across the border of two leaf tables.
    let start = suite
        .mode
        .window()
        .plus((suite.mode.span(2) - 16 * PAGE) as usize);
    DEMAND.set(Some((suite.space, 0)));
    with_hook(map_on_demand, || {
        for index in 0..32 {
            let page = start.plus(index as usize * PAGE as usize);
            suite.reads("a page mapped on demand", index, page);
            suite.writes("a store to it", page.plus(4), index);
        }
        // One REP MOVSB over 8 pages that are there into 8 that are not.
        let to = start.plus(64 * PAGE as usize);
        let copied = crate::trap::catch(|| copy(start, to, 8 * PAGE as usize));
        suite
            .checks
            .succeeds("REP MOVSB with faults on its way", copied);
        for index in 0..8 {
            let page = to.plus(index as usize * PAGE as usize);
            suite.reads("what it copied", index, page.plus(4));
        }
    });
    let (_, count) = DEMAND.get().unwrap_or((suite.space, 0));
    suite.checks.equal("faults taken", 40, count);
    suite.checks.ok("demand paging: handlers map and resume");
}

fn copy(from: VirtAddr, to: VirtAddr, bytes: usize) {
    // SAFETY: both ranges are in the window, mapped or mapped on demand; no Rust object is there.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        core::arch::asm!("rep movsb", inout("rsi") from.0 => _, inout("rdi") to.0 => _,
            inout("rcx") bytes => _, options(nostack));
        #[cfg(target_arch = "x86")]
        core::arch::asm!("xchg esi, {0}", "rep movsb", "mov esi, {0}", inout(reg) from.0 => _,
            inout("edi") to.0 => _, inout("ecx") bytes => _, options(nostack));
    }
}

static SPURIOUS: Global<u32> = Global::new(0);

fn retry(trap: &Trap, _: &mut Frame) -> Disposition {
    SPURIOUS.set(SPURIOUS.get() + 1);
    if trap.vector == vector::PF && SPURIOUS.get() == 1 {
        Disposition::Resume
    } else {
        Disposition::GiveUp
    }
}

/// More permissions need no flush: at most one fault, which drops the stale translation.
fn widening(suite: &mut Suite<'_>) {
    let (page, _) = suite.fresh(12, bits::P);
    suite.reads("a load", 0, page);
    suite.space.change(page, 1, 0, bits::W);
    SPURIOUS.set(0);
    with_hook(retry, || {
        suite.writes("a store after adding W without a flush", page, 3);
    });
    suite.reads("what it stored", 3, page);
    suite.space.change(page, 1, 0, bits::U);
    SPURIOUS.set(0);
    with_hook(retry, || {
        // The hook sees ring 3's final interrupt too, and lets it pass.
        let result = suite.user(crate::user::Program::Read, page, 0);
        let got = suite
            .checks
            .succeeds("ring 3's load after adding U without a flush", result);
        suite.checks.equal("what it loaded", 3, got);
    });
    suite.checks.ok("widened permissions need no flush");
}

fn root_switches(suite: &mut Suite<'_>) {
    let (page, mine) = suite.fresh(13, bits::P | bits::W);
    let (home, other) = (suite.space, Space::new(suite.mode));
    let theirs = take_frame();
    other.map(page, 1, theirs, bits::P | bits::W);
    poke(mine, 0x111_u32);
    poke(theirs, 0x222_u32);
    for round in 0..8 {
        suite.reads("the first space", 0x111 + round, page);
        other.enter();
        suite.reads("the second space", 0x222 + round, page);
        suite.writes("a store in the second space", page, 0x223 + round);
        // Changes in the space that is not loaded count when it is.
        home.change(page, 1, bits::W, 0);
        home.enter();
        suite.write_faults("a read-only page", error::PROTECTION | error::WRITE, page);
        home.change(page, 1, 0, bits::W);
        cpu::reload_root();
        suite.writes("a store in the first space", page, 0x112 + round);
    }
    other.map(page, 1, mine, bits::P);
    cpu::write_cr3(other.root.0 as usize | (bits::PWT | bits::PCD) as usize);
    suite.reads("one frame in both spaces, CR3.PWT and PCD set", 0x119, page);
    home.enter();
    suite.checks.ok("CR3 switches between two spaces");
}

fn global_pages(suite: &mut Suite<'_>) {
    let what = "global pages";
    if !has(Feature::Pge) {
        return suite.checks.skip(what, "no PGE");
    }
    let (page, first) = suite.fresh(14, bits::P | bits::W | bits::G);
    let second = take_frame();
    poke(first, 1_u32);
    poke(second, 2_u32);
    for round in 0..3 {
        cpu::set_cr4(cr4::PGE);
        suite.reads("a global page", 1, page);
        cpu::reload_root();
        suite.reads("the same after a CR3 load", 1, page);
        suite
            .space
            .map(page, 1, second, bits::P | bits::W | bits::G);
        match round {
            0 => invlpg(page),
            1 => cpu::clear_cr4(cr4::PGE),
            _ => {
                cpu::clear_cr4(cr4::PGE);
                cpu::set_cr4(cr4::PGE);
            }
        }
        suite.reads(format_args!("the new frame, flush {round}"), 2, page);
        suite.space.map(page, 1, first, bits::P | bits::W | bits::G);
        invlpg(page);
    }
    cpu::clear_cr4(cr4::PGE);
    suite.checks.ok(what);
}

fn process_context(suite: &mut Suite<'_>) {
    let what = "process-context identifiers";
    if suite.mode != Mode::Long || !has(Feature::Pcid) {
        return suite.checks.skip(what, "not in this mode or processor");
    }
    let (page, mine) = suite.fresh(15, bits::P | bits::W);
    let (home, other) = (suite.space, Space::new(suite.mode));
    let theirs = take_frame();
    other.map(page, 1, theirs, bits::P | bits::W);
    poke(mine, 0x111_u32);
    poke(theirs, 0x222_u32);
    cpu::set_cr4(cr4::PCIDE);
    let enter = |space: Space, pcid: u64, keep: u64| {
        cpu::write_cr3((space.root.0 | pcid | keep << 63) as usize);
    };
    for _ in 0..4 {
        enter(home, 1, 1);
        suite.reads("PCID 1", 0x111, page);
        enter(other, 2, 1);
        suite.reads("PCID 2", 0x222, page);
    }
    home.map(page, 1, theirs, bits::P);
    enter(home, 1, 0);
    suite.reads("PCID 1 flushed by its CR3 load", 0x222, page);
    if has(Feature::Invpcid) {
        for kind in [
            Invpcid::Address,
            Invpcid::Pcid,
            Invpcid::All,
            Invpcid::AllNonGlobal,
        ] {
            for (frame, value) in [(mine, 0x111), (theirs, 0x222)] {
                other.map(page, 1, frame, bits::P);
                cpu::invpcid(kind, 2, page);
                enter(other, 2, 1);
                suite.reads(
                    format_args!("PCID 2 flushed by INVPCID {kind:?}"),
                    value,
                    page,
                );
                enter(home, 1, 1);
            }
        }
    }
    enter(home, 0, 0);
    cpu::clear_cr4(cr4::PCIDE);
    suite.checks.ok(what);
}

fn paging_off_and_on(suite: &mut Suite<'_>) {
    if suite.mode == Mode::Long {
        return;
    }
    let (page, frame) = suite.fresh(16, bits::P | bits::W);
    for round in 0..4_u32 {
        suite.writes("a store with paging on", page, round);
        cpu::clear_cr0(cr0::PG);
        suite
            .checks
            .equal("the frame with paging off", round, peek(frame));
        suite.space.change(page, 1, bits::W, 0);
        poke(frame, round + 100);
        cpu::set_cr0(cr0::PG);
        suite.reads("what was stored with paging off", round + 100, page);
        suite.write_faults(
            "a page made read-only",
            error::PROTECTION | error::WRITE,
            page,
        );
        suite.change(page, 1, 0, bits::W);
    }
    suite.checks.ok("paging goes off and on");
}
