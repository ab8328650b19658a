//! `cargo xtask doctor`: what this host can run, and for each "no" the reason and the fix.
//!
//! It only looks: nothing is installed or built.

use anyhow::Result;

use crate::command::{answer, clean, find_program};
use crate::kvm::{self, Nested, Unusable};
use crate::platform::Platform;
use crate::project::{Project, invocation};
use crate::setup::{self, Need};
use crate::toolchain::Toolchain;
use crate::uhyve;

/// Prints it.
///
/// # Errors
/// When the toolchains cannot be examined.
pub fn doctor(project: &Project) -> Result<()> {
    build(project)?;
    platform(
        Platform::Qemu,
        "SVM by software emulation",
        first_line("qemu-system-x86_64"),
    );
    platform(
        Platform::Bochs,
        "VMX by software emulation, booted by GRUB",
        debian_version("bochs"),
    );
    let iso = "SVM by software emulation, booted from the ISO by";
    platform(Platform::IsoBios, &format!("{iso} a BIOS"), None);
    platform(Platform::IsoUefi, &format!("{iso} UEFI"), None);
    let disk = "SVM by software emulation, booted from the cloud's disk by";
    platform(Platform::DiskBios, &format!("{disk} a BIOS"), None);
    platform(Platform::DiskUefi, &format!("{disk} UEFI"), None);
    platform(
        Platform::Uhyve,
        "uhyve on Linux with KVM, in QEMU's software emulation of SVM",
        Some(uhyve::state(project)),
    );
    processor();
    kvm();
    let us = invocation();
    match Platform::USUAL
        .into_iter()
        .find(|platform| missing(&platform.needs()).is_empty())
    {
        Some(platform) => {
            println!("So `{us} run` works here by emulation, as `--on {platform}`.");
        }
        None => println!("No platform is ready; `{us} run` sets up what it needs."),
    }
    Ok(())
}

fn build(project: &Project) -> Result<()> {
    match Toolchain::installed(project)? {
        Some(toolchain) => {
            let (major, minor) = toolchain.version.release;
            yes(
                "build",
                &format!(
                    "Rust {major}.{minor}, {} toolchain, with rust-src",
                    toolchain.name
                ),
            );
        }
        None => no(
            "build",
            "no Rust toolchain of 1.88 or newer has the library's source (rust-src)",
            &format!(
                "`{} run` gets it by rustup, or Debian's rustc-web, cargo-web and rust-web-src",
                invocation()
            ),
        ),
    }
    report_missing("build", &missing(&setup::for_building()));
    Ok(())
}

fn platform(platform: Platform, what: &str, version: Option<String>) {
    let needs = platform.needs();
    let missing = missing(&needs);
    if missing.is_empty() {
        let version = version.map_or(String::new(), |version| format!(" ({version})"));
        yes(&platform.to_string(), &format!("{what}{version}"));
    } else {
        report_missing(&platform.to_string(), &missing);
    }
}

/// What the processor says here; whoever has VMX or SVM here can boot Umbra without any emulation.
fn processor() {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = flags
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    match flags
        .split_whitespace()
        .find(|flag| ["vmx", "svm"].contains(flag))
    {
        Some(flag) => yes("processor", &format!("has {}", flag.to_uppercase())),
        None => no(
            "processor",
            "offers neither VMX nor SVM here",
            "none needed: the emulators bring their own",
        ),
    }
}

fn kvm() {
    match kvm::preflight() {
        Ok(nested) => {
            let nested = match nested {
                Nested::Vmx => "VMX",
                Nested::Svm => "SVM",
            };
            yes(
                "kvm",
                &format!(
                    "runs guests and offers them {nested}: `--on qemu-kvm` is the fastest, `uhyve-kvm` runs uhyve"
                ),
            );
        }
        Err(reason) => {
            no("kvm", &reason.to_string(), reason.fix());
            if let (Unusable::Stopped(_) | Unusable::Hung, Some(Err(reason))) =
                (&reason, kvm::offered())
            {
                println!("{:11}     besides, {reason}", "");
            }
            println!(
                "{:11}     instead: `--on qemu` and `uhyve` emulate SVM, `--on bochs` emulates VMX",
                ""
            );
        }
    }
}

fn missing(needs: &[Need]) -> Vec<&Need> {
    needs.iter().filter(|need| !need.is_met()).collect()
}

fn report_missing(name: &str, missing: &[&Need]) {
    if missing.is_empty() {
        return;
    }
    let probes: Vec<_> = missing.iter().map(|need| need.probe.as_str()).collect();
    let mut packages: Vec<_> = missing.iter().map(|need| need.package.as_str()).collect();
    packages.dedup();
    let by_hand = format!(
        "apt-get install --no-install-recommends {}",
        packages.join(" ")
    );
    let us = invocation();
    let fix = format!("`{us} run` or `{us} test` installs it when it may; or {by_hand}");
    no(name, &format!("missing: {}", probes.join(", ")), &fix);
}

fn yes(name: &str, what: &str) {
    println!("{name:11} yes  {what}");
}

fn no(name: &str, reason: &str, fix: &str) {
    println!("{name:11} no   {reason}");
    println!("{:11}     fix: {fix}", "");
}

fn first_line(program: &str) -> Option<String> {
    find_program(program)?;
    answer(clean(program).arg("--version"))?
        .lines()
        .next()
        .map(str::to_owned)
}

/// Bochs does not tell its version without starting a machine.
fn debian_version(package: &str) -> Option<String> {
    answer(clean("dpkg-query").args(["-W", "-f", "${Package} ${Version}", package]))
}
