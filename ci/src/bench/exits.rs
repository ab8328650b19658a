//! What round trips out of a guest cost: the guest `exit-costs`, which measures them by its own
//! time-stamp counter, where that counts instructions.

use anyhow::{Result, bail};

use super::Measurement;
use super::guests::{Run, Runner, costs};
use crate::platform::Platform;

const GUEST: &str = "exit-costs";

/// What an operation may cost, and what KVM's shadow MMU takes for it on the same emulated processor
/// (Linux 6.1, without nested paging), in instructions.
struct Bound {
    name: &'static str,
    target: f64,
    kvm: Option<f64>,
}

const fn bound(name: &'static str, target: f64, kvm: Option<f64>) -> Bound {
    Bound { name, target, kvm }
}

const SVM_BOUNDS: &[Bound] = &[
    bound("cpuid", 400.0, Some(2_877.0)),
    bound("hypercall", 400.0, Some(8_354.0)),
    bound("rdmsr", 400.0, Some(2_753.0)),
    // KVM's own devices; through a virtual machine monitor in user space it takes 3,209.
    bound("port-write", 400.0, Some(1_412.0)),
    bound("port-read", 400.0, Some(1_412.0)),
    bound("cr3-load", 800.0, None),
    bound("cr0.wp-toggle", 1_500.0, Some(10_702.0)),
    bound("cr4.pge-toggle", 1_000.0, Some(6_852.0)),
    bound("self-ipi", 1_500.0, Some(8_993.0)),
];
const VMX_BOUNDS: &[Bound] = &[
    bound("cpuid", 250.0, Some(1_101.0)),
    bound("hypercall", 250.0, Some(3_270.0)),
];

pub(super) fn measure(runner: &Runner<'_>) -> Result<Vec<Measurement>> {
    let platforms = [
        (Platform::Qemu, "qemu, instructions", SVM_BOUNDS),
        (Platform::Bochs, "bochs, instructions", VMX_BOUNDS),
    ];
    let mut measured = Vec::new();
    for (platform, where_and_what, bounds) in platforms {
        let finished = runner.run(&Run::new(platform, GUEST))?;
        let costs = costs(&finished.console);
        if costs.is_empty() {
            bail!(
                "{GUEST} on {platform} printed no costs:\n{}",
                finished.console
            );
        }
        measured.extend(costs.into_iter().map(|(name, value)| {
            let bound = bounds.iter().find(|bound| bound.name == name);
            Measurement {
                target: bound.map(|bound| bound.target),
                kvm: bound.and_then(|bound| bound.kvm),
                ..Measurement::new(
                    format!("exit round trips, {where_and_what}"),
                    name,
                    value,
                    "instructions",
                )
            }
        }));
    }
    Ok(measured)
}
