//! One host core with SVM switched on: what all guests that run on it share.
//!
//! Protocol: made on the core that it describes, used and dropped there. The state behind the lock
//! is touched only with interrupts off.

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, Ordering};

use spin::Mutex;
use umbra_vcpu::Unsupported;
use umbra_vcpu::extended_state::{ExtendedState, ExtendedStateOwner, SaveMethod};
use umbra_vcpu::host::{HostMemory, PageBlock, PageBlockError};
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;

use crate::capability::{Capabilities, efer};
use crate::permission::{AddressChecks, PermissionMaps, msr};

/// SVM could not be switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnableError {
    /// The processor cannot run guests.
    Unsupported(Unsupported),
    /// The host has no memory for the processor's structures.
    Memory(PageBlockError),
}

impl fmt::Display for EnableError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(error) => error.fmt(formatter),
            Self::Memory(error) => error.fmt(formatter),
        }
    }
}

impl core::error::Error for EnableError {}

impl From<PageBlockError> for EnableError {
    fn from(error: PageBlockError) -> Self {
        Self::Memory(error)
    }
}

impl From<Unsupported> for EnableError {
    fn from(error: Unsupported) -> Self {
        Self::Unsupported(error)
    }
}

/// A host core on which SVM is switched on; dropping it switches SVM off.
#[derive(Debug)]
pub struct Core {
    pub(crate) capabilities: Capabilities,
    pub(crate) maps: PermissionMaps,
    /// Where VMSAVE puts the host's own segment bases and system-call registers.
    pub(crate) host_state: PageBlock,
    /// Where VMRUN puts the rest of the host's state; the processor's own.
    _host_save_area: PageBlock,
    /// XCR0's value between guests and the one with which state is saved; `None` without XSAVE.
    pub(crate) host_xcr0: Option<u64>,
    pub(crate) shared: Mutex<Shared>,
    /// Whose guest ran last: its shared registers are still loaded.
    current: AtomicPtr<ExtendedState>,
}

/// What the guests of a core take turns with.
#[derive(Debug)]
pub(crate) struct Shared {
    extended_state: ExtendedStateOwner,
    tsc_aux: Option<u64>,
    generation: u64,
    next_asid: u32,
    asid_count: u32,
}

/// A guest's address-space identifier, valid while the core's generation lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asid {
    pub number: u32,
    pub generation: u64,
}

impl Asid {
    /// Belongs to no generation.
    pub const NONE: Self = Self {
        number: 0,
        generation: 0,
    };
}

/// What a new address-space identifier asks of the next VMRUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recycled {
    No,
    /// All numbers were used: the TLB must be flushed of all of them.
    Yes,
}

impl Core {
    /// Switches SVM on.
    ///
    /// # Safety
    /// The caller runs in ring 0, stays on this core as long as the value and every guest made from
    /// it live, and nothing else uses SVM on it.
    ///
    /// # Errors
    /// [`EnableError`] if the processor cannot run guests or memory is missing.
    pub unsafe fn enable(memory: &dyn HostMemory) -> Result<Self, EnableError> {
        let capabilities = Capabilities::discover()?;
        let extended_features = Msr::new(msr::EFER);
        // SAFETY: EFER exists in long mode.
        let old_efer = unsafe { extended_features.read() };
        if old_efer & efer::SVME != 0 {
            return Err(EnableError::Unsupported(Unsupported {
                reason: "SVM is in use already (EFER.SVME is set)",
            }));
        }
        if !Cr4::read().contains(Cr4Flags::OSFXSR) {
            return Err(EnableError::Unsupported(Unsupported {
                reason: "the host has not enabled FXSAVE (CR4.OSFXSR is clear)",
            }));
        }
        let host_xcr0 = Cr4::read().contains(Cr4Flags::OSXSAVE).then(read_xcr0);
        let method = match host_xcr0 {
            Some(components) => SaveMethod::Xsave { components },
            None => SaveMethod::Fxsave,
        };
        let maps = PermissionMaps::new(memory, address_checks())?;
        let host_state = PageBlock::new(1, memory)?;
        let host_save_area = PageBlock::new(1, memory)?;
        // SAFETY: SVM exists and is not disabled, so that SVME may be set; the host-save area is a
        // page that lives until SVME is cleared.
        unsafe {
            Msr::new(msr::EFER).write(old_efer | efer::SVME);
            Msr::new(msr::VM_HSAVE_PA).write(host_save_area.physical_address().as_u64());
        }
        Ok(Self {
            capabilities,
            maps,
            host_state,
            _host_save_area: host_save_area,
            host_xcr0,
            current: AtomicPtr::new(core::ptr::null_mut()),
            shared: Mutex::new(Shared {
                extended_state: ExtendedStateOwner::new(method),
                tsc_aux: None,
                generation: 1,
                next_asid: 1,
                asid_count: capabilities.asid_count,
            }),
        })
    }

    /// What the processor offers.
    pub const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The extended-state components that a guest may enable in XCR0; 0 if the host does not use
    /// XSAVE, and then a guest must not set CR4.OSXSAVE.
    pub fn extended_components(&self) -> u64 {
        self.host_xcr0.unwrap_or(0)
    }

    /// Whether the guest with this extended state ran last.
    pub(crate) fn is_current(&self, state: NonNull<ExtendedState>) -> bool {
        self.current.load(Ordering::Relaxed) == state.as_ptr()
    }

    /// Notes that the guest with this extended state runs next.
    pub(crate) fn set_current(&self, state: NonNull<ExtendedState>) {
        self.current.store(state.as_ptr(), Ordering::Relaxed);
    }

    /// Forgets a guest's extended state before it is dropped.
    pub(crate) fn release(&self, state: NonNull<ExtendedState>) {
        if self.is_current(state) {
            self.current.store(core::ptr::null_mut(), Ordering::Relaxed);
        }
        self.shared.lock().extended_state.release(state);
    }
}

/// Whether this processor refuses addresses that are not canonical in WRMSR. QEMU's software
/// emulation, which names itself in the hypervisor leaf of CPUID, does not.
fn address_checks() -> AddressChecks {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    const HYPERVISOR_LEAF: u32 = 0x4000_0000;
    let signature = __cpuid(HYPERVISOR_LEAF);
    let words = [signature.ebx, signature.ecx, signature.edx];
    let tcg = words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .eq(*b"TCGTCGTCGTCG");
    if __cpuid(1).ecx & HYPERVISOR_PRESENT != 0 && tcg {
        AddressChecks::Driver
    } else {
        AddressChecks::Processor
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // SAFETY: SVM was switched on by `enable` on this core, where no guest runs any more, and
        // the host-save area is freed only after this.
        unsafe {
            let old_efer = Msr::new(msr::EFER).read();
            Msr::new(msr::EFER).write(old_efer & !efer::SVME);
            Msr::new(msr::VM_HSAVE_PA).write(0);
        }
    }
}

impl Shared {
    /// A number that no translation of the TLB has.
    pub fn allocate_asid(&mut self) -> (Asid, Recycled) {
        let mut recycled = Recycled::No;
        if self.next_asid >= self.asid_count {
            self.next_asid = 1;
            self.generation += 1;
            recycled = Recycled::Yes;
        }
        let asid = Asid {
            number: self.next_asid,
            generation: self.generation,
        };
        self.next_asid += 1;
        (asid, recycled)
    }

    /// Whether `asid` still belongs to its guest alone.
    pub const fn is_current(&self, asid: Asid) -> bool {
        asid.generation == self.generation
    }

    /// Loads TSC_AUX if another guest's value stands there. The host does not use it.
    ///
    /// # Safety
    /// Ring 0, on a processor that has RDTSCP; `value` has at most 32 bits.
    pub unsafe fn load_tsc_aux(&mut self, value: u64) {
        if self.tsc_aux != Some(value) {
            // SAFETY: the register exists and takes 32 bits.
            unsafe { Msr::new(msr::TSC_AUX).write(value) };
            self.tsc_aux = Some(value);
        }
    }

    /// Puts the guest's extended state into the processor.
    ///
    /// # Safety
    /// Ring 0, interrupts off, on this core; `state` stays in place until it is released.
    pub unsafe fn acquire_extended_state(&mut self, state: NonNull<ExtendedState>) {
        if self.extended_state.is_owner(state) {
            return;
        }
        unblock_extended_registers();
        // SAFETY: TS and EM are clear, OSFXSR and XCR0 are as `enable` has found them; the caller
        // promises the rest.
        unsafe { self.extended_state.acquire(state) };
    }

    /// Takes the guest's extended state out of the processor.
    ///
    /// # Safety
    /// As [`Shared::acquire_extended_state`].
    pub unsafe fn suspend_extended_state(&mut self, state: NonNull<ExtendedState>) {
        unblock_extended_registers();
        // SAFETY: as for `acquire_extended_state`.
        unsafe { self.extended_state.suspend(state) };
    }
}

/// Makes the extended registers accessible.
fn unblock_extended_registers() {
    // The kernel sets CR0.TS at each task switch. The host uses no extended registers, so
    // clearing it here takes nothing from anybody.
    let flags = Cr0::read();
    let blocking = Cr0Flags::TASK_SWITCHED | Cr0Flags::EMULATE_COPROCESSOR;
    if flags.intersects(blocking) {
        // SAFETY: these two bits only concern the registers that are switched here.
        unsafe { Cr0::write(flags - blocking) };
    }
}

/// Reads XCR0. The host has CR4.OSXSAVE set.
pub(crate) fn read_xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: callers have checked CR4.OSXSAVE, and the instruction only reads.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes XCR0.
///
/// # Safety
/// Ring 0 with CR4.OSXSAVE set; the processor supports `value`, and what saves extended state
/// knows of it.
pub(crate) unsafe fn write_xcr0(value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nomem, nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(asid_count: u32) -> Shared {
        Shared {
            extended_state: ExtendedStateOwner::new(SaveMethod::Fxsave),
            tsc_aux: None,
            generation: 1,
            next_asid: 1,
            asid_count,
        }
    }

    #[test]
    fn identifiers_never_repeat_within_a_generation() {
        let mut shared = shared(4);
        assert!(!shared.is_current(Asid::NONE));
        let first: [_; 3] = core::array::from_fn(|_| shared.allocate_asid());
        assert_eq!(first.map(|(asid, _)| asid.number), [1, 2, 3]);
        assert!(first.iter().all(|(_, recycled)| *recycled == Recycled::No));
        let (next, recycled) = shared.allocate_asid();
        assert_eq!((next.number, recycled), (1, Recycled::Yes));
        assert!(shared.is_current(next));
        assert!(!shared.is_current(first[0].0), "the old generation is over");
    }
}
