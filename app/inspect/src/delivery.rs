//! Whether the guest's tables let an exception be delivered (SDM vol. 3A 6.10 to 6.14).

use alloc::format;
use alloc::string::String;

use umbra_mmu::AccessKind;
use umbra_vcpu::PrivilegeLevel;
use umbra_vcpu::address::Gva;
use umbra_vcpu::registers::{Gpr, SegmentRegister};
use x86_64::registers::control::Cr0Flags;

use crate::verdict::{By, access, name};
use crate::{GuestView, ProcessorState};

/// Bytes of the longest gate.
const LONGEST_GATE: usize = 16;

/// What becomes of `vector`, in words: the handler that it reaches, or what is in its way.
pub(crate) fn delivery(state: &ProcessorState, view: &dyn GuestView, vector: u8) -> String {
    let name = name(vector);
    match handler(state, view, vector) {
        Ok(handler) => format!("{name} can be delivered to its handler at {handler}"),
        Err(obstacle) => format!("{name} cannot be delivered: {obstacle}"),
    }
}

/// Where the handler of `vector` begins, if the event can be delivered.
pub fn handler_address(state: &ProcessorState, view: &dyn GuestView, vector: u8) -> Option<Gva> {
    handler(state, view, vector).ok()
}

fn handler(state: &ProcessorState, view: &dyn GuestView, vector: u8) -> Result<Gva, String> {
    let is_protected = state.control.cr0 & Cr0Flags::PROTECTED_MODE_ENABLE.bits() != 0;
    let size = match (is_protected, state.is_long_mode()) {
        (false, _) => 4,
        (true, false) => 8,
        (true, true) => LONGEST_GATE,
    };
    let last = (usize::from(vector) + 1) * size - 1;
    if last > usize::from(state.idtr.limit) {
        return Err(format!(
            "its gate ends at byte {last:#x} of the IDT, whose limit is {:#x} (SDM vol. 3A 6.10)",
            state.idtr.limit
        ));
    }
    let at = state
        .idtr
        .base
        .wrapping_add(u64::from(vector) * size as u64);
    let mut gate = [0; LONGEST_GATE];
    read_table(state, view, at, &mut gate[..size]).map_err(|cause| format!("its gate {cause}"))?;
    let word = |place: usize| u16::from_le_bytes([gate[place], gate[place + 1]]);
    let selector = word(2);
    if !is_protected {
        return Ok(Gva::new(u64::from(selector) * 16 + u64::from(word(0))));
    }
    let attributes = gate[5];
    if attributes & 0x80 == 0 {
        return Err(format!(
            "its gate at {at} is not present (SDM vol. 3A 6.11)"
        ));
    }
    let offset = u64::from(word(0)) | u64::from(word(6)) << 16;
    let offset = match (attributes & 0x1f, state.is_long_mode()) {
        (0xe | 0xf, true) => {
            let high = u32::from_le_bytes([gate[8], gate[9], gate[10], gate[11]]);
            offset | u64::from(high) << 32
        }
        (0xe | 0xf, false) => offset,
        (0x6 | 0x7, false) => offset & 0xffff,
        (0x5, false) => return Err("its gate is a task gate (SDM vol. 3A 6.14)".into()),
        (kind, _) => {
            return Err(format!(
                "its gate at {at} has the type {kind:#x}, which is none of a gate \
                 (SDM vol. 3A 6.11)"
            ));
        }
    };
    let (base, level) = code_segment(state, view, selector)?;
    let address = Gva::new(base.wrapping_add(offset));
    let by = By::Program(level);
    if let Some(verdict) = access(state, view, address, AccessKind::Execute, by) {
        return Err(format!("its handler faults: {}", verdict.reason));
    }
    stack(state, view, gate[4] & 7, level)?;
    Ok(address)
}

/// Reads a descriptor table as the processor does.
fn read_table(
    state: &ProcessorState,
    view: &dyn GuestView,
    at: Gva,
    buffer: &mut [u8],
) -> Result<(), String> {
    let read = view.read(at, buffer);
    if read == buffer.len() {
        return Ok(());
    }
    let missing = at.wrapping_add(read as u64);
    Err(
        match access(state, view, missing, AccessKind::Read, By::System) {
            Some(verdict) => format!("cannot be read: {}", verdict.reason),
            None => format!("is not in memory: there is none at {missing}"),
        },
    )
}

/// Base and privilege level of the code segment that a gate names.
fn code_segment(
    state: &ProcessorState,
    view: &dyn GuestView,
    selector: u16,
) -> Result<(u64, PrivilegeLevel), String> {
    let rule = "(SDM vol. 3A 6.12.1)";
    if selector & !3 == 0 {
        return Err(format!("its gate has a null code segment {rule}"));
    }
    let (table, table_name) = if selector & 4 == 0 {
        (state.gdtr.base, "GDT")
    } else {
        (state.segment(SegmentRegister::Ldtr).base, "LDT")
    };
    let limit = if selector & 4 == 0 {
        u32::from(state.gdtr.limit)
    } else {
        state.segment(SegmentRegister::Ldtr).limit
    };
    let offset = u64::from(selector & !7);
    if offset + 7 > u64::from(limit) {
        return Err(format!(
            "its code segment {selector:#x} is beyond the {table_name}'s limit {limit:#x} {rule}"
        ));
    }
    let mut descriptor = [0; 8];
    read_table(state, view, table.wrapping_add(offset), &mut descriptor)
        .map_err(|cause| format!("the descriptor of its code segment {selector:#x} {cause}"))?;
    let descriptor = u64::from_le_bytes(descriptor);
    let is_code = descriptor >> 43 & 3 == 3;
    let is_present = descriptor >> 47 & 1 != 0;
    if !is_code || !is_present {
        let what = if is_code {
            "not present"
        } else {
            "no code segment"
        };
        return Err(format!(
            "{selector:#x} in the {table_name} is {what} {rule}"
        ));
    }
    if state.is_long_mode() {
        if descriptor >> 53 & 1 == 0 {
            return Err(format!(
                "its code segment {selector:#x} is not a 64-bit one (SDM vol. 3A 6.14.1)"
            ));
        }
        return Ok((0, privilege(descriptor)));
    }
    let base = (descriptor >> 16 & 0xff_ffff) | (descriptor >> 56) << 24;
    Ok((base, privilege(descriptor)))
}

const fn privilege(descriptor: u64) -> PrivilegeLevel {
    PrivilegeLevel::from_bits((descriptor >> 45) as u8)
}

/// Checks the stack onto which the processor pushes.
fn stack(
    state: &ProcessorState,
    view: &dyn GuestView,
    interrupt_stack: u8,
    level: PrivilegeLevel,
) -> Result<(), String> {
    let task = state.segment(SegmentRegister::Tr);
    let field = |offset: u64, bytes: usize| {
        let mut buffer = [0; 8];
        let at = task.base.wrapping_add(offset);
        if offset + bytes as u64 - 1 > u64::from(task.limit) {
            return Err(format!(
                "its stack is at byte {offset:#x} of the TSS, whose limit is {:#x} \
                 (SDM vol. 3A 6.14.2)",
                task.limit
            ));
        }
        read_table(state, view, at, &mut buffer[..bytes])
            .map_err(|cause| format!("its stack in the TSS {cause}"))?;
        Ok(u64::from_le_bytes(buffer))
    };
    let changes_level = (level as u8) < (state.privilege_level() as u8);
    let top = match (state.is_long_mode(), changes_level) {
        (true, _) if interrupt_stack != 0 => field(0x1c + 8 * u64::from(interrupt_stack), 8)? & !15,
        (true, true) => field(4 + 8 * u64::from(level as u8), 8)? & !15,
        (true, false) => state.registers.get(Gpr::Rsp) & !15,
        // The stack segment of the inner level is taken to be flat.
        (false, true) => field(4 + 8 * u64::from(level as u8), 4)?,
        (false, false) => state.stack_address().as_u64(),
    };
    let width = if state.is_long_mode() { 8 } else { 4 };
    let first = Gva::new(top.wrapping_sub(width));
    match access(state, view, first, AccessKind::Write, By::System) {
        Some(verdict) => Err(format!("its stack faults: {}", verdict.reason)),
        None => Ok(()),
    }
}
