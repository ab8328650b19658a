//! Real mode without "unrestricted guest": it runs as virtual-8086 mode (SDM vol. 3B 21).
//!
//! Protocol: while the guest's CR0.PE is clear, the segment registers as the guest has them are here,
//! limits and rights among them, and the VMCS gets what virtual-8086 mode wants before each entry. The
//! guest may load selectors, which changes selectors and bases and is read back after each exit. It
//! has IOPL 0 there, so that everything that virtual-8086 mode carries out otherwise than real mode
//! raises #GP, and all exceptions exit: whoever runs the guest carries out the instruction or the
//! delivery in its place.
//!
//! Larger limits than 64 KiB ("big real mode") stay here, too: an access beyond 64 KiB raises #GP, or
//! #SS, and is carried out with the true limit.
#![deny(unsafe_code)]

use umbra_vcpu::registers::{Segment, SegmentAttributes, SegmentRegister};
use x86_64::registers::rflags::RFlags;

const VIRTUAL_8086: u64 = RFlags::VIRTUAL_8086_MODE.bits();
const IO_LEVEL: u64 = 3 << 12;
/// The rights of every segment in virtual-8086 mode (SDM vol. 3C 27.3.1.2).
const RIGHTS: SegmentAttributes = SegmentAttributes::from_bits_retain(0xf3);
const LIMIT: u32 = 0xffff;

/// The registers that a selector loads.
pub const LOADABLE: [SegmentRegister; 6] = [
    SegmentRegister::Es,
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
];

/// What the guest has and the VMCS does not, while the guest is in real mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealMode {
    /// The segment registers in the order of [`SegmentRegister::ALL`].
    pub segments: [Segment; 8],
    /// IA32_SYSENTER_CS: the hardware's is zero, because SYSENTER raises #GP in real mode.
    pub sysenter_cs: u32,
}

impl RealMode {
    /// The state at the switch from protected mode.
    pub const fn new(segments: [Segment; 8], sysenter_cs: u32) -> Self {
        Self {
            segments,
            sysenter_cs,
        }
    }

    /// Whether virtual-8086 mode does what real mode would with these registers.
    pub fn fits_virtual_8086(&self) -> bool {
        LOADABLE.into_iter().all(|register| {
            let segment = &self.segments[register as usize];
            let paragraphs = segment.base.as_u64() == u64::from(segment.selector) << 4;
            let usable = !segment.attributes.contains(SegmentAttributes::UNUSABLE);
            // Only a stack's width depends on D/B in real mode.
            let narrow = register != SegmentRegister::Ss
                || !segment.attributes.contains(SegmentAttributes::DEFAULT_32);
            let expands_down = segment
                .attributes
                .contains(SegmentAttributes::EXPAND_DOWN_OR_CONFORMING)
                && !segment.attributes.contains(SegmentAttributes::CODE);
            paragraphs && usable && narrow && !expands_down && segment.limit >= LIMIT
        })
    }

    /// What the VMCS gets for a register.
    pub fn hardware(&self, register: SegmentRegister) -> Segment {
        match register {
            // Its limit leaves no room for a permission map, so that every access to a port faults.
            SegmentRegister::Tr => Segment::busy_tss(0, 0),
            SegmentRegister::Ldtr => Segment::UNUSABLE,
            _ => Segment {
                limit: LIMIT,
                attributes: RIGHTS,
                ..self.segments[register as usize]
            },
        }
    }

    /// RFLAGS for the VMCS.
    pub const fn hardware_flags(rflags: u64) -> u64 {
        rflags & !IO_LEVEL | VIRTUAL_8086
    }

    /// RFLAGS as the guest has it after a run that it began with `before`, from the VMCS's: it cannot
    /// have changed IOPL.
    pub const fn guest_flags(rflags: u64, before: u64) -> u64 {
        rflags & !(IO_LEVEL | VIRTUAL_8086) | before & IO_LEVEL
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_vcpu::address::Gva;

    fn state() -> RealMode {
        let segment = Segment {
            selector: 0x1234,
            base: Gva::new(0x1_2340),
            limit: 0xffff,
            attributes: SegmentAttributes::from_bits_retain(0x93),
        };
        RealMode::new([segment; 8], 0)
    }

    #[test]
    fn what_real_mode_loads_itself_fits() {
        assert!(state().fits_virtual_8086());
        let mut big = state();
        big.segments[SegmentRegister::Ds as usize].limit = u32::MAX;
        assert!(big.fits_virtual_8086(), "faults beyond 64 KiB");
        assert_eq!(big.hardware(SegmentRegister::Ds).limit, 0xffff);
    }

    #[test]
    fn what_protected_mode_left_behind_does_not_fit() {
        let changes: [fn(&mut Segment); 4] = [
            |segment| segment.base = Gva::new(0),
            |segment| segment.limit = 0xfff,
            |segment| segment.attributes |= SegmentAttributes::UNUSABLE,
            |segment| segment.attributes |= SegmentAttributes::EXPAND_DOWN_OR_CONFORMING,
        ];
        for register in LOADABLE {
            for change in changes {
                let mut state = state();
                change(&mut state.segments[register as usize]);
                assert!(!state.fits_virtual_8086(), "{register:?}");
            }
        }
        let mut wide = state();
        wide.segments[SegmentRegister::Ss as usize].attributes |= SegmentAttributes::DEFAULT_32;
        assert!(!wide.fits_virtual_8086());
    }

    #[test]
    fn the_guest_keeps_its_io_level() {
        let hardware = RealMode::hardware_flags(0x3202);
        assert_eq!(hardware, 0x2_0202);
        assert_eq!(RealMode::guest_flags(hardware | 0x40, 0x3202), 0x3242);
    }
}
