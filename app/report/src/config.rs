//! The configuration file `umbra.toml`: the options under the same names, without the hyphens.
//!
//! Keys at the top are every guest's options; each table `[[guest]]` is one guest, whose key `name` is
//! what `--guest` says. The file becomes arguments, so that there is one schema, one parser and one
//! kind of error. On the command line, options before any `--guest` overrule the file's top; a
//! `--guest` there means that the file is not read at all.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use toml::{Table, Value};

use crate::file_error::FileError;
use crate::options::{Choice, GuestOptions, Kind, Name, Options};

/// The file's name.
pub const FILE: &str = "umbra.toml";

/// Puts the options of a configuration file before those of a command line.
///
/// # Errors
/// The first mistake in the file, as [`FileError`]. Values are checked by
/// [`crate::options::parse`].
pub fn merge(text: &str, command_line: &[String]) -> Result<Vec<String>, FileError> {
    let mut merged = command_line.to_vec();
    if names(command_line, "--guest") {
        return Ok(merged);
    }
    let file: Table = text
        .parse()
        .map_err(|error| FileError::parser(FILE, &error))?;
    let mut guests = Vec::new();
    for (key, value) in &file {
        if key == "guest" {
            for table in tables(value)? {
                guests.extend(guest(table)?);
            }
            continue;
        }
        let option = option(key, &TOP)?;
        if !names(command_line, option.text()) {
            merged.push(argument(option, key, value)?);
        }
    }
    merged.extend(guests);
    Ok(merged)
}

/// Puts the options that environment variables give before those of a command line, which overrule them:
/// `UMBRA_MMU_PAGES=64` is `--mmu-pages=64`.
///
/// # Errors
/// If a variable's name begins so and is no option's.
pub fn merge_environment<'a>(
    variables: impl IntoIterator<Item = (&'a str, &'a str)>,
    command_line: &[String],
) -> Result<Vec<String>, FileError> {
    let known = TOP.map(variable);
    let mut merged = Vec::new();
    for (name, value) in variables {
        if !name.starts_with(VARIABLE_PREFIX) {
            continue;
        }
        let index = known.iter().position(|known| known == name);
        let index =
            index.ok_or_else(|| FileError::unknown("environment", "variable", name, &known))?;
        let option = format!("--{}", TOP[index]);
        if !names(command_line, &option) {
            merged.push((index, format!("{option}={value}")));
        }
    }
    // A guest comes last, for what comes before it is every guest's.
    merged.sort_unstable();
    let merged = merged.into_iter().map(|(_, argument)| argument);
    Ok(merged.chain(command_line.iter().cloned()).collect())
}

/// What the name of each variable begins with.
const VARIABLE_PREFIX: &str = "UMBRA_";

/// The environment variable that is an option.
fn variable(key: &str) -> String {
    let name = key.replace('-', "_").to_ascii_uppercase();
    format!("{VARIABLE_PREFIX}{name}")
}

/// The file that asks for `options`, whose defaults it spells out. What depends on a guest's memory or
/// on the boot modules is left out.
pub fn text(options: &Options) -> String {
    let file = match &options.guests[..] {
        [guest] if guest.name.is_none() => table(guest),
        guests => {
            let guests = guests.iter().map(table).map(Value::Table).collect();
            Table::from_iter([("guest".to_string(), Value::Array(guests))])
        }
    };
    match toml::to_string(&file) {
        Ok(text) => text,
        // TOML refuses only what these tables don't have.
        Err(error) => unreachable!("the options are not TOML: {error}"),
    }
}

fn table(guest: &GuestOptions) -> Table {
    let text = |key: &str, text: &str| (key.to_string(), Value::from(text));
    // The largest number that an option takes fits.
    let number = |key: &str, number: u64| (key.to_string(), Value::from(number.cast_signed()));
    let mut table = Table::from_iter([
        text("append", &guest.append),
        text("memory", &size(guest.memory)),
        text("mmu-policy", guest.mmu_policy.name()),
        text("on-exhausted", guest.on_exhausted.name()),
        text("trace-format", guest.trace_format.name()),
        text("entry", guest.entry.name()),
        number("smp", guest.processors.into()),
        number("repeat", guest.repeat),
        number("timeout", guest.timeout.map_or(0, |time| time.as_secs())),
    ]);
    let traced = guest.trace.names();
    let failing = guest.fail_allocation.map(|failing| failing.to_string());
    let shrinking = guest.shrink_at.map(|shrinking| shrinking.to_string());
    let given = [
        ("trace", (!traced.is_empty()).then_some(&*traced)),
        ("name", guest.name.as_deref()),
        ("image", guest.image.as_deref()),
        ("initrd", guest.initrd.as_deref()),
        ("device", guest.device.map(Choice::name)),
        ("gdb", guest.gdb.map(Choice::name)),
        ("fail-allocation", failing.as_deref()),
        ("shrink-at", shrinking.as_deref()),
    ];
    let given = given.into_iter();
    table.extend(given.filter_map(|(key, value)| Some(text(key, value?))));
    table.extend(guest.mmu_pages.map(|pages| number("mmu-pages", pages)));
    table.extend(guest.mmu_batch.map(|pages| number("mmu-batch", pages)));
    table
}

/// Bytes in the largest unit that divides them.
fn size(bytes: u64) -> String {
    let units = [("G", 30), ("M", 20), ("K", 10)];
    let mut units = units.into_iter();
    match units.find(|(_, shift)| bytes.trailing_zeros() >= *shift) {
        Some((name, shift)) => format!("{}{name}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// A key of the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The option that it is, as [`crate::options::HELP`] lists it.
    pub option: &'static str,
    /// What its value is.
    pub kind: Kind,
}

/// The keys of a guest; all but `name` may also stand at the top, for every guest.
pub fn keys() -> impl Iterator<Item = Key> {
    GUEST.into_iter().filter_map(|key| {
        let option = match key {
            "name" => Name::Guest,
            _ => option(key, &GUEST).ok()?,
        };
        Some(Key {
            name: key,
            option: option.text(),
            kind: option.kind()?,
        })
    })
}

/// The keys that stand at the top.
const TOP: [&str; 19] = [
    "image",
    "initrd",
    "append",
    "memory",
    "smp",
    "mmu-pages",
    "mmu-policy",
    "mmu-batch",
    "on-exhausted",
    "fail-allocation",
    "shrink-at",
    "device",
    "entry",
    "repeat",
    "timeout",
    "trace",
    "trace-format",
    "gdb",
    "guest",
];
/// The keys of a guest.
const GUEST: [&str; 19] = [
    "name",
    "image",
    "initrd",
    "append",
    "memory",
    "smp",
    "mmu-pages",
    "mmu-policy",
    "mmu-batch",
    "on-exhausted",
    "fail-allocation",
    "shrink-at",
    "device",
    "entry",
    "repeat",
    "timeout",
    "trace",
    "trace-format",
    "gdb",
];

fn names(command_line: &[String], option: &str) -> bool {
    command_line.iter().any(|argument| {
        argument
            .strip_prefix(option)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

fn tables(value: &Value) -> Result<impl Iterator<Item = &Table>, FileError> {
    let array = value
        .as_array()
        .filter(|array| array.iter().all(Value::is_table));
    let array =
        array.ok_or_else(|| FileError::new(FILE, "guest must be written as [[guest]] tables"))?;
    Ok(array.iter().filter_map(Value::as_table))
}

fn guest(table: &Table) -> Result<Vec<String>, FileError> {
    let name = table.get("name").ok_or_else(|| {
        FileError::new(
            FILE,
            "a [[guest]] has no name: give it one, as in name = \"a\"",
        )
    })?;
    let mut arguments = Vec::from([argument(Name::Guest, "name", name)?]);
    for (key, value) in table.iter().filter(|(key, _)| *key != "name") {
        arguments.push(argument(option(key, &GUEST)?, key, value)?);
    }
    Ok(arguments)
}

fn option(key: &str, known: &[&'static str]) -> Result<Name, FileError> {
    let is_known = known.contains(&key);
    let name = Name::ALL
        .into_iter()
        .find(|name| is_known && name.text().trim_start_matches('-') == key);
    name.ok_or_else(|| FileError::unknown(FILE, "key", key, known))
}

fn argument(option: Name, key: &str, value: &Value) -> Result<String, FileError> {
    let value = match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        _ => {
            return Err(FileError::new(
                FILE,
                format!("the value of {key:?} must be a text between quotes or a whole number"),
            ));
        }
    };
    Ok(format!("{}={value}", option.text()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{
        self, Debug, Device, Entry, FailAllocation, MmuPolicy, OnExhausted, Request, ShrinkAt,
        ShrinkPoint, TraceFormat, Traced,
    };
    use proptest::prelude::*;

    fn merged(text: &str, command_line: &[&str]) -> Vec<String> {
        let command_line: Vec<_> = command_line.iter().map(ToString::to_string).collect();
        merge(text, &command_line).unwrap()
    }

    #[test]
    fn a_file_says_what_a_command_line_says() {
        let text = "memory = \"16M\"\nmmu-pages = 64\n\
            [[guest]]\nname = \"a\"\nappend = \"x=1 y\"\n[[guest]]\nname = \"b\"\nmemory = \"8M\"\n";
        let arguments = merged(text, &[]);
        let Ok(Request::Run(options)) = options::parse(arguments.iter().map(String::as_str)) else {
            panic!("{arguments:?}");
        };
        let [a, b] = &options.guests[..] else {
            panic!()
        };
        assert_eq!((a.name.as_deref(), &*a.append), (Some("a"), "x=1 y"));
        assert_eq!([a.memory, b.memory], [16 << 20, 8 << 20]);
        assert_eq!([a.mmu_pages, b.mmu_pages], [Some(64); 2]);
    }

    #[test]
    fn the_command_line_comes_first() {
        let text = "memory = \"16M\"\ntimeout = 3\n[[guest]]\nname = \"a\"\n";
        assert_eq!(
            merged(text, &["--memory", "8M"]),
            ["--memory", "8M", "--timeout=3", "--guest=a"]
        );
        assert_eq!(merged(text, &["--guest=b"]), ["--guest=b"]);
    }

    #[test]
    fn the_environment_comes_before_the_command_line() {
        let merged = |variables: &[(&'static str, &'static str)], command_line: &[&str]| {
            let command_line: Vec<_> = command_line.iter().map(ToString::to_string).collect();
            merge_environment(variables.iter().copied(), &command_line)
        };
        let variables = [
            ("UMBRA_GUEST", "a"),
            ("HOME", "/"),
            ("UMBRA_MMU_PAGES", "64"),
            ("UMBRA_APPEND", "x y"),
        ];
        assert_eq!(
            merged(&variables, &["--timeout=3"]).unwrap(),
            ["--append=x y", "--mmu-pages=64", "--guest=a", "--timeout=3"]
        );
        assert_eq!(
            merged(&variables[..3], &["--guest", "b", "--mmu-pages=65"]).unwrap(),
            ["--guest", "b", "--mmu-pages=65"]
        );
        assert_eq!(
            merged(&[("UMBRA_MEMROY", "1M")], &[])
                .unwrap_err()
                .to_string(),
            "environment: unknown variable \"UMBRA_MEMROY\": did you mean \"UMBRA_MEMORY\"?"
        );
    }

    #[test]
    fn every_key_of_the_lists_is_an_option() {
        for key in TOP.iter().chain(&GUEST).filter(|key| **key != "name") {
            let text = format!("--{key}");
            assert!(Name::ALL.iter().any(|name| name.text() == text), "{key}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| merge(text, &[]).unwrap_err().to_string();
        assert_eq!(
            error("memmory = \"1M\""),
            "umbra.toml: unknown key \"memmory\": did you mean \"memory\"?"
        );
        assert!(error("zzzzzzzz = 1").contains("there are: image, initrd"));
        assert!(error("help = 1").contains("unknown key"));
        assert!(error("[[guest]]\nmemory = 1").contains("has no name"));
        assert!(error("[[guest]]\nname = \"a\"\nguest = 1").contains("unknown key \"guest\""));
        assert!(error("guest = \"a\"").contains("[[guest]] tables"));
        assert!(error("memory = true").contains("\"memory\" must be"));
        assert!(
            error("memory = ").starts_with("umbra.toml: at byte 9"),
            "{}",
            error("memory = ")
        );
    }

    #[test]
    fn the_effective_configuration_is_printed() {
        let printed = |arguments: &[&str]| {
            let Ok(Request::Run(options)) = options::parse(arguments.iter().copied()) else {
                panic!("{arguments:?}");
            };
            text(&options)
        };
        let plain = printed(&["--memory=2048K", "--append=a \"b\""]);
        for line in [
            "append = 'a \"b\"'",
            "memory = \"2M\"",
            "entry = \"kernel\"",
        ] {
            assert!(plain.lines().any(|found| found == line), "{plain}");
        }
        let named = printed(&["--guest=a", "--mmu-pages=64"]);
        assert!(named.starts_with("[[guest]]\n") && named.contains("mmu-pages = 64\n"));
        assert_eq!(keys().count(), GUEST.len());
    }

    prop_compose! {
        fn any_guest()(
            files in prop::collection::vec(prop::option::of("(?s).+"), 2),
            texts in prop::collection::vec("(?s).+", 2),
            pages in 512_u64..1 << 27,
            processors in 1..=options::MAXIMUM_PROCESSORS,
            mmu_pages in prop::option::of(1_u64..=options::MAXIMUM_MMU_PAGES),
            mmu_batch in prop::option::of(1_u64..=options::MAXIMUM_MMU_PAGES),
            flags in any::<[bool; 5]>(),
            trace in 0..4_usize,
            gdb in prop::option::of(prop::sample::select(Vec::from([Debug::Wait, Debug::Attach]))),
            every in prop::option::of(1_u64..1000),
            repeat in 1..=options::MAXIMUM_REPEAT,
            timeout in prop::option::of(1..=options::MAXIMUM_TIMEOUT),
        ) -> GuestOptions {
            let [name, append] = &texts[..] else { unreachable!() };
            let [image, initrd] = &files[..] else { unreachable!() };
            GuestOptions {
                name: Some(name.clone()),
                image: image.clone(),
                initrd: initrd.clone(),
                append: append.clone(),
                memory: pages << 12,
                processors,
                mmu_pages,
                mmu_batch,
                mmu_policy: if flags[0] { MmuPolicy::Clock } else { MmuPolicy::Fifo },
                on_exhausted: if flags[1] { OnExhausted::Stop } else { OnExhausted::Raise },
                device: flags[2].then_some(Device::TestDevice),
                gdb,
                entry: if flags[4] { Entry::Kernel } else { Entry::RealMode },
                fail_allocation: every.map(if flags[0] { FailAllocation::One } else { FailAllocation::From }),
                shrink_at: every.map(|every| ShrinkAt {
                    point: if flags[1] { ShrinkPoint::Fault } else { ShrinkPoint::Locked },
                    every,
                }),
                trace: [Traced::NOTHING, Traced::EXITS, Traced::DEVICES, Traced::ALL][trace],
                trace_format: if flags[3] { TraceFormat::Text } else { TraceFormat::Json },
                repeat,
                timeout: timeout.map(core::time::Duration::from_secs),
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(
            mut guests in prop::collection::vec(any_guest(), 1..4),
            is_nameless: bool,
        ) {
            for (index, guest) in guests.iter_mut().enumerate() {
                guest.name = guest.name.take().map(|name| format!("{name}{index}"));
            }
            if is_nameless {
                guests.truncate(1);
                guests[0].name = None;
            }
            let options = Options { guests };
            let arguments = merge(&text(&options), &[]).unwrap();
            let read = options::parse(arguments.iter().map(String::as_str));
            prop_assert_eq!(read, Ok(Request::Run(options)));
        }

        #[test]
        fn every_mistake_is_one_line(text in "(?s).*") {
            if let Err(error) = merge(&text, &[]) {
                prop_assert!(!error.to_string().contains(['\n', '\r']));
            }
        }
    }
}
