//! Who receives what: commands of local APICs, messages of the I/O APIC, and hypercalls.

use umbra_vcpu::registers::CodeWidth;

use super::processors::*;
use super::*;
use crate::machine::{Hypercall, ProcessorNumber, ProcessorSet};

#[test]
fn shorthands_and_physical_destinations() {
    for (sender, destination, low, receivers) in [
        (0, 0, MYSELF, set([0])),
        (2, 0, MYSELF, set([2])),
        (0, 0, ALL, set([0, 1, 2, 3])),
        (3, 0, ALL, set([0, 1, 2, 3])),
        (0, 0, OTHERS, set([1, 2, 3])),
        (1, 0, OTHERS, set([0, 2, 3])),
        (0, 0, 0, set([0])),
        (0, 3, 0, set([3])),
        (3, 1, 0, set([1])),
        (1, 1, 0, set([1])),
        (1, 0xff, 0, set([0, 1, 2, 3])),
        (0, 4, 0, set([])),
        (0, 0x0f, 0, set([])),
        (0, 0xfe, 0, set([])),
    ] {
        let mut machine = running(4);
        machine.serve(number(sender));
        command(&mut machine, destination, low | ASSERT | 0x55);
        let mut others = receivers;
        others.remove(number(sender));
        assert_eq!(
            machine.take_kicks(),
            others,
            "{sender} {destination:#x} {low:#x}"
        );
        assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
        assert_eq!(
            take(&mut machine, 0x55),
            receivers,
            "{sender} {destination:#x} {low:#x}"
        );
    }
}

#[test]
fn logical_destinations_of_the_flat_model() {
    for (destination, receivers) in [
        (0x01, set([0])),
        (0x06, set([1, 2])),
        (0x0f, set([0, 1, 2, 3])),
        (0xf8, set([3])),
        (0xf0, set([])),
        (0x00, set([])),
        (0xff, set([0, 1, 2, 3])),
    ] {
        let mut machine = running(4);
        for processor in ProcessorNumber::first(4) {
            machine.serve(processor);
            write_apic(&mut machine, 0xd0, 1 << (24 + processor.get()));
        }
        command(&mut machine, destination, LOGICAL | ASSERT | 0x66);
        assert_eq!(take(&mut machine, 0x66), receivers, "{destination:#x}");
    }
}

#[test]
fn logical_destinations_of_the_cluster_model() {
    for (destination, receivers) in [
        (0x11, set([0])),
        (0x13, set([0, 1])),
        (0x23, set([2, 3])),
        (0x32, set([])),
        (0xf1, set([0, 2])),
        (0xff, set([0, 1, 2, 3])),
        (0x10, set([])),
    ] {
        let mut machine = running(4);
        for (processor, address) in ProcessorNumber::first(4).zip([0x11, 0x12, 0x21, 0x22]) {
            machine.serve(processor);
            write_apic(&mut machine, 0xe0, 0x0fff_ffff);
            write_apic(&mut machine, 0xd0, address << 24);
        }
        command(&mut machine, destination, LOGICAL | ASSERT | 0x77);
        assert_eq!(take(&mut machine, 0x77), receivers, "{destination:#x}");
    }
}

#[test]
fn destinations_in_x2apic_mode() {
    for (destination, low, receivers) in [
        (3_u64, 0, set([3])),
        (4, 0, set([])),
        (0xff, 0, set([])),
        (0x1_0001, 0, set([])),
        (0xffff_ffff, 0, set([0, 1, 2, 3])),
        (0b1010, LOGICAL, set([1, 3])),
        (0xffff, LOGICAL, set([0, 1, 2, 3])),
        (0x1_000f, LOGICAL, set([])),
        (0xffff_ffff, LOGICAL, set([0, 1, 2, 3])),
        (0, OTHERS, set([0, 1, 3])),
        (0xffff_ffff, MYSELF, set([2])),
    ] {
        let mut machine = running(4);
        for processor in ProcessorNumber::first(4) {
            machine.serve(processor);
            enter_x2apic_mode(&mut machine);
        }
        machine.serve(number(2));
        let value = destination << 32 | u64::from(low | ASSERT | 0x88);
        assert!(machine.write_msr(0x830, value, &context(0)).is_ok());
        assert_eq!(
            take(&mut machine, 0x88),
            receivers,
            "{destination:#x} {low:#x}"
        );
    }
}

#[test]
fn one_processor_of_several_takes_the_lowest_priority() {
    let mut machine = running(4);
    for (processor, priority) in ProcessorNumber::first(4).zip([5, 3, 2, 4]) {
        machine.serve(processor);
        write_apic(&mut machine, 0xd0, 1 << (24 + processor.get()));
        machine.set_task_priority(priority);
    }
    for (destination, low, receiver) in [
        (0, ALL, 2),
        (0xff, 0, 2),
        (0xff, LOGICAL, 2),
        (0b1011, LOGICAL, 1),
        (0b1001, LOGICAL, 3),
        (0, 0, 0),
    ] {
        command(
            &mut machine,
            destination,
            low | ASSERT | LOWEST_PRIORITY | 0x91,
        );
        assert_eq!(
            take(&mut machine, 0x91),
            set([receiver]),
            "{destination:#x} {low:#x}"
        );
    }
    machine.serve(number(2));
    write_apic(&mut machine, 0xf0, 0xff);
    command(&mut machine, 0, ALL | ASSERT | LOWEST_PRIORITY | 0x91);
    assert_eq!(
        take(&mut machine, 0x91),
        set([1]),
        "who is disabled takes none"
    );
}

#[test]
fn what_is_no_interrupt_between_processors_is_dropped() {
    const SMI: u32 = 2 << 8;
    const RESERVED: u32 = 3 << 8;
    const EXTERNAL: u32 = 7 << 8;
    for mode in [SMI, RESERVED, EXTERNAL] {
        let mut machine = running(3);
        command(&mut machine, 0xff, ASSERT | mode | 0x99);
        assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY, "{mode:#x}");
        for processor in ProcessorNumber::first(3) {
            machine.serve(processor);
            assert_eq!(machine.attention(), Attention::NotWanted, "{mode:#x}");
            assert_eq!(read_apic(&mut machine, 0x240), 0, "{mode:#x}");
        }
    }
}

#[test]
fn an_illegal_vector_is_the_senders_error_and_goes_nowhere() {
    for low in [MYSELF, ALL, OTHERS, ALL | LOWEST_PRIORITY] {
        let mut machine = running(2);
        command(&mut machine, 0, low | ASSERT | 0x0f);
        assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
        for (processor, error) in [(0, 1 << 5), (1, 0)] {
            machine.serve(number(processor));
            write_apic(&mut machine, 0x280, 0);
            assert_eq!(read_apic(&mut machine, 0x280), error, "{low:#x}");
            assert_eq!(machine.attention(), Attention::NotWanted);
        }
    }
}

#[test]
fn nmis_reach_their_receivers_whatever_these_mask() {
    let mut machine = running(3);
    for processor in ProcessorNumber::first(3) {
        machine.serve(processor);
        write_apic(&mut machine, 0xf0, 0xff);
        machine.set_task_priority(15);
    }
    command(&mut machine, 0, NMI | OTHERS);
    assert_eq!(machine.take_kicks(), set([0, 1]));
    command(&mut machine, 1, NMI);
    assert_eq!(machine.take_kicks(), set([1]), "again, though one waits");
    for (processor, taken) in [(0, true), (1, true), (2, false)] {
        machine.serve(number(processor));
        assert!(!machine.pending_interrupt());
        assert_eq!(machine.take_nmi(), taken);
        assert!(!machine.take_nmi());
        assert_eq!(machine.attention(), Attention::NotWanted);
    }
}

#[test]
fn a_kick_comes_once_until_the_processor_has_looked() {
    let mut machine = running(2);
    for vector in [0x41, 0x42, 0x43] {
        command(&mut machine, 1, ASSERT | vector);
    }
    assert_eq!(machine.take_kicks(), set([1]));
    command(&mut machine, 1, ASSERT | 0x44);
    assert_eq!(
        machine.take_kicks(),
        ProcessorSet::EMPTY,
        "it knows already"
    );
    machine.serve(number(1));
    for vector in [0x44, 0x43, 0x42, 0x41] {
        assert_eq!(machine.acknowledge_interrupt(), Some(vector));
        write_apic(&mut machine, 0xb0, 0);
    }
    command(&mut machine, 0, MYSELF | ASSERT | 0x45);
    assert_eq!(
        machine.take_kicks(),
        ProcessorSet::EMPTY,
        "nobody kicks himself"
    );
    assert_eq!(machine.acknowledge_interrupt(), Some(0x45));
}

#[test]
fn a_masked_interrupt_kicks_nobody() {
    let mut machine = running(2);
    machine.serve(number(1));
    machine.set_task_priority(8);
    machine.serve(ProcessorNumber::BOOT);
    command(&mut machine, 1, ASSERT | 0x7f);
    assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
    command(&mut machine, 1, ASSERT | 0x90);
    assert_eq!(machine.take_kicks(), set([1]));
}

fn send_to_each(machine: &mut Machine, arguments: [u64; 4], mode: CodeWidth) -> i64 {
    machine.hypercall(&Hypercall {
        number: 10,
        arguments,
        mode,
    })
}

#[test]
fn one_hypercall_interrupts_several_processors() {
    const WIDE: CodeWidth = CodeWidth::Bits64;
    const NARROW: CodeWidth = CodeWidth::Bits32;
    let ones = u64::MAX;
    for (sender, [low, high, first], width, receivers) in [
        (0, [0b1110, 0, 0], WIDE, set([1, 2, 3])),
        (2, [0b11, 0, 1], WIDE, set([1, 2])),
        (0, [ones, ones, 0], WIDE, set([0, 1, 2, 3])),
        (0, [ones, ones, 3], WIDE, set([3])),
        (0, [ones, ones, 4], WIDE, set([])),
        (0, [ones, ones, 0xffff_ffff], WIDE, set([])),
        (0, [0, ones, 0], WIDE, set([])),
        (0, [0, ones, 0], NARROW, set([])),
        (1, [ones << 32 | 0b100, 0, ones << 32], NARROW, set([2])),
        (0, [0, 0, 0], WIDE, set([])),
    ] {
        let mut machine = running(4);
        machine.serve(number(sender));
        let count = receivers.iter().fold(0, |count, _| count + 1);
        let sent = send_to_each(&mut machine, [low, high, first, 0xfb], width);
        assert_eq!(sent, count, "{low:#x} {high:#x} {first:#x}");
        let mut others = receivers;
        others.remove(number(sender));
        assert_eq!(machine.take_kicks(), others);
        assert_eq!(take(&mut machine, 0xfb), receivers);
    }
}

#[test]
fn hypercalls_send_vectors_and_nmis_only() {
    let mut machine = running(2);
    assert_eq!(
        send_to_each(&mut machine, [2, 0, 0, 0x400], CodeWidth::Bits64),
        1
    );
    assert_eq!(machine.take_kicks(), set([1]));
    for command in [
        0x140,
        0x200,
        0x300,
        0x500,
        0x600,
        0x700,
        0x840,
        0x4_0040,
        1 << 32 | 0x40,
    ] {
        let sent = send_to_each(&mut machine, [2, 0, 0, command], CodeWidth::Bits64);
        assert_eq!(sent, -22, "{command:#x}");
    }
    assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
    for number in [0, 5, 9, 11, 1 << 32 | 0xa, u64::MAX] {
        let call = Hypercall {
            number,
            arguments: [1, 0, 0, 0x40],
            mode: CodeWidth::Bits64,
        };
        assert_eq!(machine.hypercall(&call), -1000, "{number:#x}");
    }
}

#[test]
fn an_illegal_vector_of_a_hypercall_is_the_receivers_error() {
    let mut machine = running(2);
    let nobody = [u64::from(u32::MAX), 0, u64::from(u32::MAX), 0];
    assert_eq!(send_to_each(&mut machine, nobody, CodeWidth::Bits64), 0);
    assert_eq!(
        send_to_each(&mut machine, [2, 0, 0, 5], CodeWidth::Bits64),
        1
    );
    assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
    for (processor, error) in [(0, 0), (1, 1 << 6)] {
        machine.serve(number(processor));
        write_apic(&mut machine, 0x280, 0);
        assert_eq!(read_apic(&mut machine, 0x280), error);
    }
}

/// COM1's line is active as a level.
fn raise_serial_line(machine: &mut Machine) {
    out(machine, 0x3fc, 0x0b);
    out(machine, 0x3f9, 0x02);
}

fn lower_serial_line(machine: &mut Machine) {
    out(machine, 0x3f9, 0x00);
}

#[test]
fn the_io_apic_reaches_every_processor() {
    for (destination, low, receivers) in [
        (0_u32, 0x0034, set([0])),
        (2, 0x0034, set([2])),
        (0xff, 0x0034, set([0, 1, 2])),
        (7, 0x0034, set([])),
        (0b110, 0x0834, set([1, 2])),
        (0b110, 0x0934, set([1])),
        (0xff, 0x0934, set([0])),
    ] {
        let mut machine = running(3);
        for processor in ProcessorNumber::first(3) {
            machine.serve(processor);
            write_apic(&mut machine, 0xd0, 1 << (24 + processor.get()));
        }
        write_io_apic(&mut machine, 0x11 + 8, destination << 24);
        write_io_apic(&mut machine, 0x10 + 8, low);
        raise_serial_line(&mut machine);
        assert_eq!(
            take(&mut machine, 0x34),
            receivers,
            "{destination:#x} {low:#x}"
        );
    }
}

#[test]
fn the_io_apic_sends_nmis() {
    let mut machine = running(2);
    write_io_apic(&mut machine, 0x11 + 8, 1 << 24);
    write_io_apic(&mut machine, 0x10 + 8, 0x0400);
    raise_serial_line(&mut machine);
    assert_eq!(machine.take_kicks(), set([1]));
    machine.serve(number(1));
    assert!(machine.take_nmi());
}

#[test]
fn whoever_took_a_level_ends_it_at_the_io_apic() {
    let mut machine = running(3);
    write_io_apic(&mut machine, 0x11 + 8, 2 << 24);
    write_io_apic(&mut machine, 0x10 + 8, 0x8041);
    raise_serial_line(&mut machine);
    assert_eq!(machine.take_kicks(), set([2]));
    machine.serve(number(1));
    write_apic(&mut machine, 0xb0, 0);
    assert_eq!(
        read_io_apic(&mut machine, 0x10 + 8),
        0xc041,
        "it served nothing"
    );
    machine.serve(number(2));
    assert_eq!(machine.acknowledge_interrupt(), Some(0x41));
    write_apic(&mut machine, 0xb0, 0);
    assert_eq!(
        machine.acknowledge_interrupt(),
        Some(0x41),
        "the line is still active"
    );
    machine.serve(ProcessorNumber::BOOT);
    lower_serial_line(&mut machine);
    machine.serve(number(2));
    write_apic(&mut machine, 0xb0, 0);
    assert_eq!(read_io_apic(&mut machine, 0x10 + 8), 0x8041);
    assert!(!machine.pending_interrupt());
}

#[test]
fn the_pair_of_i8259_interrupts_whom_it_is_wired_to() {
    let mut machine = running(2);
    initialize_pic(&mut machine);
    raise_serial_line(&mut machine);
    machine.serve(number(1));
    assert!(!machine.pending_interrupt(), "LINT0 is masked after INIT");
    write_apic(&mut machine, 0x350, 0x700);
    assert!(machine.pending_interrupt());
    machine.serve(ProcessorNumber::BOOT);
    assert_eq!(machine.acknowledge_interrupt(), Some(0x24));
    machine.serve(number(1));
    assert_eq!(machine.acknowledge_interrupt(), None, "the other has it");

    let mut machine = running(2);
    initialize_pic(&mut machine);
    write_apic(&mut machine, 0x350, 0x1_0000);
    write_io_apic(&mut machine, 0x11, 1 << 24);
    write_io_apic(&mut machine, 0x10, 0x0700);
    raise_serial_line(&mut machine);
    assert!(!machine.pending_interrupt());
    assert_eq!(machine.take_kicks(), set([1]), "through the I/O APIC");
    machine.serve(number(1));
    assert_eq!(machine.acknowledge_interrupt(), Some(0x24));
}

#[test]
fn the_interval_timer_waits_until_its_receiver_has_taken_its_tick() {
    let mut machine = running(2);
    write_io_apic(&mut machine, 0x11 + 4, 1 << 24);
    write_io_apic(&mut machine, 0x10 + 4, 0x30);
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        out(&mut machine, port, value);
    }
    machine.advance(GuestTime::from_nanoseconds(3_100_000));
    for _ in 0..3 {
        assert_eq!(take(&mut machine, 0x30), set([1]), "1 kHz");
    }
    assert_eq!(take(&mut machine, 0x30), ProcessorSet::EMPTY);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever commands come from whom, only existing processors are kicked, each for a reason, and
    /// an interrupt that waits is one that can be taken.
    #[test]
    fn any_commands_are_answered(
        commands in proptest::collection::vec(
            (0..4_u8, any::<u8>(), any::<u32>(), 0..0x40_u32, any::<u64>()), 0..100),
        processors in 1..=4_u8,
        startup: bool,
    ) {
        let mut machine = if startup { running(processors) } else { cold(processors) };
        for (sender, destination, low, register, value) in commands {
            let sender = number(sender % processors);
            machine.serve(sender);
            let apic_base = 0x1b;
            match machine.msrs().apic_base().mode() {
                _ if register == apic_base => {
                    let base = value & 0xc00 | 0xfee0_0000;
                    let _ = machine.write_msr(apic_base, base, &context(0));
                }
                ApicMode::X2Apic => {
                    let _ = machine.write_msr(0x800 + register, value, &context(0));
                    let _ = machine.write_msr(0x830, value, &context(0));
                }
                ApicMode::XApic => {
                    write_apic(&mut machine, 16 * u64::from(register), low);
                    command(&mut machine, destination, low);
                }
                ApicMode::Disabled => {}
            }
            for kicked in machine.take_kicks().iter() {
                prop_assert!(kicked.get() < processors && kicked != sender);
                machine.serve(kicked);
                prop_assert_eq!(machine.attention(), Attention::Wanted);
            }
            for processor in ProcessorNumber::first(processors) {
                machine.serve(processor);
                let waits = machine.waits_for_startup();
                prop_assert!(!(waits && machine.pending_interrupt()));
                if value & 1 != 0 {
                    let pending = machine.pending_interrupt();
                    prop_assert_eq!(machine.acknowledge_interrupt().is_some(), pending);
                    machine.take_nmi();
                    while machine.take_startup().is_some() {}
                    machine.take_shutdown();
                    prop_assert!(machine.pending_interrupt() || machine.attention() == Attention::NotWanted);
                }
            }
        }
    }
}
