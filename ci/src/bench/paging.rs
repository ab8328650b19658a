//! What a guest's page tables cost it, and how that grows: the guest `paging-costs` with shadow pools
//! of many sizes, several guests at once, and both choices of victims on the guest `hot-cold`.

#![allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]

use anyhow::{Context, Result, ensure};
use umbra_report::Report;

use super::Measurement;
use super::guests::{Runner, costs};
use crate::platform::Platform;

const INSTRUCTIONS: &str = "instructions";
const FIRST_USE: &str = "first-use";
/// What each may cost at most.
const TARGETS: [(&str, f64); 2] = [(FIRST_USE, 1_500.0), ("table-write", 50.0)];
/// Shadow pages of a guest that has a quarter more tables than that. The largest is as many tables as fit
/// its memory.
const POOLS: [u32; 7] = [64, 128, 256, 512, 1_024, 2_048, 4_096];
const GUESTS: [usize; 5] = [1, 2, 4, 8, 16];
/// Shadow pages of the guest whose memory is partly hot and partly cold.
const HOT_COLD_PAGES: u32 = 128;

pub(super) fn measure(runner: &Runner<'_>) -> Result<Vec<Measurement>> {
    let mut measured = Vec::new();
    let finished = runner.run(
        Platform::Qemu,
        "paging-costs",
        1,
        &["--mmu-pages=1024".into()],
    )?;
    measured.extend(costs(&finished.console).into_iter().map(|(name, value)| {
        let target = TARGETS.iter().find(|(named, _)| *named == name);
        Measurement {
            target: target.map(|(_, target)| *target),
            ..Measurement::new("page tables, qemu", name, value, INSTRUCTIONS)
        }
    }));
    for pool in POOLS {
        measured.push(recycling(runner, pool)?);
    }
    for count in GUESTS {
        measured.push(together(runner, count)?);
    }
    for policy in ["fifo", "clock"] {
        measured.extend(victims(runner, policy)?);
    }
    Ok(measured)
}

/// The use of a table whose shadow page has been recycled.
fn recycling(runner: &Runner<'_>, pool: u32) -> Result<Measurement> {
    let options = [
        format!("--mmu-pages={pool}"),
        format!("--append=tables={}", pool + pool / 4),
    ];
    let finished = runner.run(Platform::Qemu, "paging-costs", 1, &options)?;
    let cost = costs(&finished.console).into_iter().next();
    let (_, value) = cost.context("paging-costs printed no cost")?;
    Ok(Measurement {
        at: Some(pool.into()),
        ..Measurement::new(
            "first use of a recycled table, by pages in the pool",
            format!("{pool} pages"),
            value,
            INSTRUCTIONS,
        )
    })
}

/// What the first use of a page costs each of several guests, on average.
fn together(runner: &Runner<'_>, count: usize) -> Result<Measurement> {
    let finished = runner.run(
        Platform::Qemu,
        "paging-costs",
        count,
        &["--mmu-pages=1024".into()],
    )?;
    let costs = costs(&finished.console);
    let values = costs.iter().filter(|(name, _)| name == FIRST_USE);
    let values: Vec<_> = values.map(|(_, value)| *value).collect();
    ensure!(
        values.len() == count,
        "{count} guests printed {} costs:\n{}",
        values.len(),
        finished.console
    );
    Ok(Measurement {
        at: Some(count as f64),
        ..Measurement::new(
            "first use of a page, by guests at once",
            format!("{count} guests"),
            values.iter().sum::<f64>() / count as f64,
            INSTRUCTIONS,
        )
    })
}

/// What the choice of victims costs a guest with a hot and a cold part.
fn victims(runner: &Runner<'_>, policy: &str) -> Result<[Measurement; 4]> {
    let options = [
        format!("--mmu-pages={HOT_COLD_PAGES}"),
        format!("--mmu-policy={policy}"),
    ];
    let finished = runner.run(Platform::Qemu, "hot-cold", 1, &options)?;
    let report: &Report = finished.reports.first().context("hot-cold has no report")?;
    let measurement = |name: &str, value: u64, unit| {
        Measurement::new(
            "victims, the guest hot-cold",
            format!("{policy}, {name}"),
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
