//! What the user can do about too little memory.
//!
//! Protocol: [`prepare`] once the options are known; [`complete`] for every report.

use alloc::format;

use spin::Once;
use umbra_report::options::Options;
use umbra_report::{Outcome, Report};

use crate::platform;

/// To follow what is wrong.
static ADVICE: Once<&'static str> = Once::new();

/// Finds out how much memory the machine must have for these guests.
pub fn prepare(options: &Options) {
    let advice = ADVICE.call_once(|| {
        let bytes: u64 = platform::memory_ranges()
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        let there_are = bytes.div_ceil(1 << 20);
        // Whoever has given as much as that needs more.
        let enough = options.machine_memory_mib().max(there_are * 3 / 2);
        // uhyve takes whole large pages.
        let enough = enough.next_multiple_of(2);
        let advice = format!(
            "; this machine has {there_are} MiB of memory: give it {enough} (uhyve -m {enough}MiB, \
             qemu-system-x86_64 -m {enough})"
        );
        &*advice.leak()
    });
    platform::advise_when_out_of_memory(advice);
}

/// Adds the advice to the report of a guest for which there was too little memory.
pub fn complete(mut report: Report) -> Report {
    if report.outcome == Outcome::HostOutOfMemory
        && let Some(advice) = ADVICE.get()
    {
        report.message.push_str(advice);
    }
    report
}
