use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::string::String;

use super::*;

extern crate std;

/// The block as kernels walk it.
struct Walk(Vec<u8>);

impl Walk {
    fn at(&self, address: u64) -> &[u8] {
        &self.0[(address - ADDRESS.as_u64()) as usize..]
    }

    fn number<const BYTES: usize>(table: &[u8], offset: usize) -> u64 {
        table[offset..offset + BYTES]
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// The table at `address`, whose signature, length and checksum must be right.
    fn table(&self, address: u64, signature: [u8; 4]) -> &[u8] {
        let bytes = self.at(address);
        assert_eq!(bytes[..4], signature);
        let table = &bytes[..Self::number::<4>(bytes, 4) as usize];
        assert_eq!(
            sum(table),
            0,
            "the checksum of {}",
            signature.escape_ascii()
        );
        table
    }

    fn tables(&self) -> [(&'static str, &[u8]); 5] {
        let root = self.at(ADDRESS.as_u64());
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root[..36])), (0, 0));
        let xsdt = self.table(Self::number::<8>(root, 24), *b"XSDT");
        let fadt = self.table(Self::number::<8>(xsdt, 36), *b"FACP");
        let madt = self.table(Self::number::<8>(xsdt, 44), *b"APIC");
        assert_eq!(xsdt.len(), 52);
        let dsdt = self.table(Self::number::<8>(fadt, 140), *b"DSDT");
        assert_eq!(Self::number::<4>(fadt, 40), Self::number::<8>(fadt, 140));
        let facs = self.at(Self::number::<4>(fadt, 36));
        assert_eq!((&facs[..4], Self::number::<4>(facs, 4)), (&b"FACS"[..], 64));
        [
            ("xsdt", xsdt),
            ("facp", fadt),
            ("apic", madt),
            ("dsdt", dsdt),
            ("facs", &facs[..64]),
        ]
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

#[test]
fn every_table_is_found_and_whole() {
    let walk = Walk(tables(1));
    let [_, (_, fadt), (_, madt), ..] = walk.tables();
    assert_eq!(fadt.len(), 276);
    assert_eq!(Walk::number::<4>(fadt, 56), 0x600, "PM1a events");
    assert_eq!(Walk::number::<4>(fadt, 64), 0x604, "PM1a control");
    assert_eq!(Walk::number::<4>(fadt, 76), 0x608, "the timer");
    assert_eq!(Walk::number::<8>(fadt, 120), 0xcf9, "the reset register");
    assert_eq!(
        madt[36..],
        [
            &[0, 0, 0xe0, 0xfe, 1, 0, 0, 0][..],
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
            &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
            &[2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0],
            &[4, 6, 0xff, 0, 0, 1],
        ]
        .concat()
    );
    assert!(walk.0.len() < 0x1_0000, "the BIOS area has room for them");
}

#[test]
fn every_processor_is_listed() {
    let walk = Walk(tables(3));
    let [.., (_, madt), _, _] = walk.tables();
    let processors = &madt[44..44 + 3 * 8];
    for (number, processor) in (0..).zip(processors.chunks(8)) {
        assert_eq!(processor, [0, 8, number, number, 1, 0, 0, 0]);
    }
    assert_eq!(madt[44 + 3 * 8], 1, "the I/O APIC follows");
}

/// Intel's own compiler takes the tables apart and finds the devices in them. Debian's package
/// acpica-tools has it; without it there is nobody to ask.
#[test]
fn the_reference_compiler_agrees() {
    let directory = std::env::temp_dir().join(std::format!("umbra-acpi-{}", std::process::id()));
    fs::create_dir_all(&directory).expect("a temporary directory");
    let walk = Walk(tables(4));
    let mut sources = String::new();
    for (name, table) in walk.tables() {
        let file = directory.join(name).with_extension("aml");
        fs::write(&file, table).expect("a temporary file");
        match disassemble(&file) {
            Some(source) => sources.push_str(&source),
            None => break,
        }
    }
    if sources.is_empty() {
        std::eprintln!("iasl is not installed: not asked");
    } else {
        for expected in [
            "\"ACPI0007\"",
            "Device (CPU0)",
            "Device (CPU3)",
            "\"PNP0501\"",
            "\"PNP0B00\"",
            "Name (_S5, Package (0x04)",
        ] {
            assert!(sources.contains(expected), "{expected} in {sources}");
        }
        let compiled = Command::new("iasl")
            .args(["-we", "-vi"])
            .arg(directory.join("dsdt.dsl"))
            .output()
            .expect("it was there a moment ago");
        let messages = String::from_utf8_lossy(&compiled.stdout);
        assert!(messages.contains("0 Errors, 0 Warnings"), "{messages}");
    }
    fs::remove_dir_all(directory).expect("the temporary directory is ours");
}

/// The source of a table, which must have no flaw; `None` if there is no compiler.
fn disassemble(file: &Path) -> Option<String> {
    let run = Command::new("iasl").arg("-d").arg(file).output().ok()?;
    let messages = [run.stdout, run.stderr].concat();
    let messages = String::from_utf8_lossy(&messages);
    assert!(run.status.success(), "{messages}");
    for complaint in ["Error", "Warning", "Invalid", "Incorrect"] {
        assert!(!messages.contains(complaint), "{messages}");
    }
    let source: PathBuf = file.with_extension("dsl");
    let source = fs::read_to_string(source).expect("the compiler has written it");
    for complaint in ["Invalid", "Incorrect", "Unknown"] {
        assert!(!source.contains(complaint), "{source}");
    }
    Some(source)
}
