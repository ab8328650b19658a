//! What is typed at a machine's serial console: by the user, or by a scenario's script.
//!
//! Protocol: a platform calls [`Input::start`] with the pipe to the machine, then [`Typing::wait`]
//! until the machine has ended. The terminal is raw as long as the [`Typing`] lives.

use std::io::{Read, Write, stdin};
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Deserialize;

use crate::platform::Console;
use crate::terminal::RawTerminal;

/// Between two looks at the machine.
const PERIOD: Duration = Duration::from_millis(10);

/// Who types.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// The user, or whatever our standard input is.
    User,
    /// A script.
    Script(&'a [Line]),
}

/// A step of a script.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// What the console must show first, after what the step before has waited for.
    pub after: String,
    /// What is typed then.
    pub send: String,
}

impl Input<'_> {
    /// Begins to type into `machine`.
    pub fn start(self, machine: impl Write + Send + 'static, console: &Console) -> Typing {
        let is_over = Arc::new(AtomicBool::new(false));
        let is_quit = Arc::new(AtomicBool::new(false));
        let terminal = match self {
            Self::User => {
                let terminal = RawTerminal::enter();
                let escape = terminal.as_ref().map(|_| Escape::default());
                let is_quit = Arc::clone(&is_quit);
                thread::spawn(move || copy(machine, escape, &is_quit));
                terminal
            }
            Self::Script(lines) => {
                let (lines, console) = (lines.to_vec(), console.clone());
                let is_over = Arc::clone(&is_over);
                thread::spawn(move || perform(&lines, machine, &console, &is_over));
                None
            }
        };
        Typing {
            is_over,
            is_quit,
            _terminal: terminal,
        }
    }
}

/// How a machine's program has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself.
    Exited(ExitStatus),
    /// It was killed for taking too long.
    TooLong,
    /// It was killed because the user wanted so.
    Quit,
}

/// Typing that goes on.
pub struct Typing {
    is_over: Arc<AtomicBool>,
    is_quit: Arc<AtomicBool>,
    _terminal: Option<RawTerminal>,
}

impl Typing {
    /// Waits for the machine's end, and kills it once `limit` has passed or the user wants to quit.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn wait(&self, machine: &mut Child, limit: Option<Duration>) -> Result<End> {
        let start = Instant::now();
        loop {
            if let Some(status) = machine.try_wait()? {
                return Ok(End::Exited(status));
            }
            let is_too_long = limit.is_some_and(|limit| start.elapsed() >= limit);
            let is_quit = self.is_quit.load(Ordering::Relaxed);
            if is_quit || is_too_long {
                machine.kill()?;
                machine.wait()?;
                return Ok(if is_quit { End::Quit } else { End::TooLong });
            }
            thread::sleep(PERIOD);
        }
    }
}

impl Drop for Typing {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// Copies the standard input to the machine, until one of them ends.
fn copy(mut machine: impl Write, mut escape: Option<Escape>, is_quit: &AtomicBool) {
    let mut buffer = [0; 256];
    while let Ok(length @ 1..) = stdin().read(&mut buffer) {
        let mut typed = buffer[..length].to_vec();
        if let Some(escape) = &mut escape {
            match escape.filter(&typed) {
                Some(rest) => typed = rest,
                None => return is_quit.store(true, Ordering::Relaxed),
            }
        }
        if machine
            .write_all(&typed)
            .and_then(|()| machine.flush())
            .is_err()
        {
            return;
        }
    }
}

/// Types each line of a script once its turn has come.
fn perform(lines: &[Line], mut machine: impl Write, console: &Console, is_over: &AtomicBool) {
    let mut position = 0;
    for line in lines {
        loop {
            if let Some(end) = console.find(&line.after, position) {
                position = end;
                break;
            }
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(PERIOD);
        }
        let typed = machine.write_all(line.send.as_bytes());
        if typed.and_then(|()| machine.flush()).is_err() {
            return;
        }
    }
    // Closing the pipe would be the end of the machine's input.
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(PERIOD);
    }
}

/// Finds Ctrl-A x in what the user types. Ctrl-A with any other key is for Umbra.
#[derive(Debug, Default)]
struct Escape {
    is_open: bool,
}

impl Escape {
    const CONTROL_A: u8 = 1;

    /// What is left for the machine; `None` if the user wants to quit.
    fn filter(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut rest = Vec::new();
        for &byte in typed {
            match (self.is_open, byte) {
                (false, Self::CONTROL_A) => self.is_open = true,
                (false, _) => rest.push(byte),
                (true, b'x') => return None,
                (true, _) => {
                    self.is_open = false;
                    rest.extend([Self::CONTROL_A, byte]);
                }
            }
        }
        Some(rest)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::platform::Show;

    #[test]
    fn control_a_x_quits() {
        let filter = |typed: &[u8]| Escape::default().filter(typed);
        assert_eq!(filter(b"x\r").as_deref(), Some(&b"x\r"[..]));
        assert_eq!(filter(b"a\x01\x01b").as_deref(), Some(&b"a\x01\x01b"[..]));
        assert_eq!(filter(b"a\x01cx").as_deref(), Some(&b"a\x01cx"[..]));
        assert_eq!(filter(b"a\x01x"), None);
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"\x01").as_deref(), Some(&b""[..]));
        assert_eq!(escape.filter(b"x"), None, "in two reads");
    }

    #[test]
    fn a_script_waits_for_each_prompt() {
        let program = "printf 'name? '; read name; printf 'again? '; read again; \
                       echo \"$name $again\"; test \"$name\" = one";
        let mut child = Command::new("sh")
            .args(["-c", program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = Console::new(Show::Nothing);
        let output = child.stdout.take().unwrap();
        let reader = thread::spawn({
            let console = console.clone();
            move || console.record(output)
        });
        let line = |after: &str, send: &str| Line {
            after: after.to_owned(),
            send: send.to_owned(),
        };
        let script = [line("? ", "one\n"), line("? ", "two\n")];
        let typing = Input::Script(&script).start(child.stdin.take().unwrap(), &console);
        let end = typing
            .wait(&mut child, Some(Duration::from_secs(20)))
            .unwrap();
        reader.join().unwrap();
        assert!(
            matches!(end, End::Exited(status) if status.success()),
            "{end:?}"
        );
        assert_eq!(console.text(), "name? again? one two\n");
    }

    #[test]
    fn a_script_that_never_gets_its_turn_ends_with_the_machine() {
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let console = Console::new(Show::Nothing);
        let script = [Line {
            after: "never".into(),
            send: "x".into(),
        }];
        let typing = Input::Script(&script).start(child.stdin.take().unwrap(), &console);
        let end = typing
            .wait(&mut child, Some(Duration::from_millis(50)))
            .unwrap();
        assert_eq!(end, End::TooLong);
    }
}
