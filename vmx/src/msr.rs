//! The model-specific registers that the hardware holds for the guest, and the bitmap that lets the
//! guest at them without an exit.

use core::ptr::NonNull;

use umbra_vcpu::address::PAGE_SIZE;

/// IA32_SYSENTER_CS.
pub const SYSENTER_CS: u32 = 0x174;
/// IA32_SYSENTER_ESP.
pub const SYSENTER_ESP: u32 = 0x175;
/// IA32_SYSENTER_EIP.
pub const SYSENTER_EIP: u32 = 0x176;
/// IA32_EFER.
pub const EFER: u32 = 0xc000_0080;
/// IA32_STAR.
pub const STAR: u32 = 0xc000_0081;
/// IA32_LSTAR.
pub const LSTAR: u32 = 0xc000_0082;
/// IA32_CSTAR.
pub const CSTAR: u32 = 0xc000_0083;
/// IA32_FMASK.
pub const FMASK: u32 = 0xc000_0084;
/// IA32_FS_BASE.
pub const FS_BASE: u32 = 0xc000_0100;
/// IA32_GS_BASE.
pub const GS_BASE: u32 = 0xc000_0101;
/// IA32_KERNEL_GS_BASE.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// IA32_TSC_AUX.
pub const TSC_AUX: u32 = 0xc000_0103;

/// The registers that the guest reads and writes without an exit.
pub const PASS_THROUGH: [u32; 11] = [
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    STAR,
    LSTAR,
    CSTAR,
    FMASK,
    FS_BASE,
    GS_BASE,
    KERNEL_GS_BASE,
    TSC_AUX,
];

/// Whether WRMSR takes `value` for the pass-through register `index` (SDM vol. 4 table 2-2) on a
/// processor with linear addresses of `linear_bits` bits.
pub fn is_valid(index: u32, value: u64, linear_bits: u32) -> bool {
    match index {
        SYSENTER_ESP | SYSENTER_EIP | LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE => {
            is_canonical(value, linear_bits)
        }
        SYSENTER_CS | TSC_AUX | FMASK => value >> 32 == 0,
        _ => true,
    }
}

/// Whether the bits of `address` above `linear_bits` all equal the highest one within.
pub const fn is_canonical(address: u64, linear_bits: u32) -> bool {
    let unused = 64 - linear_bits;
    ((address << unused).cast_signed() >> unused).cast_unsigned() == address
}

/// Byte and bit of the read bitmap for `index`; the write bitmap is 2048 bytes further on
/// (SDM vol. 3C 25.6.9). `None` for numbers outside both ranges, which always exit.
pub const fn bitmap_position(index: u32) -> Option<(usize, u8)> {
    let (base, offset) = match index {
        0..=0x1fff => (0, index),
        0xc000_0000..=0xc000_1fff => (1024, index - 0xc000_0000),
        _ => return None,
    };
    Some((base + offset as usize / 8, (offset % 8) as u8))
}

/// Fills an MSR bitmap: everything exits but [`PASS_THROUGH`].
///
/// # Safety
/// `page` is valid for writes of a page and shared with nobody yet.
pub unsafe fn fill_bitmap(page: NonNull<u8>) {
    const WRITE: usize = 2048;
    // SAFETY: the caller's promise.
    let bitmap = unsafe { core::slice::from_raw_parts_mut(page.as_ptr(), PAGE_SIZE as usize) };
    bitmap.fill(0xff);
    for (byte, bit) in PASS_THROUGH.into_iter().filter_map(bitmap_position) {
        bitmap[byte] &= !(1 << bit);
        bitmap[WRITE + byte] &= !(1 << bit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_positions_follow_the_manual() {
        assert_eq!(bitmap_position(0x174), Some((0x2e, 4)));
        assert_eq!(bitmap_position(0xc000_0080), Some((1024 + 16, 0)));
        assert_eq!(bitmap_position(0xc000_1fff), Some((2047, 7)));
        assert_eq!(bitmap_position(0x2000), None);
        assert_eq!(bitmap_position(0xc001_0000), None);
    }

    #[test]
    fn only_the_listed_registers_pass() {
        let mut page = [0_u8; 4096];
        // SAFETY: an array of a page's size.
        unsafe { fill_bitmap(NonNull::from(&mut page).cast()) };
        let clear: u32 = page.iter().map(|byte| byte.count_zeros()).sum();
        assert_eq!(clear as usize, 2 * PASS_THROUGH.len());
        let (byte, bit) = bitmap_position(EFER).expect("in range");
        assert_ne!(page[byte] & 1 << bit, 0);
        assert_ne!(page[2048 + byte] & 1 << bit, 0);
    }

    #[test]
    fn canonical_addresses() {
        assert!(is_canonical(0x7fff_ffff_ffff, 48));
        assert!(!is_canonical(0x8000_0000_0000, 48));
        assert!(is_canonical(0xffff_8000_0000_0000, 48));
        assert!(is_canonical(0x8000_0000_0000, 57));
        assert!(!is_valid(LSTAR, 1 << 50, 48));
        assert!(is_valid(STAR, u64::MAX, 48));
        assert!(!is_valid(FMASK, 1 << 32, 48));
    }
}
