//! `paging-costs`: what a guest's work on its page tables costs, in ticks of its time-stamp counter:
//! the first use of pages, changes of a table, and a storm of forks. On the command line,
//! `tables=NUMBER` asks for this alone: one page in each of so many tables is read, again and again, so
//! that a shadow MMU with fewer pages must recycle one each time; with `hold` the guest then stays as it
//! is. `processes=NUMBER` asks for the storm alone, with so many processes alive at once.

#![no_std]
#![no_main]

mod recycling;
mod space;
mod storm;
mod tables;

use umbra_guest::{BootInfo, Checks, guest, println};

use space::Frames;

guest!("paging-costs", pvh, run);

fn run(boot: &BootInfo, checks: &mut Checks) {
    let mut frames = Frames::new(boot);
    if let Some(number) = boot.number("tables") {
        recycling::measure(checks, &mut frames, number);
        if boot.has_word("hold") {
            println!("holding {number} tables");
            loop {
                core::hint::spin_loop();
            }
        }
    } else if let Some(processes) = boot.number("processes") {
        storm::measure(checks, &mut frames, processes);
    } else {
        tables::measure(checks, &mut frames);
        storm::measure(checks, &mut frames, 1);
    }
    checks.ok("costs measured");
}
