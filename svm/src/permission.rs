//! The I/O and MSR permission maps (APM vol. 2 15.10 and 15.11): a set bit exits.

use umbra_vcpu::host::{HostMemory, PageBlock, PageBlockError};

/// Model-specific registers that VMLOAD and VMSAVE switch, so that the guest may use them freely.
pub const SWITCHED_MSRS: [u32; 10] = [
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
];

/// Those of the switched registers that hold a linear address: writing one that is not canonical
/// is #GP (APM vol. 2 2.4.2 and 6.1).
pub const ADDRESS_MSRS: [u32; 7] = [
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
    msr::LSTAR,
    msr::CSTAR,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
];

/// Who refuses addresses that are not canonical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressChecks {
    /// The processor, as the manual demands.
    Processor,
    /// Nobody but us: QEMU's software emulation takes any value. Writes must exit.
    Driver,
}

/// Numbers of model-specific registers (APM vol. 2 appendix A).
pub mod msr {
    #![allow(missing_docs, reason = "the manual's table is the documentation")]
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const VM_CR: u32 = 0xc001_0114;
    pub const VM_HSAVE_PA: u32 = 0xc001_0117;
}

/// The I/O permission map has 12 KiB: 64 Ki ports and three bits for accesses that run past them.
const IO_PAGES: usize = 3;
const MSR_PAGES: usize = 2;
/// The two bits of a register in the MSR permission map.
const READ: u8 = 0b01;
const WRITE: u8 = 0b10;

/// Both maps. They are the same for every guest and never change.
#[derive(Debug)]
pub struct PermissionMaps {
    /// Every port exits.
    pub io: PageBlock,
    /// Every register exits but [`SWITCHED_MSRS`].
    pub msr: PageBlock,
}

impl PermissionMaps {
    /// Allocates and fills the maps.
    ///
    /// # Errors
    /// [`PageBlockError`] if the host has no memory for them.
    pub fn new(memory: &dyn HostMemory, checks: AddressChecks) -> Result<Self, PageBlockError> {
        let io = PageBlock::new(IO_PAGES, memory)?;
        let msr = PageBlock::new(MSR_PAGES, memory)?;
        // SAFETY: both blocks are writable over their size and nobody else knows them yet.
        let bits = unsafe {
            io.pointer().write_bytes(0xff, io.size());
            msr.pointer().write_bytes(0xff, msr.size());
            core::slice::from_raw_parts_mut(msr.pointer().as_ptr(), msr.size())
        };
        for register in SWITCHED_MSRS {
            if let Some(position) = msr_position(register) {
                let exempt = match checks {
                    AddressChecks::Driver if ADDRESS_MSRS.contains(&register) => READ,
                    _ => READ | WRITE,
                };
                bits[position / 8] &= !(exempt << (position % 8));
            }
        }
        Ok(Self { io, msr })
    }
}

/// The position of a register's read bit in the MSR permission map; its write bit follows.
/// Registers outside of the map always exit.
const fn msr_position(register: u32) -> Option<usize> {
    let (vector, base) = match register {
        0..=0x1fff => (0, 0),
        0xc000_0000..=0xc000_1fff => (0x800, 0xc000_0000),
        0xc001_0000..=0xc001_1fff => (0x1000, 0xc001_0000),
        _ => return None,
    };
    Some(vector * 8 + 2 * (register - base) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ptr::NonNull;
    use umbra_vcpu::address::Hpa;

    struct Identity;

    impl HostMemory for Identity {
        fn physical_address(&self, pointer: NonNull<u8>) -> Hpa {
            Hpa::new(pointer.as_ptr() as u64)
        }
    }

    #[test]
    fn only_switched_registers_do_not_exit() {
        let maps = PermissionMaps::new(&Identity, AddressChecks::Processor).expect("memory");
        // SAFETY: the block is readable over its size.
        let bits =
            unsafe { core::slice::from_raw_parts(maps.msr.pointer().as_ptr(), maps.msr.size()) };
        let clear: u32 = bits.iter().map(|byte| byte.count_zeros()).sum();
        assert_eq!(clear as usize, 2 * SWITCHED_MSRS.len());
        for (register, byte, shift) in [
            (msr::SYSENTER_CS, 0x174 / 4, 0),
            (msr::LSTAR, 0x800 + 0x82 / 4, 4),
            (msr::FS_BASE, 0x800 + 0x100 / 4, 0),
        ] {
            assert_eq!(bits[byte] >> shift & 3, 0, "{register:#x}");
        }
        assert_eq!(bits[0x800 + 0x80 / 4] & 3, 3, "EFER exits");
    }

    #[test]
    fn writes_of_addresses_exit_where_the_processor_takes_any() {
        let maps = PermissionMaps::new(&Identity, AddressChecks::Driver).expect("memory");
        // SAFETY: the block is readable over its size.
        let bits =
            unsafe { core::slice::from_raw_parts(maps.msr.pointer().as_ptr(), maps.msr.size()) };
        for register in SWITCHED_MSRS {
            let position = msr_position(register).expect("in the map");
            let expected = if ADDRESS_MSRS.contains(&register) {
                WRITE
            } else {
                0
            };
            assert_eq!(
                bits[position / 8] >> (position % 8) & 0b11,
                expected,
                "{register:#x}"
            );
        }
    }

    #[test]
    fn every_port_exits() {
        let maps = PermissionMaps::new(&Identity, AddressChecks::Processor).expect("memory");
        // SAFETY: the block is readable over its size.
        let bits =
            unsafe { core::slice::from_raw_parts(maps.io.pointer().as_ptr(), maps.io.size()) };
        assert!(bits.iter().all(|&byte| byte == 0xff));
    }
}
