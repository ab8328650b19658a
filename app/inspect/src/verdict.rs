//! What in the architecture says that the guest's next instruction must fault.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use umbra_mmu::{AccessKind, GuestEnd, Permission, Permissions};
use umbra_vcpu::PrivilegeLevel;
use umbra_vcpu::address::Gva;
use umbra_vcpu::event::vector;
use umbra_vcpu::instruction::iced_x86::{
    Code, Instruction, InstructionInfoFactory, OpAccess, OpKind,
};
use umbra_vcpu::instruction::{self, MAX_LENGTH};
use umbra_vcpu::registers::SegmentRegister;
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::rflags::RFlags;

use crate::walk::GuestEndText;
use crate::{GuestView, ProcessorState};

/// An exception that must come, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The exception's vector.
    pub vector: u8,
    /// What says so.
    pub reason: String,
}

/// Who accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The program, at its privilege level.
    Program(PrivilegeLevel),
    /// The processor itself, to descriptor tables and to the stack of a handler.
    System,
}

impl By {
    const fn is_user(self) -> bool {
        matches!(self, Self::Program(level) if level.is_user())
    }
}

/// The instruction at RIP, as far as it can be read.
pub(crate) struct Next {
    pub bytes: [u8; MAX_LENGTH],
    pub available: usize,
    pub decoded: Option<Instruction>,
}

impl Next {
    pub fn of(state: &ProcessorState, view: &dyn GuestView) -> Self {
        let mut bytes = [0; MAX_LENGTH];
        let available = view.read(state.code_address(), &mut bytes);
        let decoded =
            instruction::decode(&bytes[..available], state.code_width(), state.registers.rip);
        Self {
            bytes,
            available,
            decoded,
        }
    }

    /// The linear address of the instruction's memory operand, if it has one.
    pub fn operand(&self, state: &ProcessorState) -> Option<Gva> {
        let segment = |register: SegmentRegister| *state.segment(register);
        let decoded = self.decoded.as_ref()?;
        instruction::memory_operand(decoded, &state.registers, state.code_width(), segment)
    }
}

/// Every exception that the next instruction must raise, the first of them first.
pub(crate) fn next_instruction(
    state: &ProcessorState,
    view: &dyn GuestView,
    next: &Next,
) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let by = By::Program(state.privilege_level());
    let code = state.code_address();
    if let Some(verdict) = access(state, view, code, AccessKind::Execute, by) {
        return [verdict].into();
    }
    let Some(decoded) = &next.decoded else {
        let missing = code.wrapping_add(next.available as u64);
        if next.available < MAX_LENGTH
            && let Some(verdict) = access(state, view, missing, AccessKind::Execute, by)
        {
            return [verdict].into();
        }
        if next.available > 0 {
            let reason = "the bytes at RIP are no instruction (SDM vol. 3A 6.15, \"Interrupt 6\")";
            verdicts.push(verdict(vector::INVALID_OPCODE, reason));
        }
        return verdicts;
    };
    if matches!(
        decoded.code(),
        Code::Ud2 | Code::Ud0_r16_rm16 | Code::Ud0_r32_rm32 | Code::Ud0_r64_rm64
    ) {
        let reason = "UD0 and UD2 always raise it (SDM vol. 2B, \"UD\")";
        verdicts.push(verdict(vector::INVALID_OPCODE, reason));
    }
    if decoded.is_privileged() && by.is_user() {
        let reason = "the instruction needs privilege level 0 (SDM vol. 3A 5.9)";
        verdicts.push(verdict(vector::GENERAL_PROTECTION, reason));
    }
    if let Some(address) = next.operand(state)
        && let Some(kind) = operand_access(decoded)
    {
        verdicts.extend(access(state, view, address, kind, by));
    }
    if decoded.is_stack_instruction() {
        let change = i64::from(decoded.stack_pointer_increment());
        let (address, kind) = if change < 0 {
            (
                state.stack_address().wrapping_add(change.cast_unsigned()),
                AccessKind::Write,
            )
        } else {
            (state.stack_address(), AccessKind::Read)
        };
        verdicts.extend(access(state, view, address, kind, by));
    }
    verdicts
}

/// What the instruction does to its memory operand.
fn operand_access(decoded: &Instruction) -> Option<AccessKind> {
    let place =
        (0..decoded.op_count()).find(|&operand| decoded.op_kind(operand) == OpKind::Memory)?;
    match InstructionInfoFactory::new().info(decoded).op_access(place) {
        OpAccess::Read | OpAccess::CondRead => Some(AccessKind::Read),
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
            Some(AccessKind::Write)
        }
        OpAccess::None | OpAccess::NoMemAccess => None,
    }
}

/// What an access must raise by the guest's own tables, if anything.
pub(crate) fn access(
    state: &ProcessorState,
    view: &dyn GuestView,
    address: Gva,
    kind: AccessKind,
    by: By,
) -> Option<Verdict> {
    let end = view.inspect(address).guest_end;
    let action = match kind {
        AccessKind::Read => "read",
        AccessKind::Write => "written",
        AccessKind::Execute => "fetched from",
    };
    let at = format!("{address} is {action}");
    match end {
        GuestEnd::NotCanonical => Some(verdict(
            vector::GENERAL_PROTECTION,
            format!("{at}, and is not canonical (SDM vol. 1 3.3.7.1)"),
        )),
        GuestEnd::NotPresent(_) | GuestEnd::Malformed(_) => Some(verdict(
            vector::PAGE_FAULT,
            format!("{at}, but {} (SDM vol. 3A 4.7)", GuestEndText(end)),
        )),
        GuestEnd::Page { permits, .. } => forbidden(state, permits, kind, by).map(|rule| {
            let reason = format!("{at}, but {rule} (SDM vol. 3A 4.6)");
            verdict(vector::PAGE_FAULT, reason)
        }),
        GuestEnd::Unpaged { .. } => None,
    }
}

/// The rule by which permissions forbid an access.
fn forbidden(
    state: &ProcessorState,
    permits: Permissions,
    kind: AccessKind,
    by: By,
) -> Option<&'static str> {
    let denied = |permission| permission == Permission::Denied;
    let cr0 = Cr0Flags::from_bits_retain(state.control.cr0);
    let cr4 = Cr4Flags::from_bits_retain(state.control.cr4);
    let overrides_smap = matches!(by, By::Program(_))
        && state.registers.rflags & RFlags::ALIGNMENT_CHECK.bits() != 0;
    if by.is_user() && denied(permits.user) {
        return Some("its page is the supervisor's and user mode accesses it");
    }
    match kind {
        AccessKind::Execute if denied(permits.execute) => Some("its page is not executable"),
        AccessKind::Execute
            if !by.is_user()
                && !denied(permits.user)
                && cr4.contains(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION) =>
        {
            Some("its page is the user's and CR4.SMEP is set")
        }
        AccessKind::Write
            if denied(permits.write) && (by.is_user() || cr0.contains(Cr0Flags::WRITE_PROTECT)) =>
        {
            Some("its page is read-only")
        }
        AccessKind::Read | AccessKind::Write
            if !by.is_user()
                && !denied(permits.user)
                && cr4.contains(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION)
                && !overrides_smap =>
        {
            Some("its page is the user's, CR4.SMAP is set and RFLAGS.AC is clear")
        }
        _ => None,
    }
}

fn verdict(vector: u8, reason: impl Into<String>) -> Verdict {
    Verdict {
        vector,
        reason: reason.into(),
    }
}

/// An exception's name.
pub(crate) const fn name(vector: u8) -> &'static str {
    match vector {
        vector::DIVIDE_ERROR => "#DE",
        vector::DEBUG => "#DB",
        vector::NMI => "NMI",
        vector::BREAKPOINT => "#BP",
        vector::OVERFLOW => "#OF",
        vector::BOUND_RANGE => "#BR",
        vector::INVALID_OPCODE => "#UD",
        vector::DEVICE_NOT_AVAILABLE => "#NM",
        vector::DOUBLE_FAULT => "#DF",
        vector::INVALID_TSS => "#TS",
        vector::SEGMENT_NOT_PRESENT => "#NP",
        vector::STACK_FAULT => "#SS",
        vector::GENERAL_PROTECTION => "#GP",
        vector::PAGE_FAULT => "#PF",
        vector::X87_FLOATING_POINT => "#MF",
        vector::ALIGNMENT_CHECK => "#AC",
        vector::MACHINE_CHECK => "#MC",
        vector::SIMD_FLOATING_POINT => "#XM",
        vector::VIRTUALIZATION => "#VE",
        vector::CONTROL_PROTECTION => "#CP",
        _ => "exception",
    }
}
