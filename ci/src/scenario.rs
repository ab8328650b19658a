//! A scenario: what to boot, where, and what must come of it.
//!
//! Each of our own guests is one, as `images/guests/guests.toml` says what it prints and how it ends.
//! Others are TOML files in `ci/scenarios`; one that is named after a guest takes its place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};
use umbra_report::{ExitCode, Outcome, Report};

use crate::build::Application;
use crate::config::Config;
use crate::disk;
use crate::guest::{self, Guest, Source};
use crate::input::BadInput;
use crate::keys::{self, Keys, LEAF};
use crate::platform::{Clock, Console, Hardware, Platform, UhyveSettings};
use crate::project::Project;
use crate::report;
use crate::second_serial::{Exchange, SecondSerial, Session};
use crate::setup::{self, Need};
use crate::trace::Trace;
use crate::typing::{Input, Line};

/// What a scenario file holds. Everything but `exit_code` may be left out.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The file's name without `.toml`.
    #[serde(skip)]
    pub name: String,
    /// What it shows, in one line.
    #[allow(dead_code, reason = "for the reader of the file")]
    about: Option<String>,
    /// Where it runs: everywhere, unless this says otherwise.
    #[serde(default = "everywhere")]
    pub platforms: Vec<Platform>,
    /// The Hermit application that is booted.
    #[serde(default)]
    pub application: Application,
    /// One of the guests that this tool knows by name, or a file by its path relative to the
    /// scenario's.
    guest: Option<String>,
    /// Where that guest comes from.
    #[serde(skip)]
    pub source: Option<Source>,
    /// Several guests instead: an umbra.toml, by its path relative to the scenario's.
    config: Option<PathBuf>,
    /// Only so many bytes of the guest are passed on.
    truncate_guest: Option<usize>,
    /// What is changed in the guest.
    edit_guest: Option<Edit>,
    /// The guest's first module, by its path relative to the scenario's.
    pub initrd: Option<PathBuf>,
    /// The guest's command line.
    append: Option<String>,
    /// The guest's memory, as in `64M`.
    memory: Option<String>,
    /// The form of the disk, on a platform that boots one.
    #[serde(default)]
    pub disk: disk::Format,
    /// A device that the guest has besides the usual ones, as in `testdev`.
    device: Option<String>,
    /// Where a Linux kernel is entered, as in `real-mode`.
    entry: Option<String>,
    /// The whole machine's memory in MiB, instead of what is comfortable for the guest's.
    pub machine_memory_mib: Option<u64>,
    /// QEMU's machine, as in `q35` or `microvm,acpi=off`.
    machine: Option<String>,
    /// QEMU's processor, as in `EPYC,+svm,-pdpe1gb`.
    cpu: Option<String>,
    /// How many processors the machine under Umbra has.
    host_cpus: Option<NonZeroU8>,
    /// What the machine's clock follows: the time, or the instructions that are executed.
    #[serde(default)]
    pub clock: Clock,
    /// How many processors the guest has.
    smp: Option<u64>,
    /// The most shadow pages that the guest may use.
    mmu_pages: Option<u64>,
    /// Which shadow pages go first when there are too many: `clock` or `fifo`.
    mmu_policy: Option<String>,
    /// What happens when the guest needs more at once: `stop` or `raise`.
    on_exhausted: Option<String>,
    /// After how many seconds Umbra shall stop the guest.
    watchdog: Option<u64>,
    /// More arguments for Umbra, which nobody checks before.
    #[serde(default)]
    arguments: Vec<String>,
    /// Environment variables for Umbra, each as `NAME=VALUE`.
    #[serde(default)]
    pub environment: Vec<String>,
    /// What only uhyve has.
    #[serde(default)]
    pub uhyve: UhyveSettings,
    /// Whether it takes so long that it only runs when asked for.
    #[serde(default)]
    pub long: bool,
    /// What is typed at the console, each line once its turn has come.
    #[serde(default)]
    input: Vec<Line>,
    /// What is asked of the monitor through the second serial port, and what it must answer.
    #[serde(default)]
    monitor: Vec<Exchange>,
    /// A session of GDB at the second serial port, with the guest's symbols.
    gdb: Option<Session>,
    /// After how many seconds of wall time the machine is killed.
    #[serde(default = "two_minutes")]
    limit: u64,
    /// The exit code of the run.
    exit_code: u8,
    /// Texts on the console, in this order.
    #[serde(default)]
    console: Vec<String>,
    /// Texts that must not be on the console.
    #[serde(default)]
    forbid: Vec<String>,
    /// What the fields of every guest's report must be.
    #[serde(default)]
    report: BTreeMap<String, Expectation>,
    /// Fields that must be the same in every report.
    #[serde(default)]
    constant: Vec<String>,
    /// How many reports come before those, while everything is used for the first time.
    #[serde(default)]
    constant_after: usize,
    /// What the fields must be for a guest by name.
    #[serde(default)]
    reports: BTreeMap<String, BTreeMap<String, Expectation>>,
    /// What events the trace must have by their names; viewers must be able to read it.
    #[serde(default)]
    trace: Vec<String>,
    /// How large fields of a report must be beside others.
    #[serde(default)]
    ratio: Vec<Ratio>,
    /// The directory of the file.
    #[serde(skip)]
    directory: PathBuf,
}

const KEYS: Keys = Keys(&[
    ("about", LEAF),
    ("platforms", LEAF),
    ("application", LEAF),
    ("guest", LEAF),
    ("config", LEAF),
    ("truncate_guest", LEAF),
    ("edit_guest", Keys(&[("find", LEAF), ("replace", LEAF)])),
    ("initrd", LEAF),
    ("append", LEAF),
    ("memory", LEAF),
    ("disk", LEAF),
    ("device", LEAF),
    ("entry", LEAF),
    ("machine_memory_mib", LEAF),
    ("machine", LEAF),
    ("cpu", LEAF),
    ("host_cpus", LEAF),
    ("clock", LEAF),
    ("smp", LEAF),
    ("mmu_pages", LEAF),
    ("mmu_policy", LEAF),
    ("on_exhausted", LEAF),
    ("watchdog", LEAF),
    ("arguments", LEAF),
    ("environment", LEAF),
    ("uhyve", Keys(&[("options", LEAF), ("hermit_toml", LEAF)])),
    ("long", LEAF),
    ("input", LEAF),
    ("monitor", LEAF),
    ("gdb", LEAF),
    ("limit", LEAF),
    ("exit_code", LEAF),
    ("console", LEAF),
    ("forbid", LEAF),
    ("trace", LEAF),
    ("report", LEAF),
    ("constant", LEAF),
    ("constant_after", LEAF),
    ("reports", LEAF),
    ("ratio", LEAF),
]);

fn everywhere() -> Vec<Platform> {
    Platform::USUAL.to_vec()
}

fn two_minutes() -> u64 {
    120
}

/// A change of a guest's bytes, which must be in it once.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Edit {
    find: String,
    replace: String,
}

impl Edit {
    fn apply(&self, guest: &mut [u8]) -> Result<()> {
        let (find, replace) = (self.find.as_bytes(), self.replace.as_bytes());
        if find.is_empty() || find.len() != replace.len() {
            bail!("edit_guest: find and replace must have the same length");
        }
        let starts = guest.windows(find.len()).enumerate();
        let found: Vec<_> = starts
            .filter_map(|(at, bytes)| (bytes == find).then_some(at))
            .collect();
        let [at] = found[..] else {
            bail!(
                "edit_guest: {:?} is {} times in the guest",
                self.find,
                found.len()
            );
        };
        guest[at..at + find.len()].copy_from_slice(replace);
        Ok(())
    }
}

/// What a field of the report must be.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Expectation {
    Text(String),
    OneOf(Vec<String>),
    Number(u64),
    Bounds(Bounds),
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Bounds {
    #[serde(default)]
    min: u64,
    #[serde(default = "no_bound")]
    max: u64,
}

impl Bounds {
    fn hold(&self, number: u64) -> bool {
        (self.min..=self.max).contains(&number)
    }
}

fn no_bound() -> u64 {
    u64::MAX
}

/// How large one field of a report must be beside another.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Ratio {
    /// The guest; every guest, unless one is named.
    guest: Option<String>,
    /// The one field.
    of: String,
    /// The other, which must not be 0.
    to: String,
    /// How much of the other the one must be.
    percent: Bounds,
}

/// How long a guest runs that must be stopped.
const GUEST_WATCHDOG_SECONDS: u64 = 2;

impl Scenario {
    /// Every scenario, in the order of their names.
    ///
    /// # Errors
    /// The first mistake in any file.
    pub fn all(project: &Project) -> Result<Vec<Self>> {
        let mut scenarios = Self::read_all(&project.root().join("ci/scenarios"))?;
        let guests = guest::own(project)?;
        for scenario in &mut scenarios {
            scenario.find_guest(&guests)?;
        }
        for guest in guests {
            if !scenarios.iter().any(|scenario| scenario.name == guest.name) {
                scenarios.push(Self::of_guest(guest));
            }
        }
        scenarios.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(scenarios)
    }

    /// The scenarios in these files; no two may have the same name.
    ///
    /// # Errors
    /// The first mistake in any file.
    pub fn read_files(project: &Project, paths: &[PathBuf]) -> Result<Vec<Self>> {
        let guests = guest::own(project)?;
        let mut scenarios: Vec<Self> = Vec::new();
        for path in paths {
            let mut scenario = Self::read(path)?;
            scenario.find_guest(&guests)?;
            if scenarios.iter().any(|other| other.name == scenario.name) {
                let message = format!("two scenarios are named {}", scenario.name);
                return Err(BadInput(message).into());
            }
            scenarios.push(scenario);
        }
        Ok(scenarios)
    }

    /// The keys that a file may have.
    #[cfg(test)]
    pub fn keys() -> impl Iterator<Item = &'static str> {
        KEYS.0.iter().map(|(key, _)| *key)
    }

    fn of_guest(guest: Guest) -> Self {
        Self {
            name: guest.name.clone(),
            about: None,
            platforms: everywhere(),
            application: Application::Umbra,
            guest: Some(guest.name.clone()),
            config: None,
            truncate_guest: None,
            edit_guest: None,
            initrd: None,
            append: guest.command_line.clone(),
            memory: None,
            disk: disk::Format::Raw,
            device: guest.device.clone(),
            entry: None,
            machine_memory_mib: None,
            machine: None,
            cpu: None,
            host_cpus: None,
            clock: Clock::Time,
            smp: guest.smp,
            mmu_pages: None,
            mmu_policy: None,
            on_exhausted: None,
            watchdog: (guest.expect_exit_code == ExitCode::Watchdog.as_u8())
                .then_some(GUEST_WATCHDOG_SECONDS),
            arguments: Vec::new(),
            environment: Vec::new(),
            uhyve: UhyveSettings::default(),
            long: guest.long,
            limit: two_minutes(),
            exit_code: guest.expect_exit_code,
            console: guest.console.clone(),
            input: Vec::new(),
            monitor: Vec::new(),
            gdb: None,
            trace: Vec::new(),
            source: Some(Source::Own(guest)),
            forbid: Vec::new(),
            report: BTreeMap::new(),
            constant: Vec::new(),
            constant_after: 0,
            reports: BTreeMap::new(),
            ratio: Vec::new(),
            directory: PathBuf::new(),
        }
    }

    fn read_all(directory: &Path) -> Result<Vec<Self>> {
        let entries = fs::read_dir(directory)
            .with_context(|| format!("cannot read {}", directory.display()))?;
        let mut paths: Vec<_> = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "toml")
            })
            .collect();
        paths.sort();
        paths.iter().map(|path| Self::read(path)).collect()
    }

    fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(path, &text)
    }

    /// Reads `text`, which is the content of `path`.
    ///
    /// # Errors
    /// The first mistake in it.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let mut scenario: Self =
            keys::parse(path, text, &KEYS).map_err(|error| BadInput(error.to_string()))?;
        scenario.name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        scenario.directory = path.parent().unwrap_or(Path::new("")).to_path_buf();
        for &platform in &scenario.platforms {
            let checked = scenario.hardware().check(platform);
            checked.map_err(|error| BadInput(format!("{}: {error}", path.display())))?;
        }
        let known = fields(&Report::new("", Outcome::Succeeded, ""));
        let expectations = scenario.reports.values().chain([&scenario.report]);
        for field in expectations
            .flat_map(BTreeMap::keys)
            .chain(&scenario.constant)
            .chain(
                scenario
                    .ratio
                    .iter()
                    .flat_map(|ratio| [&ratio.of, &ratio.to]),
            )
        {
            let (outer, _) = field.split_once('.').unwrap_or((field, ""));
            if !known.contains_key(outer) {
                let hint = keys::suggestion(field, known.keys().map(String::as_str));
                let place = path.display();
                let message = format!("{place}: the report has no field `{field}`; {hint}");
                return Err(BadInput(message).into());
            }
        }
        Ok(scenario)
    }

    /// Finds out where the guest comes from.
    fn find_guest(&mut self, guests: &[Guest]) -> Result<()> {
        let Some(name) = &self.guest else {
            return Ok(());
        };
        let file = self.directory.join(name);
        self.source = Some(if file.is_file() {
            Source::File(file)
        } else {
            Source::find(guests, name).with_context(|| format!("scenario {}", self.name))?
        });
        Ok(())
    }

    /// What must be installed besides what its platforms need.
    pub fn needs(&self) -> Vec<Need> {
        let mut needs = Vec::new();
        if self.platforms.iter().any(|platform| platform.has_disk()) {
            needs.extend(self.disk.needs());
        }
        if self.gdb.is_some() {
            needs.extend(setup::for_gdb());
        }
        needs
    }

    /// The configuration of several guests, if that is what is booted.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn config(&self, project: &Project) -> Result<Option<Config>> {
        let path = self.config.as_deref().map(|path| self.path(path));
        path.map(|path| Config::read(project, &path)).transpose()
    }

    /// Umbra's arguments.
    pub fn umbra_arguments(&self) -> Vec<String> {
        let name = self.guest.as_deref().map(guest::display_name);
        let options = [
            ("--guest", name),
            ("--append", self.command_line()),
            ("--memory", self.memory().map(str::to_owned)),
            ("--smp", self.smp.map(|processors| processors.to_string())),
            ("--mmu-pages", self.mmu_pages.map(|pages| pages.to_string())),
            ("--mmu-policy", self.mmu_policy.clone()),
            ("--on-exhausted", self.on_exhausted.clone()),
            ("--device", self.device.clone()),
            ("--entry", self.entry.clone()),
            (
                "--timeout",
                self.watchdog.map(|seconds| seconds.to_string()),
            ),
        ];
        let options = options
            .into_iter()
            .filter_map(|(option, value)| Some(format!("{option}={}", value?)));
        options.chain(self.arguments.iter().cloned()).collect()
    }

    /// Umbra's arguments that the scenario's own fields stand for, without the unchecked ones.
    pub fn memory_arguments(&self) -> Vec<String> {
        let memory = self.memory().into_iter();
        memory.map(|memory| format!("--memory={memory}")).collect()
    }

    fn memory(&self) -> Option<&str> {
        let own = self.source.as_ref().and_then(Source::memory);
        self.memory.as_deref().or(own)
    }

    fn command_line(&self) -> Option<String> {
        match &self.source {
            Some(source) => source.command_line(self.append.as_deref()),
            None => self.append.clone(),
        }
    }

    /// What the machine is made of.
    pub fn hardware(&self) -> Hardware {
        Hardware {
            machine: self.machine.clone(),
            cpu: self.cpu.clone(),
            host_cpus: self.host_cpus,
        }
    }

    /// What is typed at the console.
    pub fn input(&self) -> Input<'_> {
        Input::Script(&self.input)
    }

    /// What is connected to the second serial port, if anything is. `guest` is the guest's image, for
    /// its symbols.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn second_serial(
        &self,
        guest: Option<&Path>,
        console: &Console,
    ) -> Result<Option<SecondSerial>> {
        match &self.gdb {
            Some(session) => SecondSerial::gdb(session, guest, console).map(Some),
            None if self.monitor.is_empty() => Ok(None),
            None => SecondSerial::script(&self.monitor, console).map(Some),
        }
    }

    /// What is passed on of the guest.
    ///
    /// # Errors
    /// When it cannot be changed as the scenario says.
    pub fn guest_bytes(&self, mut guest: Vec<u8>) -> Result<Vec<u8>> {
        if let Some(edit) = &self.edit_guest {
            edit.apply(&mut guest)?;
        }
        guest.truncate(self.truncate_guest.unwrap_or(usize::MAX));
        Ok(guest)
    }

    /// When the machine is killed.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.limit)
    }

    /// A path in the scenario, which is relative to its file.
    pub fn path(&self, path: &Path) -> PathBuf {
        self.directory.join(path)
    }

    /// What is not as it should be about a run; nothing if it passed.
    pub fn failures(
        &self,
        platform: Platform,
        result: &report::Result,
        console: &str,
    ) -> Vec<String> {
        let mut failures: Vec<_> = result.problem.iter().cloned().collect();
        if result.code != self.exit_code {
            failures.push(format!(
                "exit code {}, expected {}",
                result.code, self.exit_code
            ));
        }
        let mut rest = console;
        for text in &self.console {
            match rest.split_once(text.as_str()) {
                Some((_, after)) => rest = after,
                None => failures.push(format!("the console lacks `{text}`, or has it too early")),
            }
        }
        for text in self
            .forbid
            .iter()
            .filter(|text| console.contains(text.as_str()))
        {
            failures.push(format!("the console has `{text}`"));
        }
        failures.extend(self.trace_failures(console));
        for report in &result.reports {
            if let (Some(driver), Some(expected)) = (report.driver, platform.driver())
                && driver != expected
            {
                failures.push(format!("driver {driver:?} ran the guest"));
            }
            failures.extend(report_failures(&self.report, report));
        }
        for (guest, expected) in &self.reports {
            match result.reports.iter().find(|report| report.guest == *guest) {
                Some(report) => failures.extend(report_failures(expected, report)),
                None => failures.push(format!("there is no report of {guest}")),
            }
        }
        for ratio in &self.ratio {
            let is_meant = |report: &&Report| {
                ratio
                    .guest
                    .as_ref()
                    .is_none_or(|guest| *guest == report.guest)
            };
            let mut reports = result.reports.iter().filter(is_meant).peekable();
            if reports.peek().is_none() {
                failures.push(format!("there is no report for {ratio:?}"));
            }
            failures.extend(reports.filter_map(|report| ratio_failure(ratio, report)));
        }
        for field in &self.constant {
            let values: BTreeSet<_> = result
                .reports
                .iter()
                .skip(self.constant_after)
                .filter_map(|report| Some(find(&fields(report), field)?.to_string()))
                .collect();
            if values.len() > 1 {
                let values = Vec::from_iter(values).join(", ");
                failures.push(format!("{field} is not the same in all reports: {values}"));
            }
        }
        if result.reports.is_empty() && !self.report.is_empty() {
            failures.push("there is no report".to_owned());
        }
        failures
    }
}

impl Scenario {
    /// What is not as it should be about the trace.
    fn trace_failures(&self, console: &str) -> Vec<String> {
        if self.trace.is_empty() {
            return Vec::new();
        }
        let trace = Trace::of_console(console).and_then(|trace| Trace::load(&trace.json()?));
        match trace {
            Ok(trace) => {
                let missing = self.trace.iter().filter(|name| !trace.has(name));
                missing
                    .map(|name| format!("the trace has no event `{name}`"))
                    .collect()
            }
            Err(error) => vec![format!("the trace cannot be read: {error:#}")],
        }
    }
}

fn report_failures(expectations: &BTreeMap<String, Expectation>, report: &Report) -> Vec<String> {
    let values = fields(report);
    let mut failures = Vec::new();
    for (field, expected) in expectations {
        let value = find(&values, field);
        let number = value.and_then(Value::as_u64);
        let text = value.and_then(Value::as_str);
        let is_met = match expected {
            Expectation::Text(expected) => text == Some(expected),
            Expectation::OneOf(expected) => expected.iter().any(|one| text == Some(one)),
            Expectation::Number(expected) => number == Some(*expected),
            Expectation::Bounds(bounds) => number.is_some_and(|number| bounds.hold(number)),
        };
        if !is_met {
            let value = value.map_or("nothing".to_owned(), ToString::to_string);
            failures.push(format!(
                "the report of {} has {value} as {field}, expected {expected:?}",
                report.guest
            ));
        }
    }
    failures
}

/// What is wrong about a ratio in a report, if anything is.
fn ratio_failure(ratio: &Ratio, report: &Report) -> Option<String> {
    let values = fields(report);
    let number = |field| find(&values, field).and_then(Value::as_u64);
    let (of, to) = (number(&ratio.of), number(&ratio.to));
    let percent = of.zip(to).and_then(|(of, to)| {
        let percent = (u128::from(of) * 100).checked_div(u128::from(to))?;
        u64::try_from(percent).ok()
    });
    let is_met = percent.is_some_and(|percent| ratio.percent.hold(percent));
    (!is_met).then(|| {
        let shown = |number: Option<u64>| number.map_or("nothing".to_owned(), |n| n.to_string());
        format!(
            "the report of {} has {} as {} beside {} as {}, expected {:?} percent",
            report.guest,
            shown(of),
            ratio.of,
            shown(to),
            ratio.to,
            ratio.percent
        )
    })
}

/// A field of a report, where `a.b` is the field `b` of the object `a`.
fn find<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    match name.split_once('.') {
        Some((outer, inner)) => find(fields.get(outer)?.as_object()?, inner),
        None => fields.get(name),
    }
}

fn fields(report: &Report) -> Map<String, Value> {
    match serde_json::to_value(report) {
        Ok(Value::Object(fields)) => fields,
        other => unreachable!("a report is a JSON object, not {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Scenario> {
        Scenario::parse(Path::new("dir/example.toml"), text)
    }

    fn result(code: u8, report: Option<Report>) -> report::Result {
        report::Result {
            code,
            reports: report.into_iter().collect(),
            problem: None,
        }
    }

    #[test]
    fn a_scenario_is_read() {
        let text = "guest = \"hello\"\nmemory = \"32M\"\nwatchdog = 3\nexit_code = 7\n\
                    platforms = [\"bochs\"]\narguments = [\"--mmu-page\"]\n";
        let scenario = parse(text).unwrap();
        assert_eq!(scenario.name, "example");
        assert_eq!(scenario.platforms, [Platform::Bochs]);
        let arguments = ["--guest=hello", "--memory=32M", "--timeout=3", "--mmu-page"];
        assert_eq!(scenario.umbra_arguments(), arguments);
        assert_eq!(scenario.path(Path::new("x")), Path::new("dir/x"));
        assert_eq!(parse("exit_code = 0").unwrap().platforms, Platform::USUAL);
    }

    #[test]
    fn mistyped_keys_name_the_nearest() {
        for (text, hint) in [
            (
                "exit_code = 0\nguset = \"hello\"",
                "unknown key `guset`; did you mean `guest`?",
            ),
            (
                "exit_code = 0\n[report]\npf_fixd = 1",
                "no field `pf_fixd`; did you mean `pf_fixed`?",
            ),
            (
                "exit_code = 0\nplatforms = [\"qemo\"]",
                "unknown variant `qemo`",
            ),
            ("guest = \"hello\"", "missing field `exit_code`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.is::<BadInput>());
            let error = error.to_string();
            assert!(error.contains(hint) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn console_texts_must_come_in_order() {
        let scenario =
            parse("exit_code = 1\nconsole = [\"one\", \"two\"]\nforbid = [\"bad\"]").unwrap();
        let failures = |console| {
            scenario
                .failures(Platform::Qemu, &result(1, None), console)
                .len()
        };
        assert_eq!(failures("one and two"), 0);
        assert_eq!(failures("two and one"), 1);
        assert_eq!(failures("one"), 1);
        assert_eq!(failures("one two bad"), 1);
    }

    #[test]
    fn the_exit_code_must_match() {
        let scenario = parse("exit_code = 6").unwrap();
        assert!(
            scenario
                .failures(Platform::Qemu, &result(6, None), "")
                .is_empty()
        );
        assert_eq!(
            scenario
                .failures(Platform::Qemu, &result(0, None), "")
                .len(),
            1
        );
    }

    #[test]
    fn report_fields_are_bounded() {
        let text = "exit_code = 6\n[report]\noutcome = \"triple-fault\"\npf_taken = { min = 2, max = 3 }\n\
                    mmu_recycled = 0\n\"exits.cpuid\" = { min = 1 }\n";
        let scenario = parse(text).unwrap();
        let mut report = Report::new("x", Outcome::TripleFault, "");
        report.mmu.pf_taken = 3;
        report.exits.insert("cpuid".into(), 1);
        let failures = |report: &Report| {
            scenario
                .failures(Platform::Qemu, &result(6, Some(report.clone())), "")
                .len()
        };
        assert_eq!(failures(&report), 0);
        report.mmu.pf_taken = 4;
        report.mmu.mmu_recycled = 1;
        report.exits.clear();
        assert_eq!(failures(&report), 3);
        assert_eq!(
            scenario.failures(Platform::Qemu, &result(6, None), ""),
            ["there is no report"]
        );
    }

    #[test]
    fn fields_are_compared_with_others() {
        let text = "exit_code = 0\n[report]\noutcome = [\"failed\", \"succeeded\"]\n\
                    \"exhausted.pinned\" = 4\n\
                    [[ratio]]\nof = \"tlb_flush\"\nto = \"mmu_recycled\"\npercent = { max = 6 }\n";
        let scenario = parse(text).unwrap();
        let mut report = Report::new("x", Outcome::Succeeded, "");
        report.exhausted = Some(umbra_report::Exhausted {
            needed: 1,
            used: 4,
            limit: 4,
            pinned: 4,
        });
        (report.mmu.tlb_flush, report.mmu.mmu_recycled) = (6, 100);
        let failures = |report: &Report| {
            scenario
                .failures(Platform::Qemu, &result(0, Some(report.clone())), "")
                .len()
        };
        assert_eq!(failures(&report), 0);
        report.mmu.tlb_flush = 7;
        assert_eq!(failures(&report), 1);
        report.mmu.mmu_recycled = 0;
        report.exhausted = None;
        report.outcome = Outcome::Reset;
        assert_eq!(failures(&report), 3);
        let other = parse(
            "exit_code = 0\n[[ratio]]\nguest = \"y\"\nof = \"run\"\nto = \"run\"\npercent = {}",
        );
        let failures = other
            .unwrap()
            .failures(Platform::Qemu, &result(0, Some(report)), "");
        assert_eq!(failures.len(), 1, "there is no guest y");
        let unknown = "exit_code = 0\n[[ratio]]\nof = \"tlb\"\nto = \"run\"\npercent = {}";
        assert!(parse(unknown).is_err());
    }

    #[test]
    fn a_guest_is_changed_where_it_has_the_bytes_once() {
        let text = "exit_code = 2\ntruncate_guest = 4\nedit_guest = { find = \"b\\u0000\", replace = \"xy\" }";
        let scenario = parse(text).unwrap();
        let change = |guest: &[u8]| scenario.guest_bytes(guest.to_vec());
        assert_eq!(change(b"ab\0cdef").unwrap(), b"axyc");
        assert!(change(b"ab\0b\0").is_err());
        assert!(change(b"ab").is_err());
    }

    #[test]
    fn the_driver_is_the_platform_s() {
        let scenario = parse("exit_code = 0").unwrap();
        let mut report = Report::new("x", Outcome::Succeeded, "");
        report.driver = Some(umbra_report::Driver::Vmx);
        let result = result(0, Some(report));
        assert_eq!(scenario.failures(Platform::Qemu, &result, "").len(), 1);
        assert!(scenario.failures(Platform::Bochs, &result, "").is_empty());
    }

    #[test]
    fn our_own_scenarios_are_read() {
        let scenarios = Scenario::all(&Project::find().unwrap()).unwrap();
        let mut names: Vec<_> = scenarios
            .iter()
            .map(|scenario| scenario.name.as_str())
            .collect();
        assert!(names.contains(&"hello") && names.contains(&"low-memory-callback"));
        names.dedup();
        assert_eq!(names.len(), scenarios.len(), "two scenarios have one name");
        for scenario in &scenarios {
            assert!(
                !scenario.platforms.is_empty(),
                "{} runs nowhere",
                scenario.name
            );
        }
    }
}
