//! What a guest's page tables cost it, and how that grows: the guest `paging-costs` with shadow pools
//! of many sizes, several processes and several guests at once, and the guest `hot-cold` under every
//! way to choose victims and to zap them.

#![allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]

use anyhow::{Context, Result, ensure};
use umbra_report::Report;

use super::guests::{Run, Runner, costs};
use super::{Measurement, SPREAD_TARGET, spread};
use crate::platform::Platform;
use crate::second_serial::Exchange;

const INSTRUCTIONS: &str = "instructions";
const GUEST: &str = "paging-costs";

/// What each may cost at most.
const TARGETS: [(&str, f64); 2] = [("first-use", 1_500.0), ("table-write", 50.0)];
/// Shadow pages of a guest that has a quarter more tables than that.
const POOLS: [u32; 6] = [64, 256, 1_024, 4_096, 16_384, 65_536];
/// Where the guest's own memory ends, and what each of its tables takes, its page included, in KiB.
const GUEST_KIB: u32 = 9 << 10;
const TABLE_KIB: u32 = 8;
/// What the host takes for a shadow page, in KiB: more than the page itself and what is known of it.
const SHADOW_KIB: u32 = 6;
/// How often the guest reads all of its tables after the first time.
const PASSES: u32 = 3;
/// Shadow pages that one shrink asks for, and how many shrinks there are.
const SHRUNK: u32 = 1_000;
const SHRINKS: usize = 3;
const PROCESSES: [u32; 4] = [1, 4, 16, 64];
const GUESTS: [usize; 5] = [1, 2, 4, 8, 16];
/// Shadow pages of the guest whose memory is partly hot and partly cold.
const HOT_COLD_PAGES: u32 = 128;

pub(super) fn measure(runner: &Runner<'_>) -> Result<Vec<Measurement>> {
    let mut measured = Vec::new();
    let finished = runner.run(&Run {
        options: &["--mmu-pages=1024".into()],
        ..Run::new(Platform::Qemu, GUEST)
    })?;
    measured.extend(costs(&finished.console).into_iter().map(|(name, value)| {
        let target = TARGETS.iter().find(|(named, _)| *named == name);
        Measurement {
            target: target.map(|(_, target)| *target),
            ..Measurement::new("page tables, qemu", name, value, INSTRUCTIONS)
        }
    }));
    measured.extend(pools(runner)?);
    for processes in PROCESSES {
        measured.push(storm(runner, processes)?);
    }
    for count in GUESTS {
        measured.push(together(runner, count)?);
    }
    for policy in ["fifo", "clock"] {
        for batches in [Batches::OneAtATime, Batches::Whole] {
            measured.extend(victims(runner, policy, batches)?);
        }
    }
    Ok(measured)
}

/// What recycling and shrinking cost, by pages in the pool.
fn pools(runner: &Runner<'_>) -> Result<Vec<Measurement>> {
    let pools = POOLS.iter().map(|&pool| self::pool(runner, pool));
    let pools = pools.collect::<Result<Vec<_>>>()?;
    let row = |table: &str, pool: &Pool, value| Measurement {
        at: Some(pool.pages.into()),
        ..Measurement::new(table, format!("{} pages", pool.pages), value, INSTRUCTIONS)
    };
    let recycling = pools.iter().map(|pool| {
        let table = "first use of a recycled table, by pages in the pool";
        row(table, pool, pool.recycling)
    });
    let shrinking = pools.iter().map(|pool| {
        let table = "a page of a shrink of 1,000, by pages in the pool";
        row(table, pool, pool.shrinking)
    });
    let flatness = |name: &str, value: fn(&Pool) -> f64| Measurement {
        target: Some(SPREAD_TARGET),
        ..Measurement::new(
            "growth with the pool",
            format!("{name}, largest distance from the mean"),
            spread(&pools.iter().map(value).collect::<Vec<_>>()),
            "%",
        )
    };
    Ok(recycling
        .chain(shrinking)
        .chain([
            flatness("recycled table", |pool| pool.recycling),
            flatness("page of a shrink", |pool| pool.shrinking),
        ])
        .collect())
}

/// What was measured with so many pages in the pool.
struct Pool {
    pages: u32,
    /// Instructions for the first use of a table whose shadow page has been recycled.
    recycling: f64,
    /// Instructions for a page that a shrink gives back.
    shrinking: f64,
}

fn pool(runner: &Runner<'_>, pages: u32) -> Result<Pool> {
    let tables = pages + pages / 4;
    let options = [
        format!("--mmu-pages={pages}"),
        format!(
            "--memory={}M",
            32.max((GUEST_KIB + tables * TABLE_KIB).div_ceil(1_024))
        ),
        format!("--append=tables={tables} hold"),
    ];
    let command = |after: String, send: String, expect: &str| Exchange {
        after,
        send,
        expect: vec![expect.to_owned()],
    };
    let shrink = |number| {
        let after = match number {
            0 => format!("holding {tables} tables"),
            _ => String::new(),
        };
        command(after, format!("shrink {SHRUNK}"), "\"freed\":")
    };
    let stop = command(String::new(), format!("stop {GUEST}-1"), "stopped");
    let commands: Vec<_> = (0..SHRINKS).map(shrink).chain([stop]).collect();
    let finished = runner.run(&Run {
        options: &options,
        more_memory_mib: u64::from(pages * SHADOW_KIB / 1_024),
        commands: &commands,
        ..Run::new(Platform::Qemu, GUEST)
    })?;
    let cost = costs(&finished.console).into_iter().next();
    let (_, of_read) = cost.context("paging-costs printed no cost")?;
    let report = finished.reports.first().context("there is no report")?;
    // The clock keeps some tables from one pass to the next. In the first pass none was recycled.
    let made = report.mmu.mmu_cache_miss.saturating_sub(tables.into());
    ensure!(made > 0, "nothing was recycled:\n{}", finished.console);
    let recycling = of_read * f64::from(PASSES * tables) / made as f64;
    let shrunk = finished
        .replies
        .iter()
        .filter_map(|reply| Shrunk::parse(reply));
    let (freed, ticks) = shrunk.fold((0, 0), |(freed, ticks), shrunk| {
        (freed + shrunk.freed, ticks + shrunk.ticks)
    });
    ensure!(freed > 0, "nothing was freed: {:?}", finished.replies);
    Ok(Pool {
        pages,
        recycling,
        shrinking: ticks as f64 / freed as f64,
    })
}

/// The monitor's reply to a shrink.
#[derive(Debug, PartialEq, serde::Deserialize)]
struct Shrunk {
    freed: u64,
    ticks: u64,
}

impl Shrunk {
    fn parse(reply: &str) -> Option<Self> {
        serde_json::from_str(reply).ok()
    }
}

/// What a fork, a short life and an end cost, with so many processes alive at once.
fn storm(runner: &Runner<'_>, processes: u32) -> Result<Measurement> {
    let finished = runner.run(&Run {
        options: &[
            "--mmu-pages=1024".into(),
            format!("--append=processes={processes}"),
        ],
        ..Run::new(Platform::Qemu, GUEST)
    })?;
    let cost = costs(&finished.console).into_iter().next();
    let (_, value) = cost.context("paging-costs printed no cost")?;
    Ok(Measurement {
        at: Some(processes.into()),
        ..Measurement::new(
            "a fork in a storm of them, by processes alive",
            format!("{processes} processes"),
            value,
            INSTRUCTIONS,
        )
    })
}

/// What each of several guests takes from the first one's start to the last one's end, on average.
fn together(runner: &Runner<'_>, count: usize) -> Result<Measurement> {
    let finished = runner.run(&Run {
        count,
        options: &["--mmu-pages=1024".into()],
        ..Run::new(Platform::Qemu, GUEST)
    })?;
    let reports = &finished.reports;
    let start = reports.iter().map(|report| report.first_entry_tsc).min();
    let ends = reports
        .iter()
        .map(|report| report.first_entry_tsc + report.tsc_ticks);
    let (start, end) = start.zip(ends.max()).context("there is no report")?;
    Ok(Measurement {
        at: Some(count as f64),
        ..Measurement::new(
            "a whole run of paging-costs, by guests at once",
            format!("{count} guests"),
            (end - start) as f64 / count as f64,
            INSTRUCTIONS,
        )
    })
}

/// How many pages go with one flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batches {
    OneAtATime,
    Whole,
}

/// What the choice of victims, and how they are zapped, costs a guest with a hot and a cold part.
fn victims(runner: &Runner<'_>, policy: &str, batches: Batches) -> Result<[Measurement; 4]> {
    let mut options = vec![
        format!("--mmu-pages={HOT_COLD_PAGES}"),
        format!("--mmu-policy={policy}"),
    ];
    let way = match batches {
        Batches::OneAtATime => {
            options.push("--mmu-batch=1".into());
            format!("{policy}, one at a time")
        }
        Batches::Whole => format!("{policy}, in batches"),
    };
    let finished = runner.run(&Run {
        options: &options,
        ..Run::new(Platform::Qemu, "hot-cold")
    })?;
    let report: &Report = finished.reports.first().context("hot-cold has no report")?;
    let measurement = |name: &str, value: u64, unit| {
        Measurement::new(
            "victims, the guest hot-cold",
            format!("{way}: {name}"),
            value as f64,
            unit,
        )
    };
    Ok([
        measurement("faults", report.mmu.pf_taken, "faults"),
        measurement("recycled", report.mmu.mmu_recycled, "pages"),
        measurement("flushes", report.mmu.tlb_flush, "flushes"),
        measurement("in all", report.tsc_ticks, INSTRUCTIONS),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitor_s_reply_is_read() {
        let reply = "{\"ok\":true,\"freed\":1000,\"skipped\":0,\"ticks\":500000}\n";
        let shrunk = Shrunk {
            freed: 1_000,
            ticks: 500_000,
        };
        assert_eq!(Shrunk::parse(reply), Some(shrunk));
        assert_eq!(Shrunk::parse("{\"ok\":true,\"now\":\"stopped\"}\n"), None);
    }
}
