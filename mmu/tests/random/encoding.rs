//! Scenarios as bytes, for a fuzzer to change and for a file to keep. Any bytes are a scenario.

use super::scenario::{Entry, MOST_SEEDS, MOST_VMS, Op, Place, Scenario, VmSetup};

/// Steps of the longest scenario that is read from bytes.
const MOST_STEPS: usize = 1000;

/// The scenario that these bytes say; past their end they say zero.
pub fn decode(bytes: &[u8]) -> Scenario {
    let mut bytes = Reader(bytes);
    let vms = 1 + usize::from(bytes.byte()) % MOST_VMS;
    let mut scenario = Scenario {
        total: bytes.byte(),
        vms: Vec::new(),
        seed: Vec::new(),
        steps: Vec::new(),
    };
    for _ in 0..vms {
        scenario.vms.push(VmSetup {
            modes: bytes.bytes(),
            flags: bytes.bytes(),
            fifo: bytes.byte() & 1 != 0,
        });
    }
    for _ in 0..usize::from(bytes.byte()) % (MOST_SEEDS + 1) {
        let (table, index) = (bytes.byte(), bytes.byte());
        scenario.seed.push((table, index, bytes.entry()));
    }
    while !bytes.0.is_empty() && scenario.steps.len() < MOST_STEPS {
        scenario.steps.push(bytes.step());
    }
    scenario
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    fn place(&mut self) -> Place {
        Place {
            indices: self.bytes(),
            offset: u16::from_le_bytes(self.bytes()),
        }
    }

    fn entry(&mut self) -> Entry {
        Entry {
            target: self.byte(),
            flags: u16::from_le_bytes(self.bytes()),
            key: self.byte(),
        }
    }

    /// One byte for what happens, one for who does it and how, the rest as the step needs it.
    fn step(&mut self) -> (u8, Op) {
        let (what, how) = (self.byte(), self.byte());
        let cpu = how & 1;
        let (user, ac) = (how & 2 != 0, how & 4 != 0);
        let op = match what % 32 {
            0..=7 => Op::Access {
                cpu,
                place: self.place(),
                kind: (how >> 3 & 3) % 3,
                user,
                ac,
            },
            8..=15 => Op::Write {
                cpu,
                place: self.place(),
                user,
                ac,
                width: how >> 3 & 3,
                entry: self.entry(),
            },
            16 | 17 => Op::HostWrite {
                table: self.byte(),
                index: self.byte(),
                entry: self.entry(),
            },
            18 | 19 => Op::Load {
                cpu,
                root: self.byte(),
            },
            20 => Op::Mode {
                cpu,
                mode: self.byte(),
                flags: self.byte(),
                root: self.byte(),
            },
            21 => Op::Pkru {
                cpu,
                value: u32::from_le_bytes(self.bytes()),
            },
            22 => Op::Invlpg {
                cpu,
                place: self.place(),
            },
            23 => Op::Flush { cpu },
            24 => Op::Limit(self.byte()),
            25 => Op::Pressure(self.byte()),
            26 => Op::Total(self.byte()),
            27 => Op::Unprotect(self.byte()),
            28 => Op::Slot(self.byte()),
            29 => Op::Accessed(self.byte()),
            30 => Op::Flags(self.byte()),
            _ if how & 8 == 0 => Op::ZapAll,
            _ => Op::Dirty,
        };
        (how >> 5, op)
    }
}

/// Bytes that [`decode`] reads as this scenario.
pub fn encode(scenario: &Scenario) -> Vec<u8> {
    let mut bytes = vec![(scenario.vms.len() - 1) as u8, scenario.total];
    for vm in &scenario.vms {
        bytes.extend(vm.modes.iter().chain(&vm.flags));
        bytes.push(u8::from(vm.fifo));
    }
    bytes.push(scenario.seed.len() as u8);
    for (table, index, entry) in &scenario.seed {
        bytes.extend([*table, *index]);
        put_entry(&mut bytes, *entry);
    }
    for (vm, op) in &scenario.steps {
        put_step(&mut bytes, *vm, *op);
    }
    bytes
}

fn put_entry(bytes: &mut Vec<u8>, entry: Entry) {
    bytes.push(entry.target);
    bytes.extend(entry.flags.to_le_bytes());
    bytes.push(entry.key);
}

fn put_place(bytes: &mut Vec<u8>, place: Place) {
    bytes.extend(place.indices);
    bytes.extend(place.offset.to_le_bytes());
}

fn put_step(bytes: &mut Vec<u8>, vm: u8, op: Op) {
    let who = |cpu: u8, user: bool, ac: bool| cpu | u8::from(user) << 1 | u8::from(ac) << 2;
    let mut head = |what: u8, how: u8| bytes.extend([what, how | vm << 5]);
    match op {
        Op::Access {
            cpu,
            place,
            kind,
            user,
            ac,
        } => {
            head(0, who(cpu, user, ac) | kind << 3);
            put_place(bytes, place);
        }
        Op::Write {
            cpu,
            place,
            user,
            ac,
            width,
            entry,
        } => {
            head(8, who(cpu, user, ac) | width << 3);
            put_place(bytes, place);
            put_entry(bytes, entry);
        }
        Op::HostWrite {
            table,
            index,
            entry,
        } => {
            head(16, 0);
            bytes.extend([table, index]);
            put_entry(bytes, entry);
        }
        Op::Load { cpu, root } => {
            head(18, cpu);
            bytes.push(root);
        }
        Op::Mode {
            cpu,
            mode,
            flags,
            root,
        } => {
            head(20, cpu);
            bytes.extend([mode, flags, root]);
        }
        Op::Pkru { cpu, value } => {
            head(21, cpu);
            bytes.extend(value.to_le_bytes());
        }
        Op::Invlpg { cpu, place } => {
            head(22, cpu);
            put_place(bytes, place);
        }
        Op::Flush { cpu } => head(23, cpu),
        Op::ZapAll => head(31, 0),
        Op::Dirty => head(31, 8),
        Op::Limit(byte) => put_byte(bytes, 24, vm, byte),
        Op::Pressure(byte) => put_byte(bytes, 25, vm, byte),
        Op::Total(byte) => put_byte(bytes, 26, vm, byte),
        Op::Unprotect(byte) => put_byte(bytes, 27, vm, byte),
        Op::Slot(byte) => put_byte(bytes, 28, vm, byte),
        Op::Accessed(byte) => put_byte(bytes, 29, vm, byte),
        Op::Flags(byte) => put_byte(bytes, 30, vm, byte),
    }
}

fn put_byte(bytes: &mut Vec<u8>, what: u8, vm: u8, byte: u8) {
    bytes.extend([what, vm << 5, byte]);
}
