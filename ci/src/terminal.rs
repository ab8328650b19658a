//! The terminal on the standard input while it hands on every key as it is typed.
//!
//! Protocol: it is raw as long as a [`RawTerminal`] lives, and as it was before when this tool has ended,
//! whatever ended it. A signal that would end the tool first restores it. SIGKILL cannot be caught: for
//! that there is a guard, a process that waits for the end of a pipe whose other end only we have.

use std::io::{IsTerminal, Write, stdin};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, Once};
use std::thread;

use rustix::process::getpgrp;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::command::{answer, clean};

/// The terminal's modes before it was made raw, while it is.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// A terminal that is raw.
pub struct RawTerminal {
    _guard: Option<Guard>,
}

impl RawTerminal {
    /// Makes it raw, if there is one and we are in its foreground.
    pub fn enter() -> Option<Self> {
        let input = stdin();
        if !input.is_terminal() || tcgetpgrp(&input).ok()? != getpgrp() {
            return None;
        }
        let before = tcgetattr(&input).ok()?;
        let mut raw = before.clone();
        raw.input_modes -= InputModes::BRKINT
            | InputModes::ICRNL
            | InputModes::IGNCR
            | InputModes::INLCR
            | InputModes::INPCK
            | InputModes::ISTRIP
            | InputModes::IXON;
        raw.local_modes -=
            LocalModes::ECHO | LocalModes::ICANON | LocalModes::IEXTEN | LocalModes::ISIG;
        let guard = Guard::start();
        restore_on_signals();
        *BEFORE.lock().ok()? = Some(before);
        tcsetattr(&input, OptionalActions::Now, &raw).ok()?;
        eprintln!("Ctrl-A x ends the machine, Ctrl-A h shows what else there is.");
        Some(Self { _guard: guard })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = BEFORE.lock().ok().and_then(|mut before| before.take()) {
        // There is nobody left to complain to.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

/// From now on, signals that end this tool restore the terminal first.
fn restore_on_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Ok(mut signals) = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM]) else {
            return;
        };
        thread::spawn(move || {
            for signal in signals.forever() {
                restore();
                // What cannot end us as it should is nothing to stay for, either.
                let _ = emulate_default_handler(signal);
            }
        });
    });
}

/// A shell that restores the terminal when we have gone without a word.
struct Guard {
    process: Child,
    word: Option<ChildStdin>,
}

impl Guard {
    /// It outlives the signals that we may die of, and is in the terminal's background by then.
    const SCRIPT: &str = r#"trap "" HUP INT QUIT TERM TTOU; read -r _ || exec stty "$0" </dev/tty"#;

    /// Starts it; there is none if this system lacks what it needs.
    fn start() -> Option<Self> {
        let modes = answer(Command::new("stty").arg("-g").stdin(Stdio::inherit()))?;
        let mut process = clean("sh")
            .args(["-c", Self::SCRIPT, &modes])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let word = process.stdin.take();
        Some(Self { process, word })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut word) = self.word.take() {
            // If it has ended already, there is nothing to tell it.
            let _ = word.write_all(b"\n");
        }
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;
    use crate::command::die_with_us;

    const DIRECTORY: &str = "UMBRA_TEST_DIRECTORY";

    /// What the test below runs and kills: a tool with a raw terminal and a machine.
    #[test]
    fn tool() {
        let Some(directory) = std::env::var_os(DIRECTORY) else {
            return;
        };
        let _terminal = RawTerminal::enter().expect("no terminal in whose foreground we are");
        let mut machine = die_with_us(Command::new("sleep").arg("1000"))
            .spawn()
            .unwrap();
        let started = Path::new(&directory).join("started");
        let pids = format!("{} {}", std::process::id(), machine.id());
        fs::write(started.with_extension("new"), pids).unwrap();
        fs::rename(started.with_extension("new"), &started).unwrap();
        machine.wait().unwrap();
    }

    /// Waits until `probe` finds something.
    fn wait_for<T>(what: &str, probe: impl Fn() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = probe() {
                return found;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "no {what}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn has_ended(pid: &str) -> bool {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.is_empty() || status.contains("State:\tZ")
    }

    #[test]
    fn neither_a_machine_nor_raw_modes_outlive_this_tool() {
        for signal in [Signal::HUP, Signal::INT, Signal::TERM, Signal::KILL] {
            let directory = tempfile::tempdir().unwrap();
            let modes = directory.path().join("modes");
            let tool = std::env::current_exe().unwrap();
            let script = format!(
                "'{}' --exact terminal::tests::tool; \
                 while stty -a | grep -q -e -icanon; do sleep 0.1; done; stty -a >'{modes}'",
                tool.display(),
                modes = modes.display(),
            );
            let mut session = Command::new("script")
                .args(["--quiet", "--command", &script, "/dev/null"])
                .env(DIRECTORY, directory.path())
                .env("SHELL", "/bin/sh")
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let started = directory.path().join("started");
            let pids = wait_for("tool", || fs::read_to_string(&started).ok());
            let (tool, machine) = pids.split_once(' ').unwrap();
            assert!(!has_ended(machine));
            let pid = Pid::from_raw(tool.parse().unwrap()).unwrap();
            kill_process(pid, signal).unwrap();
            let modes = wait_for("restored modes", || {
                fs::read_to_string(&modes)
                    .ok()
                    .filter(|text| !text.is_empty())
            });
            assert!(
                modes.contains(" echo ") && modes.contains(" icrnl "),
                "{modes}"
            );
            wait_for("end of the machine", || has_ended(machine).then_some(()));
            session.wait().unwrap();
        }
    }
}
