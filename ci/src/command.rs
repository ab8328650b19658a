//! Running other programs: with a clean environment, a sign of life, and their output when they fail.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::Signal;

/// How much of a failed program's output is shown, in lines.
const LINES_SHOWN: usize = 80;
/// A step that takes less than this is not worth a line, where there is no terminal to draw on.
const WORTH_A_LINE: Duration = Duration::from_secs(2);

/// What cargo and rustup set for the program that they run, and what must not leak into another
/// toolchain's builds.
const OF_THE_CALLING_TOOLCHAIN: &[&str] = &[
    "CARGO",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
    "RUST_RECURSION_COUNT",
];

/// A command free of what the cargo that started us put into the environment.
pub fn clean(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for name in OF_THE_CALLING_TOOLCHAIN {
        command.env_remove(name);
    }
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// The cargo that started us, or else the one of the search path.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The same command, whose program is killed when the thread that starts it ends, whatever ends it.
#[allow(unsafe_code)]
pub fn die_with_us(command: &mut Command) -> &mut Command {
    let us = rustix::process::getpid();
    let ask = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have ended before it asked.
        if rustix::process::getppid() == Some(us) {
            Ok(())
        } else {
            Err(std::io::ErrorKind::Interrupted.into())
        }
    };
    // SAFETY: between fork and exec, `ask` makes two system calls and allocates nothing.
    unsafe { command.pre_exec(ask) }
}

/// The full path of a program of the search path, if it is there.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Debian keeps some tools where an ordinary user's search path does not look.
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// The standard output of a program that should end at once; `None` when it fails or is missing.
pub fn answer(command: &mut Command) -> Option<String> {
    let output = command.stderr(Stdio::null()).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// One step of the work, which runs a program to its end.
pub struct Step<'a> {
    /// What the step does, as in "building the guests".
    pub what: &'a str,
    /// After how long the program is killed.
    pub limit: Option<Duration>,
}

impl<'a> Step<'a> {
    /// A step that may take as long as it needs.
    pub fn new(what: &'a str) -> Self {
        Self { what, limit: None }
    }

    /// The same step, killed after `limit`.
    pub fn within(self, limit: Duration) -> Self {
        Self {
            limit: Some(limit),
            ..self
        }
    }

    /// Runs the program, shows that it lives, and returns its standard output.
    ///
    /// # Errors
    /// When it cannot be started, fails, or takes too long: with the end of its output.
    pub fn run(self, command: &mut Command) -> Result<String> {
        let what = self.what;
        let program = command.get_program().to_string_lossy().into_owned();
        let finished = self.finish(command)?;
        match finished.status {
            Some(status) if status.success() => Ok(finished.output()),
            Some(status) => bail!("{what} failed ({program}: {status})\n{}", finished.tail()),
            None => bail!("{what} took too long ({program})\n{}", finished.tail()),
        }
    }

    /// Runs the program, shows that it lives, and returns how it ended.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn finish(self, command: &mut Command) -> Result<Finished> {
        let program = command.get_program().to_string_lossy().into_owned();
        let start = Instant::now();
        let spinner = spinner(self.what);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}: cannot start {program}", self.what))?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let readers = [
            child
                .stdout
                .take()
                .map(|pipe| collect(pipe, Stream::Output, &lines, &spinner)),
            child
                .stderr
                .take()
                .map(|pipe| collect(pipe, Stream::Error, &lines, &spinner)),
        ];
        let status = wait(&mut child, self.limit)?;
        // A killed program may leave children that keep the pipes open.
        if status.is_some() {
            for reader in readers.into_iter().flatten() {
                let _ = reader.join();
            }
        }
        spinner.finish_and_clear();
        if !std::io::stderr().is_terminal() && start.elapsed() >= WORTH_A_LINE {
            eprintln!("{}: {:.1} s", self.what, start.elapsed().as_secs_f32());
        }
        let lines = lines
            .lock()
            .map(|mut lines| std::mem::take(&mut *lines))
            .unwrap_or_default();
        Ok(Finished { status, lines })
    }
}

/// How a program ended.
pub struct Finished {
    /// Its exit status; `None` when it was killed for taking too long.
    pub status: Option<ExitStatus>,
    lines: Lines,
}

impl Finished {
    /// Its standard output.
    pub fn output(&self) -> String {
        let lines = self
            .lines
            .iter()
            .filter(|(stream, _)| *stream == Stream::Output);
        lines
            .map(|(_, line)| line.as_str())
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// All that it printed, line by line.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(|(_, line)| line.as_str())
    }

    /// The end of all that it printed.
    pub fn tail(&self) -> String {
        let skipped = self.lines.len().saturating_sub(LINES_SHOWN);
        let lines = self.lines[skipped..].iter();
        lines
            .map(|(_, line)| line.as_str())
            .collect::<Vec<_>>()
            .join("\n")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Output,
    Error,
}

type Lines = Vec<(Stream, String)>;

fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {prefix} ({elapsed}) {wide_msg:.dim}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn collect(
    pipe: impl Read + Send + 'static,
    stream: Stream,
    lines: &Arc<Mutex<Lines>>,
    spinner: &ProgressBar,
) -> JoinHandle<()> {
    let lines = Arc::clone(lines);
    let spinner = spinner.clone();
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            spinner.set_message(text.trim().to_owned());
            if let Ok(mut lines) = lines.lock() {
                lines.push((stream, text));
            }
            line.clear();
        }
    })
}

/// Waits for a child, and kills it once `limit` has passed (then `None`).
pub fn wait(child: &mut Child, limit: Option<Duration>) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if limit.is_some_and(|limit| start.elapsed() >= limit) {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
