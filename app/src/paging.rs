//! The guest's memory as its processor sees it: the shadow MMU with the registers that steer it.
//!
//! Protocol: whoever changes CR0, CR3, CR4 or EFER calls [`Paging::load_registers`] before the
//! next entry, with the registers that the architecture's checks have passed.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use umbra_inspect::GuestView;
use umbra_machine::ProcessorNumber;
use umbra_mmu::{
    Access, AccessKind, Cr3, Fault, FaultOutcome, GuestEnd, Inspection, InvalidPdpte, Marking, Mmu,
    MmuError, PageFault, PagingRegisters, Pkru, RootChange, TranslateError, Vcpu as PagingVcpu,
};
use umbra_report::options::ShrinkPoint;
use umbra_vcpu::address::{Gpa, Gva, Hpa, PAGE_SIZE, Pfn};
use umbra_vcpu::instruction::MAX_LENGTH;
use umbra_vcpu::registers::ControlRegisters;
use umbra_vcpu::{CodeReader, PrivilegeLevel, ShadowMode, ShadowPaging, Vcpu};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::registers::model_specific::EferFlags;
use x86_64::registers::rflags::RFlags;
use x86_64::structures::idt::PageFaultErrorCode;

use crate::memory::{GuestHost, Unwritable};
use crate::physical::{self, ENTRIES};

/// A guest's shadow MMU and one processor's part in it.
pub struct Paging {
    mmu: Arc<Mmu<GuestHost>>,
    number: ProcessorNumber,
    vcpu: PagingVcpu,
    code_page: Option<CodePage>,
    /// What the hardware walks since the last entry.
    root: ShadowPaging,
    /// Pages of code that were found by walking as the hardware does. Like the processor's TLB they hold
    /// as long as nothing asks for a flush.
    peeked: [Option<Peeked>; PEEKED],
}

/// How many pages of code are kept.
const PEEKED: usize = 8;

/// A page of code and where it is.
#[derive(Clone, Copy)]
struct Peeked {
    root: Hpa,
    page: Gva,
    frame: Pfn,
}

/// Where instructions were last fetched from. Like an entry of a processor's instruction TLB it
/// holds until the guest drops translations, and it only ever holds what was allowed.
#[derive(Clone, Copy)]
struct CodePage {
    page: Gva,
    level: PrivilegeLevel,
    frame: Gpa,
}

impl Paging {
    /// The view of a processor that has just been reset.
    ///
    /// # Errors
    /// [`MmuError`] if there is no memory for it.
    pub fn new(mmu: Arc<Mmu<GuestHost>>, number: ProcessorNumber) -> Result<Self, MmuError> {
        let vcpu = mmu.create_vcpu()?;
        Ok(Self {
            mmu,
            number,
            vcpu,
            code_page: None,
            root: ShadowPaging {
                root: Hpa::new(0),
                mode: ShadowMode::Pae,
            },
            peeked: [None; PEEKED],
        })
    }

    /// The guest's MMU.
    pub const fn mmu(&self) -> &Arc<Mmu<GuestHost>> {
        &self.mmu
    }

    /// Takes over changed control registers.
    ///
    /// # Errors
    /// [`InvalidPdpte`] if they make the processor load page-directory pointers with reserved bits;
    /// nothing has changed then, and the guest gets #GP(0).
    pub fn load_registers(&mut self, control: &ControlRegisters) -> Result<(), InvalidPdpte> {
        let mut registers = PagingRegisters {
            cr0: Cr0Flags::from_bits_retain(control.cr0),
            cr3: Cr3::new(control.cr3),
            cr4: Cr4Flags::from_bits_retain(control.cr4),
            efer: EferFlags::from_bits_retain(control.efer),
            pdptrs: self.vcpu.registers().pdptrs,
        };
        if registers.uses_pdptrs() {
            registers.pdptrs = self.mmu.read_pdptrs(registers.cr3)?;
        }
        self.code_page = None;
        self.mmu.host().shrinks().pass(ShrinkPoint::Cr3);
        self.mmu.load_registers(&mut self.vcpu, registers);
        self.mmu.host().shrinks().pass(ShrinkPoint::Cr3);
        Ok(())
    }

    /// What the guest's protection keys forbid, while its CR4.PKE is set.
    pub fn protection_keys(&self) -> Pkru {
        self.vcpu.pkru()
    }

    /// WRPKRU.
    pub fn set_protection_keys(&mut self, rights: Pkru) {
        self.mmu.set_pkru(&mut self.vcpu, rights);
    }

    /// Makes sure that the next entry has a root. Whether it is another one than at the last entry.
    ///
    /// # Errors
    /// [`MmuError`] if there is no page for it.
    #[inline]
    pub fn prepare_entry(&mut self) -> Result<RootChange, MmuError> {
        if self.mmu.is_prepared(&self.vcpu) {
            return Ok(RootChange::Same);
        }
        let entry = self.mmu.prepare_entry(&mut self.vcpu)?;
        let mode = match entry.mode {
            umbra_mmu::ShadowMode::Pae => ShadowMode::Pae,
            umbra_mmu::ShadowMode::FourLevel => ShadowMode::FourLevel,
            umbra_mmu::ShadowMode::FiveLevel => ShadowMode::FiveLevel,
        };
        self.root = ShadowPaging {
            root: entry.root,
            mode,
        };
        Ok(entry.change)
    }

    /// What the hardware walks at the next entry, once that is prepared.
    pub const fn root(&self) -> ShadowPaging {
        self.root
    }

    /// Whether the MMU has asked for a flush since the last call.
    #[inline]
    pub fn take_flush_request(&mut self) -> bool {
        let requested = self.mmu.host().take_flush_request(self.number);
        if requested {
            self.peeked = [None; PEEKED];
        }
        requested
    }

    /// Handles a page fault that the hardware met in the shadow tables.
    ///
    /// # Errors
    /// [`MmuError`] if there is no page to fix it with.
    pub fn handle_fault(
        &mut self,
        vcpu: &dyn Vcpu,
        gva: Gva,
        error: PageFaultErrorCode,
    ) -> Result<FaultOutcome, MmuError> {
        let fault = Fault {
            gva,
            error,
            cpl: vcpu.privilege_level() as u8,
            rflags: RFlags::from_bits_retain(vcpu.registers().rflags),
        };
        self.mmu.handle_page_fault(&mut self.vcpu, &fault)
    }

    /// INVLPG.
    pub fn invalidate_page(&mut self, gva: Gva) {
        self.code_page = None;
        self.peeked = [None; PEEKED];
        self.mmu.invalidate_page(&mut self.vcpu, gva);
    }

    /// Translates an address for an access that the host makes for the guest's current instruction.
    ///
    /// # Errors
    /// The page fault that the guest must see.
    pub fn translate(&self, vcpu: &dyn Vcpu, gva: Gva, kind: AccessKind) -> Result<Gpa, PageFault> {
        let access = Access {
            kind,
            cpl: vcpu.privilege_level() as u8,
            rflags: RFlags::from_bits_retain(vcpu.registers().rflags),
            marking: Marking::SetAccessedDirty,
        };
        self.translate_for(gva, &access)
    }

    fn translate_for(&self, gva: Gva, access: &Access) -> Result<Gpa, PageFault> {
        loop {
            match self.mmu.translate(&self.vcpu, gva, access) {
                Ok(gpa) => return Ok(gpa),
                Err(TranslateError::Fault(fault)) => return Err(fault),
                // Another processor has changed the tables meanwhile.
                Err(TranslateError::Retry) => {}
            }
        }
    }

    /// Translates an address that the processor itself accesses: a descriptor table or the like.
    ///
    /// # Errors
    /// The page fault that the guest must see.
    pub fn translate_system(&self, gva: Gva, kind: AccessKind) -> Result<Gpa, PageFault> {
        self.translate_for(
            gva,
            &Access {
                kind,
                cpl: 0,
                // No AC: it does not open user pages to such accesses (SDM vol. 3A 4.6).
                rflags: RFlags::empty(),
                marking: Marking::SetAccessedDirty,
            },
        )
    }

    /// Whether `length` bytes at an address are RAM.
    pub fn is_ram(&self, gpa: Gpa, length: usize) -> bool {
        self.mmu.host().contains(gpa, length as u64)
    }

    /// Copies RAM out.
    pub fn read_ram(&self, gpa: Gpa, buffer: &mut [u8]) {
        self.mmu.host().ram().read(gpa, buffer);
    }

    /// Copies bytes into RAM, as a store of the guest does: page tables there take effect.
    ///
    /// # Errors
    /// [`Unwritable`] if it is no RAM, or the host has none to put there.
    pub fn write_ram(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unwritable> {
        self.mmu.host().write(gpa, bytes)?;
        self.mmu.track_guest_write(gpa, bytes.len());
        Ok(())
    }
}

impl Paging {
    /// The guest-physical page behind a page of code, if `level` may execute there.
    fn code_frame(&mut self, page: Gva, level: PrivilegeLevel) -> Option<Gpa> {
        if let Some(known) = self.code_page
            && known.page == page
            && known.level == level
        {
            return Some(known.frame);
        }
        let access = Access {
            kind: AccessKind::Execute,
            cpl: level as u8,
            rflags: RFlags::empty(),
            marking: Marking::Leave,
        };
        let frame = loop {
            match self.mmu.translate(&self.vcpu, page, &access) {
                Ok(frame) => break frame,
                Err(TranslateError::Fault(_)) => return None,
                // Another processor has changed the tables meanwhile.
                Err(TranslateError::Retry) => {}
            }
        };
        self.code_page = Some(CodePage { page, level, frame });
        Some(frame)
    }
}

impl Paging {
    /// The frame behind an address, by the tables that the hardware walks; `None` if they have none.
    fn hardware_frame(&self, address: Gva) -> Option<Pfn> {
        const PRESENT: u64 = 1 << 0;
        const LARGE: u64 = 1 << 7;
        const FRAME: u64 = 0x000f_ffff_ffff_f000;
        let levels = match self.root.mode {
            ShadowMode::Pae => 3,
            ShadowMode::FourLevel => 4,
            ShadowMode::FiveLevel => 5,
        };
        let page = address.as_u64() >> 12;
        // Outside long mode the table of four entries has a frame of its own, too.
        let mut table = Pfn::containing(self.root.root);
        for below in (0..levels).rev() {
            let index = (page >> (9 * below)) as usize % ENTRIES;
            let entry = physical::entries(table)[index].load(Ordering::Relaxed);
            if entry & PRESENT == 0 {
                return None;
            }
            table = Pfn::containing(Hpa::new(entry & FRAME));
            // The flag means something else in an entry for a page of 4 KiB.
            if below > 0 && entry & LARGE != 0 {
                let inside = page & ((1 << (9 * below)) - 1);
                return Some(Pfn::new(table.as_u64() | inside));
            }
        }
        Some(table)
    }
}

/// How many of `length` bytes at `address` lie in its page.
fn part_in_page(address: Gva, length: usize) -> usize {
    ((PAGE_SIZE - address.page_offset()) as usize).min(length)
}

impl Paging {
    /// Finds the code at `address`, and keeps its page at `place`.
    #[inline(never)]
    fn peek_anew(&mut self, address: Gva, place: usize) -> Option<u64> {
        let frame = self.hardware_frame(address)?;
        self.peeked[place] = Some(Peeked {
            root: self.root.root,
            page: address.page_base(),
            frame,
        });
        physical::read_word(frame, address.page_offset())
    }
}

impl CodeReader for Paging {
    #[inline]
    fn peek_code(&mut self, address: Gva) -> Option<u64> {
        let (root, page) = (self.root.root, address.page_base());
        let mixed = Pfn::containing(root).as_u64() ^ page.as_u64() >> 12;
        let place = mixed as usize % PEEKED;
        let frame = match self.peeked[place] {
            Some(known) if known.page == page && known.root == root => known.frame,
            _ => {
                return self.peek_anew(address, place);
            }
        };
        physical::read_word(frame, address.page_offset())
    }

    fn read_code(
        &mut self,
        _control: &ControlRegisters,
        level: PrivilegeLevel,
        address: Gva,
        buffer: &mut [u8; MAX_LENGTH],
    ) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let part_address = address.wrapping_add(done as u64);
            let part = part_in_page(part_address, buffer.len() - done);
            let Some(frame) = self.code_frame(part_address.page_base(), level) else {
                break;
            };
            let gpa = frame.wrapping_add(part_address.page_offset());
            self.mmu
                .host()
                .ram()
                .read(gpa, &mut buffer[done..done + part]);
            done += part;
        }
        done
    }
}

impl GuestView for Paging {
    fn inspect(&self, gva: Gva) -> Inspection {
        self.mmu.inspect(&self.vcpu, gva)
    }

    fn read(&self, gva: Gva, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let address = gva.wrapping_add(done as u64);
            let (GuestEnd::Page { gpa, .. } | GuestEnd::Unpaged { gpa }) =
                self.inspect(address).guest_end
            else {
                break;
            };
            let part = part_in_page(address, buffer.len() - done);
            if !self.is_ram(gpa, part) {
                break;
            }
            self.read_ram(gpa, &mut buffer[done..done + part]);
            done += part;
        }
        done
    }
}
