//! Machines with several processors.

use super::*;
use crate::machine::{ProcessorNumber, ProcessorSet, Startup};

pub(super) const INIT: u32 = 0x0000_4500;
pub(super) const START_UP: u32 = 0x0000_4600;
pub(super) const NMI: u32 = 0x0000_4400;
pub(super) const LOGICAL: u32 = 1 << 11;
pub(super) const LOWEST_PRIORITY: u32 = 1 << 8;
pub(super) const ASSERT: u32 = 1 << 14;
pub(super) const MYSELF: u32 = 1 << 18;
pub(super) const ALL: u32 = 2 << 18;
pub(super) const OTHERS: u32 = 3 << 18;

pub(super) fn number(number: u8) -> ProcessorNumber {
    ProcessorNumber::new(number).expect("machines may have as many")
}

pub(super) fn set<const N: usize>(numbers: [u8; N]) -> ProcessorSet {
    numbers.into_iter().map(number).collect()
}

/// A machine whose processors are as firmware leaves them.
pub(super) fn cold(processors: u8) -> Machine {
    Machine::new(Configuration {
        processors,
        ..configuration(Console::default())
    })
}

/// A machine whose processors all run with their local APICs enabled.
pub(super) fn running(processors: u8) -> Machine {
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
pub(super) fn command(machine: &mut Machine, destination: u8, low: u32) {
    write_apic(machine, 0x310, u32::from(destination) << 24);
    write_apic(machine, 0x300, low);
}

pub(super) fn enter_x2apic_mode(machine: &mut Machine) {
    let base = machine.msrs().apic_base().bits();
    let entered = machine.write_msr(0x1b, base | 1 << 10, &context(0));
    assert!(matches!(entered, Ok(MsrEffect::ApicMode(_))));
}

/// Takes `vector` at all processors that it waits for, ends it there, and says who they were.
pub(super) fn take(machine: &mut Machine, vector: u8) -> ProcessorSet {
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
fn each_processor_has_its_own_timer() {
    let mut machine = running(3);
    for (processor, count) in [(1, 5000), (2, 3000)] {
        machine.serve(number(processor));
        write_apic(&mut machine, 0x3e0, 0b1011);
        write_apic(&mut machine, 0x320, 0x50);
        write_apic(&mut machine, 0x380, count);
    }
    machine.serve(ProcessorNumber::BOOT);
    assert_eq!(machine.take_timers(), Timers::Touched, "whoever set it");
    assert_eq!(machine.take_timers(), Timers::Untouched);
    for (time, processor) in [(3000, 2), (5000, 1)] {
        let deadline = GuestTime::from_nanoseconds(time);
        assert_eq!(machine.next_deadline(), Some(deadline));
        machine.advance(deadline);
        assert_eq!(machine.take_kicks(), set([processor]));
        assert_eq!(take(&mut machine, 0x50), set([processor]));
    }
    assert_eq!(machine.next_deadline(), None);
}

#[test]
fn time_stamp_counters_are_in_step_until_one_is_written() {
    let mut machine = running(2);
    let offsets = |machine: &mut Machine| {
        [0, 1].map(|processor| {
            machine.serve(number(processor));
            machine.msrs().tsc_offset()
        })
    };
    assert_eq!(offsets(&mut machine), [-5000, -5000]);
    machine.serve(number(1));
    assert!(machine.write_msr(0x3b, 70, &context(9000)).is_ok());
    assert_eq!(offsets(&mut machine), [-5000, -4930]);
    machine.serve(ProcessorNumber::BOOT);
    assert_eq!(machine.read_msr(0x3b, &context(9000)), Ok(0));
}

#[test]
fn registers_are_each_processors_own() {
    let mut machine = running(2);
    machine.serve(number(1));
    for (register, value) in [
        (0x277, 0x0606_0606_0606_0606),
        (0x2ff, 0xc00),
        (0x4b56_4d01, 0x5001),
    ] {
        assert!(machine.write_msr(register, value, &context(6000)).is_ok());
    }
    assert!(machine.take_memory_write().is_some());
    machine.serve(ProcessorNumber::BOOT);
    assert_eq!(machine.take_memory_write(), None);
    for (register, value) in [
        (0x277, 0x0007_0406_0007_0406),
        (0x2ff, 0xc06),
        (0x4b56_4d01, 0),
    ] {
        assert_eq!(machine.read_msr(register, &context(6000)), Ok(value));
    }
}

#[test]
fn a_disabled_local_apic_is_not_there() {
    let mut machine = running(2);
    machine.serve(number(1));
    assert!(machine.write_msr(0x1b, 0xfee0_0000, &context(0)).is_ok());
    machine.serve(ProcessorNumber::BOOT);
    for low in [ASSERT | 0x40, NMI, INIT, START_UP] {
        command(&mut machine, 1, low);
    }
    assert_eq!(machine.take_kicks(), ProcessorSet::EMPTY);
    machine.serve(number(1));
    assert_eq!(machine.attention(), Attention::NotWanted);
    assert!(!machine.waits_for_startup());
}

#[test]
fn a_page_that_one_processor_moves_moves_for_no_other() {
    let mut machine = running(2);
    machine.serve(number(1));
    assert!(machine.write_msr(0x1b, 0xfed0_0800, &context(0)).is_ok());
    let mut bytes = [0; 4];
    let (usual, moved) = (Gpa::new(0xfee0_0020), Gpa::new(0xfed0_0020));
    assert_eq!(machine.read_mmio(usual, &mut bytes), Err(NoDevice));
    assert_eq!(machine.read_mmio(moved, &mut bytes), Ok(()));
    assert_eq!(bytes, [0, 0, 0, 1]);
    machine.serve(ProcessorNumber::BOOT);
    assert_eq!(machine.read_mmio(moved, &mut bytes), Err(NoDevice));
    assert_eq!(machine.read_mmio(usual, &mut bytes), Ok(()));
}

#[test]
#[should_panic(expected = "number.index()")]
fn nobody_serves_a_processor_that_is_not_there() {
    cold(2).serve(number(2));
}
