//! The workload on the machine that builds it: what it expects of Linux must hold there.

use std::process::Command;

fn run(names: &str) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_workload"))
        .args(["run", names])
        .env("UMBRA_WORKLOAD_MEMORY_MIB", "32")
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
    )
}

#[test]
fn everything_passes() {
    let (status, output) = run("all");
    assert_eq!(status, Some(0), "{output}");
    assert_eq!(
        output
            .lines()
            .filter(|line| line.starts_with("ok "))
            .count(),
        11,
        "{output}"
    );
}

#[test]
fn tests_are_chosen_by_name() {
    let (status, output) = run("code,exceptions");
    assert_eq!(status, Some(0), "{output}");
    assert!(output.starts_with("ok code: "), "{output}");
    assert!(
        output.ends_with(")\n") && output.contains("workload: 2 passed, 0 failed"),
        "{output}"
    );
}

#[test]
fn an_unknown_name_is_a_failure() {
    let (status, output) = run("fork,frok");
    assert_eq!(status, Some(1));
    assert!(
        output.starts_with("FAILED frok: no such test; there are all, fork"),
        "{output}"
    );
}
