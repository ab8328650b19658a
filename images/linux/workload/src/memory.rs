//! Anonymous memory: its content, its protection, its holes, and code in it.

use std::fs;

use crate::mapping::{Mapping, OpeningPages, PAGE, Protection};
use crate::random::Random;
use crate::{Failure, Outcome, expect, scratch};

/// Overrides how much memory [`anonymous`] takes, in MiB.
const MEMORY_VARIABLE: &str = "UMBRA_WORKLOAD_MEMORY_MIB";
const WORDS_PER_PAGE: usize = PAGE / 8;

/// Maps a quarter of the machine's memory, touches it at random, and checks it.
pub fn anonymous() -> Outcome {
    let bytes = match std::env::var(MEMORY_VARIABLE) {
        Ok(mib) => mib.parse::<usize>()? << 20,
        Err(_) => total_memory()? / 4,
    };
    let pages = (bytes / PAGE).max(1);
    let memory = Mapping::anonymous(pages)?;
    let mut random = Random::new(2);
    // What was last written to each page, and where in it.
    let mut written: Vec<Option<(u16, u64)>> = vec![None; pages];
    let touches = 2 * pages;
    for _ in 0..touches {
        let page = random.below(pages);
        check(&memory, page, written[page])?;
        let word = random.below(WORDS_PER_PAGE);
        let value = random.number();
        memory.write(page * PAGE + word * 8, value);
        written[page] = Some((u16::try_from(word)?, value));
    }
    for (page, written) in written.iter().enumerate() {
        check(&memory, page, *written)?;
    }
    Ok(format!("{touches} touches of {} MiB", bytes >> 20))
}

fn check(memory: &Mapping, page: usize, written: Option<(u16, u64)>) -> Result<(), Failure> {
    let (word, expected) = written.unwrap_or_default();
    let found = memory.read(page * PAGE + usize::from(word) * 8);
    expect(&format!("word {word} of page {page}"), &found, &expected)
}

/// What the kernel says that the machine has, in bytes.
fn total_memory() -> Result<usize, Failure> {
    let text =
        fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kibibytes: usize = kibibytes
        .ok_or("/proc/meminfo has no MemTotal in kB")?
        .parse()?;
    Ok(kibibytes << 10)
}

/// Changes what may be done with pages over and over, and tries it.
pub fn protections() -> Outcome {
    const PAGES: usize = 64;
    const ROUNDS: usize = 2000;
    const TRIES: usize = 4;
    let _opening = OpeningPages::begin()?;
    let memory = Mapping::anonymous(PAGES)?;
    let mut random = Random::new(3);
    let mut allowed = [Protection::ReadWrite; PAGES];
    let mut content = [0; PAGES];
    let mut faults = 0;
    for round in 0..ROUNDS {
        let first = random.below(PAGES);
        let pages = 1 + random.below(PAGES - first);
        let protection = match random.below(3) {
            0 => Protection::None,
            1 => Protection::Read,
            _ => Protection::ReadWrite,
        };
        memory.protect(first, pages, protection)?;
        allowed[first..first + pages].fill(protection);
        for _ in 0..TRIES {
            let page = random.below(PAGES);
            let offset = page * PAGE;
            let what = |access| {
                format!(
                    "round {round}: faults of a {access} page {page}, {:?}",
                    allowed[page]
                )
            };
            let is_write = random.below(2) == 0;
            let (what, found, is_allowed) = if is_write {
                content[page] = random.number();
                let found = memory.try_write(offset, content[page]);
                (what("write to"), found, allowed[page].is_writable())
            } else {
                let (value, found) = memory.try_read(offset);
                expect(
                    &format!("round {round}: page {page}"),
                    &value,
                    &content[page],
                )?;
                (what("read of"), found, allowed[page].is_readable())
            };
            expect(&what, &found.count, &usize::from(!is_allowed))?;
            if !is_allowed {
                // The handler has opened the page.
                expect(
                    "the address of a fault",
                    &found.last,
                    &(memory.address() + offset),
                )?;
                allowed[page] = Protection::ReadWrite;
                faults += 1;
            }
        }
    }
    memory.protect(0, PAGES, Protection::Read)?;
    for (page, expected) in content.iter().enumerate() {
        expect(
            &format!("page {page} in the end"),
            &memory.read(page * PAGE),
            expected,
        )?;
    }
    Ok(format!("{ROUNDS} changes of protection, {faults} faults"))
}

/// Unmaps and maps again parts of a mapping, and has the kernel look for what must not be there.
pub fn holes() -> Outcome {
    const PAGES: usize = 256;
    const ROUNDS: usize = 2000;
    const TRIES: usize = 4;
    let memory = Mapping::anonymous(PAGES)?;
    let path = scratch("sink");
    let sink = fs::File::create(&path)?;
    let mut random = Random::new(4);
    // The content of each page that there is.
    let mut content = [Some(0); PAGES];
    for round in 0..ROUNDS {
        let first = random.below(PAGES);
        let pages = 1 + random.below((PAGES - first).min(32));
        let range = first..first + pages;
        if random.below(2) == 0 {
            memory.punch(first, pages)?;
            content[range].fill(None);
        } else {
            memory.refill(first, pages)?;
            content[range].fill(Some(0));
        }
        for _ in 0..TRIES {
            let page = random.below(PAGES);
            let is_there = memory.is_there(page * PAGE, &sink);
            expect(
                &format!("round {round}: page {page} is there, which"),
                &is_there,
                &content[page].is_some(),
            )?;
            if let Some(expected) = &mut content[page] {
                expect(
                    &format!("round {round}: page {page}"),
                    &memory.read(page * PAGE),
                    expected,
                )?;
                *expected = random.number();
                memory.write(page * PAGE, *expected);
            }
        }
        // The sink is as long as there were reads; it must not fill the memory.
        sink.set_len(0)?;
    }
    fs::remove_file(path)?;
    Ok(format!("{ROUNDS} changes of a mapping"))
}

/// Writes functions, calls them, and writes others in their place.
pub fn code() -> Outcome {
    const PAGES: usize = 16;
    const ROUNDS: usize = 1000;
    let memory = Mapping::anonymous(PAGES)?;
    let mut random = Random::new(5);
    let mut values = [None; PAGES];
    for round in 0..ROUNDS {
        let page = random.below(PAGES);
        let value = random.number() as u32;
        memory.write_function(page, value)?;
        values[page] = Some(value);
        for (page, value) in values.iter().enumerate() {
            if let Some(value) = value {
                expect(
                    &format!("round {round}: the function on page {page}"),
                    &memory.call(page),
                    value,
                )?;
            }
        }
    }
    Ok(format!("{ROUNDS} functions written"))
}
