//! The four kinds of address and two kinds of frame number, each a type of its own.
//!
//! A value of one kind never becomes another by arithmetic: only a page-table walk turns a
//! [`Gva`] into a [`Gpa`], and only a memory slot turns a [`Gfn`] into a [`Pfn`].

use core::fmt;

/// log2 of the size of a base page.
pub const PAGE_SHIFT: u32 = 12;
/// The size of a base page in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Physical addresses have at most 52 bits (SDM vol. 3A 4.1.4).
pub const PHYSICAL_ADDRESS_BITS: u32 = 52;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address with this value.
            #[inline]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The numeric value.
            #[inline]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// The byte offset within the 4 KiB page.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// The first address of the 4 KiB page that holds this address.
            #[inline]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }

            /// The address `bytes` further on, wrapping at 2^64 as the processor does.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The address `bytes` further on, or `None` past 2^64 - 1.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, formatter)
            }
        }
    };
}

macro_rules! frame_number {
    ($(#[$doc:meta])* $name:ident, $address:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The frame with this number.
            #[inline]
            pub const fn new(number: u64) -> Self {
                Self(number)
            }

            /// The number: the address divided by 4096.
            #[inline]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// The frame that holds `address`.
            #[inline]
            pub const fn containing(address: $address) -> Self {
                Self(address.0 >> PAGE_SHIFT)
            }

            /// The frame's first byte.
            #[inline]
            pub const fn base(self) -> $address {
                $address(self.0 << PAGE_SHIFT)
            }

            /// The frame `count` frames further on.
            #[inline]
            pub const fn offset(self, count: u64) -> Self {
                Self(self.0.wrapping_add(count))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// Guest virtual address: what the guest's instructions use, after segmentation (a linear
    /// address in the manuals' words).
    Gva
}
address! {
    /// Guest physical address: what the guest's page tables hold.
    Gpa
}
address! {
    /// Host virtual address: a pointer of the unikernel.
    Hva
}
address! {
    /// Host physical address: what a shadow page-table entry holds.
    Hpa
}
frame_number! {
    /// Guest frame number: a [`Gpa`] in units of 4 KiB.
    Gfn, Gpa
}
frame_number! {
    /// Page frame number of the host: an [`Hpa`] in units of 4 KiB.
    Pfn, Hpa
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_and_offset_make_the_address() {
        let address = Gpa::new(0x1234_5678);
        let frame = Gfn::containing(address);
        assert_eq!(frame.as_u64(), 0x12345);
        assert_eq!(frame.base().wrapping_add(address.page_offset()), address);
        assert_eq!(address.page_base(), frame.base());
    }

    #[test]
    fn checked_add_stops_at_the_end_of_the_address_space() {
        assert_eq!(Gva::new(u64::MAX).checked_add(1), None);
        assert_eq!(Gva::new(u64::MAX).wrapping_add(1), Gva::new(0));
    }
}
