//! One core in VMX operation, and the host state that every VM exit restores on it.
//!
//! Protocol: [`Vmx::enable`] turns VMX on for the core that calls it; everything made from the value
//! stays on that core (no type here is `Send`), and the last of it to be dropped turns VMX off.
//! Everything that depends on which VMCS is current happens with interrupts off.

use alloc::rc::Rc;
use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::cell::{Cell, RefCell};
use core::fmt;
use core::ptr::NonNull;

use umbra_vcpu::Unsupported;
use umbra_vcpu::address::Hpa;
use umbra_vcpu::extended_state::{ExtendedState, ExtendedStateOwner, SaveMethod};
use umbra_vcpu::host::{HostMemory, PageBlock, PageBlockError};
use x86_64::instructions::interrupts;
use x86_64::instructions::tables::{sgdt, sidt};
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;
use x86_64::registers::segmentation::{CS, DS, ES, SS, Segment as _};

use crate::bank::BankOwner;
use crate::capabilities::{Capabilities, FeatureControl};
use crate::instructions::{self, CurrentVmcs};
use crate::{entry, fields, msr};

/// VMX cannot be used on this core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnableError {
    /// The processor or its firmware does not allow it.
    Unsupported(Unsupported),
    /// The host has no memory for it.
    Memory(PageBlockError),
}

impl From<Unsupported> for EnableError {
    fn from(error: Unsupported) -> Self {
        Self::Unsupported(error)
    }
}

impl From<PageBlockError> for EnableError {
    fn from(error: PageBlockError) -> Self {
        Self::Memory(error)
    }
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

/// Checks whether this core can be put into VMX operation, without doing it.
///
/// # Errors
/// [`Unsupported`] with the reason.
pub fn probe() -> Result<(), Unsupported> {
    const VMX: u32 = 1 << 5;
    if __cpuid(1).ecx & VMX == 0 {
        return Err(Unsupported {
            reason: "this processor has no VMX (CPUID.1:ECX bit 5)",
        });
    }
    // SAFETY: processors with VMX have this register.
    FeatureControl::judge(unsafe { Msr::new(FeatureControl::MSR).read() })?;
    // SAFETY: the capability registers exist with VMX; those that depend on others are read only if
    // these announce them.
    Capabilities::discover(|index| unsafe { Msr::new(index).read() }).map(|_| ())
}

/// VMX operation on this core. Clones stand for the same operation.
#[derive(Clone, Debug)]
pub struct Vmx {
    core: Rc<Core>,
}

impl Vmx {
    /// Puts this core into VMX operation.
    ///
    /// # Errors
    /// [`EnableError`] with the reason; nothing has changed then, except that an unlocked
    /// IA32_FEATURE_CONTROL may have been set and locked.
    ///
    /// # Safety
    /// 1. The caller runs in ring 0 in 64-bit mode, and the value and all that is made of it stay
    ///    on this core.
    /// 2. Host code uses neither x87, SSE and AVX registers, nor DR0 to DR3 and DR7, nor the SYSCALL
    ///    registers, SWAPGS and TSC_AUX.
    /// 3. This core's GDT, IDT, TSS, CR3 and GS base stay as they are; RAM is mapped as `memory` says.
    pub unsafe fn enable(memory: &dyn HostMemory) -> Result<Self, EnableError> {
        probe()?;
        // SAFETY: `probe` has found VMX, so the registers exist.
        let capabilities = Capabilities::discover(|index| unsafe { Msr::new(index).read() })?;
        let region = PageBlock::new(1, memory)?;
        // SAFETY: the block is ours and at least four bytes long.
        unsafe { region.pointer().cast::<u32>().write(capabilities.revision) };
        let bitmap = PageBlock::new(1, memory)?;
        // SAFETY: the block is a page, and nobody else knows it yet.
        unsafe { msr::fill_bitmap(bitmap.pointer()) };
        // SAFETY: the caller's promise 1.
        interrupts::without_interrupts(|| unsafe { enter_vmx_operation(&capabilities, &region) })?;
        Ok(Self {
            core: Rc::new(Core {
                capabilities,
                _region: region,
                msr_bitmap: bitmap,
                current: Cell::new(None),
                entered: Cell::new(None),
                extended: RefCell::new(ExtendedStateOwner::new(save_method())),
                bank: BankOwner::new(has_rdtscp()),
                vpids: RefCell::new(VpidAllocator::new()),
                host_xcr0: host_xcr0(),
                linear_bits: linear_bits(),
                physical_bits: __cpuid(0x8000_0008).eax & 0xff,
            }),
        })
    }

    /// What this core's VMX can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.core.capabilities
    }

    /// The extended-state components that a guest may enable in XCR0; 0 if the host does not use
    /// XSAVE, and then a guest must not set CR4.OSXSAVE.
    pub fn extended_components(&self) -> u64 {
        self.core.host_xcr0.unwrap_or(0)
    }

    pub(crate) fn core(&self) -> Rc<Core> {
        Rc::clone(&self.core)
    }
}

/// # Safety
/// As [`Vmx::enable`] 1, with interrupts off.
unsafe fn enter_vmx_operation(
    capabilities: &Capabilities,
    region: &PageBlock,
) -> Result<(), Unsupported> {
    if Cr4::read_raw() & Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits() != 0 {
        return Err(Unsupported {
            reason: "VMX is already in use on this core (CR4.VMXE is set)",
        });
    }
    let mut feature_control = Msr::new(FeatureControl::MSR);
    // SAFETY: the register exists with VMX.
    let state = unsafe { feature_control.read() };
    if let FeatureControl::Unlocked(value) = FeatureControl::judge(state)? {
        // SAFETY: an unlocked register takes the value.
        unsafe { feature_control.write(value) };
    }
    let cr0 = Cr0::read_raw() | Cr0Flags::NUMERIC_ERROR.bits();
    let cr4 = Cr4::read_raw() | Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits();
    if !capabilities.cr0.accepts(cr0) || !capabilities.cr4.accepts(cr4) {
        return Err(Unsupported {
            reason: "the host's CR0 or CR4 has values that VMX does not allow",
        });
    }
    // SAFETY: NE only chooses how x87 errors are reported, VMXE only permits VMXON.
    unsafe {
        Cr0::write_raw(cr0);
        Cr4::write_raw(cr4);
    }
    // SAFETY: CR0 and CR4 have just been prepared and the region has its revision.
    if unsafe { instructions::vmxon(region.physical_address()) }.is_err() {
        // SAFETY: as it was before.
        unsafe { Cr4::write_raw(cr4 & !Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits()) };
        return Err(Unsupported {
            reason: "VMXON failed",
        });
    }
    Ok(())
}

/// What the vCPUs on one core share.
pub(crate) struct Core {
    pub(crate) capabilities: Capabilities,
    /// Used by the processor until VMXOFF.
    _region: PageBlock,
    pub(crate) msr_bitmap: PageBlock,
    current: Cell<Option<Hpa>>,
    /// The VMCS of the vCPU that was entered last, while the processor holds all that belongs to it.
    entered: Cell<Option<Hpa>>,
    extended: RefCell<ExtendedStateOwner>,
    pub(crate) bank: BankOwner,
    vpids: RefCell<VpidAllocator>,
    /// The host's XCR0 if CR4.OSXSAVE is set.
    host_xcr0: Option<u64>,
    pub(crate) linear_bits: u32,
    pub(crate) physical_bits: u32,
}

impl fmt::Debug for Core {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Core")
            .field("capabilities", &self.capabilities)
            .field("current", &self.current)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// Makes `vmcs` current. Interrupts are off, and stay so while the token lives.
    ///
    /// # Safety
    /// `vmcs` belongs to a live vCPU of this core and has been through VMCLEAR.
    #[inline]
    pub(crate) unsafe fn make_current(&self, vmcs: Hpa) -> CurrentVmcs {
        if self.current.get() != Some(vmcs) {
            // SAFETY: the caller's promise; the core is in VMX operation while `self` lives.
            let loaded = unsafe { instructions::vmptrld(vmcs) };
            assert!(loaded.is_ok(), "VMPTRLD of a vCPU's own VMCS failed");
            self.current.set(Some(vmcs));
        }
        // SAFETY: it is current now, and the caller keeps interrupts off.
        unsafe { CurrentVmcs::new() }
    }

    /// Takes `vmcs` off the core, marked as not launched. Interrupts are off.
    ///
    /// # Safety
    /// `vmcs` is a page that its vCPU owns.
    pub(crate) unsafe fn clear(&self, vmcs: Hpa) {
        // SAFETY: the caller's promise.
        let cleared = unsafe { instructions::vmclear(vmcs) };
        assert!(cleared.is_ok(), "VMCLEAR of a vCPU's own VMCS failed");
        if self.current.get() == Some(vmcs) {
            self.current.set(None);
        }
        if self.entered.get() == Some(vmcs) {
            self.entered.set(None);
        }
    }

    /// Whether the vCPU with this VMCS was entered last, and the processor still holds its pass-through
    /// registers and its extended state.
    #[inline]
    pub(crate) fn is_entered(&self, vmcs: Hpa) -> bool {
        self.entered.get() == Some(vmcs)
    }

    /// Notes that the processor holds all that belongs to the vCPU with this VMCS.
    pub(crate) fn set_entered(&self, vmcs: Hpa) {
        self.entered.set(Some(vmcs));
    }

    /// A virtual processor identifier that nobody uses, without translations of an earlier user.
    pub(crate) fn allocate_vpid(&self) -> Option<u16> {
        self.capabilities.vpid?;
        let vpid = self.vpids.borrow_mut().allocate()?;
        // SAFETY: the type exists, or `capabilities.vpid` would be `None`.
        unsafe { instructions::invvpid(vpid, instructions::Invvpid::SingleContext) }.ok()?;
        Some(vpid)
    }

    pub(crate) fn free_vpid(&self, vpid: u16) {
        self.vpids.borrow_mut().free(vpid);
    }

    /// Puts the guest's x87, SSE and AVX state into the processor. Interrupts are off.
    ///
    /// # Safety
    /// `state` lives and stays in place until [`Core::release_extended_state`].
    #[inline]
    pub(crate) unsafe fn acquire_extended_state(&self, state: NonNull<ExtendedState>) {
        let mut owner = self.extended.borrow_mut();
        if owner.is_owner(state) {
            return;
        }
        // SAFETY: the registers may be switched within; the state's life is the caller's promise.
        self.with_extended_registers(|| unsafe { owner.acquire(state) });
    }

    /// Takes the guest's x87, SSE and AVX state out of the processor. Interrupts are off.
    ///
    /// # Safety
    /// As [`Core::acquire_extended_state`].
    pub(crate) unsafe fn suspend_extended_state(&self, state: NonNull<ExtendedState>) {
        self.entered.set(None);
        let mut owner = self.extended.borrow_mut();
        // SAFETY: the registers may be switched within; the state's life is the caller's promise.
        self.with_extended_registers(|| unsafe { owner.suspend(state) });
    }

    /// Runs `switch` where all extended registers can be accessed.
    fn with_extended_registers(&self, switch: impl FnOnce()) {
        let cr0 = Cr0::read_raw();
        // SAFETY: CR0.TS and EM are clear for the switch (the host's scheduler leaves TS set), and XCR0
        // has all components; both are put back.
        unsafe {
            Cr0::write_raw(cr0 & !(Cr0Flags::TASK_SWITCHED | Cr0Flags::EMULATE_COPROCESSOR).bits());
            if let (Some(host), SaveMethod::Xsave { components }) = (self.host_xcr0, save_method())
            {
                write_xcr0(components);
                switch();
                write_xcr0(host);
            } else {
                switch();
            }
            Cr0::write_raw(cr0);
        }
    }

    pub(crate) fn release_extended_state(&self, state: NonNull<ExtendedState>) {
        self.extended.borrow_mut().release(state);
    }

    /// The value that XCR0 must have in the guest if it is not the host's, and the host's.
    #[inline]
    pub(crate) fn foreign_xcr0(&self, guest_xcr0: u64) -> Option<XcrPair> {
        self.host_xcr0
            .filter(|&host| host != guest_xcr0)
            .map(|host| XcrPair {
                guest: guest_xcr0,
                host,
            })
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // SAFETY: the last vCPU and the last handle are gone, so no VMCS is in use; CR4.VMXE may be
        // cleared after VMXOFF.
        interrupts::without_interrupts(|| unsafe {
            instructions::vmxoff();
            Cr4::write_raw(Cr4::read_raw() & !Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits());
        });
    }
}

/// XCR0 in the guest and in the host where they differ.
#[derive(Clone, Copy, Debug)]
pub(crate) struct XcrPair {
    pub(crate) guest: u64,
    pub(crate) host: u64,
}

/// Loads XCR0.
///
/// # Safety
/// CR4.OSXSAVE is set; `value` is one that XSETBV takes.
pub(crate) unsafe fn write_xcr0(value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nomem, nostack, preserves_flags));
    }
}

fn has_xsave() -> bool {
    const XSAVE: u32 = 1 << 26;
    __cpuid(1).ecx & XSAVE != 0
}

fn save_method() -> SaveMethod {
    if has_xsave() && host_xcr0().is_some() {
        let leaf = __cpuid_count(0xd, 0);
        SaveMethod::Xsave {
            components: u64::from(leaf.edx) << 32 | u64::from(leaf.eax),
        }
    } else {
        SaveMethod::Fxsave
    }
}

/// The host's XCR0, if it has turned XSAVE on.
fn host_xcr0() -> Option<u64> {
    if Cr4::read_raw() & Cr4Flags::OSXSAVE.bits() == 0 {
        return None;
    }
    let (low, high): (u32, u32);
    // SAFETY: CR4.OSXSAVE is set.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    Some(u64::from(high) << 32 | u64::from(low))
}

fn has_rdtscp() -> bool {
    const RDTSCP: u32 = 1 << 27;
    __cpuid(0x8000_0001).edx & RDTSCP != 0
}

/// 57 with five-level paging, else 48 (SDM vol. 3A 3.3.7.1).
fn linear_bits() -> u32 {
    const LA57: u32 = 1 << 16;
    if __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & LA57 != 0 {
        57
    } else {
        48
    }
}

/// Virtual processor identifiers: 0 is the host's.
#[derive(Debug)]
struct VpidAllocator {
    /// A set bit is taken; more guests than bits run without an identifier of their own.
    taken: u64,
}

impl VpidAllocator {
    const fn new() -> Self {
        Self { taken: 1 }
    }

    fn allocate(&mut self) -> Option<u16> {
        let free = self.taken.trailing_ones();
        if free >= u64::BITS {
            return None;
        }
        self.taken |= 1 << free;
        Some(free as u16)
    }

    fn free(&mut self, vpid: u16) {
        self.taken &= !(1 << vpid) | 1;
    }
}

/// Writes the host state that never changes on this core (SDM vol. 3C 25.5).
pub(crate) fn write_constant_host_state(vmcs: &CurrentVmcs, capabilities: &Capabilities) {
    let (gdt, idt) = (sgdt(), sidt());
    let task = task_register();
    vmcs.write(fields::HOST_CR0, Cr0::read_raw());
    let (frame, flags) = Cr3::read_raw();
    vmcs.write(
        fields::HOST_CR3,
        frame.start_address().as_u64() | u64::from(flags),
    );
    vmcs.write(fields::HOST_CR4, Cr4::read_raw());
    vmcs.write(fields::HOST_CS_SELECTOR, CS::get_reg().0);
    vmcs.write(fields::HOST_SS_SELECTOR, SS::get_reg().0);
    vmcs.write(fields::HOST_DS_SELECTOR, DS::get_reg().0);
    vmcs.write(fields::HOST_ES_SELECTOR, ES::get_reg().0);
    // The bases of FS and GS have fields of their own.
    vmcs.write(fields::HOST_FS_SELECTOR, 0);
    vmcs.write(fields::HOST_GS_SELECTOR, 0);
    vmcs.write(fields::HOST_TR_SELECTOR, task);
    vmcs.write(fields::HOST_TR_BASE, tss_base(gdt.base.as_u64(), task));
    vmcs.write(fields::HOST_GDTR_BASE, gdt.base.as_u64());
    vmcs.write(fields::HOST_IDTR_BASE, idt.base.as_u64());
    for (index, field) in [
        (msr::GS_BASE, fields::HOST_GS_BASE),
        (msr::SYSENTER_ESP, fields::HOST_SYSENTER_ESP),
        (msr::SYSENTER_EIP, fields::HOST_SYSENTER_EIP),
    ] {
        // SAFETY: processors with VMX and long mode have these registers.
        vmcs.write(field, unsafe { Msr::new(index).read() });
    }
    // SAFETY: as above.
    let sysenter_cs = unsafe { Msr::new(msr::SYSENTER_CS).read() };
    vmcs.write(fields::HOST_SYSENTER_CS, sysenter_cs as u32);
    if capabilities.has_efer_controls() {
        vmcs.write(fields::HOST_EFER, host_efer());
    }
    vmcs.write(fields::HOST_RIP, entry::exit_address());
}

pub(crate) fn host_efer() -> u64 {
    // SAFETY: the register exists in long mode.
    unsafe { Msr::new(msr::EFER).read() }
}

/// The base of FS, which the host's scheduler changes from task to task.
#[inline]
pub(crate) fn fs_base() -> u64 {
    if Cr4::read_raw() & Cr4Flags::FSGSBASE.bits() != 0 {
        let base: u64;
        // SAFETY: CR4.FSGSBASE is set.
        unsafe { asm!("rdfsbase {}", out(reg) base, options(nomem, nostack, preserves_flags)) };
        base
    } else {
        // SAFETY: the register exists in long mode.
        unsafe { Msr::new(msr::FS_BASE).read() }
    }
}

fn task_register() -> u16 {
    let selector: u16;
    // SAFETY: STR has no effect besides its result.
    unsafe { asm!("str {:x}", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector
}

/// The base in the 16-byte descriptor of a 64-bit TSS (SDM vol. 3A figure 8-4).
fn tss_base(gdt: u64, selector: u16) -> u64 {
    let descriptor = (gdt + u64::from(selector & !7)) as *const u64;
    // SAFETY: the task register was loaded from this descriptor, so the GDT holds it.
    let (low, high) = unsafe { (descriptor.read(), descriptor.add(1).read()) };
    (low >> 16 & 0xff_ffff) | (low >> 56 & 0xff) << 24 | (high & 0xffff_ffff) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_unique_and_reused() {
        let mut vpids = VpidAllocator::new();
        let all: alloc::vec::Vec<u16> = core::iter::from_fn(|| vpids.allocate()).collect();
        assert_eq!(all, (1..64).collect::<alloc::vec::Vec<u16>>());
        vpids.free(7);
        assert_eq!(vpids.allocate(), Some(7));
        vpids.free(0);
        assert_eq!(vpids.allocate(), None, "0 is the host's");
    }
}
