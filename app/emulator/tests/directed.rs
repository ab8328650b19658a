//! What a native run cannot show: faults, segments, 16- and 32-bit code, control transfers, ports,
//! and how far a repeated instruction comes.

mod common;

use common::{Machine, Never};
use umbra_emulator::{BATCH, Progress, Stop};
use umbra_vcpu::address::Gva;
use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::registers::{CodeWidth, Gpr, Segment, SegmentAttributes, SegmentRegister};
use x86_64::structures::idt::PageFaultErrorCode;

use CodeWidth::{Bits16, Bits32, Bits64};

const BASE: u64 = 0x10_0000;
const TRAP_FLAG: u64 = 1 << 8;
const DIRECTION_FLAG: u64 = 1 << 10;

fn machine(width: CodeWidth) -> Machine {
    let mut machine = Machine::new(width, BASE, 0x2000);
    for (index, byte) in machine.memory.iter_mut().enumerate() {
        *byte = index as u8;
    }
    machine
}

fn done(result: Result<Progress, Stop<Never>>) {
    assert!(matches!(result, Ok(Progress::Done { .. })), "{result:?}");
}

fn page_fault(address: u64, error: PageFaultErrorCode) -> Result<Progress, Stop<Never>> {
    Err(Exception::page_fault(Gva::new(address), error).into())
}

const STACK_FAULT: Exception = Exception::with_error_code(vector::STACK_FAULT, 0);

fn raised(exception: Exception) -> Result<Progress, Stop<Never>> {
    Err(exception.into())
}

/// Checks that an instruction fails and leaves everything as it was.
fn fails(machine: &Machine, bytes: &[u8], expected: Result<Progress, Stop<Never>>) {
    let mut after = machine.clone();
    assert_eq!(after.step(bytes), expected, "{bytes:02x?}");
    assert_eq!(after.registers, machine.registers, "{bytes:02x?}");
    assert!(after.memory == machine.memory, "{bytes:02x?}");
    assert_eq!(after.accesses, (0, 0), "a device has noticed {bytes:02x?}");
}

#[test]
fn an_access_across_pages_happens_as_a_whole() {
    let write = PageFaultErrorCode::CAUSED_BY_WRITE;
    let protection = PageFaultErrorCode::PROTECTION_VIOLATION;
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rbx, BASE + 0xffd);
    done(machine.step(&[0xc7, 0x03, 1, 2, 3, 4]));
    assert_eq!(machine.bytes(BASE + 0xffd, 4), [1, 2, 3, 4]);
    assert_eq!(machine.accesses, (0, 2), "one for each page");
    machine.accesses = (0, 0);

    machine.read_only.push(BASE + 0x1000);
    let second = BASE + 0x1000;
    // MOV, ADD, XADD and CMPXCHG fault as writes though they read first.
    for bytes in [
        &[0xc7, 0x03, 1, 2, 3, 4][..],
        &[0x01, 0x03],
        &[0xf0, 0x0f, 0xc1, 0x03],
        &[0x0f, 0xb1, 0x03],
    ] {
        fails(&machine, bytes, page_fault(second, write | protection));
    }
    machine.registers.set(Gpr::Rbx, BASE + 0x1ffd);
    let end = BASE + 0x2000;
    fails(
        &machine,
        &[0x8b, 0x03],
        page_fault(end, PageFaultErrorCode::empty()),
    );
    machine.registers.set(Gpr::Rbx, BASE - 2);
    fails(
        &machine,
        &[0x8b, 0x03],
        page_fault(BASE - 2, PageFaultErrorCode::empty()),
    );
    fails(&machine, &[0xff, 0x03], page_fault(BASE - 2, write));
}

#[test]
fn addresses_are_canonical_in_64_bit_mode() {
    let mut machine = machine(Bits64);
    let hole = 0x0000_8000_0000_0000;
    machine.registers.set(Gpr::Rbx, hole - 2);
    machine.registers.set(Gpr::Rbp, hole);
    fails(
        &machine,
        &[0x8b, 0x03],
        raised(Exception::GENERAL_PROTECTION),
    );
    fails(&machine, &[0x8b, 0x45, 0], raised(STACK_FAULT));
    // A DS prefix means nothing, an FS prefix does.
    fails(&machine, &[0x3e, 0x8b, 0x45, 0], raised(STACK_FAULT));
    fails(
        &machine,
        &[0x64, 0x8b, 0x45, 0],
        raised(Exception::GENERAL_PROTECTION),
    );
    // With 5 levels it is an ordinary address.
    machine.cr4 = 1 << 12;
    let missing = page_fault(hole, PageFaultErrorCode::empty());
    fails(&machine, &[0x8b, 0x45, 0], missing);
}

#[test]
fn segments_have_bases_limits_and_types() {
    let mut machine = machine(Bits32);
    let data = |limit, attributes| Segment {
        selector: 0x18,
        base: Gva::new(BASE),
        limit,
        attributes: SegmentAttributes::from_bits_retain(attributes),
    };
    let set = |machine: &mut Machine, segment| {
        machine.segments[SegmentRegister::Es as usize] = segment;
        machine.segments[SegmentRegister::Ss as usize] = segment;
    };
    let load = [0x26, 0x8b, 0x03];
    let store = [0x26, 0x89, 0x03];
    let stack_load = [0x8b, 0x45, 0];
    for offset in [0x10, 0x0c, 0x0d] {
        set(&mut machine, data(0xf, 0xc093));
        machine.registers.set(Gpr::Rbx, offset);
        machine.registers.set(Gpr::Rbp, offset);
        if offset == 0x0c {
            done(machine.clone().step(&load));
            done(machine.clone().step(&stack_load));
        } else {
            fails(&machine, &load, raised(Exception::GENERAL_PROTECTION));
            fails(&machine, &stack_load, raised(STACK_FAULT));
        }
    }
    // Expand-down: above the limit.
    set(&mut machine, data(0xf, 0xc097));
    machine.registers.set(Gpr::Rbx, 0xf);
    fails(&machine, &load, raised(Exception::GENERAL_PROTECTION));
    machine.registers.set(Gpr::Rbx, 0x10);
    done(machine.clone().step(&load));
    // Read-only data, code that cannot be read, and a null selector.
    machine.registers.set(Gpr::Rbx, 0);
    set(&mut machine, data(u32::MAX, 0xc091));
    done(machine.clone().step(&load));
    fails(&machine, &store, raised(Exception::GENERAL_PROTECTION));
    set(&mut machine, data(u32::MAX, 0xc099));
    fails(&machine, &load, raised(Exception::GENERAL_PROTECTION));
    set(&mut machine, data(u32::MAX, 0xc09b));
    done(machine.clone().step(&load));
    fails(&machine, &store, raised(Exception::GENERAL_PROTECTION));
    set(&mut machine, Segment::UNUSABLE);
    fails(&machine, &load, raised(Exception::GENERAL_PROTECTION));
    fails(&machine, &stack_load, raised(STACK_FAULT));
    // Linear addresses wrap at 4 GiB.
    let mut high = data(u32::MAX, 0xc093);
    high.base = Gva::new(0xffff_f000);
    set(&mut machine, high);
    machine.registers.set(Gpr::Rbx, BASE + 0x1000 + 4);
    done(machine.step(&load));
    assert_eq!(machine.registers.get(Gpr::Rax), 0x0706_0504);
}

#[test]
fn sixteen_bit_code_has_its_own_addresses() {
    let mut machine = Machine::new(Bits16, 0, 0x2_0000);
    machine.memory[0x1234] = 0x5a;
    machine.registers.set(Gpr::Rbx, 0xffff_0000_ffff_1000);
    machine.registers.set(Gpr::Rsi, 0x1111_0234);
    // mov al, [bx + si]
    done(machine.step(&[0x8a, 0x00]));
    assert_eq!(machine.registers.get(Gpr::Rax), 0x5a);
    // mov [bx + si], ax
    machine.registers.set(Gpr::Rsi, 0xf234);
    machine.registers.set(Gpr::Rax, 0x1111_2233);
    done(machine.step(&[0x89, 0x00]));
    assert_eq!(
        machine.bytes(0x234, 3),
        [0x33, 0x22, 0],
        "the offset wraps at 64 KiB"
    );
    // add dword ptr [0x234], eax with an operand-size prefix
    done(machine.step(&[0x66, 0x01, 0x06, 0x34, 0x02]));
    assert_eq!(machine.bytes(0x234, 4), [0x66, 0x44, 0x11, 0x11]);
    // movsb moves SI and DI, and keeps what lies above
    machine.registers.set(Gpr::Rsi, 0x7777_ffff);
    machine.registers.set(Gpr::Rdi, 0x8888_0100);
    done(machine.step(&[0xa4]));
    assert_eq!(machine.registers.get(Gpr::Rsi), 0x7777_0000);
    assert_eq!(machine.registers.get(Gpr::Rdi), 0x8888_0101);
    // mov ax, [0xffff] reaches beyond a real-mode segment
    machine.segments = machine.segments.map(|segment| Segment {
        limit: 0xffff,
        ..segment
    });
    machine.accesses = (0, 0);
    fails(
        &machine,
        &[0xa1, 0xff, 0xff],
        raised(Exception::GENERAL_PROTECTION),
    );
}

#[test]
fn selectors_are_stored_as_words() {
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rbx, BASE);
    // mov [rbx], ds with REX.W
    done(machine.step(&[0x48, 0x8c, 0x1b]));
    assert_eq!(machine.bytes(BASE, 4), [0x10, 0, 2, 3]);
}

#[test]
fn pushes_and_pops_follow_the_stack_s_width() {
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rsp, BASE + 0x108);
    machine.registers.set(Gpr::Rcx, 0x1122_3344_5566_7788);
    done(machine.step(&[0x51]));
    assert_eq!(machine.registers.get(Gpr::Rsp), BASE + 0x100);
    assert_eq!(machine.bytes(BASE + 0x100, 2), [0x88, 0x77]);
    // pop [rsp + 8]: relative to the stack pointer after the pop.
    done(machine.step(&[0x8f, 0x44, 0x24, 0x08]));
    assert_eq!(machine.registers.get(Gpr::Rsp), BASE + 0x108);
    assert_eq!(machine.bytes(BASE + 0x110, 2), [0x88, 0x77]);
    // The same where the destination faults.
    machine.registers.set(Gpr::Rsp, BASE + 0x1ff0);
    machine.accesses = (0, 0);
    let fault = page_fault(BASE + 0x2000, PageFaultErrorCode::CAUSED_BY_WRITE);
    fails(&machine, &[0x8f, 0x44, 0x24, 0x08], fault);

    // A 16-bit stack in 32-bit code.
    let mut machine = Machine::new(Bits32, 0, 0x2_0000);
    machine.segments[SegmentRegister::Ss as usize]
        .attributes
        .remove(SegmentAttributes::DEFAULT_32);
    machine.registers.set(Gpr::Rsp, 0x0001_0000);
    done(machine.step(&[0x68, 1, 2, 3, 4]));
    assert_eq!(machine.registers.get(Gpr::Rsp), 0x0001_fffc);
    assert_eq!(machine.bytes(0xfffc, 4), [1, 2, 3, 4]);
}

#[test]
fn near_transfers_through_memory() {
    let mut machine = machine(Bits64);
    machine.registers.rip = 0x5000;
    machine.registers.set(Gpr::Rbx, BASE);
    machine.registers.set(Gpr::Rsp, BASE + 0x100);
    machine.memory[..8].copy_from_slice(&0x1234_5678_u64.to_le_bytes());
    // call [rbx]; ret
    done(machine.step(&[0xff, 0x13]));
    assert_eq!(machine.registers.rip, 0x1234_5678);
    assert_eq!(machine.bytes(BASE + 0xf8, 8), 0x5002_u64.to_le_bytes());
    done(machine.step(&[0xc3]));
    assert_eq!(machine.registers.rip, 0x5002);
    assert_eq!(machine.registers.get(Gpr::Rsp), BASE + 0x100);
    // jmp [rbx]; a direct call; ret 16
    done(machine.step(&[0xff, 0x23]));
    assert_eq!(machine.registers.rip, 0x1234_5678);
    done(machine.step(&[0xe8, 0, 1, 0, 0]));
    assert_eq!(machine.registers.rip, 0x1234_577d);
    done(machine.step(&[0xc2, 16, 0]));
    assert_eq!(machine.registers.rip, 0x1234_567d);
    assert_eq!(machine.registers.get(Gpr::Rsp), BASE + 0x110);
    // A target that is not canonical.
    machine.memory[7] = 0x80;
    let before = machine.clone();
    for bytes in [[0xff, 0x13], [0xff, 0x23]] {
        let mut machine = before.clone();
        assert_eq!(machine.step(&bytes), raised(Exception::GENERAL_PROTECTION));
        assert_eq!(machine.registers, before.registers);
        assert!(machine.memory == before.memory);
    }
}

#[test]
fn a_repeated_instruction_comes_as_far_as_it_can() {
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rdi, BASE);
    machine.registers.set(Gpr::Rcx, u64::from(BATCH) + 3);
    assert_eq!(machine.step(&[0xf3, 0xaa]), Ok(Progress::Repeating));
    assert_eq!(machine.registers.get(Gpr::Rcx), 3);
    assert_eq!(machine.registers.rip, 0);
    done(machine.step(&[0xf3, 0xaa]));
    assert_eq!(machine.registers.get(Gpr::Rcx), 0);
    assert_eq!(machine.registers.get(Gpr::Rdi), BASE + u64::from(BATCH) + 3);
    assert_eq!(machine.registers.rip, 2);
    // With a count of zero nothing happens.
    machine.accesses = (0, 0);
    done(machine.step(&[0xf3, 0xaa]));
    assert_eq!(machine.accesses, (0, 0));

    // A fault ends it between two elements.
    machine.registers.set(Gpr::Rsi, BASE);
    machine.registers.set(Gpr::Rdi, BASE + 0x1ff0);
    machine.registers.set(Gpr::Rcx, 9);
    let fault = page_fault(BASE + 0x2000, PageFaultErrorCode::CAUSED_BY_WRITE);
    assert_eq!(machine.step(&[0xf3, 0x48, 0xa5]), fault);
    assert_eq!(machine.registers.get(Gpr::Rcx), 7);
    assert_eq!(machine.registers.get(Gpr::Rsi), BASE + 16);

    // Backwards, and one element for each step.
    machine.registers.set(Gpr::Rdi, BASE + 0x100);
    machine.registers.rflags |= DIRECTION_FLAG | TRAP_FLAG;
    assert_eq!(machine.step(&[0xf3, 0xa4]), Ok(Progress::Repeating));
    assert_eq!(machine.registers.get(Gpr::Rcx), 6);
    assert_eq!(machine.registers.get(Gpr::Rsi), BASE + 15);
}

#[test]
fn strings_use_ports() {
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rdx, 0x1234_03f8);
    machine.registers.set(Gpr::Rdi, BASE + 0xffe);
    machine.registers.set(Gpr::Rcx, 2);
    machine.input = (1..=8).collect();
    // rep insd, across a page's end
    done(machine.step(&[0xf3, 0x6d]));
    assert_eq!(machine.bytes(BASE + 0xffe, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    machine.registers.set(Gpr::Rsi, BASE + 0xffe);
    machine.registers.set(Gpr::Rcx, 2);
    // rep outsw
    done(machine.step(&[0xf3, 0x66, 0x6f]));
    assert_eq!(machine.output, [(0x3f8, 0x0201), (0x3f8, 0x0403)]);
    // A device is not asked where its answer has no place.
    machine.registers.set(Gpr::Rdi, BASE + 0x1fff);
    machine.input = vec![9; 4];
    let fault = page_fault(BASE + 0x2000, PageFaultErrorCode::CAUSED_BY_WRITE);
    assert_eq!(machine.step(&[0x6d]), fault);
    assert_eq!(machine.input.len(), 4);
}

#[test]
fn what_wants_alignment_faults_without_it() {
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rbx, BASE + 8);
    for bytes in [
        // movdqa xmm1, [rbx]; movaps [rbx], xmm1; movntdq [rbx], xmm1; cmpxchg16b [rbx]
        &[0x66, 0x0f, 0x6f, 0x0b][..],
        &[0x0f, 0x29, 0x0b],
        &[0x66, 0x0f, 0xe7, 0x0b],
        &[0x48, 0x0f, 0xc7, 0x0b],
    ] {
        fails(&machine, bytes, raised(Exception::GENERAL_PROTECTION));
    }
    done(machine.step(&[0xf3, 0x0f, 0x6f, 0x0b]));
    assert_eq!(machine.vectors[1].to_le_bytes()[..2], [8, 9]);
}

#[test]
fn division_raises_its_exception() {
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rbx, BASE);
    machine.memory[0] = 0;
    machine.memory[1] = 0x80;
    let error = Exception::new(vector::DIVIDE_ERROR);
    let before = machine.registers;
    // div byte ptr [rbx]: by zero
    assert_eq!(machine.step(&[0xf6, 0x33]), raised(error));
    // idiv byte ptr [rbx + 1]: -32768 by -128 does not fit
    machine.registers.set(Gpr::Rax, 0x8000);
    assert_eq!(machine.step(&[0xf6, 0x7b, 0x01]), raised(error));
    machine.registers.set(Gpr::Rax, before.get(Gpr::Rax));
    assert_eq!(machine.registers, before);
}

#[test]
fn what_is_not_known_is_said_to_be() {
    let mut machine = machine(Bits64);
    machine.registers.set(Gpr::Rbx, BASE);
    for bytes in [
        // fld, fnsave, vmovdqu, tzcnt, paddd
        &[0xd9, 0x03][..],
        &[0xdd, 0x33],
        &[0xc5, 0xfe, 0x6f, 0x03],
        &[0xf3, 0x0f, 0xbc, 0x03],
        &[0x66, 0x0f, 0xfe, 0x03],
        // shld word ptr [rbx], ax, 17: undefined
        &[0x66, 0x0f, 0xa4, 0x03, 17],
    ] {
        fails(&machine, bytes, Err(Stop::Unsupported));
    }
}
