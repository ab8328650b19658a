//! Guest registers that stay in the processor while the host runs, because the host does not use
//! them: the SYSCALL group, KERNEL_GS_BASE, TSC_AUX, DR0 to DR3 and DR6.
//!
//! Protocol: a core knows whose bank its registers hold. A vCPU takes them over before its entry, with
//! interrupts off; the previous owner's values are saved then, and not before. DR7 is in the VMCS,
//! and zero of it reaches the host, so the breakpoints sleep outside the guest.

use alloc::rc::Rc;
use core::arch::asm;
use core::cell::{Cell, RefCell};

use umbra_vcpu::debug::{DR6_BD, DR6_BS, DR6_HITS, DR6_RESET, DR6_WRITABLE};
use x86_64::registers::model_specific::Msr;

use crate::msr;

/// The model-specific registers of the bank.
const MSRS: [u32; 6] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::FMASK,
    msr::KERNEL_GS_BASE,
    msr::TSC_AUX,
];

/// One guest's values; stale while the guest owns the processor's registers.
#[derive(Debug)]
pub struct Bank {
    msrs: [Cell<u64>; MSRS.len()],
    breakpoints: [Cell<u64>; 4],
    dr6: Cell<u64>,
}

/// Whose values one core's registers hold.
#[derive(Debug)]
pub struct BankOwner {
    owner: RefCell<Option<Rc<Bank>>>,
    has_tsc_aux: bool,
}

impl Bank {
    /// The values after reset.
    pub fn new() -> Self {
        Self {
            msrs: [const { Cell::new(0) }; MSRS.len()],
            breakpoints: [const { Cell::new(0) }; 4],
            dr6: Cell::new(DR6_RESET),
        }
    }

    fn save(&self, has_tsc_aux: bool) {
        for (&index, value) in MSRS.iter().zip(&self.msrs) {
            if index != msr::TSC_AUX || has_tsc_aux {
                // SAFETY: a processor with VMX and long mode has these registers.
                value.set(unsafe { Msr::new(index).read() });
            }
        }
        let [dr0, dr1, dr2, dr3] = &self.breakpoints;
        let (zero, one, two, three, six): (u64, u64, u64, u64, u64);
        // SAFETY: reading debug registers in ring 0 with DR7.GD clear, as VM exits leave it, has no
        // effect on memory.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3", "mov {}, dr6",
                out(reg) zero, out(reg) one, out(reg) two, out(reg) three, out(reg) six,
                options(nomem, nostack, preserves_flags));
        }
        dr0.set(zero);
        dr1.set(one);
        dr2.set(two);
        dr3.set(three);
        self.dr6.set(six);
    }

    fn load(&self, has_tsc_aux: bool) {
        for (&index, value) in MSRS.iter().zip(&self.msrs) {
            if index != msr::TSC_AUX || has_tsc_aux {
                // SAFETY: the host does not use these registers; the value came from the processor or
                // passed `msr::is_valid`.
                unsafe { Msr::new(index).write(value.get()) };
            }
        }
        let [dr0, dr1, dr2, dr3] = self.breakpoints.each_ref().map(Cell::get);
        // SAFETY: the host's DR7 enables no breakpoint.
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov dr6, {}",
                in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, in(reg) self.dr6.get(),
                options(nomem, nostack, preserves_flags));
        }
    }
}

impl BankOwner {
    /// A record for a core whose registers hold nothing worth keeping.
    pub const fn new(has_tsc_aux: bool) -> Self {
        Self {
            owner: RefCell::new(None),
            has_tsc_aux,
        }
    }

    /// Makes `bank` the owner of this core's registers. Interrupts are off.
    pub fn acquire(&self, bank: &Rc<Bank>) {
        if self.owns(bank) {
            return;
        }
        let previous = self.owner.replace(Some(Rc::clone(bank)));
        if let Some(previous) = previous {
            previous.save(self.has_tsc_aux);
        }
        bank.load(self.has_tsc_aux);
    }

    /// Forgets `bank` if it is the owner; its registers are lost.
    pub fn release(&self, bank: &Rc<Bank>) {
        if self.owns(bank) {
            self.owner.replace(None);
        }
    }

    fn owns(&self, bank: &Rc<Bank>) -> bool {
        self.owner
            .borrow()
            .as_ref()
            .is_some_and(|owner| Rc::ptr_eq(owner, bank))
    }

    /// Reads a register of the bank, from the processor or from memory; `None` if it has no such.
    /// Interrupts are off.
    pub fn read(&self, bank: &Rc<Bank>, index: u32) -> Option<u64> {
        let position = self.position(index)?;
        Some(if self.owns(bank) {
            // SAFETY: the register exists, see `save`.
            unsafe { Msr::new(index).read() }
        } else {
            bank.msrs[position].get()
        })
    }

    /// Writes a register of the bank with a value that passed `msr::is_valid`; `None` if it has no
    /// such. Interrupts are off.
    pub fn write(&self, bank: &Rc<Bank>, index: u32, value: u64) -> Option<()> {
        let position = self.position(index)?;
        bank.msrs[position].set(value);
        if self.owns(bank) {
            // SAFETY: the register exists, is not the host's, and takes the value.
            unsafe { Msr::new(index).write(value) };
        }
        Some(())
    }

    /// Reads DR0 to DR3 or DR6. Interrupts are off.
    pub fn debug_register(&self, bank: &Rc<Bank>, number: u8) -> u64 {
        if self.owns(bank) {
            bank.save(self.has_tsc_aux);
        }
        match bank.breakpoints.get(usize::from(number)) {
            Some(breakpoint) => breakpoint.get(),
            None => bank.dr6.get(),
        }
    }

    /// Writes DR0 to DR3 or DR6. Interrupts are off.
    pub fn set_debug_register(&self, bank: &Rc<Bank>, number: u8, value: u64) {
        if self.owns(bank) {
            bank.save(self.has_tsc_aux);
        }
        match bank.breakpoints.get(usize::from(number)) {
            Some(breakpoint) => breakpoint.set(value),
            None => bank.dr6.set(value & DR6_WRITABLE | DR6_RESET),
        }
        if self.owns(bank) {
            bank.load(self.has_tsc_aux);
        }
    }

    fn position(&self, index: u32) -> Option<usize> {
        if index == msr::TSC_AUX && !self.has_tsc_aux {
            return None;
        }
        MSRS.iter().position(|&candidate| candidate == index)
    }
}

/// Adds the conditions that a #DB exit reports to the guest's DR6, as the processor does on
/// delivery (SDM vol. 3C 28.1, vol. 3B 18.2.3). The guest owns the bank.
pub fn report_debug_conditions(qualification: u64) {
    let mut dr6: u64;
    // SAFETY: see `save`.
    unsafe { asm!("mov {}, dr6", out(reg) dr6, options(nomem, nostack, preserves_flags)) };
    dr6 = with_debug_conditions(dr6, qualification);
    // SAFETY: the reserved bits are as the processor gave them.
    unsafe { asm!("mov dr6, {}", in(reg) dr6, options(nomem, nostack, preserves_flags)) };
}

/// DR6 after the delivery of a #DB with these conditions.
pub const fn with_debug_conditions(dr6: u64, qualification: u64) -> u64 {
    /// B0 to B3, BD, BS.
    const CONDITIONS: u64 = DR6_HITS | DR6_BD | DR6_BS;
    /// RTM is inverted: clear in DR6 when the condition is set in the qualification.
    const RTM: u64 = 1 << 16;
    (dr6 & !DR6_HITS | RTM | qualification & CONDITIONS) & !(qualification & RTM)
}
