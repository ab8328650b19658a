//! CPUID, control registers and model-specific registers: the machine decides what an access means,
//! and this module carries its decision to the processor and to the shadow MMU.

use core::arch::x86_64::{__cpuid_count, CpuidResult};

use umbra_machine::Hypercall;
use umbra_machine::processor::control;
use umbra_machine::processor::features::{Features, GuestFeatures};
use umbra_machine::processor::msr::{MsrContext, MsrEffect};
use umbra_machine::processor::paravirtual::call_error;
use umbra_mmu::{Feature, GuestFeatures as MmuFeatures, MmuError};
use umbra_vcpu::PrivilegeLevel;
use umbra_vcpu::debug::{DebugExtensions, DebugFault, DebugRegisters};
use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::exit::{ControlRegister, MoveDirection};
use umbra_vcpu::registers::{CodeWidth, ControlRegisters, Gpr, SegmentRegister};

use crate::guest::{End, Guest};
use crate::memory::Unwritable;
use crate::platform;

/// The host's CPUID.
pub fn host_cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// What the shadow MMU must know of the guest's processor.
pub fn mmu_features(features: &GuestFeatures) -> MmuFeatures {
    let mut flags = Feature::empty();
    flags.set(Feature::NO_EXECUTE, features.has(Features::NX));
    flags.set(
        Feature::GIGABYTE_PAGES,
        features.has(Features::GIGABYTE_PAGES),
    );
    MmuFeatures {
        max_physical_address: features.physical_address_bits,
        flags,
    }
}

/// What EDX holds after INIT: the processor's family, model and stepping.
pub fn signature(guest: &Guest) -> u32 {
    query(guest, 1, 0).eax
}

#[inline]
fn query(guest: &Guest, leaf: u32, subleaf: u32) -> CpuidResult {
    guest.cpuid.query(
        &host_cpuid,
        leaf,
        subleaf,
        &|| guest.vcpu.control_registers(),
        &guest.machine.identity(),
    )
}

/// CPUID.
pub fn cpuid(guest: &mut Guest) {
    let registers = guest.vcpu.registers();
    let (leaf, subleaf) = (
        registers.get(Gpr::Rax) as u32,
        registers.get(Gpr::Rcx) as u32,
    );
    let result = query(guest, leaf, subleaf);
    let registers = guest.vcpu.registers_mut();
    registers.set_u32(Gpr::Rax, result.eax);
    registers.set_u32(Gpr::Rbx, result.ebx);
    registers.set_u32(Gpr::Rcx, result.ecx);
    registers.set_u32(Gpr::Rdx, result.edx);
    guest.vcpu.skip_instruction();
}

/// VMCALL and VMMCALL: KVM's interface (Linux's uapi/linux/kvm_para.h).
pub fn hypercall(guest: &mut Guest) -> Result<(), End> {
    let result = if guest.vcpu.privilege_level().is_user() {
        call_error::NOT_PERMITTED
    } else if !Hypercall::may_be_known(guest.vcpu.registers().get(Gpr::Rax)) {
        call_error::UNKNOWN
    } else {
        let registers = guest.vcpu.registers();
        guest.machine.hypercall(&Hypercall {
            number: registers.get(Gpr::Rax),
            arguments: [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(|gpr| registers.get(gpr)),
            mode: guest.vcpu.code_width(),
        })
    };
    let registers = guest.vcpu.registers_mut();
    registers.set(Gpr::Rax, result.cast_unsigned());
    guest.vcpu.skip_instruction();
    Ok(())
}

/// RDMSR.
pub fn read_msr(guest: &mut Guest, index: u32) -> Result<(), End> {
    let Guest { vcpu, machine, .. } = guest;
    let context = MsrContext {
        control: &|| vcpu.control_registers(),
        hardware: &|index| vcpu.hardware_msr(index),
        host_counter: platform::timestamp(),
    };
    match machine.read_msr(index, &context) {
        Ok(value) => {
            vcpu.registers_mut().set_edx_eax(value);
            vcpu.skip_instruction();
            Ok(())
        }
        Err(exception) => guest.raise(exception),
    }
}

/// WRMSR.
pub fn write_msr(guest: &mut Guest, index: u32, value: u64) -> Result<(), End> {
    let Guest { vcpu, machine, .. } = guest;
    let context = MsrContext {
        control: &|| vcpu.control_registers(),
        hardware: &|index| vcpu.hardware_msr(index),
        host_counter: platform::timestamp(),
    };
    let effect = match machine.write_msr(index, value, &context) {
        Ok(effect) => effect,
        Err(exception) => return guest.raise(exception),
    };
    while let Some(write) = guest.machine.take_memory_write() {
        match guest.paging.write_ram(write.at, write.bytes()) {
            // What is written where no memory is goes nowhere.
            Ok(()) | Err(Unwritable::NoMemory(_)) => {}
            Err(Unwritable::OutOfMemory) => return Err(MmuError::OutOfMemory.into()),
        }
    }
    match effect {
        MsrEffect::None | MsrEffect::ApicMode(_) => {}
        MsrEffect::TscOffset(offset) => guest.vcpu.set_tsc_offset(offset),
        MsrEffect::Hardware => {
            if guest.vcpu.set_hardware_msr(index, value).is_err() {
                return guest.raise(Exception::GENERAL_PROTECTION);
            }
        }
        MsrEffect::ControlRegisters(new) => {
            let old = guest.vcpu.control_registers();
            return change_control(guest, &old, new);
        }
    }
    guest.vcpu.skip_instruction();
    Ok(())
}

/// RDTSC and RDTSCP, where the processor makes them exit.
pub fn read_tsc(guest: &mut Guest) -> Result<(), End> {
    let offset = guest.machine.msrs().tsc_offset();
    let value = platform::timestamp().wrapping_add_signed(offset);
    guest.vcpu.registers_mut().set_edx_eax(value);
    guest.vcpu.skip_instruction();
    Ok(())
}

/// MOV from a control register.
pub fn read_control_register(
    guest: &mut Guest,
    register: ControlRegister,
    target: Gpr,
) -> Result<(), End> {
    let control = guest.vcpu.control_registers();
    let value = match register {
        ControlRegister::Cr0 => control.cr0,
        ControlRegister::Cr2 => control.cr2.as_u64(),
        ControlRegister::Cr3 => control.cr3,
        ControlRegister::Cr4 => control.cr4,
        ControlRegister::Cr8 => guest.machine.task_priority(),
    };
    let value = match guest.vcpu.code_width() {
        CodeWidth::Bits64 => value,
        CodeWidth::Bits32 | CodeWidth::Bits16 => value & 0xffff_ffff,
    };
    guest.vcpu.registers_mut().set(target, value);
    guest.vcpu.skip_instruction();
    Ok(())
}

/// MOV to a control register, LMSW and CLTS.
pub fn write_control_register(
    guest: &mut Guest,
    register: ControlRegister,
    value: u64,
) -> Result<(), End> {
    let current = guest.vcpu.control_registers();
    let features = guest.cpuid.features();
    let new = match register {
        ControlRegister::Cr0 => {
            control::write_cr0(&current, value, || guest.vcpu.segment(SegmentRegister::Cs))
        }
        ControlRegister::Cr2 => Ok(ControlRegisters {
            cr2: umbra_vcpu::address::Gva::new(value),
            ..current
        }),
        ControlRegister::Cr3 => {
            control::write_cr3(&current, value, features).map(|(control, _)| control)
        }
        ControlRegister::Cr4 => control::write_cr4(&current, value, features),
        ControlRegister::Cr8 => control::write_cr8(&current, value).inspect(|new| {
            guest.machine.set_task_priority(new.cr8);
        }),
    };
    match new {
        Ok(new) => change_control(guest, &current, new),
        Err(exception) => guest.raise(exception),
    }
}

/// MOV to or from a debug register (SDM vol. 3B 18.2).
pub fn move_debug_register(
    guest: &mut Guest,
    number: u8,
    general: Gpr,
    direction: MoveDirection,
) -> Result<(), End> {
    if guest.vcpu.privilege_level() != PrivilegeLevel::Ring0 {
        return guest.raise(Exception::GENERAL_PROTECTION);
    }
    let vcpu = &mut guest.vcpu;
    let old = DebugRegisters {
        addresses: [0, 1, 2, 3].map(|number| vcpu.debug_register(number)),
        dr7: vcpu.debug_register(7),
    };
    let old_dr6 = vcpu.debug_register(6);
    let (mut new, mut dr6) = (old, old_dr6);
    let extensions = DebugExtensions::of(vcpu.control_registers().cr4);
    let mask = match vcpu.code_width() {
        CodeWidth::Bits64 => u64::MAX,
        CodeWidth::Bits32 | CodeWidth::Bits16 => 0xffff_ffff,
    };
    let result = match direction {
        MoveDirection::Write => {
            let value = vcpu.registers().get(general) & mask;
            new.write(number, value, extensions, &mut dr6)
        }
        MoveDirection::Read => new
            .read(number, extensions, &mut dr6)
            .map(|value| vcpu.registers_mut().set(general, value & mask)),
    };
    for (number, (old, new)) in (0..).zip(old.addresses.iter().zip(new.addresses)) {
        if *old != new {
            vcpu.set_debug_register(number, new);
        }
    }
    if dr6 != old_dr6 {
        vcpu.set_debug_register(6, dr6);
    }
    if new.dr7 != old.dr7 {
        vcpu.set_debug_register(7, new.dr7);
    }
    match result {
        Ok(()) => {
            vcpu.skip_instruction();
            Ok(())
        }
        Err(DebugFault::GeneralDetect) => guest.raise(Exception::new(vector::DEBUG)),
        Err(DebugFault::InvalidOpcode) => guest.raise(Exception::INVALID_OPCODE),
        Err(DebugFault::GeneralProtection) => guest.raise(Exception::GENERAL_PROTECTION),
    }
}

/// XSETBV.
pub fn set_extended_control_register(guest: &mut Guest, index: u32, value: u64) -> Result<(), End> {
    let current = guest.vcpu.control_registers();
    match control::write_xcr(&current, index, value, guest.cpuid.features()) {
        Ok(new) => change_control(guest, &current, new),
        Err(exception) => guest.raise(exception),
    }
}

/// Completes the instruction that finds `old` and leaves `new` in the control registers.
fn change_control(
    guest: &mut Guest,
    old: &ControlRegisters,
    new: ControlRegisters,
) -> Result<(), End> {
    let paging_difference =
        (old.cr0 ^ new.cr0) | (old.cr3 ^ new.cr3) | (old.cr4 ^ new.cr4) | (old.efer ^ new.efer);
    let other_difference =
        (old.cr2.as_u64() ^ new.cr2.as_u64()) | (old.cr8 ^ new.cr8) | (old.xcr0 ^ new.xcr0);
    // Loading CR3 drops translations even if the value stays.
    let loads = paging_difference != 0 || other_difference == 0;
    if loads && guest.paging.load_registers(&new).is_err() {
        return guest.raise(Exception::GENERAL_PROTECTION);
    }
    guest.vcpu.set_control_registers(new);
    guest.vcpu.skip_instruction();
    Ok(())
}
