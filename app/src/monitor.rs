//! The monitor: what users and programs tell Umbra to do while guests run.
//!
//! Protocol: the scheduler calls [`Monitor::poll`] between turns, so that no guest runs meanwhile.
//! The terminal's keys go to the first guest, except after Ctrl-A and while the prompt is open. The
//! second serial port, if there is one, takes commands line by line.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use umbra_inspect::monitor::{
    Command, CommandError, Escape, GuestStatistics, GuestStatus, HELP, Key, LineEditor, PROMPT,
    Reply, Run, Typed, WalkReply, answer,
};
use umbra_inspect::{GuestView, ProcessorState};
use umbra_report::Report;

use crate::guest::{Guest, Halted};
use crate::platform;
use crate::pressure;
use crate::schedule::Running;
use crate::second_serial::SecondSerial;

/// Where commands come from.
pub struct Monitor {
    escape: Escape,
    /// The line at the prompt, while it is open.
    prompt: Option<LineEditor>,
    /// The second serial port, and the line that arrives there.
    port: Option<(SecondSerial, LineEditor)>,
}

impl Monitor {
    /// A monitor for the console and this port.
    pub fn new(port: Option<SecondSerial>) -> Self {
        Self {
            escape: Escape::default(),
            prompt: None,
            port: port.map(|port| (port, LineEditor::default())),
        }
    }

    /// Whether the second serial port must be looked at again soon.
    pub const fn has_port(&self) -> bool {
        self.port.is_some()
    }

    /// Takes what has been typed and sent.
    pub fn poll(&mut self, guests: &mut [Running]) {
        while let Some(byte) = platform::read_console() {
            match self.escape.key(byte) {
                Some(Key::Typed(byte)) => self.typed(byte, guests),
                Some(Key::Help) => self.print(HELP),
                Some(Key::Monitor) => self.toggle(),
                Some(Key::Status) => self.print(&reply_text(&execute(Command::List, guests))),
                Some(Key::Quit) => guests.iter_mut().for_each(Running::stop),
                None => {}
            }
        }
        self.poll_port(guests);
    }

    fn poll_port(&mut self, guests: &mut [Running]) {
        let Some((port, editor)) = &mut self.port else {
            return;
        };
        port.pump();
        // Whoever does not read replies is not heard.
        while !port.is_busy()
            && let Some(byte) = port.receive()
        {
            let Typed::Line(line) = editor.take(byte) else {
                continue;
            };
            let reply = match Command::parse(&line) {
                Ok(None) => continue,
                Ok(Some(command)) => execute(command, guests),
                Err(error) => Err(error),
            };
            port.send(answer(&reply).as_bytes());
            port.send(b"\n");
            port.pump();
        }
    }

    fn typed(&mut self, byte: u8, guests: &mut [Running]) {
        let Some(editor) = &mut self.prompt else {
            if let Some(first) = guests.first_mut() {
                first.guest.current_mut().machine.receive(byte);
            }
            return;
        };
        match editor.take(byte) {
            Typed::Echo(bytes) => platform::write_console(&bytes),
            Typed::Close => self.toggle(),
            Typed::Line(line) => {
                let text = match Command::parse(&line) {
                    Ok(None) => String::new(),
                    Ok(Some(command)) => reply_text(&execute(command, guests)),
                    Err(error) => format!("{error}\n"),
                };
                platform::write_console(format!("\n{text}{PROMPT}").as_bytes());
            }
        }
    }

    fn toggle(&mut self) {
        if self.prompt.is_some() {
            self.close();
        } else {
            self.prompt = Some(LineEditor::default());
            self.print("the monitor; help lists its commands, Ctrl-A c leaves it\n");
        }
    }

    /// Leaves the prompt, if it is open, and sends what is left to be sent.
    pub fn end(&mut self) {
        self.close();
        if let Some((port, _)) = &mut self.port {
            port.drain();
        }
    }

    fn close(&mut self) {
        if self.prompt.take().is_some() {
            platform::write_console(b"\n");
        }
    }

    /// Prints lines that are not the monitor's, so that each begins a line even while the prompt is
    /// open.
    pub fn make_way(&self, text: &str) {
        match self.prompt {
            Some(_) => self.print(text),
            None => platform::write_console(text.as_bytes()),
        }
    }

    /// Prints a text on lines of its own, and the prompt again if it is open.
    fn print(&self, text: &str) {
        let prompt = self.prompt.as_ref().map_or("", |_| PROMPT);
        platform::write_console(format!("\n{text}{prompt}").as_bytes());
    }
}

/// The registers of all processors.
struct Processors<'a>(&'a [Guest]);

impl fmt::Display for Processors<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for guest in self.0 {
            if self.0.len() > 1 {
                let number = guest.machine.number().get();
                let state = match guest.halted {
                    Halted::No => "runs",
                    Halted::Yes | Halted::Deaf => "waits for an interrupt",
                    Halted::Reset => "waits for its start",
                };
                writeln!(formatter, "processor {number} {state}")?;
            }
            write!(formatter, "{}", ProcessorState::of(&*guest.vcpu))?;
        }
        Ok(())
    }
}

fn reply_text(reply: &Result<Reply, CommandError>) -> String {
    match reply {
        Ok(reply) => reply.to_string(),
        Err(error) => format!("{error}\n"),
    }
}

/// Carries a command out.
fn execute(command: Command, guests: &mut [Running]) -> Result<Reply, CommandError> {
    Ok(match command {
        Command::Help => Reply::help(),
        Command::List => Reply::Guests {
            guests: guests.iter().map(status).collect(),
        },
        Command::Statistics(name) => Reply::Statistics {
            statistics: select(guests, name)?
                .into_iter()
                .map(|running| statistics(running))
                .collect(),
            heap: pressure::heap_counters(),
        },
        Command::Shrink { pages } => {
            let start = platform::timestamp();
            let shrunk = pressure::shrink(pages);
            let ticks = platform::timestamp() - start;
            Reply::Shrunk {
                ticks,
                freed: shrunk.freed as u64,
                skipped: shrunk.skipped as u64,
            }
        }
        Command::Limit { guest, pages } => {
            let mmu = find(guests, &guest)?.guest.mmu();
            mmu.set_limit(pages);
            Reply::Limit {
                mmu_pages_limit: mmu.limit() as u64,
                mmu_pages_used: mmu.used() as u64,
                guest,
            }
        }
        Command::Pause(name) => change(guests, name, Run::Paused, Running::pause)?,
        Command::Resume(name) => change(guests, name, Run::Running, Running::resume)?,
        Command::Stop(name) => change(guests, Some(name), Run::Stopped, Running::stop)?,
        Command::Walk { guest, address } => {
            let inspection = find(guests, &guest)?
                .guest
                .current()
                .paging
                .inspect(address);
            Reply::Walk(Box::new(WalkReply { guest, inspection }))
        }
        Command::Registers(name) => {
            let running = find(guests, &name)?;
            Reply::text(&name, &Processors(running.guest.processors()))
        }
        Command::Exits(name) => Reply::text(&name, &find(guests, &name)?.guest.current().exit_log),
    })
}

fn find<'a>(guests: &'a mut [Running], name: &str) -> Result<&'a mut Running, CommandError> {
    guests
        .iter_mut()
        .find(|running| running.guest.name() == name)
        .ok_or_else(|| CommandError::NoGuest(name.to_string()))
}

/// The guest with this name, or all of them.
fn select(guests: &mut [Running], name: Option<String>) -> Result<Vec<&mut Running>, CommandError> {
    match name {
        Some(name) => find(guests, &name).map(|running| [running].into()),
        None => Ok(guests.iter_mut().collect()),
    }
}

fn change(
    guests: &mut [Running],
    name: Option<String>,
    now: Run,
    what: fn(&mut Running),
) -> Result<Reply, CommandError> {
    let mut changed = Vec::new();
    for running in select(guests, name)? {
        what(running);
        changed.push(running.guest.name().to_string());
    }
    Ok(Reply::Changed {
        guests: changed,
        now,
    })
}

fn status(running: &Running) -> GuestStatus {
    let guest = &running.guest;
    GuestStatus {
        guest: guest.name().to_string(),
        state: if running.is_stopped() {
            Run::Stopped
        } else if running.is_paused() {
            Run::Paused
        } else if guest.is_waiting() {
            Run::Waiting
        } else {
            Run::Running
        },
        run: running.run,
        exits: guest.exits(),
        mmu_pages_used: guest.mmu().used() as u64,
        mmu_pages_limit: guest.mmu().limit() as u64,
    }
}

fn statistics(running: &Running) -> GuestStatistics {
    let Report {
        guest,
        nanoseconds,
        exits,
        mmu,
        unknown_ports,
        unknown_msrs,
        ..
    } = running.guest.report_so_far();
    GuestStatistics {
        guest,
        run: running.run,
        nanoseconds,
        exits,
        mmu,
        unknown_ports,
        unknown_msrs,
    }
}
