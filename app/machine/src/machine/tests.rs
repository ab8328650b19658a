use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::processor::control;
use crate::processor::features::{Features, Vendor};
use crate::processor::msr::{ApicMode, MsrContext, MsrEffect};

extern crate std;

mod messages;
mod processors;

#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl ConsoleOutput for Console {
    fn write(&mut self, byte: u8) {
        self.0
            .lock()
            .expect("no test panics while it prints")
            .push(byte);
    }
}

const FREQUENCY: u64 = 1_000_000_000;

fn machine() -> Machine {
    machine_with(Console::default())
}

fn machine_with(console: Console) -> Machine {
    Machine::new(configuration(console))
}

fn configuration(console: Console) -> Configuration {
    Configuration {
        time_base: TimeBase::new(5000, FREQUENCY),
        processors: 1,
        features: GuestFeatures {
            features: Features::all(),
            physical_address_bits: 40,
            extended_state: 7,
            vendor: Vendor::Intel,
        },
        console: Box::new(console),
    }
}

fn context(host_counter: u64) -> MsrContext<'static> {
    MsrContext {
        control: &|| control::RESET,
        hardware: &|_| None,
        host_counter,
    }
}

fn out(machine: &mut Machine, port: u16, value: u8) {
    machine.write_port(port, IoWidth::Byte, value.into());
}

fn initialize_pic(machine: &mut Machine) {
    for (port, value) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 0x20),
        (0xa1, 0x28),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
    ] {
        out(machine, port, value);
    }
}

fn write_apic(machine: &mut Machine, offset: u64, value: u32) {
    let address = Gpa::new(0xfee0_0000 + offset);
    assert_eq!(machine.write_mmio(address, &value.to_le_bytes()), Ok(()));
}

fn read_apic(machine: &mut Machine, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    let address = Gpa::new(0xfee0_0000 + offset);
    assert_eq!(machine.read_mmio(address, &mut bytes), Ok(()));
    u32::from_le_bytes(bytes)
}

fn write_io_apic(machine: &mut Machine, register: u32, value: u32) {
    for (offset, value) in [(0, register), (0x10, value)] {
        let address = Gpa::new(0xfec0_0000 + offset);
        assert_eq!(machine.write_mmio(address, &value.to_le_bytes()), Ok(()));
    }
}

fn read_io_apic(machine: &mut Machine, register: u32) -> u32 {
    let mut bytes = [0; 4];
    let base = Gpa::new(0xfec0_0000);
    assert_eq!(machine.write_mmio(base, &register.to_le_bytes()), Ok(()));
    assert_eq!(
        machine.read_mmio(base.wrapping_add(0x10), &mut bytes),
        Ok(())
    );
    u32::from_le_bytes(bytes)
}

#[test]
fn prints_on_com1() {
    let console = Console::default();
    let mut machine = machine_with(console.clone());
    for byte in b"hello" {
        assert_ne!(machine.read_port(0x3fd, IoWidth::Byte) & 0x20, 0);
        out(&mut machine, 0x3f8, *byte);
    }
    assert_eq!(*console.0.lock().expect("not poisoned"), b"hello");
}

#[test]
fn the_exit_device_takes_any_width() {
    for (width, value, code) in [
        (IoWidth::Byte, 0xffff_ff00, 0),
        (IoWidth::Word, 0xffff_1234, 0x1234),
        (IoWidth::DoubleWord, 0x1234_5678, 0x1234_5678),
    ] {
        let mut machine = machine();
        assert_eq!(machine.take_shutdown(), None);
        machine.write_port(0xf4, width, value);
        assert_eq!(machine.take_shutdown(), Some(Shutdown::DebugExit(code)));
        assert_eq!(machine.take_shutdown(), None);
    }
}

#[test]
fn ways_to_reset() {
    for writes in [
        &[(0x64, 0xfe)][..],
        &[(0xcf9, 2), (0xcf9, 6)],
        &[(0x64, 0xd1), (0x60, 0)],
    ] {
        let mut machine = machine();
        for (port, value) in writes {
            assert_eq!(machine.take_shutdown(), None);
            out(&mut machine, *port, *value);
        }
        assert_eq!(machine.take_shutdown(), Some(Shutdown::Reset));
    }
}

#[test]
fn unknown_ports_read_ones_and_are_counted() {
    let mut machine = machine();
    assert_eq!(machine.read_port(0x2f8, IoWidth::Byte), 0xff);
    assert_eq!(machine.read_port(0x2f8, IoWidth::Word), 0xffff);
    assert_eq!(machine.read_port(0xffff, IoWidth::DoubleWord), 0xffff_ffff);
    machine.write_port(0x80, IoWidth::Byte, 1);
    assert!(
        machine
            .unknown_ports()
            .iter()
            .eq([(0x2f8, 2), (0xffff, 1), (0x80, 1)])
    );
    assert_eq!(machine.read_port(0x64, IoWidth::Byte), 0xff);
    assert_eq!(machine.unknown_ports().total(), 4);
}

#[test]
fn wide_accesses_are_cut_into_bytes() {
    let mut machine = machine();
    machine.write_port(0x3fa, IoWidth::Word, 0x0307);
    assert_eq!(machine.read_port(0x3fb, IoWidth::Byte), 0x03);
    assert_eq!(machine.read_port(0x3fa, IoWidth::Word), 0x03c1);
    assert_eq!(
        machine.read_port(0x3ff, IoWidth::Word),
        0xff00,
        "0x400 is nobody's"
    );
}

#[test]
fn pci_has_a_host_bridge_and_0xcf9_lies_within() {
    let mut machine = machine();
    out(&mut machine, 0xcfb, 1);
    machine.write_port(0xcf8, IoWidth::DoubleWord, 0x8000_0000);
    assert_eq!(machine.read_port(0xcf8, IoWidth::DoubleWord), 0x8000_0000);
    assert_eq!(machine.read_port(0xcfc, IoWidth::DoubleWord), 0x1237_8086);
    assert_eq!(machine.read_port(0xcfe, IoWidth::Word), 0x1237);
    machine.write_port(0xcf8, IoWidth::DoubleWord, 0x8000_0800);
    assert_eq!(machine.read_port(0xcfc, IoWidth::DoubleWord), 0xffff_ffff);
    assert_eq!(machine.read_port(0xcf9, IoWidth::Byte), 0);
    machine.write_port(0xcf8, IoWidth::DoubleWord, 0x0000_0600);
    assert_eq!(
        machine.take_shutdown(),
        None,
        "a double word is the address"
    );
    assert_eq!(machine.unknown_ports().total(), 0);
}

#[test]
fn fw_cfg_by_its_ports() {
    let mut machine = machine();
    machine.fw_cfg_mut().set_cpu_count(1);
    machine.write_port(0x510, IoWidth::Word, 0);
    let signature: Vec<u32> = (0..4)
        .map(|_| machine.read_port(0x511, IoWidth::Byte))
        .collect();
    assert_eq!(signature, b"QEMU".map(u32::from));
    machine.write_port(0x510, IoWidth::Word, 5);
    assert_eq!(machine.read_port(0x511, IoWidth::Byte), 1);
}

#[test]
fn the_timer_interrupts_through_the_virtual_wire() {
    let mut machine = machine();
    initialize_pic(&mut machine);
    assert!(!machine.pending_interrupt());
    out(&mut machine, 0x43, 0x34);
    out(&mut machine, 0x40, 0xa9);
    out(&mut machine, 0x40, 0x04);
    assert_eq!(
        machine.acknowledge_interrupt(),
        None,
        "programming makes no edge"
    );
    for _ in 0..3 {
        let deadline = machine.next_deadline().expect("the timer runs");
        machine.advance(GuestTime::from_nanoseconds(deadline.as_nanoseconds() - 1));
        assert!(!machine.pending_interrupt());
        machine.advance(deadline);
        assert!(machine.pending_interrupt());
        assert_eq!(machine.acknowledge_interrupt(), Some(0x20));
        assert!(!machine.pending_interrupt());
        out(&mut machine, 0x20, 0x20);
    }
    write_apic(&mut machine, 0xf0, 0x1ff);
    write_apic(&mut machine, 0x350, 0x1_0700);
    machine.advance(GuestTime::from_seconds(1));
    assert!(!machine.pending_interrupt(), "LINT0 is masked");
}

#[test]
fn a_masked_timer_needs_no_attention() {
    assert_eq!(machine().next_deadline(), None);
}

#[test]
fn a_timer_needs_attention_only_where_it_reaches_the_processor() {
    let mut machine = machine();
    initialize_pic(&mut machine);
    let tick = GuestTime::from_nanoseconds(54_925_402);
    assert_eq!(machine.next_deadline(), Some(tick), "through LINT0");
    write_apic(&mut machine, 0xf0, 0x1ff);
    write_apic(&mut machine, 0x350, 0x1_0000);
    assert_eq!(machine.next_deadline(), None, "LINT0 is masked");
    write_io_apic(&mut machine, 0x10 + 4, 0x30);
    assert_eq!(machine.next_deadline(), Some(tick), "through the I/O APIC");
}

#[test]
fn every_timer_is_due_when_it_says() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    for (input, vector) in [(2, 0x31), (8, 0x38), (9, 0x39)] {
        write_io_apic(&mut machine, 0x10 + 2 * input, vector);
    }
    // 100 Hz, 64 Hz, the power management timer's highest bit, and a period of 7 ms.
    for (port, value) in [
        (0x43, 0x34),
        (0x40, 0x9c),
        (0x40, 0x2e),
        (0x70, 0x0a),
        (0x71, 0x2a),
        (0x70, 0x0b),
        (0x71, 0x42),
        (0xb2, 0xf1),
        (0x602, 0x01),
    ] {
        out(&mut machine, port, value);
    }
    write_apic(&mut machine, 0x3e0, 0b1011);
    write_apic(&mut machine, 0x320, 0x2_0050);
    write_apic(&mut machine, 0x380, 7_000_000);
    let mut counts = [0_u32; 256];
    let end = GuestTime::from_seconds(10);
    loop {
        let deadline = machine.next_deadline().expect("timers run");
        if deadline > end {
            break;
        }
        machine.advance(GuestTime::from_nanoseconds(deadline.as_nanoseconds() - 1));
        assert!(!machine.pending_interrupt(), "{deadline:?}");
        machine.advance(deadline);
        assert!(machine.pending_interrupt(), "{deadline:?}");
        while let Some(vector) = machine.acknowledge_interrupt() {
            counts[usize::from(vector)] += 1;
            out(&mut machine, 0x70, 0x0c);
            machine.read_port(0x71, IoWidth::Byte);
            write_apic(&mut machine, 0xb0, 0);
        }
    }
    assert_eq!(
        [0x31, 0x38, 0x50].map(|vector| counts[vector]),
        [999, 640, 1428]
    );
}

#[test]
fn ticks_that_come_due_together_come_one_after_the_other() {
    for through_pic in [true, false] {
        let mut machine = machine();
        initialize_pic(&mut machine);
        write_apic(&mut machine, 0xf0, 0x1ff);
        if through_pic {
            write_apic(&mut machine, 0x350, 0x700);
        } else {
            write_apic(&mut machine, 0x350, 0x1_0000);
            write_io_apic(&mut machine, 0x10 + 4, 0x30);
        }
        // 250 Hz.
        for (port, value) in [(0x43, 0x34), (0x40, 0xa5), (0x40, 0x12)] {
            out(&mut machine, port, value);
        }
        machine.advance(GuestTime::from_nanoseconds(41_000_000));
        let mut ticks = 0;
        while machine.acknowledge_interrupt().is_some() {
            ticks += 1;
            out(&mut machine, 0x20, 0x20);
            write_apic(&mut machine, 0xb0, 0);
        }
        assert_eq!(ticks, 10, "{through_pic}");
    }
}

#[test]
fn power_management_through_the_bus() {
    let mut machine = machine();
    machine.advance(GuestTime::from_seconds(1));
    assert_eq!(machine.read_port(0x608, IoWidth::DoubleWord), 3_579_545);
    assert_eq!(machine.read_port(0x604, IoWidth::Word), 0);
    out(&mut machine, 0xb2, 0xf1);
    assert_eq!(machine.read_port(0x604, IoWidth::Word), 1);
    machine.write_port(0x604, IoWidth::Word, 0x2401);
    assert_eq!(machine.take_shutdown(), None, "not the type of S5");
    machine.write_port(0x604, IoWidth::Word, 0x2001);
    assert_eq!(machine.take_shutdown(), Some(Shutdown::PowerOff));
}

#[test]
fn serial_input_interrupts_on_irq_4() {
    let mut machine = machine();
    initialize_pic(&mut machine);
    out(&mut machine, 0x3fc, 0x0b);
    out(&mut machine, 0x3f9, 0x01);
    machine.receive(b'x');
    assert_eq!(machine.acknowledge_interrupt(), Some(0x24));
    assert_eq!(machine.read_port(0x3f8, IoWidth::Byte), u32::from(b'x'));
    out(&mut machine, 0x20, 0x20);
    assert!(!machine.pending_interrupt());
}

#[test]
fn edges_reach_the_local_apic_through_the_io_apic() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    assert_eq!(read_io_apic(&mut machine, 1), 0x0017_0011);
    write_io_apic(&mut machine, 0x11 + 8, 0);
    write_io_apic(&mut machine, 0x10 + 8, 0x0000_0034);
    out(&mut machine, 0x3fc, 0x0b);
    out(&mut machine, 0x3f9, 0x02);
    assert_eq!(machine.acknowledge_interrupt(), Some(0x34));
    assert_eq!(read_apic(&mut machine, 0x110), 1 << 20, "in service");
    assert_eq!(read_apic(&mut machine, 0xa0), 0x30, "processor priority");
    write_apic(&mut machine, 0xb0, 0);
    assert_eq!(read_apic(&mut machine, 0xa0), 0);
}

#[test]
fn level_triggered_inputs_repeat_after_the_end_of_interrupt() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    write_io_apic(&mut machine, 0x10 + 8, 0x0000_8041);
    out(&mut machine, 0x3fc, 0x0b);
    out(&mut machine, 0x3f9, 0x02);
    assert_eq!(machine.acknowledge_interrupt(), Some(0x41));
    assert_eq!(read_io_apic(&mut machine, 0x10 + 8), 0xc041, "remote IRR");
    assert!(!machine.pending_interrupt());
    write_apic(&mut machine, 0xb0, 0);
    assert_eq!(
        machine.acknowledge_interrupt(),
        Some(0x41),
        "the line is still active"
    );
    out(&mut machine, 0x3f9, 0x00);
    write_apic(&mut machine, 0xb0, 0);
    assert!(!machine.pending_interrupt());
    assert_eq!(read_io_apic(&mut machine, 0x10 + 8), 0x8041);
}

#[test]
fn the_apic_timer_fires_once_or_again_and_again() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    write_apic(&mut machine, 0x3e0, 0b1011);
    write_apic(&mut machine, 0x320, 0x50);
    write_apic(&mut machine, 0x380, 1000);
    machine.advance(GuestTime::from_nanoseconds(400));
    assert_eq!(read_apic(&mut machine, 0x390), 600);
    assert_eq!(
        machine.next_deadline(),
        Some(GuestTime::from_nanoseconds(1000))
    );
    machine.advance(GuestTime::from_nanoseconds(1000));
    assert_eq!(machine.acknowledge_interrupt(), Some(0x50));
    write_apic(&mut machine, 0xb0, 0);
    assert_eq!(
        (machine.next_deadline(), read_apic(&mut machine, 0x390)),
        (None, 0)
    );

    write_apic(&mut machine, 0x320, 0x2_0051);
    write_apic(&mut machine, 0x3e0, 0b0000);
    write_apic(&mut machine, 0x380, 1000);
    for period in 1..4 {
        let deadline = GuestTime::from_nanoseconds(1000 + 2000 * period);
        assert_eq!(machine.next_deadline(), Some(deadline));
        machine.advance(deadline);
        assert_eq!(machine.acknowledge_interrupt(), Some(0x51));
        write_apic(&mut machine, 0xb0, 0);
    }
    write_apic(&mut machine, 0x380, 0);
    assert_eq!(machine.next_deadline(), None);
}

#[test]
fn the_deadline_is_a_time_stamp_of_the_guest() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    let now = 5000;
    assert_eq!(
        machine.write_msr(0x6e0, 900, &context(now)),
        Ok(MsrEffect::None)
    );
    assert_eq!(
        machine.read_msr(0x6e0, &context(now)),
        Ok(0),
        "not in deadline mode"
    );
    write_apic(&mut machine, 0x320, 0x4_0052);
    assert_eq!(
        machine.write_msr(0x6e0, 900, &context(now)),
        Ok(MsrEffect::None)
    );
    assert_eq!(
        machine.next_deadline(),
        Some(GuestTime::from_nanoseconds(900))
    );
    assert_eq!(
        machine.write_msr(0x10, 500, &context(now)),
        Ok(MsrEffect::TscOffset(-4500))
    );
    assert_eq!(
        machine.next_deadline(),
        Some(GuestTime::from_nanoseconds(400))
    );
    machine.advance(GuestTime::from_nanoseconds(400));
    assert_eq!(machine.acknowledge_interrupt(), Some(0x52));
    assert_eq!(machine.read_msr(0x6e0, &context(now)), Ok(0), "disarmed");
    write_apic(&mut machine, 0xb0, 0);
    assert_eq!(
        machine.write_msr(0x6e0, 1, &context(now)),
        Ok(MsrEffect::None)
    );
    assert_eq!(
        machine.acknowledge_interrupt(),
        Some(0x52),
        "a past deadline fires at once"
    );
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    machine.set_task_priority(6);
    assert_eq!(read_apic(&mut machine, 0x80), 0x60);
    write_apic(&mut machine, 0x300, 0x0004_4061);
    assert!(!machine.pending_interrupt());
    write_apic(&mut machine, 0x80, 0x50);
    assert_eq!(machine.task_priority(), 5);
    assert_eq!(machine.acknowledge_interrupt(), Some(0x61));
}

#[test]
fn interprocessor_interrupts_find_the_only_processor() {
    for (high, low, arrives) in [
        (0x0000_0000, 0x0000_4070, true),
        (0x0100_0000, 0x0000_4070, false),
        (0xff00_0000, 0x0000_4070, true),
        (0x0200_0000, 0x0000_4870, true),
        (0x0400_0000, 0x0000_4870, false),
        (0x0000_0000, 0x0008_4070, true),
        (0x0000_0000, 0x000c_4070, false),
    ] {
        let mut machine = machine();
        write_apic(&mut machine, 0xf0, 0x1ff);
        write_apic(&mut machine, 0xd0, 0x0200_0000);
        write_apic(&mut machine, 0x310, high);
        write_apic(&mut machine, 0x300, low);
        assert_eq!(machine.pending_interrupt(), arrives, "{high:#x} {low:#x}");
    }
}

#[test]
fn nmi_and_init_commands() {
    let mut machine = machine();
    assert!(!machine.take_nmi());
    write_apic(&mut machine, 0x300, 0x0000_4400);
    assert!(machine.take_nmi());
    assert!(!machine.take_nmi());
    write_apic(&mut machine, 0x300, 0x0008_8500);
    assert_eq!(machine.take_shutdown(), None, "de-assertion");
    write_apic(&mut machine, 0x300, 0x0000_4500);
    assert_eq!(machine.take_shutdown(), Some(Shutdown::Reset));
}

#[test]
fn x2apic_mode_moves_the_registers_to_msrs() {
    let mut machine = machine();
    let context = context(0);
    assert!(machine.read_msr(0x802, &context).is_err());
    let enabled = machine.write_msr(0x1b, 0xfee0_0d00, &context);
    assert!(matches!(enabled, Ok(MsrEffect::ApicMode(_))));
    let mut bytes = [0; 4];
    assert_eq!(
        machine.read_mmio(Gpa::new(0xfee0_0030), &mut bytes),
        Err(NoDevice)
    );
    assert_eq!(bytes, [0xff; 4]);
    assert_eq!(machine.read_msr(0x802, &context), Ok(0));
    assert_eq!(machine.read_msr(0x803, &context), Ok(0x5_0014));
    assert_eq!(
        machine.read_msr(0x80d, &context),
        Ok(1),
        "logical destination"
    );
    for (index, value) in [
        (0x802, 0),
        (0x80b, 1),
        (0x80e, 0),
        (0x831, 0),
        (0x80f, 0x400),
    ] {
        assert!(
            machine.write_msr(index, value, &context).is_err(),
            "{index:#x}"
        );
    }
    assert_eq!(
        machine.write_msr(0x80f, 0x1ff, &context),
        Ok(MsrEffect::None)
    );
    assert_eq!(
        machine.write_msr(0x83f, 0x77, &context),
        Ok(MsrEffect::None)
    );
    assert_eq!(machine.acknowledge_interrupt(), Some(0x77));
    // Linux sets the read-only bits of LINT0, too.
    assert_eq!(
        machine.write_msr(0x835, 0x5700, &context),
        Ok(MsrEffect::None)
    );
    assert_eq!(machine.read_msr(0x835, &context), Ok(0x700));
    assert!(machine.write_msr(0x832, 0x4000, &context).is_err());
    assert_eq!(machine.write_msr(0x80b, 0, &context), Ok(MsrEffect::None));
    assert_eq!(
        machine.write_msr(0x830, 0xffff_ffff_0000_4078, &context),
        Ok(MsrEffect::None)
    );
    assert_eq!(machine.acknowledge_interrupt(), Some(0x78));
    assert_eq!(machine.read_msr(0x830, &context), Ok(0xffff_ffff_0000_4078));
}

#[test]
fn illegal_vectors_are_errors() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    write_apic(&mut machine, 0x370, 0xfe);
    write_apic(&mut machine, 0x300, 0x0004_4005);
    assert_eq!(machine.acknowledge_interrupt(), Some(0xfe));
    assert_eq!(read_apic(&mut machine, 0x280), 0, "not latched yet");
    write_apic(&mut machine, 0x280, 0);
    assert_eq!(read_apic(&mut machine, 0x280), 0x20);
    write_apic(&mut machine, 0x280, 0);
    assert_eq!(read_apic(&mut machine, 0x280), 0);
}

#[test]
fn software_disabling_masks_the_table() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    write_apic(&mut machine, 0x320, 0x40);
    write_apic(&mut machine, 0xf0, 0xff);
    assert_eq!(read_apic(&mut machine, 0x320), 0x1_0040);
    write_apic(&mut machine, 0x320, 0x40);
    assert_eq!(
        read_apic(&mut machine, 0x320),
        0x1_0040,
        "the mask cannot be cleared"
    );
}

#[test]
fn a_disabled_apic_leaves_the_pic_wired() {
    let mut machine = machine();
    initialize_pic(&mut machine);
    write_apic(&mut machine, 0x350, 0x1_0000);
    out(&mut machine, 0x3fc, 0x0b);
    out(&mut machine, 0x3f9, 0x02);
    assert!(!machine.pending_interrupt());
    assert!(machine.write_msr(0x1b, 0xfee0_0100, &context(0)).is_ok());
    assert_eq!(machine.acknowledge_interrupt(), Some(0x24));
}

#[test]
fn time_does_not_run_backwards() {
    let mut machine = machine();
    write_apic(&mut machine, 0xf0, 0x1ff);
    write_apic(&mut machine, 0x3e0, 0b1011);
    write_apic(&mut machine, 0x320, 0x1_0050);
    write_apic(&mut machine, 0x380, 1000);
    machine.advance(GuestTime::from_nanoseconds(500));
    machine.advance(GuestTime::from_nanoseconds(100));
    assert_eq!(read_apic(&mut machine, 0x390), 500);
}

#[derive(Clone, Debug)]
enum Action {
    ReadPort(u16, IoWidth),
    WritePort(u16, IoWidth, u32),
    ReadMemory(u64, usize),
    WriteMemory(u64, Vec<u8>),
    ReadMsr(u32),
    WriteMsr(u32, u64, u64),
    Advance(u64),
    Receive(u8),
    Acknowledge,
}

fn action() -> impl Strategy<Value = Action> {
    let port = prop_oneof![
        any::<u16>(),
        (0x20..0x24_u16),
        (0x40..0x44_u16),
        (0x60..0x72_u16),
        (0xa0..0xa2_u16),
        (0x3f8..0x400_u16),
        (0x4d0..0x4d2_u16),
        (0x510..0x512_u16),
        (0xcf8..0xd00_u16),
    ];
    let width = prop_oneof![
        Just(IoWidth::Byte),
        Just(IoWidth::Word),
        Just(IoWidth::DoubleWord)
    ];
    let address = prop_oneof![
        any::<u64>(),
        (0..0x1000_u64).prop_map(|offset| 0xfee0_0000 + offset),
        (0..0x40_u64).prop_map(|register| 0xfee0_0000 + 16 * register),
        Just(0xfec0_0000),
        Just(0xfec0_0010),
        (0..0x20_u64).prop_map(|offset| 0xfec0_0ff0 + offset),
    ];
    let number = prop_oneof![
        any::<u32>(),
        Just(0x10),
        Just(0x1b),
        Just(0x6e0),
        0x800..0x840_u32
    ];
    let value = prop_oneof![
        any::<u64>(),
        0..0x10_0000_u64,
        Just(0xfee0_0d00),
        Just(0xfee0_0100)
    ];
    let bytes = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..16),
        (0..0x10_0000_u32).prop_map(|value| value.to_le_bytes().to_vec()),
    ];
    prop_oneof![
        (port.clone(), width.clone()).prop_map(|(port, width)| Action::ReadPort(port, width)),
        (port, width, any::<u32>())
            .prop_map(|(port, width, value)| Action::WritePort(port, width, value)),
        (address.clone(), 0..16_usize)
            .prop_map(|(address, length)| Action::ReadMemory(address, length)),
        (address, bytes).prop_map(|(address, bytes)| Action::WriteMemory(address, bytes)),
        number.clone().prop_map(Action::ReadMsr),
        (number, value, any::<u64>())
            .prop_map(|(number, value, counter)| Action::WriteMsr(number, value, counter)),
        prop_oneof![any::<u64>(), 0..3_000_000_000_u64].prop_map(Action::Advance),
        any::<u8>().prop_map(Action::Receive),
        Just(Action::Acknowledge),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a guest does in whatever order, the machine answers and its promises hold.
    #[test]
    fn no_sequence_of_accesses_panics(actions in proptest::collection::vec(action(), 0..200)) {
        let mut machine = machine();
        for action in actions {
            match action {
                Action::ReadPort(port, width) => {
                    prop_assert_eq!(machine.read_port(port, width) & !width.mask(), 0);
                }
                Action::WritePort(port, width, value) => machine.write_port(port, width, value),
                Action::ReadMemory(address, length) => {
                    let _ = machine.read_mmio(Gpa::new(address), &mut [0; 16][..length]);
                }
                Action::WriteMemory(address, bytes) => {
                    let _ = machine.write_mmio(Gpa::new(address), &bytes);
                }
                Action::ReadMsr(number) => {
                    let _ = machine.read_msr(number, &context(1 << 40));
                }
                Action::WriteMsr(number, value, counter) => {
                    let _ = machine.write_msr(number, value, &context(counter));
                }
                Action::Advance(time) => machine.advance(GuestTime::from_nanoseconds(time)),
                Action::Receive(byte) => machine.receive(byte),
                Action::Acknowledge => {
                    let pending = machine.pending_interrupt();
                    prop_assert_eq!(machine.acknowledge_interrupt().is_some(), pending);
                }
            }
            let deadline = machine.next_deadline();
            let end = GuestTime::from_nanoseconds(u64::MAX);
            prop_assert!(deadline.is_none_or(|deadline| deadline >= machine.now || machine.now == end));
        }
    }
}

#[test]
fn the_test_device_is_there_only_when_added() {
    let mut machine = machine();
    let at = Gpa::new(0xff00_1ffe);
    let mut bytes = [0; 4];
    assert!(machine.write_mmio(at, &[1, 2]).is_err());
    assert_eq!(machine.read_port(0xe0, IoWidth::Byte), 0xff);
    machine.add_test_device();
    assert!(machine.write_mmio(at, &[1, 2]).is_ok());
    assert!(machine.read_mmio(at, &mut bytes).is_ok());
    assert_eq!(bytes, [1, 2, 0xff, 0xff], "an access ends with the page");
    machine.write_port(0xe0, IoWidth::DoubleWord, 0x1234_5678);
    assert_eq!(machine.read_port(0xe9, IoWidth::Word), 0x3456);
    machine.write_port(0xe4, IoWidth::DoubleWord, 0x5678);
    let page = machine.take_page_flush().map(Gpa::as_u64);
    assert_eq!((page, machine.take_page_flush()), (Some(0x5000), None));
}

#[test]
fn the_test_device_raises_lines() {
    let mut machine = machine();
    machine.add_test_device();
    initialize_pic(&mut machine);
    out(&mut machine, 0x21, 0);
    out(&mut machine, 0xa1, 0);
    for line in [1, 4, 5, 11] {
        out(&mut machine, 0x2000 + line, 1);
        assert!(machine.pending_interrupt(), "line {line}");
        let vector = machine.acknowledge_interrupt().expect("it waits");
        assert_eq!(u16::from(vector & 0xf), line & 0xf);
        out(&mut machine, 0x2000 + line, 0);
        out(&mut machine, 0xa0, 0x20);
        out(&mut machine, 0x20, 0x20);
    }
    assert!(!machine.pending_interrupt());
}
