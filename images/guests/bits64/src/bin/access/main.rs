//! `access`: every combination of page-table bits, control bits and accesses, against the manual.
//!
//! One page has an entry in a page directory and, unless that maps a large page, one in a page table.
//! For each setting of CR0.WP, EFER.NXE, CR4.SMEP, SMAP and PKE with PKRU, for each kind of access
//! and for each pair of entries: write the entries, flush the page, access it, and compare what
//! happened (fault, error code, CR2, the page's contents, accessed and dirty bits) with what the
//! manual says ([`rules`]). `--fast` takes 20,000 of the combinations, evenly from all settings and
//! kinds of access. What the processor lacks is left out and counted.

#![no_std]
#![no_main]

mod entries;
mod keys;
mod machine;
mod page;
mod rules;
mod settings;

use umbra_guest::paging::{Numbers, error};
use umbra_guest::{BootInfo, Checks, cpu, guest, println};

use entries::Pair;
use page::{Observed, Page};
use rules::Access;
use settings::Settings;

guest!("access", multiboot, run);

/// How many combinations `--fast` takes at least.
const FAST: u32 = 20_000;
/// This many wrong answers are shown.
const SHOWN: u32 = 10;
/// Chooses what `--fast` takes.
const SEED: u32 = 20_000;

fn run(boot: &BootInfo, checks: &mut Checks) {
    let space = machine::start(boot, checks);
    keys::run(boot, checks);
    let mut run = Run {
        page: Page::new(space),
        lenient: boot.is_lenient(),
        width: cpu::physical_address_bits(),
        step: if boot.has_word("--fast") {
            existing() / FAST
        } else {
            1
        },
        numbers: Numbers::new(SEED),
        tried: 0,
        left_out: 0,
        wrong: 0,
    };
    for settings in Settings::all() {
        run.settings(settings, checks);
    }
    println!(
        "access: {} combinations tried, {} left out because the processor lacks a feature",
        run.tried, run.left_out
    );
    checks.equal("wrong answers", 0, run.wrong);
}

/// How many combinations this processor has.
fn existing() -> u32 {
    let accesses = |settings: Settings| Access::ALL.iter().filter(move |a| a.exists(settings));
    Settings::all()
        .filter(|settings| settings.exist())
        .map(|settings| accesses(settings).count() as u32 * Pair::COUNT)
        .sum()
}

struct Run {
    page: Page,
    lenient: bool,
    /// Of physical addresses, in bits.
    width: u32,
    /// One of so many neighbouring pairs of entries is tried.
    step: u32,
    /// Which of them.
    numbers: Numbers,
    tried: u32,
    left_out: u32,
    wrong: u32,
}

impl Run {
    fn settings(&mut self, settings: Settings, checks: &mut Checks) {
        let exist = settings.exist();
        if exist {
            settings.apply();
        }
        let before = self.tried;
        for access in Access::ALL {
            if !access.exists(settings) {
                continue;
            }
            for first in (0..Pair::COUNT).step_by(self.step as usize) {
                let choice = self.step.min(Pair::COUNT - first) as usize;
                let pair = Pair::numbered(first + self.numbers.below(choice) as u32);
                if exist && pair.exists(self.width) {
                    self.combination(settings, access, pair);
                } else {
                    self.left_out += 1;
                }
            }
        }
        Settings::BENIGN.apply();
        if exist {
            checks.ok(format_args!(
                "{settings}: {} combinations",
                self.tried - before
            ));
        } else {
            checks.skip(settings, "the processor lacks a feature");
        }
    }

    fn combination(&mut self, settings: Settings, access: Access, pair: Pair) {
        let expected = rules::expect(settings, access, pair);
        let mut observed = self.page.attempt(access, pair);
        if self.lenient {
            forgive(&mut observed);
        }
        self.tried += 1;
        if expected.agrees(&observed) {
            return;
        }
        self.wrong += 1;
        if self.wrong <= SHOWN {
            println!(
                "FAIL {settings}, {access:?}, {pair:x?}: expected {expected:x?}, got {observed:x?}"
            );
        }
    }
}

/// QEMU's software emulation says of a reserved bit only that it is one.
fn forgive(observed: &mut Observed) {
    if let Some(fault) = &mut observed.fault
        && fault.error_code & error::RESERVED != 0
    {
        fault.error_code |= error::PROTECTION;
    }
}
