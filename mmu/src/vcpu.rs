//! Virtual CPUs: what each knows of its registers, and the root that it enters the guest with.
//!
//! Whoever changes a register says so ([`Mmu::load_registers`], [`Mmu::set_pkru`]), which takes no lock,
//! and asks for the root before the next entry ([`Mmu::prepare_entry`]). There flushes take effect, too.

use crate::caches::ROOT;
use crate::error::MmuError;
use crate::host::{Host, Zone};
use crate::lock::Ordering;
use crate::mmu::Mmu;
use crate::registers::{
    Cr3, Difference, Format, GuestPaging, HardwareControls, InvalidPdpte, PagingRegisters, Pdptrs,
    Pkru, ShadowMode,
};
use crate::role::bits;
use crate::root::{RootKey, VcpuRoots};
use crate::zap::Batch;
use alloc::vec::Vec;
use umbra_vcpu::address::{Gfn, Gva, Hpa};

/// A virtual CPU's paging state. It belongs to the MMU that made it.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) index: usize,
    pub(crate) registers: PagingRegisters,
    pub(crate) pkru: Pkru,
    pub(crate) paging: GuestPaging,
    /// What the root for `paging` is known by.
    pub(crate) root_key: RootKey,
    /// The epoch at which the root was last found good; `None` if it must be loaded.
    pub(crate) root_epoch: Option<u64>,
    /// How often the guest has flushed translations.
    pub(crate) flushes: u64,
    /// The last of these flushes after which the root was brought up to date.
    pub(crate) synced: u64,
    pub(crate) root: Hpa,
}

impl Vcpu {
    /// The registers as they were last loaded.
    pub fn registers(&self) -> &PagingRegisters {
        &self.registers
    }

    /// PKRU as it was last set.
    pub fn pkru(&self) -> Pkru {
        self.pkru
    }

    pub(crate) const fn index(&self) -> usize {
        self.index
    }

    pub(crate) const fn paging(&self) -> &GuestPaging {
        &self.paging
    }

    pub(crate) const fn root_key(&self) -> &RootKey {
        &self.root_key
    }
}

/// Whether the hardware has another root now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RootChange {
    /// The same root as at the last entry.
    Same,
    /// Another root: the hardware must forget the virtual CPU's old translations.
    Changed,
}

/// What the hardware needs to enter the guest.
#[derive(Clone, Copy, Debug)]
pub struct HardwareRoot {
    /// For the hardware's CR3.
    pub root: Hpa,
    /// The kind of table at `root`.
    pub mode: ShadowMode,
    /// Whether that is another one than before.
    pub change: RootChange,
    /// How the guest's control registers become the hardware's.
    pub controls: HardwareControls,
}

impl<H: Host> Mmu<H> {
    /// A virtual CPU after reset.
    ///
    /// # Errors
    /// Out of memory below 4 GiB.
    pub fn create_vcpu(&self) -> Result<Vcpu, MmuError> {
        let pointers = self
            .host
            .allocate(Zone::Below4GiB)
            .ok_or(MmuError::OutOfMemory)?;
        let registers = PagingRegisters::RESET;
        let paging = GuestPaging::new(&registers, Pkru(0), self.config.features);
        let Some(index) = self.enter(VcpuRoots::new(pointers)) else {
            self.host.free(pointers);
            return Err(MmuError::OutOfMemory);
        };
        Ok(Vcpu {
            index,
            registers,
            pkru: Pkru(0),
            paging,
            root_key: RootKey::of(&paging),
            root_epoch: None,
            flushes: 0,
            synced: 0,
            root: Hpa::new(0),
        })
    }

    /// Puts a virtual CPU's roots where nobody's are. `None` if the host has no memory for the place.
    fn enter(&self, roots: VcpuRoots) -> Option<usize> {
        let mut larger = Vec::new();
        loop {
            let mut state = self.state.lock();
            let vcpus = &mut state.vcpus;
            if let Some(index) = vcpus.iter().position(Option::is_none) {
                vcpus[index] = Some(roots);
                return Some(index);
            }
            if vcpus.capacity() < larger.capacity() {
                larger.append(vcpus);
                core::mem::swap(&mut larger, vcpus);
            }
            if vcpus.len() < vcpus.capacity() {
                vcpus.push(Some(roots));
                return Some(vcpus.len() - 1);
            }
            let wanted = 2 * vcpus.len() + 4;
            drop(state);
            larger.try_reserve_exact(wanted).ok()?;
        }
    }

    /// Gives back all that a virtual CPU holds. It must not run any more.
    #[allow(clippy::needless_pass_by_value, reason = "the virtual CPU ends here")]
    pub fn destroy_vcpu(&self, vcpu: Vcpu) {
        let pointers = self.locked(|core| {
            let mut batch = Batch::new();
            core.release_all_roots(vcpu.index, &mut batch);
            core.commit(batch);
            core.state.flush_pending = true;
            core.state.vcpus[vcpu.index]
                .take()
                .map(|roots| roots.pointers)
        });
        if let Some(frame) = pointers {
            for index in 0..4 {
                self.host.store(frame, index, 0);
            }
            self.host.free(frame);
        }
    }

    /// Takes over the guest's paging registers after any of them was written. Like every such write
    /// this flushes the guest's TLB, which takes effect with the next [`Mmu::prepare_entry`].
    pub fn load_registers(&self, vcpu: &mut Vcpu, registers: PagingRegisters) {
        let difference = vcpu.registers.difference(&registers);
        vcpu.registers = registers;
        vcpu.flushes += 1;
        match difference {
            Difference::Tables => {
                vcpu.paging.set_table(&registers);
                if vcpu.root_key.set_table(&vcpu.paging) {
                    vcpu.root_epoch = None;
                }
            }
            Difference::WriteProtection => {
                vcpu.paging.set_table(&registers);
                vcpu.paging.set_write_protection(&registers);
                vcpu.root_key = RootKey::of(&vcpu.paging);
                vcpu.root_epoch = None;
            }
            Difference::Rules => self.renew(vcpu),
        }
    }

    /// Takes over PKRU after WRPKRU or XRSTOR.
    pub fn set_pkru(&self, vcpu: &mut Vcpu, pkru: Pkru) {
        if vcpu.pkru != pkru {
            vcpu.pkru = pkru;
            self.renew(vcpu);
        }
    }

    /// Derives anew what depends on the registers.
    fn renew(&self, vcpu: &mut Vcpu) {
        vcpu.paging = GuestPaging::new(&vcpu.registers, vcpu.pkru, self.config.features);
        vcpu.root_key = RootKey::of(&vcpu.paging);
        vcpu.root_epoch = None;
    }

    /// Reads the four page-directory-pointer-table entries that a load of `cr3` under PAE paging
    /// would (SDM vol. 3A 4.4.1).
    ///
    /// # Errors
    /// The first present entry with reserved bits set: #GP(0), and nothing is loaded.
    pub fn read_pdptrs(&self, cr3: Cr3) -> Result<Pdptrs, InvalidPdpte> {
        let table = cr3.pointer_table();
        let width = self.config.features.max_physical_address.min(52);
        let reserved = 0x1e6 | (u64::MAX << width);
        self.locked(|core| {
            let mut pdptrs = Pdptrs::default();
            for (index, entry) in pdptrs.0.iter_mut().enumerate() {
                let offset = table.page_offset() as usize + index * 8;
                let value = core.read_guest(Format::Pae, Gfn::containing(table), offset);
                if value & bits::PRESENT != 0 && value & reserved != 0 {
                    return Err(InvalidPdpte { index, value });
                }
                *entry = value;
            }
            Ok(pdptrs)
        })
    }

    /// Whether [`Mmu::prepare_entry`] would find nothing to do.
    #[inline]
    pub fn is_prepared(&self, vcpu: &Vcpu) -> bool {
        vcpu.root_epoch == Some(self.root_epoch.load(Ordering::Acquire))
            && vcpu.synced == vcpu.flushes
    }

    /// Makes sure that the virtual CPU has a root. Call it before every entry into the guest, unless
    /// [`Mmu::is_prepared`].
    ///
    /// # Errors
    /// See [`MmuError`]; the call can be repeated.
    pub fn prepare_entry(&self, vcpu: &mut Vcpu) -> Result<HardwareRoot, MmuError> {
        let epoch = self.root_epoch.load(Ordering::Acquire);
        let mut change = RootChange::Same;
        if vcpu.root_epoch == Some(epoch) {
            if vcpu.synced != vcpu.flushes {
                self.locked(|core| core.sync_current(vcpu.index, vcpu.flushes));
            }
        } else {
            let (index, key, paging, flushes) =
                (vcpu.index, &vcpu.root_key, &vcpu.paging, vcpu.flushes);
            let cached = self.locked(|core| {
                let change = core.use_cached_root(index, key, flushes)?;
                Some((change, core.root_address(index, paging)))
            });
            let (loaded, root) = match cached {
                Some(found) => found,
                None => self.with_relief(ROOT, |core| {
                    let change = core.load_root(index, key, paging, flushes)?;
                    Ok((change, core.root_address(index, paging)))
                })?,
            };
            if loaded == RootChange::Changed || root != vcpu.root {
                change = RootChange::Changed;
            }
            vcpu.root = root;
            vcpu.root_epoch = Some(epoch);
        }
        vcpu.synced = vcpu.flushes;
        Ok(HardwareRoot {
            root: vcpu.root,
            mode: vcpu.paging.format.shadow_mode(),
            change,
            controls: vcpu.paging.controls(),
        })
    }

    /// INVLPG, or INVPCID for one address.
    pub fn invalidate_page(&self, vcpu: &mut Vcpu, gva: Gva) {
        vcpu.flushes += 1;
        let done = self
            .locked(|core| core.invalidate_address(vcpu.index, &vcpu.root_key, gva, vcpu.flushes));
        if done {
            vcpu.synced = vcpu.flushes;
        }
    }

    /// INVPCID for more than one address, and whatever else flushes the guest's TLB. It takes effect
    /// with the next [`Mmu::prepare_entry`].
    #[allow(clippy::unused_self, reason = "the virtual CPU is this MMU's")]
    pub fn flush_guest_tlb(&self, vcpu: &mut Vcpu) {
        vcpu.flushes += 1;
    }
}
