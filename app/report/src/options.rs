//! The image's own options, given as Hermit application arguments.
//!
//! `--name VALUE` and `--name=VALUE` mean the same. `--guest` may be given several times: options after
//! it are that guest's, options before the first one are every guest's. Otherwise each option may be
//! given once. Every mistake is one [`OptionsError`], whose text is one line that says what is wrong and
//! what would be right.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::ops::RangeInclusive;
use core::time::Duration;

use error::Unit;
pub use error::{OptionsError, Range};

mod error;
#[cfg(test)]
mod tests;

/// What `--help` prints.
pub const HELP: &str = "\
Umbra runs guests, whose files the boot loader passes as modules or in one tar archive.

  --guest NAME       name of a guest, in the report and on the console; may be given several times:
                     options after it are this guest's, options before the first are every guest's
                     (default: one guest, hello)
  --image FILE       the boot module that is its kernel (default: the one that has the guest's name;
                     for a single guest, the first; without modules, the guest that Umbra carries)
  --initrd FILE      the boot module that is its initial RAM disk or first module
  --append TEXT      its command line
  --memory SIZE      its RAM: bytes, or a number with K, M or G (default: 64M)
  --smp N            how many processors it has, 1 to 4 (default: 1)
  --mmu-pages N      limit on its shadow pages (default: 1/50 of its pages, at least 64); with fewer
                     than 64 it may need more at once than it may have
  --mmu-policy NAME  which shadow pages go first when there are too many: clock, those that are used
                     least, or fifo, the oldest (default: clock)
  --mmu-batch N      the most shadow pages that go at once, with one flush: 1 is one at a time
                     (default: all that must go)
  --on-exhausted DO  what happens when it needs more shadow pages at once than it may have: stop, or
                     raise, to let it have them (default: stop)
  --device NAME      a device that it has besides the usual ones: testdev, which kernels that test
                     themselves know as QEMU's pc-testdev (default: none)
  --entry WHERE      where a Linux kernel is entered: kernel, or real-mode for its setup code, which
                     asks a BIOS (default: kernel)
  --repeat N         start it again when it has ended, until it has run so often or failed (default: 1)
  --timeout SECONDS  stop it after so many seconds (default: 0, never)
  --trace WHAT       record what it does: exits, mmu, devices, several of them with commas between, or
                     all; if it fails, the last events are printed (default: nothing)
  --trace-format AS  text, or json, to print all recorded events when it ends, as lines that begin with
                     UMBRA-TRACE (default: text)
  --gdb HOW          let GDB debug it at the machine's second serial port: wait, to begin only when GDB
                     says so, or attach, to run until GDB comes (default: no debugger)
  --fail-allocation N   for tests: the Nth allocation of a page or more in its first run fails, in its
                     second the one after that, and so on; N.. lets all from that one on fail; with
                     --repeat, runs follow each other even where the host ran out of memory
  --shrink-at WHEN   for tests: takes shadow pages from all guests while it faults (fault), loads page
                     tables (cr3), gives pages back (commit), or holds its MMU's lock (locked);
                     WHEN:N does so every Nth time
  --print-config     print what all this amounts to, as an umbra.toml, and run nothing
  --help             print this text

A boot module named umbra.toml holds the same options as keys, and guests as [[guest]] tables; it is
read if the command line names no guest. An option may also be an environment variable, as in
UMBRA_MMU_PAGES=64. The command line overrules the environment, which overrules the file. Under uhyve,
files of the .hermit image or of --file-mapping are boot modules.
";

/// The guest's RAM if `--memory` is not given, in bytes.
pub const DEFAULT_MEMORY: u64 = 64 << 20;
/// The least RAM that a guest may have, in bytes: what lies above 1 MiB must hold an image.
pub const MINIMUM_MEMORY: u64 = 2 << 20;
/// The most RAM that a guest may have, in bytes.
pub const MAXIMUM_MEMORY: u64 = 512 << 30;
/// The least number of shadow pages. A guest with fewer than 64 (KVM's `KVM_MIN_ALLOC_MMU_PAGES`) may
/// need more for one instruction.
pub const MINIMUM_MMU_PAGES: u64 = 1;
/// The largest number of shadow pages.
pub const MAXIMUM_MMU_PAGES: u64 = 1 << 30;
/// The most processors of a guest.
pub const MAXIMUM_PROCESSORS: u8 = 4;
/// The most runs of a guest.
pub const MAXIMUM_REPEAT: u64 = 1_000_000;
/// The largest number that an option for tests counts to.
pub const MAXIMUM_COUNT: u64 = 1 << 32;
/// The longest time limit in seconds: one year.
pub const MAXIMUM_TIMEOUT: u64 = 365 * 24 * 60 * 60;

/// What Umbra, Hermit and the boot stub need besides the guests' memory, in MiB.
pub const HOST_MEMORY_MIB: u64 = 192;

const PAGE_SIZE: u64 = 4096;

/// What the arguments ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Run guests.
    Run(Options),
    /// Print the options as a configuration file ([`crate::config::text`]) and succeed.
    PrintConfig(Options),
    /// Print [`HELP`] and succeed.
    Help,
}

/// The options of one run: at least one guest, each with a name of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The guests, in the order in which they were named.
    pub guests: Vec<GuestOptions>,
}

impl Options {
    /// How many runs there are, if none fails.
    pub fn runs(&self) -> u64 {
        self.guests.iter().map(|guest| guest.repeat).sum()
    }

    /// The memory in MiB of a machine that these guests run on in comfort.
    pub fn machine_memory_mib(&self) -> u64 {
        self.memory().div_ceil(1 << 20) + HOST_MEMORY_MIB
    }

    /// The memory of all guests together, in bytes.
    pub fn memory(&self) -> u64 {
        self.guests.iter().map(|guest| guest.memory).sum()
    }
}

/// The options of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestOptions {
    /// Its name, if one was given.
    pub name: Option<String>,
    /// The boot module that is its kernel image, if one was given.
    pub image: Option<String>,
    /// The boot module that is its initial RAM disk, if one was given.
    pub initrd: Option<String>,
    /// Its command line.
    pub append: String,
    /// Its RAM in bytes: a multiple of 4096.
    pub memory: u64,
    /// How many processors it has: 1 to [`MAXIMUM_PROCESSORS`].
    pub processors: u8,
    /// The limit on its shadow pages, if one was given.
    pub mmu_pages: Option<u64>,
    /// Which shadow pages go first when there are too many.
    pub mmu_policy: MmuPolicy,
    /// The most shadow pages that go with one flush; without it, all that must go.
    pub mmu_batch: Option<u64>,
    /// What happens when it needs more shadow pages at once than it may have.
    pub on_exhausted: OnExhausted,
    /// The device that it has besides the usual ones, if it has one.
    pub device: Option<Device>,
    /// What fails for a test, if anything shall.
    pub fail_allocation: Option<FailAllocation>,
    /// When shadow pages are taken away for a test, if they shall be.
    pub shrink_at: Option<ShrinkAt>,
    /// Where a Linux kernel is entered.
    pub entry: Entry,
    /// How often it shall run, one run after the other, while it succeeds.
    pub repeat: u64,
    /// The time limit of a run, if it has one.
    pub timeout: Option<Duration>,
    /// How a debugger finds it, if it shall have one.
    pub gdb: Option<Debug>,
    /// Which events are recorded.
    pub trace: Traced,
    /// How they are printed.
    pub trace_format: TraceFormat,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            name: None,
            image: None,
            initrd: None,
            append: String::new(),
            memory: DEFAULT_MEMORY,
            processors: 1,
            mmu_pages: None,
            mmu_policy: MmuPolicy::Clock,
            mmu_batch: None,
            on_exhausted: OnExhausted::Stop,
            device: None,
            fail_allocation: None,
            shrink_at: None,
            entry: Entry::Kernel,
            repeat: 1,
            timeout: None,
            gdb: None,
            trace: Traced::NOTHING,
            trace_format: TraceFormat::Text,
        }
    }
}

/// Kinds of events.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Traced(u8);

impl Traced {
    /// None.
    pub const NOTHING: Self = Self(0);
    /// Exits of the guest.
    pub const EXITS: Self = Self(1 << 0);
    /// Page faults, roots and flushes.
    pub const MMU: Self = Self(1 << 1);
    /// Accesses to devices, and interrupts.
    pub const DEVICES: Self = Self(1 << 2);
    /// All of them.
    pub const ALL: Self = Self(0b111);

    /// Whether all kinds of `other` are among these.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Each kind by its name.
    const KINDS: [(&str, Self); 3] = [
        ("exits", Self::EXITS),
        ("mmu", Self::MMU),
        ("devices", Self::DEVICES),
    ];

    /// Reads kinds with commas between.
    fn parse(text: &str) -> Option<Self> {
        let mut traced = Self::NOTHING;
        for kind in text.split(',') {
            let named = Self::KINDS.into_iter().chain([("all", Self::ALL)]);
            traced.0 |= named.into_iter().find(|(name, _)| *name == kind)?.1.0;
        }
        Some(traced)
    }

    /// The names of the kinds with commas between.
    pub(crate) fn names(self) -> String {
        let names = Self::KINDS.into_iter();
        let names = names.filter(|(_, kind)| self.contains(*kind));
        names.map(|(name, _)| name).collect::<Vec<_>>().join(",")
    }
}

/// How a debugger finds a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Debug {
    /// It waits for the debugger before its first instruction.
    Wait,
    /// It runs.
    Attach,
}

/// How recorded events are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TraceFormat {
    /// The last ones in words, if the guest fails.
    Text,
    /// All that are kept, as lines of JSON, whenever the guest ends.
    Json,
}

/// Which shadow pages go first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MmuPolicy {
    /// Those that are used least.
    Clock,
    /// The oldest.
    Fifo,
}

/// What happens to a guest that needs more shadow pages at once than it may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnExhausted {
    /// It ends with [`crate::Outcome::NoMmuPages`].
    Stop,
    /// Its limit is raised to what it needs, and it goes on.
    Raise,
}

/// Which allocations of a page or more fail in a guest's first run, counted from 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailAllocation {
    /// This one.
    One(u64),
    /// This one and all that follow.
    From(u64),
}

impl fmt::Display for FailAllocation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(number) => write!(formatter, "{number}"),
            Self::From(number) => write!(formatter, "{number}.."),
        }
    }
}

/// When shadow pages are taken away for a test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShrinkAt {
    /// The kind of moment.
    pub point: ShrinkPoint,
    /// Every how many of these moments.
    pub every: u64,
}

impl fmt::Display for ShrinkAt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.point.name(), self.every)
    }
}

/// A moment in a guest's run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShrinkPoint {
    /// Its fault is being handled, and memory for it is fetched.
    Fault,
    /// Its paging registers are being loaded.
    Cr3,
    /// Its zapped pages are being freed, with its MMU's lock held.
    Commit,
    /// Its translations are being flushed, with its MMU's lock held.
    Locked,
}

/// Where a Linux kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Entry {
    /// Behind its setup code.
    #[default]
    Kernel,
    /// At its setup code in real mode.
    RealMode,
}

/// A device that not every guest has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// QEMU's `pc-testdev`.
    TestDevice,
}

/// What the value of an option is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Any text.
    Text,
    /// Bytes, or a number with K, M or G.
    Size,
    /// A whole number within these bounds.
    Number(RangeInclusive<u64>),
    /// One of these texts.
    Choice(Vec<&'static str>),
}

impl Kind {
    fn of<T: Choice>() -> Self {
        Self::Choice(T::NAMES.iter().map(|(name, _)| *name).collect())
    }
}

/// A value that has one of a few names.
pub(crate) trait Choice: Copy + PartialEq + 'static {
    /// Every value with its name.
    const NAMES: &'static [(&'static str, Self)];

    /// Its name.
    fn name(self) -> &'static str {
        let named = Self::NAMES.iter().find(|(_, value)| *value == self);
        named.map_or("", |(name, _)| name)
    }
}

impl Choice for MmuPolicy {
    const NAMES: &'static [(&'static str, Self)] = &[("clock", Self::Clock), ("fifo", Self::Fifo)];
}

impl Choice for OnExhausted {
    const NAMES: &'static [(&'static str, Self)] = &[("stop", Self::Stop), ("raise", Self::Raise)];
}

impl Choice for TraceFormat {
    const NAMES: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}

impl Choice for Debug {
    const NAMES: &'static [(&'static str, Self)] =
        &[("wait", Self::Wait), ("attach", Self::Attach)];
}

impl Choice for Entry {
    const NAMES: &'static [(&'static str, Self)] =
        &[("kernel", Self::Kernel), ("real-mode", Self::RealMode)];
}

impl Choice for ShrinkPoint {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("fault", Self::Fault),
        ("cr3", Self::Cr3),
        ("commit", Self::Commit),
        ("locked", Self::Locked),
    ];
}

impl Choice for Device {
    const NAMES: &'static [(&'static str, Self)] = &[("testdev", Self::TestDevice)];
}

/// One option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Name {
    Guest,
    Image,
    Initrd,
    Append,
    Memory,
    Processors,
    MmuPages,
    MmuPolicy,
    MmuBatch,
    OnExhausted,
    Device,
    FailAllocation,
    ShrinkAt,
    Entry,
    Repeat,
    Timeout,
    Trace,
    TraceFormat,
    Gdb,
    PrintConfig,
    Help,
}

impl Name {
    pub(crate) const ALL: [Self; 21] = [
        Self::Guest,
        Self::Image,
        Self::Initrd,
        Self::Append,
        Self::Memory,
        Self::Processors,
        Self::MmuPages,
        Self::MmuPolicy,
        Self::MmuBatch,
        Self::OnExhausted,
        Self::Device,
        Self::FailAllocation,
        Self::ShrinkAt,
        Self::Entry,
        Self::Repeat,
        Self::Timeout,
        Self::Trace,
        Self::TraceFormat,
        Self::Gdb,
        Self::PrintConfig,
        Self::Help,
    ];

    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Guest => "--guest",
            Self::Image => "--image",
            Self::Initrd => "--initrd",
            Self::Append => "--append",
            Self::Memory => "--memory",
            Self::Processors => "--smp",
            Self::MmuPages => "--mmu-pages",
            Self::MmuPolicy => "--mmu-policy",
            Self::MmuBatch => "--mmu-batch",
            Self::OnExhausted => "--on-exhausted",
            Self::Device => "--device",
            Self::FailAllocation => "--fail-allocation",
            Self::ShrinkAt => "--shrink-at",
            Self::Entry => "--entry",
            Self::Repeat => "--repeat",
            Self::Timeout => "--timeout",
            Self::Trace => "--trace",
            Self::TraceFormat => "--trace-format",
            Self::Gdb => "--gdb",
            Self::PrintConfig => "--print-config",
            Self::Help => "--help",
        }
    }

    /// What its value looks like.
    const fn value(self) -> &'static str {
        match self {
            Self::Guest => "a name, as in --guest hello",
            Self::Image => "a boot module's name, as in --image vmlinuz",
            Self::Initrd => "a boot module's name, as in --initrd initrd.img",
            Self::Append => "a text, as in --append \"quiet\"",
            Self::Memory => "a size, as in --memory 256M",
            Self::Processors => "a number, as in --smp 2",
            Self::MmuPages => "a number, as in --mmu-pages 1024",
            Self::MmuPolicy => "clock or fifo, as in --mmu-policy fifo",
            Self::MmuBatch => "a number, as in --mmu-batch 1",
            Self::OnExhausted => "stop or raise, as in --on-exhausted raise",
            Self::Device => "a device, as in --device testdev",
            Self::FailAllocation => "a number, as in --fail-allocation 1 or --fail-allocation 1..",
            Self::ShrinkAt => "fault, cr3, commit or locked, as in --shrink-at fault:3",
            Self::Entry => "a place, as in --entry real-mode",
            Self::Repeat => "a number, as in --repeat 100",
            Self::Timeout => "seconds, as in --timeout 30",
            Self::Trace => "exits, mmu, devices or all, as in --trace exits,mmu",
            Self::TraceFormat => "text or json, as in --trace-format json",
            Self::Gdb => "wait or attach, as in --gdb wait",
            Self::PrintConfig | Self::Help => "no value",
        }
    }

    /// What its value is; none for an option without one.
    pub(crate) fn kind(self) -> Option<Kind> {
        Some(match self {
            Self::Guest
            | Self::Image
            | Self::Initrd
            | Self::Append
            | Self::FailAllocation
            | Self::ShrinkAt
            | Self::Trace => Kind::Text,
            Self::Memory => Kind::Size,
            Self::Processors => Kind::Number(1..=u64::from(MAXIMUM_PROCESSORS)),
            Self::MmuPages => Kind::Number(MINIMUM_MMU_PAGES..=MAXIMUM_MMU_PAGES),
            Self::MmuPolicy => Kind::of::<MmuPolicy>(),
            Self::MmuBatch => Kind::Number(1..=MAXIMUM_MMU_PAGES),
            Self::OnExhausted => Kind::of::<OnExhausted>(),
            Self::Device => Kind::of::<Device>(),
            Self::Repeat => Kind::Number(1..=MAXIMUM_REPEAT),
            Self::Timeout => Kind::Number(0..=MAXIMUM_TIMEOUT),
            Self::Gdb => Kind::of::<Debug>(),
            Self::Entry => Kind::of::<Entry>(),
            Self::TraceFormat => Kind::of::<TraceFormat>(),
            Self::PrintConfig | Self::Help => return None,
        })
    }
}

/// Reads the image's arguments, without the program's name.
///
/// # Errors
/// The first mistake, as [`OptionsError`].
pub fn parse<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Request, OptionsError> {
    let mut arguments = arguments.into_iter();
    // What is said before the first guest holds for all of them.
    let mut defaults = GuestOptions::default();
    let mut guests: Vec<GuestOptions> = Vec::new();
    let mut seen = [false; Name::ALL.len()];
    let mut instead = None;
    while let Some(argument) = arguments.next() {
        let (text, attached) = match argument.split_once('=') {
            Some((text, value)) if text.starts_with('-') => (text, Some(value)),
            _ => (argument, None),
        };
        let name = find(text)?;
        if name == Name::Guest {
            seen = [false; Name::ALL.len()];
        }
        if core::mem::replace(&mut seen[name as usize], true) {
            return Err(OptionsError::Duplicate {
                option: name.text(),
            });
        }
        if name.kind().is_none() {
            if let Some(value) = attached {
                return Err(bad_value(name, value, "it takes no value"));
            }
            // Whoever asks for help wants nothing else.
            instead = instead.filter(|&other| other == Name::Help).or(Some(name));
            continue;
        }
        let value = match attached {
            Some(value) => value,
            None => match arguments.next() {
                // Whoever wants a text that looks like an option writes `--append=--verbose`.
                Some(value) if find(value).is_err() => value,
                _ => {
                    let expected = name.value();
                    return Err(OptionsError::MissingValue {
                        option: name.text(),
                        expected,
                    });
                }
            },
        };
        if name == Name::Guest {
            if guests
                .iter()
                .any(|guest| guest.name.as_deref() == Some(value))
            {
                return Err(OptionsError::SameName {
                    guest: value.to_string(),
                });
            }
            guests.push(defaults.clone());
        }
        set(guests.last_mut().unwrap_or(&mut defaults), name, value)?;
    }
    if guests.is_empty() {
        guests.push(defaults);
    }
    let options = Options { guests };
    Ok(match instead {
        None => Request::Run(options),
        Some(Name::PrintConfig) => Request::PrintConfig(options),
        Some(_) => Request::Help,
    })
}

fn find(text: &str) -> Result<Name, OptionsError> {
    if let Some(name) = Name::ALL.into_iter().find(|name| name.text() == text) {
        return Ok(name);
    }
    let option = text.to_string();
    if !text.starts_with('-') {
        return Err(OptionsError::NotAnOption { text: option });
    }
    let typed = text.trim_start_matches('-');
    let nearest = Name::ALL
        .into_iter()
        .map(|name| {
            (
                edit_distance(typed, name.text().trim_start_matches('-')),
                name,
            )
        })
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, name)| *distance <= name.text().len() / 2)
        .map(|(_, name)| name.text());
    Err(OptionsError::Unknown { option, nearest })
}

fn set(options: &mut GuestOptions, name: Name, value: &str) -> Result<(), OptionsError> {
    match name {
        Name::Guest | Name::Image | Name::Initrd if value.is_empty() => {
            return Err(bad_value(name, value, "it is empty"));
        }
        Name::Guest => options.name = Some(value.to_string()),
        Name::Image => options.image = Some(value.to_string()),
        Name::Initrd => options.initrd = Some(value.to_string()),
        Name::Append => options.append = value.to_string(),
        Name::Memory => options.memory = memory(value)?,
        Name::Processors => {
            // The bounds are a byte's.
            options.processors = number_within_bounds(name, value)? as u8;
        }
        Name::MmuPages => {
            options.mmu_pages = Some(number_within_bounds(name, value)?);
        }
        Name::MmuPolicy => {
            options.mmu_policy = choice(name, value, "there is no such policy")?;
        }
        Name::MmuBatch => {
            options.mmu_batch = Some(number_within_bounds(name, value)?);
        }
        Name::OnExhausted => {
            options.on_exhausted = choice(name, value, "that cannot be done")?;
        }
        Name::Device => options.device = Some(choice(name, value, "there is no such device")?),
        Name::FailAllocation => {
            let (digits, fails): (_, fn(u64) -> FailAllocation) = match value.strip_suffix("..") {
                Some(digits) => (digits, FailAllocation::From),
                None => (value, FailAllocation::One),
            };
            let first = number(name, digits)?;
            check_range(name, value, first, 1, MAXIMUM_COUNT)?;
            options.fail_allocation = Some(fails(first));
        }
        Name::ShrinkAt => {
            let (point, every) = value.split_once(':').unwrap_or((value, "1"));
            let point =
                named(point).ok_or_else(|| bad_value(name, value, "there is no such moment"))?;
            let every = number(name, every)?;
            check_range(name, value, every, 1, MAXIMUM_COUNT)?;
            options.shrink_at = Some(ShrinkAt { point, every });
        }
        Name::Entry => options.entry = choice(name, value, "it is neither kernel nor real-mode")?,
        Name::Repeat => {
            options.repeat = number_within_bounds(name, value)?;
        }
        Name::Timeout => {
            let seconds = number_within_bounds(name, value)?;
            options.timeout = (seconds != 0).then(|| Duration::from_secs(seconds));
        }
        Name::Trace => {
            options.trace = Traced::parse(value)
                .ok_or_else(|| bad_value(name, value, "there is no such kind of event"))?;
        }
        Name::TraceFormat => {
            options.trace_format = choice(name, value, "there is no such format")?;
        }
        Name::Gdb => {
            options.gdb = Some(choice(name, value, "no debugger does that")?);
        }
        Name::PrintConfig | Name::Help => {}
    }
    Ok(())
}

fn memory(value: &str) -> Result<u64, OptionsError> {
    let name = Name::Memory;
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (&value[..value.len() - 1], 10),
        Some(b'M' | b'm') => (&value[..value.len() - 1], 20),
        Some(b'G' | b'g') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let units = number(name, digits).map_err(|_| {
        bad_value(
            name,
            value,
            "it is not a whole number of bytes, or one with K, M or G",
        )
    })?;
    let bytes = units.saturating_mul(1 << shift);
    check_range(name, value, bytes, MINIMUM_MEMORY, MAXIMUM_MEMORY)?;
    if bytes % PAGE_SIZE != 0 {
        return Err(bad_value(name, value, "it is not a multiple of 4K"));
    }
    Ok(bytes)
}

/// A decimal number; one too large for 64 bits becomes the largest, for the range check to refuse.
fn number(name: Name, value: &str) -> Result<u64, OptionsError> {
    if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad_value(name, value, "it is not a whole number"));
    }
    Ok(value.parse().unwrap_or(u64::MAX))
}

/// The same, within the option's bounds.
fn number_within_bounds(name: Name, value: &str) -> Result<u64, OptionsError> {
    let number = number(name, value)?;
    if let Some(Kind::Number(bounds)) = name.kind() {
        check_range(name, value, number, *bounds.start(), *bounds.end())?;
    }
    Ok(number)
}

/// The value of that name; `reason` is why there is none.
fn choice<T: Choice>(name: Name, value: &str, reason: &'static str) -> Result<T, OptionsError> {
    named(value).ok_or_else(|| bad_value(name, value, reason))
}

fn named<T: Choice>(text: &str) -> Option<T> {
    let named = T::NAMES.iter().find(|(name, _)| *name == text);
    named.map(|(_, choice)| *choice)
}

fn check_range(
    name: Name,
    value: &str,
    number: u64,
    minimum: u64,
    maximum: u64,
) -> Result<(), OptionsError> {
    if (minimum..=maximum).contains(&number) {
        return Ok(());
    }
    let unit = match name {
        Name::Memory => Unit::Bytes,
        _ => Unit::None,
    };
    let range = Range {
        minimum,
        maximum,
        unit,
    };
    Err(OptionsError::OutOfRange {
        option: name.text(),
        value: value.to_string(),
        range,
    })
}

fn bad_value(name: Name, value: &str, reason: &'static str) -> OptionsError {
    OptionsError::BadValue {
        option: name.text(),
        value: value.to_string(),
        reason,
        expected: name.value(),
    }
}

/// Levenshtein's distance: the least number of inserted, removed or replaced characters.
pub(crate) fn edit_distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.chars().count()).collect();
    for (i, l) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, r) in right.chars().enumerate() {
            let replaced = diagonal + usize::from(l != r);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}
