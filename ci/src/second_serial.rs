//! The machine's second serial port: a script that talks to Umbra's monitor there, a session of GDB, or a
//! local TCP port for a program of the user's.
//!
//! Protocol: the machine connects to [`SecondSerial::port`] when it starts; what happens then happens
//! in a thread of its own, until the machine closes the connection. [`SecondSerial::finish`] is called
//! when the machine has ended.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::command::clean;
use crate::platform::Console;

/// Between two looks at something that may have happened.
const PERIOD: Duration = Duration::from_millis(10);

/// A step of a script.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// What the console must show first, after what the step before has waited for.
    #[serde(default)]
    pub after: String,
    /// The command.
    pub send: String,
    /// Texts that the reply's line must have, in this order.
    pub expect: Vec<String>,
}

/// A session of GDB, which begins when Umbra says that it can.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// GDB's commands after it has connected. `ADDRESS` stands for the address to which it connects.
    pub commands: Vec<String>,
    /// Texts that GDB must print, in this order.
    pub expect: Vec<String>,
}

/// What Umbra prints when GDB can connect.
const GDB_CAN_CONNECT: &str = "umbra: GDB can debug ";
/// What stands for the address to connect to, in GDB's commands.
const ADDRESS: &str = "ADDRESS";
/// How long GDB waits for an answer, in seconds.
const GDB_PATIENCE: u32 = 60;

/// What goes on at the port. It ends with what is not as it should be.
pub struct SecondSerial {
    port: u16,
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Vec<String>>,
}

impl SecondSerial {
    /// Sends each command of a script once its turn has come, and looks at the replies.
    ///
    /// # Errors
    /// When no local port can be had.
    pub fn script(exchanges: &[Exchange], console: &Console) -> Result<Self> {
        Self::conversation(exchanges, console, |_| {})
    }

    /// The same, and hands each reply on.
    ///
    /// # Errors
    /// When no local port can be had.
    pub fn conversation(
        exchanges: &[Exchange],
        console: &Console,
        reply: impl FnMut(&str) + Send + 'static,
    ) -> Result<Self> {
        let (exchanges, console) = (exchanges.to_vec(), console.clone());
        Self::start(move |machine, is_over| perform(&exchanges, &machine, &console, is_over, reply))
    }

    /// Runs a session of GDB, with the symbols of this file, and looks at what it prints.
    ///
    /// # Errors
    /// When no local port can be had.
    pub fn gdb(session: &Session, symbols: Option<&Path>, console: &Console) -> Result<Self> {
        let listener = listen()?;
        let address = format!("localhost:{}", listener.local_addr()?.port());
        let mut command = clean("gdb");
        command.args(["-nx", "-batch"]);
        command.args(["-ex", &format!("set remotetimeout {GDB_PATIENCE}")]);
        command.args(["-ex", &format!("target remote {address}")]);
        for line in &session.commands {
            command.args(["-ex", &line.replace(ADDRESS, &address)]);
        }
        command.args(symbols);
        let (expect, console) = (session.expect.clone(), console.clone());
        Self::start(move |machine, is_over| {
            while console.find(GDB_CAN_CONNECT, 0).is_none() {
                if is_over.load(Ordering::Relaxed) {
                    return vec!["Umbra never said that GDB can connect".to_owned()];
                }
                thread::sleep(PERIOD);
            }
            let output = thread::scope(|scope| {
                let gdb = scope.spawn(move || command.output());
                // GDB may disconnect and come back.
                while !gdb.is_finished() {
                    if let Some(client) = accept_while(&listener, || !gdb.is_finished()) {
                        // Whichever side ends it: what counts is what GDB has printed.
                        let _ = copy_both(&machine, &client);
                    }
                }
                gdb.join()
            });
            let output = match output {
                Ok(Ok(output)) => [output.stdout, output.stderr].concat(),
                Ok(Err(error)) => return vec![format!("gdb cannot be started: {error}")],
                Err(_) => return vec!["gdb's thread panicked".to_owned()],
            };
            let output = String::from_utf8_lossy(&output);
            let mut rest = &*output;
            for text in &expect {
                match rest.split_once(text.as_str()) {
                    Some((_, after)) => rest = after,
                    None => return vec![format!("gdb's output lacks `{text}`:\n{output}")],
                }
            }
            Vec::new()
        })
    }

    /// Hands the port on to whoever connects to a local TCP port, whose number is returned, too.
    ///
    /// # Errors
    /// When no local port can be had.
    pub fn bridge() -> Result<(Self, u16)> {
        let listener = listen()?;
        let port = listener.local_addr()?.port();
        let bridge = Self::start(move |machine, is_over| {
            while let Some(client) = accept(&listener, is_over) {
                if copy_both(&machine, &client).is_err() {
                    break;
                }
            }
            Vec::new()
        })?;
        Ok((bridge, port))
    }

    fn start(
        converse: impl FnOnce(TcpStream, &AtomicBool) -> Vec<String> + Send + 'static,
    ) -> Result<Self> {
        let listener = listen()?;
        let port = listener.local_addr()?.port();
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || match accept(&listener, &is_over) {
                Some(machine) => converse(machine, &is_over),
                None => vec!["the machine never opened its second serial port".to_owned()],
            }
        });
        Ok(Self {
            port,
            is_over,
            thread,
        })
    }

    /// The local TCP port to which the machine shall connect its second serial port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Ends it, and returns what is not as it should be.
    pub fn finish(self) -> Vec<String> {
        self.is_over.store(true, Ordering::Relaxed);
        let panicked = || vec!["the second serial port's thread panicked".to_owned()];
        self.thread.join().unwrap_or_else(|_| panicked())
    }
}

fn listen() -> Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .context("cannot open a local port for the second serial port")?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The next connection; `None` once all is over.
fn accept(listener: &TcpListener, is_over: &AtomicBool) -> Option<TcpStream> {
    accept_while(listener, || !is_over.load(Ordering::Relaxed))
}

/// The next connection; `None` if there is none as long as `goes_on`.
fn accept_while(listener: &TcpListener, goes_on: impl Fn() -> bool) -> Option<TcpStream> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).ok()?;
                stream.set_nodelay(true).ok()?;
                return Some(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
        if !goes_on() {
            return None;
        }
        thread::sleep(PERIOD);
    }
}

/// Copies both ways until the client closes its side.
fn copy_both(machine: &TcpStream, client: &TcpStream) -> std::io::Result<()> {
    machine.set_read_timeout(Some(PERIOD))?;
    let is_closed = AtomicBool::new(false);
    thread::scope(|scope| {
        let up = scope.spawn(|| {
            let result = copy(client, machine);
            is_closed.store(true, Ordering::Relaxed);
            result
        });
        let mut buffer = [0; 4096];
        let mut machine_reader = machine;
        let mut client_writer = client;
        let down = loop {
            match machine_reader.read(&mut buffer) {
                Ok(0) => break Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => {
                    // A client that has gone is noticed by the other direction.
                    let _ = client_writer.write_all(&buffer[..length]);
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => break Err(error),
            }
            if is_closed.load(Ordering::Relaxed) {
                break Ok(());
            }
        };
        // The machine has gone: so must the client, for the other direction to end.
        let _ = client.shutdown(Shutdown::Both);
        let _ = up.join();
        down
    })
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length])?,
        }
    }
}

/// Sends each command once its turn has come; returns the first thing that is wrong.
fn perform(
    exchanges: &[Exchange],
    mut machine: &TcpStream,
    console: &Console,
    is_over: &AtomicBool,
    mut hand_on: impl FnMut(&str),
) -> Vec<String> {
    let mut replies = BufReader::new(machine);
    let mut position = 0;
    for exchange in exchanges {
        let send = &exchange.send;
        while console
            .find(&exchange.after, position)
            .inspect(|end| position = *end)
            .is_none()
        {
            if is_over.load(Ordering::Relaxed) {
                let after = &exchange.after;
                return vec![format!("`{send}` waited for `{after}` to the end")];
            }
            thread::sleep(PERIOD);
        }
        let mut reply = String::new();
        let result = machine
            .write_all(format!("{send}\n").as_bytes())
            .and_then(|()| replies.read_line(&mut reply));
        if result.is_err() || !reply.ends_with('\n') {
            return vec![format!("`{send}` got no reply but {reply:?}")];
        }
        hand_on(&reply);
        let mut rest = reply.as_str();
        for text in &exchange.expect {
            match rest.split_once(text.as_str()) {
                Some((_, after)) => rest = after,
                None => return vec![format!("the reply to `{send}` lacks `{text}`: {reply}")],
            }
        }
    }
    // Closing the connection would be the end of the machine's port.
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(PERIOD);
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::Show;

    fn exchange(send: &str, expect: &[&str]) -> Exchange {
        Exchange {
            after: String::new(),
            send: send.to_owned(),
            expect: expect.iter().map(ToString::to_string).collect(),
        }
    }

    /// A machine that answers every line with the same one, prefixed.
    fn echo(port: u16, lines: usize) {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        let mut reader = BufReader::new(&stream);
        for _ in 0..lines {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            (&stream)
                .write_all(format!("got {line}").as_bytes())
                .unwrap();
        }
    }

    fn run(exchanges: &[Exchange], lines: usize) -> Vec<String> {
        let console = Console::new(Show::Nothing);
        let serial = SecondSerial::script(exchanges, &console).unwrap();
        echo(serial.port(), lines);
        serial.finish()
    }

    #[test]
    fn replies_must_have_their_texts_in_order() {
        let good = [exchange("one", &["got", "one"]), exchange("two", &[])];
        assert_eq!(run(&good, 2), [""; 0]);
        let wrong = run(&[exchange("one", &["one", "got"])], 1);
        assert_eq!(wrong, ["the reply to `one` lacks `got`: got one\n"]);
    }

    #[test]
    fn a_machine_that_says_nothing_is_a_failure() {
        let silent = run(&[exchange("one", &[])], 0);
        assert_eq!(silent, ["`one` got no reply but \"\""]);
        let console = Console::new(Show::Nothing);
        let absent = SecondSerial::script(&[], &console).unwrap().finish();
        assert_eq!(absent, ["the machine never opened its second serial port"]);
        let late = Exchange {
            after: "never".to_owned(),
            ..exchange("one", &[])
        };
        assert_eq!(run(&[late], 0), ["`one` waited for `never` to the end"]);
    }

    #[test]
    fn a_bridge_takes_one_client_after_the_other() {
        let (bridge, port) = SecondSerial::bridge().unwrap();
        let machine = thread::spawn({
            let port = bridge.port();
            move || echo(port, 2)
        });
        for text in ["one", "two"] {
            let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            (&client).write_all(format!("{text}\n").as_bytes()).unwrap();
            let mut line = String::new();
            BufReader::new(&client).read_line(&mut line).unwrap();
            assert_eq!(line, format!("got {text}\n"));
        }
        machine.join().unwrap();
        assert_eq!(bridge.finish(), [""; 0]);
    }
}
