//! The guest of `docs/ci.md`: the program and the command that stand there, so that what a new user
//! copies is what is tested. It stays in `target/first-guest`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::command::{Step, clean};
use crate::project::{Project, write_if_changed};
use crate::setup;

const PAGE: &str = "docs/ci.md";
const HEADING: &str = "## A first guest";

/// Compiles it, and returns the image.
///
/// # Errors
/// When the page has no such program, or it does not compile.
pub fn set_up(project: &Project) -> Result<PathBuf> {
    let page = fs::read_to_string(project.root().join(PAGE))
        .with_context(|| format!("cannot read {PAGE}"))?;
    let guest = FirstGuest::parse(&page)
        .with_context(|| format!("{PAGE} has no program and command below `{HEADING}`"))?;
    setup::install(&setup::for_first_guest())?;
    let place = project.target("first-guest")?;
    write_if_changed(&place.join("hello.c"), guest.program.as_bytes())?;
    let mut command = clean("sh");
    command.current_dir(&place).args(["-c", guest.command]);
    Step::new("compiling the first guest").run(&mut command)?;
    Ok(place.join("hello.elf"))
}

/// What stands on the page.
#[derive(Debug, PartialEq, Eq)]
struct FirstGuest<'a> {
    program: &'a str,
    command: &'a str,
}

impl<'a> FirstGuest<'a> {
    fn parse(page: &'a str) -> Option<Self> {
        let (_, rest) = page.split_once(HEADING)?;
        let (_, rest) = rest.split_once("```c\n")?;
        let (program, rest) = rest.split_once("```\n")?;
        let (_, rest) = rest.split_once("```\n")?;
        let (command, _) = rest.split_once("```\n")?;
        Some(Self { program, command })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_and_command_are_found() {
        let page = "```c\nother\n```\n## A first guest\n\n```c\nint x;\n```\n\n```\ngcc \\\n  -c x.c\n```\nmore\n";
        let guest = FirstGuest {
            program: "int x;\n",
            command: "gcc \\\n  -c x.c\n",
        };
        assert_eq!(FirstGuest::parse(page), Some(guest));
        assert_eq!(FirstGuest::parse("## A first guest\nnothing"), None);
    }
}
