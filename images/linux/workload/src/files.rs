//! Files and their mappings.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use crate::mapping::{Mapping, PAGE, Sharing};
use crate::random::Random;
use crate::{Outcome, expect, scratch};

/// Maps a file shared and private, changes all three ways to see it, and compares them.
pub fn mapped() -> Outcome {
    const PAGES: usize = 256;
    const ROUNDS: usize = 4000;
    let (path, sink_path) = (scratch("file"), scratch("sink"));
    let mut random = Random::new(6);
    let mut content: Vec<u64> = (0..PAGES).map(|_| random.number()).collect();
    let bytes = content
        .iter()
        .flat_map(|value| value.to_le_bytes().repeat(PAGE / 8));
    fs::write(&path, bytes.collect::<Vec<_>>())?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let shared = Mapping::of_file(&file, PAGES, Sharing::Shared)?;
    let private = Mapping::of_file(&file, PAGES, Sharing::Private)?;
    // What was written to the private copy of a page, once there is one.
    let mut copies = vec![None; PAGES];
    for round in 0..ROUNDS {
        let page = random.below(PAGES);
        let offset = page * PAGE;
        let value = random.number();
        match random.below(3) {
            0 => {
                shared.write(offset, value);
                content[page] = value;
            }
            1 => {
                file.write_all_at(&value.to_le_bytes(), offset as u64)?;
                content[page] = value;
            }
            _ => {
                private.write(offset, value);
                copies[page] = Some(value);
            }
        }
        let page = random.below(PAGES);
        let offset = page * PAGE;
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset as u64)?;
        let expected = content[page];
        let what = |how| format!("round {round}: page {page} of the {how}");
        expect(&what("file"), &u64::from_le_bytes(bytes), &expected)?;
        expect(&what("shared mapping"), &shared.read(offset), &expected)?;
        let expected = copies[page].unwrap_or(expected);
        expect(&what("private mapping"), &private.read(offset), &expected)?;
    }
    // Past the end of a file that was cut, a mapping has nothing.
    file.set_len((PAGES / 2 * PAGE) as u64)?;
    let sink = File::create(&sink_path)?;
    for page in 0..PAGES {
        let is_there = shared.is_there(page * PAGE, &sink);
        expect(
            &format!("page {page} of the cut file is there, which"),
            &is_there,
            &(page < PAGES / 2),
        )?;
    }
    fs::remove_file(&sink_path)?;
    fs::remove_file(path)?;
    Ok(format!("{ROUNDS} changes of a mapped file"))
}
