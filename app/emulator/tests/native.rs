//! The emulator against the processor that the test runs on: random instructions on random
//! registers, flags and memory must leave the same.
//!
//! The emulator goes first, on a copy of everything. Only what it carried out, with every access in
//! the test's own memory, runs natively, on a page of code that ends with a jump back.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::arch::global_asm;
use std::collections::BTreeMap;
use std::sync::Mutex;

use common::Machine;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use umbra_emulator::{Progress, Stop, emulate};
use umbra_vcpu::instruction::iced_x86::{
    FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits,
};
use umbra_vcpu::instruction::{decode, general_register};
use umbra_vcpu::registers::{CodeWidth, Gpr, Registers};

/// Where the test's memory is, low enough for 32-bit addresses.
const BASE: u64 = 0x2000_0000;
const MEMORY_BYTES: usize = 3 * 4096;
const CODE: u64 = 0x2001_0000;
const CODE_BYTES: usize = 4096;

/// Everything that an instruction changes in the processor. The assembly below uses the layout.
#[repr(C)]
struct State {
    registers: Registers,
    vectors: [u128; 16],
}

global_asm!(
    ".pushsection .data",
    ".balign 8",
    "native_stack: .quad 0",
    "native_state: .quad 0",
    "native_code: .quad 0",
    "native_scratch: .quad 0",
    ".popsection",
    "native_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + native_stack], rsp",
    "mov [rip + native_state], rdi",
    "mov [rip + native_code], rsi",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movups xmm\\n, [rdi + 144 + 16 * \\n]",
    ".endr",
    "push [rdi + 136]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rsp, [rdi + 32]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    ".irp n, 8,9,10,11,12,13,14,15",
    "mov r\\n, [rdi + 8 * \\n]",
    ".endr",
    "mov rdi, [rdi + 56]",
    "jmp [rip + native_code]",
    "native_return:",
    "mov [rip + native_scratch], rax",
    "mov rax, [rip + native_state]",
    "mov [rax + 8], rcx",
    "mov [rax + 16], rdx",
    "mov [rax + 24], rbx",
    "mov [rax + 32], rsp",
    "mov [rax + 40], rbp",
    "mov [rax + 48], rsi",
    "mov [rax + 56], rdi",
    ".irp n, 8,9,10,11,12,13,14,15",
    "mov [rax + 8 * \\n], r\\n",
    ".endr",
    "mov rcx, [rip + native_scratch]",
    "mov [rax], rcx",
    "mov rsp, [rip + native_stack]",
    "pushfq",
    "pop [rax + 136]",
    "cld",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movups [rax + 144 + 16 * \\n], xmm\\n",
    ".endr",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    /// Runs the code at `code` on `state`. It must end by jumping to [`native_return`].
    fn native_run(state: *mut State, code: u64);
    fn native_return();
}

/// The pages that native instructions use; one for the whole process.
struct Native;

static NATIVE: Mutex<Option<Native>> = Mutex::new(None);

impl Native {
    fn new() -> Self {
        for (address, bytes) in [(BASE, MEMORY_BYTES), (CODE, CODE_BYTES)] {
            // SAFETY: the kernel refuses an address where something is mapped already.
            let mapped = unsafe {
                libc::mmap(
                    address as *mut libc::c_void,
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                )
            };
            assert_eq!(mapped as u64, address, "the test's addresses are taken");
        }
        Self
    }

    /// Runs one instruction with `memory` at [`BASE`], and returns its memory afterwards.
    #[allow(
        clippy::unused_self,
        reason = "whoever has the value has the pages for himself"
    )]
    fn run(&mut self, bytes: &[u8], state: &mut State, memory: &[u8]) -> Vec<u8> {
        let mut code = bytes.to_vec();
        // jmp [rip + 0], then the target.
        code.extend([0xff, 0x25, 0, 0, 0, 0]);
        code.extend((native_return as *const () as u64).to_le_bytes());
        // SAFETY: both mappings belong to this value and are as long as what is copied. The
        // instruction was emulated before with all its accesses in that memory, it does not
        // transfer control, and the code after it returns to `native_return`, which restores the
        // stack and the registers that a function must keep. No signal handler is installed that
        // would run on the instruction's stack pointer.
        unsafe {
            std::ptr::copy_nonoverlapping(memory.as_ptr(), BASE as *mut u8, MEMORY_BYTES);
            std::ptr::copy_nonoverlapping(code.as_ptr(), CODE as *mut u8, code.len());
            native_run(state, CODE);
            std::slice::from_raw_parts(BASE as *const u8, MEMORY_BYTES).to_vec()
        }
    }
}

/// One random instruction with the state before it.
#[derive(Clone, Debug)]
struct Case {
    bytes: Vec<u8>,
    registers: [u64; 16],
    flags: u8,
    vectors: [u128; 2],
    seed: u8,
    /// Where in memory the operand shall be.
    place: u16,
    count: u8,
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let prefixes = prop::collection::vec(
        prop_oneof![
            6 => Just(None),
            3 => Just(Some(0x66)),
            1 => Just(Some(0x67)),
            2 => Just(Some(0xf0)),
            2 => Just(Some(0xf2)),
            3 => Just(Some(0xf3)),
        ],
        0..3,
    );
    let rex = prop_oneof![Just(None), (0x40_u8..0x50).prop_map(Some)];
    let opcode = prop_oneof![
        8 => any::<u8>().prop_map(|byte| vec![byte]),
        2 => (0x80_u8..0xe0).prop_map(|byte| vec![byte]),
        2 => prop::sample::select(vec![0xf6, 0xf7, 0xfe, 0xff, 0xa4, 0xa5, 0xa6, 0xa7, 0xaa,
            0xab, 0xac, 0xad, 0xae, 0xaf]).prop_map(|byte| vec![byte]),
        8 => any::<u8>().prop_map(|byte| vec![0x0f, byte]),
        4 => prop::sample::select(vec![0x10_u8, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2b,
            0x6e, 0x6f, 0x7e, 0x7f, 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3,
            0xb8, 0xba, 0xbb, 0xbc, 0xbd, 0xc0, 0xc1, 0xc3, 0xc7, 0xd6, 0xe7, 0xf0])
            .prop_map(|byte| vec![0x0f, byte]),
        1 => prop::sample::select(vec![0xf0_u8, 0xf1, 0x2a])
            .prop_map(|byte| vec![0x0f, 0x38, byte]),
    ];
    // A memory operand in most cases.
    let modrm = (0_u8..0xff).prop_map(|byte| {
        if byte < 0xc0 {
            byte
        } else {
            byte & 0x3f | 0x40
        }
    });
    (prefixes, rex, opcode, modrm, any::<[u8; 9]>()).prop_map(
        |(prefixes, rex, opcode, modrm, rest)| {
            let mut bytes: Vec<u8> = prefixes.into_iter().flatten().collect();
            bytes.extend(rex);
            bytes.extend(opcode);
            bytes.push(modrm);
            bytes.extend(rest);
            bytes.truncate(15);
            bytes
        },
    )
}

fn register() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        any::<u8>().prop_map(u64::from),
        any::<i8>().prop_map(|value| i64::from(value).cast_unsigned()),
        prop::sample::select(vec![
            0,
            0x7f,
            0x80,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000
        ]),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    (
        bytes(),
        prop::array::uniform16(register()),
        any::<u8>(),
        any::<[u128; 2]>(),
        any::<u8>(),
        0_u16..4,
        any::<(u8, u16)>(),
    )
        .prop_map(
            |(bytes, registers, flags, vectors, seed, near, (count, offset))| Case {
                bytes,
                registers,
                flags,
                vectors,
                seed,
                // Often aligned, often across a page's end.
                place: match near {
                    0 => 4096 - 4,
                    1 => 2048 + (offset & 0xff0),
                    _ => 2048 + (offset & 0xfff),
                },
                count,
            },
        )
}

/// The state before the instruction; `None` if it cannot be had with the operand in memory.
fn prepare(case: &mut Case) -> Option<(Machine, Instruction)> {
    let mut machine = Machine::new(CodeWidth::Bits64, BASE, MEMORY_BYTES);
    let target = BASE + u64::from(case.place);
    // An absolute address stands in the instruction itself.
    let decoded = decode(&case.bytes, CodeWidth::Bits64, CODE)?;
    if decoded.memory_displ_size() == 8 && decoded.memory_base() == Register::None {
        let size = case.bytes.len().min(decoded.len());
        if (0..decoded.op_count()).any(|op| decoded.op_kind(op) == OpKind::Memory) && size >= 9 {
            case.bytes[size - 8..size].copy_from_slice(&target.to_le_bytes());
        }
    }
    let instruction = decode(&case.bytes, CodeWidth::Bits64, CODE)?;
    case.bytes.truncate(instruction.len());
    if !is_candidate(&instruction) {
        return None;
    }

    for (register, value) in Gpr::ALL.into_iter().zip(case.registers) {
        machine.registers.set(register, value);
    }
    if is_stack(&instruction) {
        machine.registers.set(Gpr::Rsp, target);
    }
    if instruction.is_string_instruction() {
        let other = BASE + 0x2800 - u64::from(case.seed);
        machine.registers.set(Gpr::Rsi, target);
        machine.registers.set(Gpr::Rdi, other);
        machine
            .registers
            .set(Gpr::Rcx, u64::from(case.count & 0x3f));
    }
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && instruction.op1_kind() == OpKind::Register
    {
        let register = general_register(instruction.op1_register())?;
        let value = machine.registers.get(register).cast_signed() % 8192;
        machine.registers.set(register, value.cast_unsigned());
    }
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Cmpxchg | Mnemonic::Div | Mnemonic::Idiv
    ) && case.count & 1 != 0
    {
        // So that it is equal, and a quotient fits, now and then.
        let small = if case.count & 2 != 0 { u64::MAX } else { 0 };
        machine.registers.set(Gpr::Rax, small);
        machine.registers.set(Gpr::Rdx, small);
    }
    place_operand(&mut machine, &instruction, target)?;

    machine.registers.rip = CODE;
    // CF, PF, AF, ZF, SF; DF; OF.
    let flags = u64::from(case.flags);
    machine.registers.rflags = 2 | flags & 0xd5 | (flags & 2) << 9 | (flags & 8) << 8 | RFLAGS_IF;
    for (index, vector) in machine.vectors.iter_mut().enumerate() {
        *vector = case.vectors[index % 2].rotate_left(index as u32 * 8);
    }
    for (index, byte) in machine.memory.iter_mut().enumerate() {
        *byte = (index as u8).wrapping_mul(7) ^ case.seed.rotate_left(index as u32 / 16);
    }
    match case.seed {
        0..64 => machine.memory.fill(case.seed & 1),
        64..96 => machine.memory.fill(0xff),
        _ => {}
    }
    Some((machine, instruction))
}

const RFLAGS_IF: u64 = 1 << 9;

/// Whether the instruction can run natively at all: no control transfer, no privilege, no segment,
/// and no extension that this processor lacks.
fn is_candidate(instruction: &Instruction) -> bool {
    let uses_memory = (0..instruction.op_count())
        .any(|operand| instruction.op_kind(operand) == OpKind::Memory)
        || instruction.is_string_instruction()
        || is_stack(instruction)
        || is_register_only(instruction);
    let overridden = matches!(instruction.segment_prefix(), Register::FS | Register::GS);
    let has_extension = match instruction.mnemonic() {
        Mnemonic::Popcnt => is_x86_feature_detected!("popcnt"),
        Mnemonic::Movbe => is_x86_feature_detected!("movbe"),
        Mnemonic::Cmpxchg16b => is_x86_feature_detected!("cmpxchg16b"),
        Mnemonic::Movntdqa => is_x86_feature_detected!("sse4.1"),
        Mnemonic::Lddqu => is_x86_feature_detected!("sse3"),
        // The test's own code needs its segment registers; and system registers and the x87 unit are
        // the kernel's, or an emulation of them.
        Mnemonic::Lss
        | Mnemonic::Lfs
        | Mnemonic::Lgs
        | Mnemonic::Fnstcw
        | Mnemonic::Fnstsw
        | Mnemonic::Smsw
        | Mnemonic::Sgdt
        | Mnemonic::Sidt
        | Mnemonic::Sldt
        | Mnemonic::Str
        | Mnemonic::Insb
        | Mnemonic::Insw
        | Mnemonic::Insd
        | Mnemonic::Outsb
        | Mnemonic::Outsw
        | Mnemonic::Outsd => false,
        _ => true,
    };
    let moves_selector = (0..instruction.op_count())
        .any(|operand| instruction.op_register(operand).is_segment_register());
    let uses_mmx =
        (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_mm());
    uses_memory
        && !moves_selector
        && !uses_mmx
        && !overridden
        && has_extension
        && !instruction.is_privileged()
        && instruction.flow_control() == FlowControl::Next
}

fn is_stack(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Push | Mnemonic::Pop)
}

/// The instructions without memory that the emulator knows, too, besides the usual arithmetic.
fn is_register_only(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Lea | M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo | M::Lahf | M::Sahf
    ) || matches!(instruction.mnemonic(), M::Clc | M::Stc | M::Cmc | M::Bswap)
        && instruction.op0_register().size() != 2
}

/// Sets the base register so that the memory operand is at `target`.
fn place_operand(machine: &mut Machine, instruction: &Instruction, target: u64) -> Option<()> {
    let operand =
        (0..instruction.op_count()).find(|&operand| instruction.op_kind(operand) == OpKind::Memory);
    let (Some(operand), base) = (operand, instruction.memory_base()) else {
        return Some(());
    };
    if base == Register::None {
        return (instruction.memory_index() == Register::None
            && instruction.memory_displacement64() == target)
            .then_some(());
    }
    let full = general_register(base)?;
    if general_register(instruction.memory_index()) == Some(full) {
        return None;
    }
    let address = instruction.virtual_address(operand, 0, |register, _, _| {
        if register.is_segment_register() {
            return Some(0);
        }
        let value = machine.registers.get(general_register(register)?);
        Some(if register.size() == 4 {
            value & 0xffff_ffff
        } else {
            value
        })
    })?;
    let old = machine.registers.get(full);
    let new = if base.size() == 4 {
        let low = old.wrapping_add(target).wrapping_sub(address) & 0xffff_ffff;
        old & !0xffff_ffff | low
    } else {
        old.wrapping_add(target).wrapping_sub(address)
    };
    machine.registers.set(full, new);
    Some(())
}

/// Flags whose value the manual leaves open after this instruction.
fn undefined_flags(instruction: &Instruction, machine: &Machine) -> u64 {
    use Mnemonic as M;
    let mut undefined = instruction.rflags_undefined();
    let is_shift = matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if is_shift {
        let last = instruction.op_count() - 1;
        let count = match instruction.op_kind(last) {
            OpKind::Register => machine.registers.get(Gpr::Rcx),
            _ => instruction.immediate(last),
        };
        let wide = instruction.memory_size().size() == 8;
        let bits = 8 * instruction.memory_size().size() as u64;
        match count & if wide { 0x3f } else { 0x1f } {
            0 => undefined = 0,
            1 => undefined &= !RflagsBits::OF,
            // Bits shifted out beyond the operand.
            count if count >= bits => undefined |= RflagsBits::CF | RflagsBits::OF,
            _ => undefined |= RflagsBits::OF,
        }
        // Rotations never touch the others.
        if matches!(instruction.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr) {
            undefined &= RflagsBits::OF;
        }
    }
    [
        (RflagsBits::CF, 1 << 0),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, 1 << 11),
    ]
    .into_iter()
    .filter(|(flag, _)| undefined & flag != 0)
    .fold(0, |mask, (_, bit)| mask | bit)
}

/// How often each mnemonic ran natively.
type Tally = BTreeMap<String, usize>;

fn check(mut case: Case, native: &mut Native, tally: &mut Tally) -> Result<(), TestCaseError> {
    let Some((before, instruction)) = prepare(&mut case) else {
        return Ok(());
    };
    let mut emulated = before.clone();
    loop {
        match emulate(&mut emulated, &instruction) {
            Ok(Progress::Done { next_rip }) => {
                prop_assert_eq!(next_rip, CODE + case.bytes.len() as u64);
                break;
            }
            Ok(Progress::Repeating) => {}
            // What leaves the test's memory, is not known, or is the run loop's, is not run.
            Ok(Progress::Exits { .. } | Progress::Delivers(_))
            | Err(Stop::Exception(_) | Stop::Unsupported) => return Ok(()),
            Err(Stop::Failed(never)) => match never {},
        }
    }
    let mut state = State {
        registers: before.registers,
        vectors: before.vectors,
    };
    let memory = native.run(&case.bytes, &mut state, &before.memory);
    *tally
        .entry(format!("{:?}", instruction.mnemonic()))
        .or_default() += 1;

    let code = instruction.code();
    for register in Gpr::ALL {
        prop_assert_eq!(
            emulated.registers.get(register),
            state.registers.get(register),
            "{:?} of {:?}, {:02x?}",
            register,
            code,
            case.bytes
        );
    }
    let defined = !undefined_flags(&instruction, &before) & 0xcd5;
    prop_assert_eq!(
        emulated.registers.rflags & defined,
        state.registers.rflags & defined,
        "flags {:#x} of {:?}, {:02x?}, before {:#x}",
        defined,
        code,
        case.bytes,
        before.registers.rflags
    );
    prop_assert_eq!(emulated.vectors, state.vectors, "vectors of {:?}", code);
    prop_assert!(emulated.memory == memory, "memory of {:?}", code);
    Ok(())
}

/// Every instruction that must have been compared often enough.
const EXPECTED: &str = "Mov Movnti Movzx Movsx Movsxd Movbe Add Adc Sub Sbb And Or Xor Cmp Test Inc \
    Dec Neg Not Shl Sal Shr Sar Rol Ror Rcl Rcr Shld Shrd Bt Bts Btr Btc Bsf Bsr Popcnt \
    Xchg Xadd Cmpxchg Cmpxchg8b Cmpxchg16b Mul Imul Div Idiv Push Pop Movsb Movsw Movsd Movsq Stosb \
    Stosw Stosd Stosq Lodsb Lodsw Lodsd Lodsq Cmpsb Cmpsw Cmpsd Cmpsq Scasb Scasw Scasd Scasq Cmovo \
    Cmovno Cmovb Cmovae Cmove Cmovne Cmovbe Cmova Cmovs Cmovns Cmovp Cmovnp Cmovl Cmovge Cmovle \
    Cmovg Seto Setno Setb Setae Sete Setne Setbe Seta Sets Setns Setp Setnp Setl Setge Setle Setg \
    Movdqa Movdqu Movaps Movapd Movups Movupd Movd Movq Movss Movlps Movlpd Movhps Movhpd Movntps \
    Movntpd Movntdq Lea Cbw Cwde Cdqe Cwd Cdq Cqo Lahf Sahf Clc Stc Cmc Bswap";

#[test]
fn instructions_leave_what_the_processor_leaves() {
    let config = Config {
        cases: 400_000,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let mut guard = NATIVE.lock().unwrap();
    let native = std::cell::RefCell::new(guard.get_or_insert_with(Native::new));
    let tally = std::cell::RefCell::new(Tally::new());
    let result = runner.run(&case(), |case| {
        check(case, &mut native.borrow_mut(), &mut tally.borrow_mut())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let tally = tally.borrow();
    let seldom: Vec<_> = EXPECTED
        .split_whitespace()
        .filter(|mnemonic| tally.get(*mnemonic).copied().unwrap_or(0) < 10)
        .collect();
    println!("{} instructions compared", tally.values().sum::<usize>());
    assert!(seldom.is_empty(), "seldom compared: {seldom:?}\n{tally:?}");
}
