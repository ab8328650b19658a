use super::*;
use proptest::prelude::*;

fn run_all(arguments: &[&str]) -> Vec<GuestOptions> {
    match parse(arguments.iter().copied()) {
        Ok(Request::Run(options)) => options.guests,
        other => panic!("{arguments:?}: {other:?}"),
    }
}

fn run(arguments: &[&str]) -> GuestOptions {
    let mut guests = run_all(arguments);
    assert_eq!(guests.len(), 1);
    guests.remove(0)
}

fn error(arguments: &[&str]) -> String {
    parse(arguments.iter().copied()).unwrap_err().to_string()
}

#[test]
fn no_arguments_are_the_defaults() {
    let options = run(&[]);
    assert_eq!(options, GuestOptions::default());
    assert_eq!(options.memory, 64 << 20);
}

#[test]
fn both_forms_mean_the_same() {
    let separate = [
        "--guest",
        "a",
        "--append",
        "x=1 y",
        "--memory",
        "1G",
        "--mmu-pages",
        "64",
    ];
    let options = run(&separate);
    let joined = [
        "--guest=a",
        "--append=x=1 y",
        "--memory=1G",
        "--mmu-pages=64",
    ];
    assert_eq!(options, run(&joined));
    assert_eq!(options.name.as_deref(), Some("a"));
    assert_eq!(options.append, "x=1 y");
    assert_eq!(options.memory, 1 << 30);
    assert_eq!(options.mmu_pages, Some(64));
    assert_eq!(
        run(&["--timeout", "30"]).timeout,
        Some(Duration::from_secs(30))
    );
    assert_eq!(run(&["--timeout=0"]).timeout, None);
    assert_eq!(run(&["--append", ""]).append, "");
    assert_eq!(run(&["--append", "-v"]).append, "-v");
    assert_eq!(run(&["--append=--help"]).append, "--help");
}

#[test]
fn options_before_the_first_guest_are_for_all() {
    let guests = run_all(&[
        "--memory=8M",
        "--image=k",
        "--guest=a",
        "--guest=b",
        "--memory=16M",
        "--append=x",
    ]);
    let name = |guest: &GuestOptions| guest.name.clone().unwrap();
    assert_eq!(guests.iter().map(name).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!([guests[0].memory, guests[1].memory], [8 << 20, 16 << 20]);
    assert_eq!([&*guests[0].append, &*guests[1].append], ["", "x"]);
    assert!(
        guests
            .iter()
            .all(|guest| guest.image.as_deref() == Some("k"))
    );
    let options = Options { guests };
    assert_eq!(options.memory(), 24 << 20);
    assert!(error(&["--guest=a", "--memory=2M", "--memory=3M"]).contains("given twice"));
}

#[test]
fn help_is_asked_for() {
    let default = Options {
        guests: Vec::from([GuestOptions::default()]),
    };
    assert_eq!(parse(["--print-config"]), Ok(Request::PrintConfig(default)));
    for both in [["--help", "--print-config"], ["--print-config", "--help"]] {
        assert_eq!(parse(both), Ok(Request::Help));
    }
    assert_eq!(parse(["--memory", "64M", "--help"]), Ok(Request::Help));
    assert!(error(&["--help=yes"]).contains("it takes no value"));
    for name in Name::ALL {
        assert!(HELP.contains(name.text()), "{name:?} is not in the help");
    }
}

#[test]
fn memory_sizes() {
    for (text, bytes) in [
        ("2M", 2 << 20),
        ("2048k", 2 << 20),
        ("67108864", 64 << 20),
        ("512G", 512 << 30),
    ] {
        assert_eq!(run(&["--memory", text]).memory, bytes);
    }
    for text in [
        "",
        "M",
        "64 M",
        "64MB",
        "-1",
        "1.5G",
        "+4M",
        "0x1000000",
        "six",
        "６４M",
    ] {
        assert!(
            error(&["--memory", text]).starts_with("bad value"),
            "{text}"
        );
    }
    for text in [
        "0",
        "1M",
        "2097151",
        "513G",
        "99999999999999999999G",
        "18446744073709551615",
    ] {
        let error = error(&["--memory", text]);
        assert!(error.ends_with("out of range: from 2M to 512G"), "{error}");
    }
    assert!(error(&["--memory", "67108865"]).contains("multiple of 4K"));
}

#[test]
fn numbers_have_bounds() {
    assert!(error(&["--mmu-pages", "0"]).contains("from 1 to 1073741824"));
    assert!(error(&["--timeout", "31536001"]).contains("from 0 to 31536000"));
    assert!(error(&["--repeat=0"]).contains("from 1 to 1000000"));
    assert_eq!(run(&["--repeat=3"]).repeat, 3);
    assert!(error(&["--timeout", "1s"]).contains("not a whole number"));
    assert!(error(&["--guest="]).contains("empty"));
    assert!(error(&["--device", "disk"]).contains("no such device"));
    assert!(error(&["--trace", "exits,"]).contains("takes exits, mmu, devices or all"));
    assert!(error(&["--gdb=now"]).contains("takes wait or attach"));
    assert_eq!(run(&["--gdb=wait"]).gdb, Some(Debug::Wait));
    assert_eq!(run(&["--gdb=attach"]).gdb, Some(Debug::Attach));
    assert!(error(&["--trace-format=xml"]).contains("takes text or json"));
    let traced = run(&["--trace=exits,mmu", "--trace-format=json"]);
    assert!(traced.trace.contains(Traced::EXITS) && traced.trace.contains(Traced::MMU));
    assert!(!traced.trace.contains(Traced::DEVICES));
    assert_eq!(traced.trace_format, TraceFormat::Json);
    assert_eq!(run(&["--trace=all"]).trace, Traced::ALL);
    assert_eq!(run(&["--trace-format=text"]).trace, Traced::NOTHING);
    assert!(error(&["--mmu-policy", "random"]).contains("takes clock or fifo"));
    assert!(error(&["--on-exhausted="]).contains("takes stop or raise"));
    assert_eq!(run(&["--mmu-policy=fifo"]).mmu_policy, MmuPolicy::Fifo);
    assert_eq!(run(&["--mmu-policy=clock"]).mmu_policy, MmuPolicy::Clock);
    let raising = run(&["--on-exhausted=raise"]);
    assert_eq!(raising.on_exhausted, OnExhausted::Raise);
    let stopping = run(&["--on-exhausted=stop"]);
    assert_eq!(stopping.on_exhausted, OnExhausted::Stop);
    for (text, fails) in [
        ("7", FailAllocation::One(7)),
        ("7..", FailAllocation::From(7)),
    ] {
        let options = run(&["--fail-allocation", text]);
        assert_eq!(options.fail_allocation, Some(fails));
    }
    for text in ["0", "..", "1...", "x", "-1"] {
        let error = error(&["--fail-allocation", text]);
        assert!(error.contains("--fail-allocation"), "{error}");
    }
    for (text, point, every) in [
        ("fault", ShrinkPoint::Fault, 1),
        ("cr3:2", ShrinkPoint::Cr3, 2),
        ("commit:30", ShrinkPoint::Commit, 30),
        ("locked:1", ShrinkPoint::Locked, 1),
    ] {
        let options = run(&["--shrink-at", text]);
        assert_eq!(options.shrink_at, Some(ShrinkAt { point, every }));
    }
    for text in ["", "fault:", "fault:0", "cr2", "locked:1:1"] {
        let error = error(&["--shrink-at", text]);
        assert!(error.contains("--shrink-at"), "{error}");
    }
    assert!(error(&["--entry", "16"]).contains("neither kernel nor real-mode"));
    assert_eq!(run(&["--entry=real-mode"]).entry, Entry::RealMode);
    assert_eq!(run(&["--device=testdev"]).device, Some(Device::TestDevice));
}

#[test]
fn a_mistyped_option_names_the_nearest() {
    for (typed, right) in [
        ("--geust", "--guest"),
        ("--mem", "--memory"),
        ("--mmu_pages=7", "--mmu-pages"),
        ("--time-out", "--timeout"),
        ("-append", "--append"),
        ("--hlep", "--help"),
    ] {
        let error = error(&[typed]);
        assert!(
            error.ends_with(&alloc::format!("did you mean {right}?")),
            "{error}"
        );
    }
    assert_eq!(
        error(&["--zzzzzzzzzz"]),
        "unknown option \"--zzzzzzzzzz\": see --help"
    );
    assert!(error(&["guest"]).starts_with("unexpected argument \"guest\""));
}

#[test]
fn values_must_be_there_once() {
    assert!(error(&["--memory"]).starts_with("option --memory lacks its value"));
    assert!(error(&["--append", "--memory", "64M"]).starts_with("option --append lacks"));
    assert!(error(&["--memory=2M", "--memory=3M"]).starts_with("option --memory is given twice"));
    assert_eq!(
        error(&["--guest", "a", "--guest=b", "--guest=a"]),
        "two guests are named \"a\": give each a name of its own"
    );
    assert!(error(&["--help", "--help"]).starts_with("option --help is given twice"));
}

#[test]
fn edit_distances() {
    for (left, right, distance) in [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("abc", "abc", 0),
        ("é", "e", 1),
    ] {
        assert_eq!(edit_distance(left, right), distance);
        assert_eq!(edit_distance(right, left), distance);
    }
}

proptest! {
    #[test]
    fn every_mistake_is_one_line(
        arguments in prop::collection::vec(
            prop_oneof![
                "(?s).*",
                "--(guest|image|initrd|append|memory|mmu-pages|mmu-policy|on-exhausted|fail-allocation|shrink-at|device|entry|repeat|timeout|trace|trace-format|gdb|print-config|help)(=(?s).*)?",
                "[0-9]{1,22}[KMG]?",
            ],
            0..6,
        ),
    ) {
        match parse(arguments.iter().map(String::as_str)) {
            Ok(Request::Run(options) | Request::PrintConfig(options)) => {
                prop_assert!(!options.guests.is_empty());
                for guest in options.guests {
                    prop_assert!((MINIMUM_MEMORY..=MAXIMUM_MEMORY).contains(&guest.memory));
                    prop_assert_eq!(guest.memory % PAGE_SIZE, 0);
                }
            }
            Ok(Request::Help) => {}
            Err(error) => prop_assert!(!error.to_string().contains(['\n', '\r'])),
        }
    }
}
