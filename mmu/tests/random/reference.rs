//! The reference: a walker of the guest's tables that knows nothing of shadows. It asks for entries
//! through a closure that may give several values, and returns every translation that follows.

use umbra_mmu::AccessKind;
use x86_64::structures::idt::PageFaultErrorCode as Code;

use crate::common::Try;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Unpaged,
    Legacy,
    Pae,
    Long4,
    Long5,
}

#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub mode: Mode,
    pub pse: bool,
    pub nxe: bool,
    pub wp: bool,
    pub smep: bool,
    pub smap: bool,
    pub pke: bool,
    pub pkru: u32,
    pub width: u32,
    pub root: u64,
    pub pointers: [u64; 4],
}

/// An entry that the walk went through: table, byte offset, width in bytes, whether it is the leaf.
pub type Step = (u64, usize, usize, bool);

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Page { gfn: u64, path: Vec<Step> },
    Fault(Code),
}

impl Rules {
    pub fn code(&self, attempt: &Try, cause: Code) -> Code {
        let mut code = cause;
        if attempt.user {
            code |= Code::USER_MODE;
        }
        match attempt.kind {
            AccessKind::Write => code |= Code::CAUSED_BY_WRITE,
            AccessKind::Execute
                if self.smep && self.mode != Mode::Unpaged || self.nxe && self.wide() =>
            {
                code |= Code::INSTRUCTION_FETCH;
            }
            _ => {}
        }
        code
    }

    fn wide(&self) -> bool {
        !matches!(self.mode, Mode::Unpaged | Mode::Legacy)
    }

    fn long(&self) -> bool {
        matches!(self.mode, Mode::Long4 | Mode::Long5)
    }

    pub fn walk(
        &self,
        attempt: &Try,
        read: &mut dyn FnMut(u64, usize, usize) -> Vec<u64>,
    ) -> Vec<Outcome> {
        let gva = attempt.gva.as_u64();
        let mut found = Vec::new();
        match self.mode {
            Mode::Unpaged => {
                found.push(Outcome::Page {
                    gfn: gva >> 12 & 0xfffff,
                    path: Vec::new(),
                });
            }
            Mode::Legacy => {
                self.level(
                    attempt,
                    2,
                    self.root,
                    (true, true, false),
                    &[],
                    read,
                    &mut found,
                );
            }
            Mode::Pae => {
                let pointer = self.pointers[(gva >> 30 & 3) as usize];
                if pointer & 1 == 0 {
                    found.push(Outcome::Fault(self.code(attempt, Code::empty())));
                } else {
                    let table = (pointer >> 12) & 0xff_ffff_ffff;
                    self.level(
                        attempt,
                        2,
                        table,
                        (true, true, false),
                        &[],
                        read,
                        &mut found,
                    );
                }
            }
            Mode::Long4 => {
                self.level(
                    attempt,
                    4,
                    self.root,
                    (true, true, false),
                    &[],
                    read,
                    &mut found,
                );
            }
            Mode::Long5 => {
                self.level(
                    attempt,
                    5,
                    self.root,
                    (true, true, false),
                    &[],
                    read,
                    &mut found,
                );
            }
        }
        found
    }

    #[allow(clippy::too_many_arguments, reason = "the walk's state, by value")]
    fn level(
        &self,
        attempt: &Try,
        level: u32,
        table: u64,
        above: (bool, bool, bool),
        path: &[Step],
        read: &mut dyn FnMut(u64, usize, usize) -> Vec<u64>,
        found: &mut Vec<Outcome>,
    ) {
        let gva = attempt.gva.as_u64();
        let (index, width) = if self.wide() {
            (gva >> (12 + 9 * (level - 1)) & 511, 8)
        } else {
            (gva >> (12 + 10 * (level - 1)) & 1023, 4)
        };
        let offset = index as usize * width;
        for entry in read(table, offset, width) {
            if entry & 1 == 0 {
                found.push(Outcome::Fault(self.code(attempt, Code::empty())));
                continue;
            }
            let large = entry & 0x80 != 0;
            let leaf = match level {
                1 => true,
                2 => large && (self.wide() || self.pse),
                3 => large,
                _ => false,
            };
            if self.has_reserved(level, entry, leaf, large) {
                found.push(Outcome::Fault(
                    self.code(attempt, Code::PROTECTION_VIOLATION | Code::MALFORMED_TABLE),
                ));
                continue;
            }
            let rights = (
                above.0 && entry & 2 != 0,
                above.1 && entry & 4 != 0,
                above.2 || (self.wide() && self.nxe && entry >> 63 != 0),
            );
            let mut path = path.to_vec();
            path.push((table, offset, width, leaf));
            let frame = if self.wide() {
                entry >> 12 & 0xff_ffff_ffff
            } else {
                entry >> 12
            };
            if !leaf {
                self.level(attempt, level - 1, frame, rights, &path, read, found);
                continue;
            }
            let gfn = match (level, self.wide()) {
                (1, _) => frame,
                (2, false) => {
                    ((entry >> 22) << 10 | (entry >> 13 & 0xff) << 20) + (gva >> 12 & 0x3ff)
                }
                (_, _) => {
                    let mask = (1u64 << (9 * (level - 1))) - 1;
                    (frame & !mask) + (gva >> 12 & mask)
                }
            };
            found.push(match self.verdict(attempt, rights, entry) {
                Some(cause) => Outcome::Fault(self.code(attempt, cause)),
                None => Outcome::Page { gfn, path },
            });
        }
    }

    fn has_reserved(&self, level: u32, entry: u64, leaf: bool, large: bool) -> bool {
        if !self.wide() {
            if level == 2 && leaf {
                // Bit 21, and the address bits that the processor lacks.
                let address = entry >> 13 & 0xff;
                let lacking = if self.width >= 40 {
                    0
                } else {
                    0xff << (self.width - 32) & 0xff
                };
                return entry >> 21 & 1 != 0 || address & lacking != 0;
            }
            return false;
        }
        let address = entry & 0x000f_ffff_ffff_f000;
        if address >> self.width != 0 || (entry >> 63 != 0 && !self.nxe) {
            return true;
        }
        if self.mode == Mode::Pae && entry >> 52 & 0x7ff != 0 {
            return true;
        }
        match (level, leaf) {
            (2, true) => address & 0x1f_e000 != 0,
            (3, true) => address & 0x3fff_e000 != 0,
            (4 | 5, _) => large,
            _ => false,
        }
    }

    fn verdict(&self, attempt: &Try, (w, u, nx): (bool, bool, bool), entry: u64) -> Option<Code> {
        let mut bad = false;
        let mut key_bad = false;
        if attempt.user && !u {
            bad = true;
        }
        match attempt.kind {
            AccessKind::Execute => bad |= nx || (self.smep && u && !attempt.user),
            kind => {
                let write = kind == AccessKind::Write;
                if write && !w && (attempt.user || self.wp) {
                    bad = true;
                }
                if self.smap && u && !attempt.user && !attempt.ac {
                    bad = true;
                }
                if self.pke && self.long() && u {
                    let bits = self.pkru >> (2 * (entry >> 59 & 15)) & 3;
                    key_bad =
                        bits & 1 != 0 || (bits & 2 != 0 && write && (attempt.user || self.wp));
                }
            }
        }
        (bad || key_bad).then(|| {
            let mut cause = Code::PROTECTION_VIOLATION;
            cause.set(Code::PROTECTION_KEY, key_bad);
            cause
        })
    }
}
