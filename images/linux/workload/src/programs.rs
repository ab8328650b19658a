//! Programs of the system: `sha256sum` and `tar`.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::random::Random;
use crate::{Failure, Outcome, expect, scratch};

/// SHA-256 of one million times the letter a (FIPS 180-2, appendix B.3).
const MILLION_A: &str = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
/// SHA-256 of "abc" (FIPS 180-2, appendix B.1).
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

/// Has `sha256sum` read known data from a pipe and from a file.
pub fn sha256() -> Outcome {
    let million = vec![b'a'; 1_000_000];
    for (data, expected) in [(&b"abc"[..], ABC), (&million, MILLION_A)] {
        let mut child = Command::new("sha256sum")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        child.stdin.take().ok_or("no pipe")?.write_all(data)?;
        let output = child.wait_with_output()?;
        check_sum("from a pipe", &output.stdout, expected)?;
    }
    let path = scratch("sha256");
    fs::write(&path, &million)?;
    let output = Command::new("sha256sum").arg(&path).output()?;
    check_sum("of a file", &output.stdout, MILLION_A)?;
    fs::remove_file(path)?;
    Ok("3 sums of known data".into())
}

fn check_sum(what: &str, output: &[u8], expected: &str) -> Result<(), Failure> {
    let text = String::from_utf8_lossy(output);
    let sum = text.split_whitespace().next().unwrap_or_default();
    expect(&format!("the sum {what}"), &sum, &expected)
}

/// Packs a directory with `tar`, unpacks it elsewhere, and compares.
pub fn tar() -> Outcome {
    const FILES: usize = 100;
    let root = scratch("tar");
    let (from, to) = (root.join("from"), root.join("to"));
    let mut random = Random::new(7);
    let mut files = Vec::new();
    for number in 0..FILES {
        let name = format!("{}/{number}", number % 7);
        let length = random.below(16 << 10);
        let content = random.bytes(length);
        let path = from.join(&name);
        fs::create_dir_all(path.parent().ok_or("no parent")?)?;
        fs::write(path, &content)?;
        files.push((name, content));
    }
    fs::create_dir_all(&to)?;
    let archive = root.join("archive.tar");
    let run = |command: &mut Command| -> Result<(), Failure> {
        let output = command.output()?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            Ok(())
        } else {
            Err(format!("{command:?} ended with {}: {complaint}", output.status).into())
        }
    };
    run(Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(&from)
        .arg("."))?;
    run(Command::new("tar")
        .arg("-xf")
        .arg(&archive)
        .arg("-C")
        .arg(&to))?;
    let mut bytes = 0;
    for (name, content) in files {
        let unpacked = fs::read(to.join(&name)).map_err(|error| format!("{name}: {error}"))?;
        if unpacked != content {
            let at = unpacked.iter().zip(&content).position(|(a, b)| a != b);
            let lengths = (unpacked.len(), content.len());
            return Err(format!("{name} differs first at {at:?}; lengths {lengths:?}").into());
        }
        bytes += content.len();
    }
    fs::remove_dir_all(root)?;
    Ok(format!("{FILES} files, {} KiB there and back", bytes >> 10))
}
