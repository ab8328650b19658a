//! RDPKRU and WRPKRU (SDM vol. 2, their pages), which set and show what the guest's protection keys
//! forbid.
//!
//! The shadow MMU enforces the keys, so the hardware's CR4.PKE stays clear and both instructions raise
//! #UD there. A driver makes that an exit only while the guest's CR4.PKE is set; they are carried out
//! here, and any other #UD goes to the guest.

use umbra_mmu::Pkru;
use umbra_vcpu::event::Exception;
use umbra_vcpu::instruction::iced_x86::Code;
use umbra_vcpu::instruction::{self, MAX_LENGTH};
use umbra_vcpu::registers::Gpr;
use x86_64::registers::control::Cr4Flags;

use crate::emulation;
use crate::guest::{End, Guest};

/// #UD by the guest's current instruction.
pub fn invalid_opcode(guest: &mut Guest) -> Result<(), End> {
    let keys = Cr4Flags::PROTECTION_KEY_USER.bits();
    if guest.vcpu.control_registers().cr4 & keys == 0 {
        return guest.raise(Exception::INVALID_OPCODE);
    }
    let mut bytes = [0; MAX_LENGTH];
    let available = emulation::fetch(guest, &mut bytes);
    let rip = guest.vcpu.registers().rip;
    let width = guest.vcpu.code_width();
    let decoded = instruction::decode(&bytes[..available], width, rip);
    let Some(decoded) = decoded.filter(|instruction| !instruction.has_lock_prefix()) else {
        return guest.raise(Exception::INVALID_OPCODE);
    };
    let registers = guest.vcpu.registers();
    let (ecx, edx) = (
        registers.get(Gpr::Rcx) as u32,
        registers.get(Gpr::Rdx) as u32,
    );
    match decoded.code() {
        Code::Rdpkru if ecx == 0 => {
            let Pkru(rights) = guest.paging.protection_keys();
            guest.vcpu.registers_mut().set_edx_eax(rights.into());
        }
        Code::Wrpkru if ecx == 0 && edx == 0 => {
            let rights = Pkru(registers.get(Gpr::Rax) as u32);
            guest.paging.set_protection_keys(rights);
        }
        Code::Rdpkru | Code::Wrpkru => return guest.raise(Exception::GENERAL_PROTECTION),
        _ => return guest.raise(Exception::INVALID_OPCODE),
    }
    guest.vcpu.finish_instruction(decoded.next_ip());
    Ok(())
}
