//! What an emulated machine is made of, where the usual is not meant.

use std::num::NonZeroU8;

use anyhow::Result;
use clap::Args;

use super::Platform;
use crate::input::BadInput;

/// Parts of the machine, each the platform's own if it is not given.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    /// QEMU's machine, as in q35 or microvm,acpi=off [default: pc; q35 for disks]
    #[arg(long, value_name = "TYPE")]
    pub machine: Option<String>,
    /// QEMU's processor, as in EPYC,+svm,-pdpe1gb
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// How many processors the machine under Umbra has [default: 1]
    #[arg(long, value_name = "N")]
    pub host_cpus: Option<NonZeroU8>,
}

impl Hardware {
    /// Checks that a platform can have these parts.
    ///
    /// # Errors
    /// [`BadInput`] if it cannot.
    pub fn check(&self, platform: Platform) -> Result<()> {
        let refuse = |part: &str, reason: &str| {
            Err(BadInput(format!("{part} cannot be chosen on {platform}: {reason}")).into())
        };
        let given = [
            ("machine", self.machine.is_some()),
            ("cpu", self.cpu.is_some()),
            ("host-cpus", self.host_cpus.is_some()),
        ];
        let first = given.into_iter().find_map(|(part, is)| is.then_some(part));
        let is_fixed = matches!(
            platform,
            Platform::Bochs | Platform::Uhyve | Platform::UhyveKvm
        );
        if is_fixed && let Some(part) = first {
            return refuse(part, "only QEMU's machines can be put together");
        }
        let is_microvm = self
            .machine
            .as_ref()
            .is_some_and(|m| m.starts_with("microvm"));
        if is_microvm && !matches!(platform, Platform::Qemu | Platform::QemuKvm) {
            return refuse("machine", "a microvm has no disk and no CD to boot from");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_a_platform_has_not_are_refused() {
        let usual = Hardware::default();
        let microvm = Hardware {
            machine: Some("microvm,acpi=off".into()),
            ..Hardware::default()
        };
        let processors = Hardware {
            host_cpus: NonZeroU8::new(4),
            ..Hardware::default()
        };
        let is_good = |hardware: &Hardware, platform| hardware.check(platform).is_ok();
        assert!(is_good(&usual, Platform::Bochs) && !is_good(&processors, Platform::Bochs));
        assert!(is_good(&usual, Platform::Uhyve) && !is_good(&processors, Platform::Uhyve));
        assert!(is_good(&processors, Platform::IsoUefi) && is_good(&microvm, Platform::Qemu));
        assert!(!is_good(&microvm, Platform::IsoBios));
    }
}
