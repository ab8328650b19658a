//! Puts a processor where the boot protocol wants it.

use umbra_loader::{CODE_SELECTOR, DATA_SELECTOR, DESCRIPTORS_SIZE, EntryState};
use umbra_vcpu::Vcpu;
use umbra_vcpu::address::Gva;
use umbra_vcpu::event::EventQueue;
use umbra_vcpu::registers::{
    ControlRegisters, DescriptorTable, Gpr, Registers, Segment, SegmentAttributes, SegmentRegister,
};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::model_specific::EferFlags;

/// Bit 1 of RFLAGS is always set.
const RFLAGS_FIXED: u64 = 2;
const PROTECTED_MODE: Cr0Flags = Cr0Flags::PROTECTED_MODE_ENABLE.union(Cr0Flags::EXTENSION_TYPE);

/// Brings a processor that has just been made to a guest's entry point.
pub fn enter_state(vcpu: &mut dyn Vcpu, entry: &EntryState) {
    vcpu.registers_mut().rflags = RFLAGS_FIXED;
    match *entry {
        EntryState::Protected32 { eip, eax, ebx } => {
            const CODE: u16 = 0x08;
            const DATA: u16 = 0x10;
            set_segments(vcpu, Segment::flat_code32(CODE), DATA);
            set_control(
                vcpu,
                PROTECTED_MODE,
                0,
                Cr4Flags::empty(),
                EferFlags::empty(),
            );
            let registers = vcpu.registers_mut();
            registers.rip = u64::from(eip);
            registers.set(Gpr::Rax, u64::from(eax));
            registers.set(Gpr::Rbx, u64::from(ebx));
        }
        EntryState::Linux32 { eip, esi, gdt } => {
            set_segments(vcpu, Segment::flat_code32(CODE_SELECTOR), DATA_SELECTOR);
            vcpu.set_gdtr(descriptor_table(gdt));
            set_control(
                vcpu,
                PROTECTED_MODE,
                0,
                Cr4Flags::empty(),
                EferFlags::empty(),
            );
            let registers = vcpu.registers_mut();
            registers.rip = u64::from(eip);
            registers.set(Gpr::Rsi, u64::from(esi));
        }
        EntryState::Hermit64 {
            rip,
            rdi,
            rsp,
            cr3,
            gdt,
        } => {
            set_segments(vcpu, Segment::flat_code64(CODE_SELECTOR), DATA_SELECTOR);
            vcpu.set_gdtr(descriptor_table(gdt));
            set_control(
                vcpu,
                PROTECTED_MODE | Cr0Flags::NUMERIC_ERROR | Cr0Flags::PAGING,
                u64::from(cr3),
                Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
                EferFlags::LONG_MODE_ENABLE
                    | EferFlags::LONG_MODE_ACTIVE
                    | EferFlags::NO_EXECUTE_ENABLE,
            );
            let registers = vcpu.registers_mut();
            registers.rip = rip;
            registers.set(Gpr::Rdi, rdi);
            registers.set(Gpr::Rsp, rsp);
        }
        EntryState::Real {
            cs,
            ip,
            data,
            sp,
            dx,
        } => {
            enter_real_mode(vcpu, cs, data);
            let registers = vcpu.registers_mut();
            registers.rip = u64::from(ip);
            registers.set(Gpr::Rsp, u64::from(sp));
            registers.set(Gpr::Rdx, u64::from(dx));
        }
        EntryState::Long64 { rip, rsi, cr3, gdt } => {
            set_segments(vcpu, Segment::flat_code64(CODE_SELECTOR), DATA_SELECTOR);
            vcpu.set_gdtr(descriptor_table(gdt));
            set_control(
                vcpu,
                PROTECTED_MODE | Cr0Flags::PAGING,
                u64::from(cr3),
                Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
                EferFlags::LONG_MODE_ENABLE | EferFlags::LONG_MODE_ACTIVE,
            );
            let registers = vcpu.registers_mut();
            registers.rip = rip;
            registers.set(Gpr::Rsi, rsi);
        }
    }
}

/// Brings a processor where INIT and a start-up IPI with this vector bring it: real mode at the page
/// of this number (SDM vol. 3A table 9-1; APM vol. 2 table 14-1). `signature` is what EDX holds then.
pub fn start_up(vcpu: &mut dyn Vcpu, vector: u8, signature: u32) {
    const CACHE_CONTROL: Cr0Flags = Cr0Flags::CACHE_DISABLE.union(Cr0Flags::NOT_WRITE_THROUGH);
    const TABLE: DescriptorTable = DescriptorTable {
        base: Gva::new(0),
        limit: 0xffff,
    };
    const DR6: u64 = 0xffff_0ff0;
    const DR7: u64 = 0x400;
    let before = vcpu.control_registers();
    *vcpu.events_mut() = EventQueue::new();
    *vcpu.registers_mut() = Registers::default();
    let registers = vcpu.registers_mut();
    registers.rflags = RFLAGS_FIXED;
    registers.set(Gpr::Rdx, signature.into());
    // Nothing is blocked, and nothing traps.
    vcpu.finish_instruction(0);
    vcpu.unblock_nmis();
    for number in 0..4 {
        vcpu.set_debug_register(number, 0);
    }
    vcpu.set_debug_register(6, DR6);
    vcpu.set_debug_register(7, DR7);
    set_real_mode_segments(vcpu, u16::from(vector) << 8, 0);
    vcpu.set_segment(
        SegmentRegister::Ldtr,
        Segment {
            limit: 0xffff,
            attributes: SegmentAttributes::from_bits_retain(LDT_RIGHTS),
            ..Segment::UNUSABLE
        },
    );
    vcpu.set_gdtr(TABLE);
    vcpu.set_idtr(TABLE);
    vcpu.set_control_registers(ControlRegisters {
        cr0: before.cr0 & CACHE_CONTROL.bits() | Cr0Flags::EXTENSION_TYPE.bits(),
        cr2: Gva::new(0),
        cr3: 0,
        cr4: 0,
        cr8: 0,
        efer: 0,
        xcr0: before.xcr0,
    });
}

/// A present LDT's access rights.
const LDT_RIGHTS: u32 = 0x82;

/// Real mode with the interrupt vectors at address 0.
fn enter_real_mode(vcpu: &mut dyn Vcpu, code: u16, data: u16) {
    set_real_mode_segments(vcpu, code, data);
    vcpu.set_idtr(DescriptorTable {
        base: Gva::new(0),
        limit: 0x3ff,
    });
    set_control(
        vcpu,
        Cr0Flags::EXTENSION_TYPE,
        0,
        Cr4Flags::empty(),
        EferFlags::empty(),
    );
}

fn set_real_mode_segments(vcpu: &mut dyn Vcpu, code: u16, data: u16) {
    const CODE_RIGHTS: u32 = 0x9b;
    const DATA_RIGHTS: u32 = 0x93;
    let segment = |selector: u16, rights| Segment {
        selector,
        base: Gva::new(u64::from(selector) << 4),
        limit: 0xffff,
        attributes: SegmentAttributes::from_bits_retain(rights),
    };
    for register in SegmentRegister::ALL {
        let loaded = match register {
            SegmentRegister::Cs => segment(code, CODE_RIGHTS),
            SegmentRegister::Ldtr => Segment::UNUSABLE,
            SegmentRegister::Tr => Segment::busy_tss(0, 0xffff),
            _ => segment(data, DATA_RIGHTS),
        };
        vcpu.set_segment(register, loaded);
    }
}

fn set_segments(vcpu: &mut dyn Vcpu, code: Segment, data_selector: u16) {
    const TASK_SELECTOR: u16 = 0x20;
    for register in SegmentRegister::ALL {
        let segment = match register {
            SegmentRegister::Cs => code,
            SegmentRegister::Ldtr => Segment::UNUSABLE,
            SegmentRegister::Tr => Segment::busy_tss(TASK_SELECTOR, 0x67),
            _ => Segment::flat_data32(data_selector),
        };
        vcpu.set_segment(register, segment);
    }
}

fn set_control(vcpu: &mut dyn Vcpu, cr0: Cr0Flags, cr3: u64, cr4: Cr4Flags, efer: EferFlags) {
    vcpu.set_control_registers(ControlRegisters {
        cr0: cr0.bits(),
        cr2: Gva::new(0),
        cr3,
        cr4: cr4.bits(),
        cr8: 0,
        efer: efer.bits(),
        xcr0: 1,
    });
}

fn descriptor_table(at: u32) -> DescriptorTable {
    DescriptorTable {
        base: Gva::new(u64::from(at)),
        limit: DESCRIPTORS_SIZE - 1,
    }
}
