//! Random machines against a reference walker, and every machine that once failed or is worth keeping.
#![allow(missing_docs, reason = "a test")]

mod common;
mod random;

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};
use random::encoding::{decode, encode};
use random::scenario::{Entry, MOST_SEEDS, MOST_VMS, Op, Place, Scenario, VmSetup};
use random::{run, run_quickly, steps_taken};

/// Steps of the longest scenario; half of that is the mean.
const LONGEST: usize = 800;

fn place() -> impl Strategy<Value = Place> {
    (any::<[u8; 5]>(), any::<u16>()).prop_map(|(indices, offset)| Place { indices, offset })
}

fn entry() -> impl Strategy<Value = Entry> {
    (any::<u8>(), any::<u16>(), any::<u8>()).prop_map(|(target, flags, key)| Entry {
        target,
        flags,
        key,
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        30 => (0u8..2, place(), 0u8..3, any::<bool>(), any::<bool>())
            .prop_map(|(cpu, place, kind, user, ac)| Op::Access { cpu, place, kind, user, ac }),
        30 => (0u8..2, place(), any::<bool>(), any::<bool>(), 0u8..4, entry()).prop_map(
            |(cpu, place, user, ac, width, entry)| Op::Write { cpu, place, user, ac, width, entry }
        ),
        6 => (any::<u8>(), any::<u8>(), entry())
            .prop_map(|(table, index, entry)| Op::HostWrite { table, index, entry }),
        4 => (0u8..2, any::<u8>()).prop_map(|(cpu, root)| Op::Load { cpu, root }),
        2 => (0u8..2, any::<u8>(), any::<u8>(), any::<u8>())
            .prop_map(|(cpu, mode, flags, root)| Op::Mode { cpu, mode, flags, root }),
        1 => (0u8..2, any::<u32>()).prop_map(|(cpu, value)| Op::Pkru { cpu, value }),
        8 => (0u8..2, place()).prop_map(|(cpu, place)| Op::Invlpg { cpu, place }),
        3 => (0u8..2).prop_map(|cpu| Op::Flush { cpu }),
        1 => any::<u8>().prop_map(Op::Limit),
        2 => any::<u8>().prop_map(Op::Pressure),
        1 => any::<u8>().prop_map(Op::Total),
        1 => Just(Op::ZapAll),
        1 => any::<u8>().prop_map(Op::Unprotect),
        1 => any::<u8>().prop_map(Op::Slot),
        1 => Just(Op::Dirty),
        1 => any::<u8>().prop_map(Op::Accessed),
        1 => any::<u8>().prop_map(Op::Flags),
    ]
}

fn vm() -> impl Strategy<Value = VmSetup> {
    (any::<[u8; 2]>(), any::<[u8; 2]>(), any::<bool>()).prop_map(|(modes, flags, fifo)| VmSetup {
        modes,
        flags,
        fifo,
    })
}

fn scenario() -> impl Strategy<Value = Scenario> {
    // Most of the steps happen to the first VM, so that it gets far.
    let number = prop_oneof![4 => Just(0u8), 1 => Just(1), 1 => Just(2)];
    (
        prop::collection::vec(vm(), 1..=MOST_VMS),
        any::<u8>(),
        prop::collection::vec((any::<u8>(), any::<u8>(), entry()), 40..=MOST_SEEDS),
        prop::collection::vec((number, op()), 1..LONGEST),
    )
        .prop_map(|(vms, total, seed, steps)| Scenario {
            vms,
            total,
            seed,
            steps,
        })
}

/// A directory of this package.
fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Scenarios that once failed.
const REGRESSIONS: &str = "tests/regressions";
/// Scenarios that a fuzzer begins with.
const CORPUS: &str = "fuzz/corpus/machine";

#[test]
fn agrees_with_the_reference_walker() {
    let steps: u64 = match (std::env::var("UMBRA_STEPS"), std::env::var("UMBRA_LONG")) {
        (Ok(steps), _) => steps.parse().expect("UMBRA_STEPS is a number"),
        (_, Ok(_)) => 10_000_000,
        _ => 200_000,
    };
    let config = ProptestConfig {
        cases: (steps / (LONGEST as u64 / 2)) as u32 + 1,
        max_shrink_iters: 1500,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    while steps_taken() < steps {
        let result = TestRunner::new(config.clone()).run(&scenario(), |scenario| {
            run(&scenario);
            Ok(())
        });
        if let Err(TestError::Fail(reason, scenario)) = result {
            let file = keep(&scenario);
            panic!("{reason}\nkept as {}: {scenario:?}", file.display());
        }
    }
    println!("{} steps", steps_taken());
}

/// Writes a scenario that failed to where the next run finds it.
fn keep(scenario: &Scenario) -> PathBuf {
    let bytes = encode(scenario);
    let name = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    let file = directory(REGRESSIONS).join(format!("{name:016x}"));
    fs::create_dir_all(directory(REGRESSIONS)).expect("the source tree can be written");
    fs::write(&file, bytes).expect("the source tree can be written");
    file
}

#[test]
fn kept_scenarios_pass() {
    let mut files = 0;
    for name in [REGRESSIONS, CORPUS] {
        for file in fs::read_dir(directory(name)).expect("the directory is in the source tree") {
            let file = file.expect("the directory can be read").path();
            println!("{}", file.display());
            run(&decode(&fs::read(&file).expect("the file can be read")));
            files += 1;
        }
    }
    assert!(files > 0);
}

proptest! {
    #[test]
    fn a_scenario_survives_its_encoding(scenario in scenario()) {
        prop_assert_eq!(decode(&encode(&scenario)), scenario);
    }

    #[test]
    fn any_bytes_are_a_scenario_as_for_the_fuzzer(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let scenario = decode(&bytes);
        run_quickly(&scenario);
        prop_assert_eq!(decode(&encode(&scenario)), scenario);
    }
}
