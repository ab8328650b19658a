//! The memory tester guest: Debian's memtest86+, which boots by Linux's boot protocol. It stays in
//! `target/memtest86`.

use std::path::PathBuf;

use anyhow::Result;

use crate::debian::{Apt, take_file};
use crate::project::Project;

/// What it is told besides the user's own words: to show its screen on the console, to begin at once,
/// and to leave alone what only real machines have.
pub const COMMAND_LINE: &str = "console=ttyS0,115200 nopause nosmp nosm nobench";

const PACKAGE: &str = "memtest86+";
const FILE: &str = "/boot/memtest86+x64.bin";

/// Downloads it if it is not there yet, and returns the image.
///
/// # Errors
/// When it cannot be downloaded.
pub fn set_up(project: &Project) -> Result<PathBuf> {
    let place = project.target("memtest86")?;
    let image = place.join("memtest86+x64.bin");
    if !image.exists() {
        let package = Apt::new(&place)?.download(PACKAGE)?;
        take_file(&package, FILE, &image)?;
    }
    Ok(image)
}
