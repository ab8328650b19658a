//! What callers see of each service.

use umbra_firmware::{Firmware, MemoryRange, Platform};
use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::registers::{Gpr, Registers, Segment, SegmentAttributes, SegmentRegister};

const CARRY: u16 = 1;
const ZERO: u16 = 1 << 6;
/// The flags that the caller's INT pushed are here.
const FLAGS: usize = 0x7000 + 4;

struct Machine {
    registers: Registers,
    memory: Vec<u8>,
    printed: String,
    ports: Vec<(u16, u8)>,
}

impl Machine {
    fn new() -> Self {
        let mut memory = vec![0; 0x2_0000];
        for piece in firmware().memory() {
            let start = piece.at.as_u64() as usize;
            if start == 0 {
                memory[..piece.bytes.len()].copy_from_slice(&piece.bytes);
            }
        }
        let mut registers = Registers::default();
        registers.set(Gpr::Rsp, 0x7000);
        Self {
            registers,
            memory,
            printed: String::new(),
            ports: Vec::new(),
        }
    }

    fn call(&mut self, vector: u8, ax: u64) -> u16 {
        self.registers.set(Gpr::Rax, ax);
        self.memory[FLAGS..FLAGS + 2].copy_from_slice(&0x0202_u16.to_le_bytes());
        firmware().call(self, vector);
        u16::from_le_bytes([self.memory[FLAGS], self.memory[FLAGS + 1]])
    }

    fn get(&self, register: Gpr) -> u64 {
        self.registers.get(register)
    }
}

impl Platform for Machine {
    fn registers(&self) -> &Registers {
        &self.registers
    }

    fn registers_mut(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        // ES differs from the others.
        let selector = if register == SegmentRegister::Es {
            0x1000
        } else {
            0
        };
        Segment {
            selector,
            base: Gva::new(u64::from(selector) << 4),
            limit: 0xffff,
            attributes: SegmentAttributes::from_bits_retain(0x93),
        }
    }

    fn read(&self, at: Gpa, bytes: &mut [u8]) {
        let start = at.as_u64() as usize;
        bytes.copy_from_slice(&self.memory[start..start + bytes.len()]);
    }

    fn write(&mut self, at: Gpa, bytes: &[u8]) {
        let start = at.as_u64() as usize;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn print(&mut self, byte: u8) {
        self.printed.push(byte.into());
    }

    fn write_port(&mut self, port: u16, value: u8) {
        self.ports.push((port, value));
    }
}

static DISK: [u8; 4 * 512] = {
    let mut disk = [0; 4 * 512];
    let mut index = 0;
    while index < disk.len() {
        disk[index] = (index / 512) as u8 + 1;
        index += 1;
    }
    disk
};

fn firmware() -> Firmware {
    let range = |start, length, kind| MemoryRange {
        start,
        length,
        kind,
    };
    let map = vec![
        range(0, 0x9_fc00, 1),
        range(0x9_fc00, 0x6_0400, 2),
        range(0x10_0000, 63 << 20, 1),
    ];
    Firmware::new(map, Some(&DISK))
}

#[test]
fn memory_is_listed_entry_by_entry() {
    let mut machine = Machine::new();
    let mut entries = Vec::new();
    machine.registers.set(Gpr::Rdi, 0x100);
    loop {
        machine.registers.set(Gpr::Rcx, 24);
        machine.registers.set(Gpr::Rdx, 0x534d_4150);
        assert_eq!(machine.call(0x15, 0xe820) & CARRY, 0);
        assert_eq!(machine.get(Gpr::Rax), 0x534d_4150);
        assert_eq!(machine.get(Gpr::Rcx), 20);
        let at = 0x1_0100;
        let start = u64::from_le_bytes(machine.memory[at..at + 8].try_into().unwrap());
        entries.push((start, machine.memory[at + 16]));
        if machine.get(Gpr::Rbx) == 0 {
            break;
        }
    }
    assert_eq!(entries, [(0, 1), (0x9_fc00, 2), (0x10_0000, 1)]);
    machine.registers.set(Gpr::Rdx, 0);
    assert_ne!(
        machine.call(0x15, 0xe820) & CARRY,
        0,
        "without the signature"
    );
}

#[test]
fn older_ways_to_ask_for_memory_agree() {
    let mut machine = Machine::new();
    assert_eq!(machine.call(0x15, 0xe801) & CARRY, 0);
    assert_eq!(machine.get(Gpr::Rax), 15 << 10);
    assert_eq!(machine.get(Gpr::Rbx), 48 * 16);
    assert_eq!(machine.call(0x15, 0x8800) & CARRY, 0);
    assert_eq!(machine.get(Gpr::Rax), 63 << 10);
    machine.call(0x12, 0);
    assert_eq!(machine.get(Gpr::Rax), 639);
    assert_ne!(machine.call(0x15, 0xc000) & CARRY, 0);
    assert_eq!(machine.get(Gpr::Rax) >> 8, 0x86);
}

#[test]
fn sectors_are_read_both_ways() {
    let mut machine = Machine::new();
    machine.registers.set(Gpr::Rdx, 0x80);
    machine.registers.set(Gpr::Rcx, 2);
    machine.registers.set(Gpr::Rbx, 0x200);
    assert_eq!(machine.call(0x13, 0x0202) & CARRY, 0);
    assert_eq!(machine.get(Gpr::Rax), 2);
    assert_eq!(machine.memory[0x1_0200], 2);
    assert_eq!(machine.memory[0x1_0200 + 1023], 3);
    assert_eq!(machine.memory[0x1_0200 + 1024], 0);
    // Past the end, another disk, a write.
    machine.registers.set(Gpr::Rcx, 4);
    assert_ne!(machine.call(0x13, 0x0202) & CARRY, 0);
    assert_eq!(machine.get(Gpr::Rax) >> 8, 4);
    assert_ne!(machine.call(0x13, 0x0301) & CARRY, 0);
    machine.registers.set(Gpr::Rdx, 0);
    assert_ne!(machine.call(0x13, 0x0201) & CARRY, 0);

    machine.registers.set(Gpr::Rdx, 0x80);
    machine.registers.set(Gpr::Rsi, 0x600);
    let packet = [16, 0, 1, 0, 0, 4, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
    machine.memory[0x600..0x610].copy_from_slice(&packet);
    assert_eq!(machine.call(0x13, 0x4200) & CARRY, 0);
    assert_eq!(machine.memory[0x400..0x600], [4; 512]);
    machine.memory[0x600 + 15] = 0x80;
    assert_ne!(machine.call(0x13, 0x4200) & CARRY, 0, "far past the end");
    machine.registers.set(Gpr::Rbx, 0x55aa);
    assert_eq!(machine.call(0x13, 0x4100) & CARRY, 0);
    assert_eq!(machine.get(Gpr::Rbx), 0xaa55);
}

#[test]
fn ticks_count_up_to_midnight() {
    let mut machine = Machine::new();
    machine.registers.set(Gpr::Rcx, 0x18);
    machine.registers.set(Gpr::Rdx, 0xaf);
    machine.call(0x1a, 0x0100);
    machine.call(0x08, 0);
    assert_eq!(machine.ports, [(0x20, 0x20)]);
    machine.call(0x1a, 0);
    assert_eq!(machine.get(Gpr::Rcx), 0);
    assert_eq!(machine.get(Gpr::Rdx), 0);
    assert_eq!(machine.get(Gpr::Rax), 1, "midnight has passed");
    machine.call(0x08, 0);
    machine.call(0x1a, 0);
    assert_eq!((machine.get(Gpr::Rdx), machine.get(Gpr::Rax)), (1, 0));
}

#[test]
fn the_slaves_interrupts_end_at_both_controllers() {
    let mut machine = Machine::new();
    machine.call(0x73, 0);
    assert_eq!(machine.ports, [(0xa0, 0x20), (0x20, 0x20)]);
}

#[test]
fn text_goes_to_the_console() {
    let mut machine = Machine::new();
    for byte in b"Hi" {
        machine.call(0x10, 0x0e00 | u64::from(*byte));
    }
    machine.memory[0x1_0300..0x1_0305].copy_from_slice(b", you");
    machine.registers.set(Gpr::Rbp, 0x300);
    machine.registers.set(Gpr::Rcx, 5);
    machine.call(0x10, 0x1301);
    assert_eq!(machine.printed, "Hi, you");
    machine.call(0x10, 0x0f00);
    assert_eq!(machine.get(Gpr::Rax), 0x5003);
}

#[test]
fn no_key_is_pressed() {
    let mut machine = Machine::new();
    assert_ne!(machine.call(0x16, 0x0100) & ZERO, 0);
}
