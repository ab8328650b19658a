//! Post-mortems of small machines whose memory is a few bytes.
#![allow(missing_docs, reason = "a test")]

use std::collections::BTreeMap;

use umbra_inspect::{Death, ExitLog, GuestView, PostMortem, ProcessorState};
use umbra_mmu::{GuestEnd, Inspection, Level, Permission, Permissions, ShadowEnd};
use umbra_vcpu::address::{Gpa, Gva};
use umbra_vcpu::exit::{Exit, ExitRecord};
use umbra_vcpu::registers::{
    ControlRegisters, DescriptorTable, Gpr, Registers, Segment, SegmentRegister,
};

const CODE: u64 = 0x1000;
const STACK: u64 = 0x2ff0;
const GDT: u64 = 0x3000;
const IDT: u64 = 0x4000;
const HANDLER: u64 = 0x5000;

/// Memory that is mapped page by page to itself.
struct Memory {
    bytes: BTreeMap<u64, u8>,
    pages: BTreeMap<u64, GuestEnd>,
}

fn permits(write: Permission, user: Permission, execute: Permission) -> Permissions {
    Permissions {
        write,
        user,
        execute,
    }
}

use Permission::{Denied, Granted};

impl Memory {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes.extend((at..).zip(bytes.iter().copied()));
    }

    fn map(&mut self, page: u64, permits: Permissions) {
        let end = GuestEnd::Page {
            gpa: Gpa::new(page),
            level: Level::One,
            permits,
        };
        self.pages.insert(page, end);
    }
}

impl GuestView for Memory {
    fn inspect(&self, gva: Gva) -> Inspection {
        let page = gva.page_base().as_u64();
        Inspection {
            gva,
            guest: [None; 5],
            guest_end: *self
                .pages
                .get(&page)
                .unwrap_or(&GuestEnd::NotPresent(Level::Two)),
            shadow: [None; 5],
            shadow_end: ShadowEnd::NoRoot,
        }
    }

    fn read(&self, gva: Gva, buffer: &mut [u8]) -> usize {
        for (done, byte) in buffer.iter_mut().enumerate() {
            let at = gva.as_u64() + done as u64;
            if !self.pages.contains_key(&(at & !0xfff)) {
                return done;
            }
            *byte = self.bytes.get(&at).copied().unwrap_or(0);
        }
        buffer.len()
    }
}

/// Something done to a machine.
type Change = fn(&mut Machine);

struct Machine {
    state: ProcessorState,
    memory: Memory,
}

/// A machine in 64-bit mode at privilege level 0 whose exceptions all have a handler.
fn machine(code: &[u8]) -> Machine {
    let mut memory = Memory {
        bytes: BTreeMap::new(),
        pages: BTreeMap::new(),
    };
    for page in [CODE, STACK & !0xfff, GDT, IDT, HANDLER] {
        memory.map(page, permits(Granted, Denied, Granted));
    }
    memory.put(CODE, code);
    memory.put(GDT + 8, &0x00af_9b00_0000_ffff_u64.to_le_bytes());
    for vector in 0..32 {
        let gate = HANDLER & 0xffff | 8 << 16 | 0x8e00 << 32;
        memory.put(IDT + 16 * vector, &gate.to_le_bytes());
    }
    let mut segments = [Segment::flat_data32(0x10); 8];
    segments[SegmentRegister::Cs as usize] = Segment::flat_code64(8);
    let mut registers = Registers::default();
    registers.rip = CODE;
    registers.rflags = 2;
    registers.set(Gpr::Rsp, STACK);
    let state = ProcessorState {
        registers,
        control: ControlRegisters {
            cr0: 0x8001_0011,
            cr2: Gva::new(0x7777),
            cr3: 0,
            cr4: 0x20,
            cr8: 0,
            efer: 0xd00,
            xcr0: 1,
        },
        segments,
        gdtr: DescriptorTable {
            base: Gva::new(GDT),
            limit: 15,
        },
        idtr: DescriptorTable {
            base: Gva::new(IDT),
            limit: 0x1ff,
        },
    };
    Machine { state, memory }
}

impl Machine {
    fn page(&self, death: Death) -> String {
        let mut exits = ExitLog::default();
        for leaf in 0..40 {
            *exits.next_record() = ExitRecord {
                rip: leaf,
                exit: Exit::Cpuid,
            };
        }
        *exits.next_record() = ExitRecord {
            rip: CODE,
            exit: Exit::TripleFault,
        };
        PostMortem {
            guest: "machine",
            message: "it died",
            death,
            state: &self.state,
            view: &self.memory,
            exits: &exits,
        }
        .to_string()
    }

    /// What the page says after "why:", for a triple fault.
    fn why(&self) -> String {
        let page = self.page(Death::TripleFault);
        page.split_once("why:\n").unwrap().1.to_owned()
    }

    fn set_level_3(&mut self) {
        self.state.segments[SegmentRegister::Ss as usize] = Segment {
            attributes: umbra_vcpu::registers::SegmentAttributes::from_bits_retain(0xc0f3),
            ..Segment::flat_data32(0x10)
        };
    }
}

/// MOV [RBX], EAX.
const STORE: &[u8] = &[0x89, 0x03];
const UD2: &[u8] = &[0x0f, 0x0b];
const PUSH_RAX: &[u8] = &[0x50];
const HLT: &[u8] = &[0xf4];

#[test]
fn the_page_has_exits_registers_walks_and_instruction() {
    let page = machine(UD2).page(Death::TripleFault);
    let (exits, rest) = page.split_once("registers:").unwrap();
    assert_eq!(
        exits.lines().filter(|line| line.ends_with("CPUID")).count(),
        31
    );
    assert!(
        exits.ends_with("0000000000001000 triple fault\n"),
        "{exits}"
    );
    assert!(!exits.contains("0000000000000008 CPUID"), "the oldest went");
    for text in [
        "rsp 0000000000002ff0",
        "cr0 80010011 (PE ET WP PG)",
        "efer d00 (LME LMA NXE)",
        "64-bit code at privilege level 0",
        "  cr2 0x0000000000007777\n    guest: the level-2 entry is not present\n",
        "instruction: 0f 0b  ud2",
    ] {
        assert!(rest.contains(text), "{text} is not in\n{page}");
    }
}

#[test]
fn what_can_be_delivered_is_said_to_be() {
    let why = machine(UD2).why();
    assert!(
        why.contains("#UD can be delivered to its handler at 0x5000"),
        "{why}"
    );
    assert!(
        why.contains("#DF can be delivered to its handler at 0x5000"),
        "{why}"
    );
}

#[test]
fn each_obstacle_of_a_delivery_is_named() {
    let ist = 8 << 16 | 0x8e01 << 32 | HANDLER;
    let obstacles: [(&str, Change); 10] = [
        ("is beyond the GDT's limit 0x7", |machine| {
            machine.state.gdtr.limit = 7;
        }),
        (
            "ends at byte 0x6f of the IDT, whose limit is 0x6e",
            |machine| {
                machine.state.idtr.limit = 0x6e;
            },
        ),
        ("its gate at 0x4060 is not present", |machine| {
            machine.memory.put(IDT + 0x65, &[0]);
        }),
        ("has the type 0x2", |machine| {
            machine.memory.put(IDT + 0x65, &[0x82]);
        }),
        ("its gate has a null code segment", |machine| {
            machine.memory.put(IDT + 0x62, &[0, 0]);
        }),
        (
            "its gate cannot be read: 0x4060 is read, but the level-2 entry",
            |machine| {
                machine.memory.pages.remove(&IDT);
            },
        ),
        ("is not a 64-bit one", |machine| {
            machine.memory.put(GDT + 14, &[0xcf]);
        }),
        ("8 in the GDT is not present", |machine| {
            machine.memory.put(GDT + 13, &[0x1b]);
        }),
        (
            "its handler faults: 0x5000 is fetched from, but its page is not executable",
            |machine| {
                machine
                    .memory
                    .map(HANDLER, permits(Granted, Denied, Denied));
            },
        ),
        (
            "its stack faults: 0x2fe8 is written, but its page is read-only",
            |machine| {
                machine
                    .memory
                    .map(STACK & !0xfff, permits(Denied, Denied, Granted));
            },
        ),
    ];
    for (text, break_it) in obstacles {
        let mut machine = machine(UD2);
        break_it(&mut machine);
        let why = machine.why();
        let delivery = why
            .lines()
            .find(|line| line.contains("#UD cannot be delivered"));
        assert!(
            delivery.is_some_and(|line| line.contains(text)),
            "{text} is not in\n{why}"
        );
    }
    let mut machine = machine(UD2);
    machine.memory.put(IDT + 0x60, &u64::to_le_bytes(ist));
    machine.state.segments[SegmentRegister::Tr as usize] = Segment::busy_tss(0x18, 0x20);
    let why = machine.why();
    assert!(
        why.contains("its stack is at byte 0x24 of the TSS, whose limit is 0x20"),
        "{why}"
    );
}

#[test]
fn each_rule_that_makes_an_instruction_fault_is_named() {
    let rules: [(&[u8], &str, Change); 9] = [
        (
            HLT,
            "#GP: the instruction needs privilege level 0",
            |machine| {
                machine.set_level_3();
                machine.memory.map(CODE, permits(Granted, Granted, Granted));
            },
        ),
        (
            HLT,
            "#PF: 0x1000 is fetched from, but its page is the supervisor's",
            |machine| {
                machine.set_level_3();
            },
        ),
        (
            HLT,
            "its page is the user's and CR4.SMEP is set",
            |machine| {
                machine.state.control.cr4 |= 1 << 20;
                machine.memory.map(CODE, permits(Granted, Granted, Granted));
            },
        ),
        (
            STORE,
            "#PF: 0x5000 is written, but its page is read-only",
            |machine| {
                machine.state.registers.set(Gpr::Rbx, HANDLER);
                machine
                    .memory
                    .map(HANDLER, permits(Denied, Denied, Granted));
            },
        ),
        (
            STORE,
            "the user's, CR4.SMAP is set and RFLAGS.AC is clear",
            |machine| {
                machine.state.control.cr4 |= 1 << 21;
                machine.state.registers.set(Gpr::Rbx, HANDLER);
                machine
                    .memory
                    .map(HANDLER, permits(Granted, Granted, Granted));
            },
        ),
        (
            STORE,
            "#GP: 0x5000 is written, and is not canonical",
            |machine| {
                machine.state.registers.set(Gpr::Rbx, HANDLER);
                machine.memory.pages.insert(HANDLER, GuestEnd::NotCanonical);
            },
        ),
        (
            STORE,
            "#PF: 0x5000 is written, but the level-3 entry has reserved bits set",
            |machine| {
                machine.state.registers.set(Gpr::Rbx, HANDLER);
                machine
                    .memory
                    .pages
                    .insert(HANDLER, GuestEnd::Malformed(Level::Three));
            },
        ),
        (PUSH_RAX, "#PF: 0x1ff8 is written, but", |machine| {
            machine.state.registers.set(Gpr::Rsp, 0x2000);
            machine.memory.map(CODE, permits(Denied, Denied, Granted));
        }),
        (&[0x06], "#UD: the bytes at RIP are no instruction", |_| {}),
    ];
    for (code, text, arrange) in rules {
        let mut machine = machine(code);
        arrange(&mut machine);
        let why = machine.why();
        assert!(why.contains(text), "{text} is not in\n{why}");
    }
}

#[test]
fn an_instruction_that_need_not_fault_is_not_accused() {
    let mut machine = machine(STORE);
    machine.state.registers.set(Gpr::Rbx, HANDLER);
    let why = machine.why();
    assert!(
        why.contains("by itself the instruction at rip need not fault"),
        "{why}"
    );
    let page = machine.page(Death::Stopped);
    assert!(page.ends_with("nothing in the guest's tables makes the instruction at rip fault\n"));
    let mut writable = machine;
    writable
        .memory
        .map(HANDLER, permits(Denied, Denied, Granted));
    writable.state.control.cr0 &= !(1 << 16);
    assert!(!writable.why().contains("read-only"), "CR0.WP is clear");
}

#[test]
fn a_halt_says_what_would_end_it() {
    let page = machine(HLT).page(Death::Halted);
    assert!(page.contains("HLT with RFLAGS.IF 0: only an NMI"), "{page}");
}
