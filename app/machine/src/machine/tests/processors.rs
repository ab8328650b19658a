//! Machines with several processors.

use super::*;
use crate::machine::{ProcessorNumber, ProcessorSet, Startup};

const INIT: u32 = 0x0000_4500;
const START_UP: u32 = 0x0000_4600;
const NMI: u32 = 0x0000_4400;
const LOGICAL: u32 = 1 << 11;
const LOWEST_PRIORITY: u32 = 1 << 8;
const ASSERT: u32 = 1 << 14;
const MYSELF: u32 = 1 << 18;
const ALL: u32 = 2 << 18;
const OTHERS: u32 = 3 << 18;

fn number(number: u8) -> ProcessorNumber {
    ProcessorNumber::new(number).expect("machines may have as many")
}

fn set<const N: usize>(numbers: [u8; N]) -> ProcessorSet {
    numbers.into_iter().map(number).collect()
}

/// A machine whose processors are as firmware leaves them.
fn cold(processors: u8) -> Machine {
    Machine::new(Configuration {
        processors,
        ..configuration(Console::default())
    })
}

/// A machine whose processors all run with their local APICs enabled.
fn running(processors: u8) -> Machine {
    let mut machine = cold(processors);
    command(&mut machine, 0, INIT | OTHERS);
    command(&mut machine, 0, START_UP | OTHERS | 8);
    for processor in ProcessorNumber::first(processors) {
        machine.serve(processor);
        while machine.take_startup().is_some() {}
        write_apic(&mut machine, 0xf0, 0x1ff);
    }
    machine.take_kicks();
    machine.serve(ProcessorNumber::BOOT);
    machine
}

/// Writes the interrupt command register of the served processor.
fn command(machine: &mut Machine, destination: u8, low: u32) {
    write_apic(machine, 0x310, u32::from(destination) << 24);
    write_apic(machine, 0x300, low);
}

fn enter_x2apic_mode(machine: &mut Machine) {
    let base = machine.msrs().apic_base().bits();
    let entered = machine.write_msr(0x1b, base | 1 << 10, &context(0));
    assert!(matches!(entered, Ok(MsrEffect::ApicMode(_))));
}

/// Takes `vector` at all processors that it waits for, ends it there, and says who they were.
fn take(machine: &mut Machine, vector: u8) -> ProcessorSet {
    let before = machine.served;
    let taken = ProcessorNumber::first(machine.processors())
        .filter(|&processor| {
            machine.serve(processor);
            assert_eq!(
                machine.pending_interrupt(),
                machine.attention() == Attention::Wanted
            );
            let taken = machine.acknowledge_interrupt();
            assert!(taken.is_none_or(|taken| taken == vector), "{taken:?}");
            if machine.msrs().apic_base().mode() == ApicMode::XApic {
                write_apic(machine, 0xb0, 0);
            } else {
                assert!(machine.write_msr(0x80b, 0, &context(0)).is_ok());
            }
            taken.is_some()
        })
        .collect();
    machine.serve(before);
    taken
}

#[test]
fn only_the_first_processor_runs_until_it_starts_the_others() {
    let mut machine = cold(4);
    assert_eq!(machine.processors(), 4);
    for processor in ProcessorNumber::first(4) {
        machine.serve(processor);
        let is_first = processor == ProcessorNumber::BOOT;
        assert_eq!(machine.waits_for_startup(), !is_first);
        assert_eq!(machine.take_startup(), None);
        assert_eq!(
            read_apic(&mut machine, 0x20),
            u32::from(processor.get()) << 24
        );
        let base = machine.read_msr(0x1b, &context(0));
        assert_eq!(base, Ok(if is_first { 0xfee0_0900 } else { 0xfee0_0800 }));
        assert_eq!(
            read_apic(&mut machine, 0x350),
            if is_first { 0x700 } else { 0x1_0000 }
        );
        assert_eq!(machine.identity().number, processor);
    }
}

#[test]
fn a_start_is_init_and_then_a_page() {
    let mut machine = cold(3);
    command(&mut machine, 2, START_UP | 0x12);
    assert_eq!(machine.take_kicks(), set([2]), "no INIT is needed at first");
    machine.serve(number(2));
    assert_eq!(machine.attention(), Attention::Wanted);
    assert!(
        machine.waits_for_startup(),
        "the run loop does not know yet"
    );
    assert_eq!(
        machine.take_startup(),
        Some(Startup::Begin { vector: 0x12 })
    );
    assert_eq!(
        (machine.take_startup(), machine.waits_for_startup()),
        (None, false)
    );
    assert_eq!(machine.attention(), Attention::NotWanted);

    machine.serve(ProcessorNumber::BOOT);
    command(&mut machine, 2, START_UP | 0x13);
    assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY, "it runs");
    command(&mut machine, 2, INIT);
    command(&mut machine, 2, START_UP | 0x14);
    command(&mut machine, 2, START_UP | 0x15);
    assert_eq!(machine.take_kicks(), set([2]));
    machine.serve(number(2));
    assert_eq!(machine.take_startup(), Some(Startup::Init));
    assert_eq!(
        machine.take_startup(),
        Some(Startup::Begin { vector: 0x14 })
    );
    assert_eq!(
        machine.take_startup(),
        None,
        "the second message is ignored"
    );
    machine.serve(number(1));
    assert_eq!(
        (machine.take_startup(), machine.waits_for_startup()),
        (None, true)
    );
    assert_eq!(machine.take_shutdown(), None);
}

#[test]
fn a_second_init_takes_the_start_back() {
    let mut machine = cold(2);
    command(&mut machine, 1, INIT);
    command(&mut machine, 1, START_UP | 1);
    command(&mut machine, 1, INIT);
    machine.serve(number(1));
    assert_eq!(machine.take_startup(), Some(Startup::Init));
    assert_eq!(machine.take_startup(), None);
    assert!(machine.waits_for_startup());
}

#[test]
fn init_resets_the_local_apic_but_not_its_place_and_mode() {
    let mut machine = running(2);
    machine.serve(number(1));
    enter_x2apic_mode(&mut machine);
    for (register, value) in [
        (0x808, 0x30),
        (0x832, 0x2_0040),
        (0x838, 1000),
        (0x83f, 0x50),
    ] {
        assert!(machine.write_msr(register, value, &context(0)).is_ok());
    }
    assert!(machine.next_deadline().is_some() && machine.pending_interrupt());
    machine.serve(ProcessorNumber::BOOT);
    command(&mut machine, 1, INIT);
    assert_eq!(machine.next_deadline(), None);
    machine.serve(number(1));
    assert!(!machine.pending_interrupt());
    assert_eq!(machine.acknowledge_interrupt(), None);
    assert_eq!(machine.task_priority(), 0);
    for (register, value) in [
        (0x802, 1),
        (0x80d, 2),
        (0x80f, 0xff),
        (0x832, 0x1_0000),
        (0x1b, 0xfee0_0c00),
    ] {
        assert_eq!(
            machine.read_msr(register, &context(0)),
            Ok(value),
            "{register:#x}"
        );
    }
}

#[test]
fn init_of_the_first_processor_is_a_reset() {
    let mut machine = running(2);
    machine.serve(number(1));
    command(&mut machine, 0, INIT);
    assert_eq!(machine.attention(), Attention::Wanted);
    assert_eq!(machine.take_shutdown(), Some(Shutdown::Reset));
}

#[test]
fn a_waiting_processor_takes_nothing_but_its_start() {
    let mut machine = cold(2);
    for low in [
        NMI | OTHERS,
        ASSERT | OTHERS | 0x40,
        ASSERT | ALL | 0x40 | LOWEST_PRIORITY,
    ] {
        command(&mut machine, 0, low);
    }
    assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
    machine.serve(number(1));
    assert_eq!(
        (machine.attention(), machine.take_nmi()),
        (Attention::NotWanted, false)
    );
    machine.serve(ProcessorNumber::BOOT);
    command(&mut machine, 1, START_UP);
    machine.serve(number(1));
    assert_eq!(machine.take_startup(), Some(Startup::Begin { vector: 0 }));
    assert_eq!(
        (machine.attention(), machine.take_nmi()),
        (Attention::NotWanted, false)
    );
}

#[test]
fn deasserting_init_does_nothing() {
    let mut machine = running(2);
    command(&mut machine, 0xff, 0x0008_8500);
    command(&mut machine, 1, 0x0000_8500);
    assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
    machine.serve(number(1));
    assert_eq!(
        (machine.take_startup(), machine.waits_for_startup()),
        (None, false)
    );
}

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
