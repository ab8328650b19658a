//! Operand sizes.

/// The size of an integer operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    DoubleWord,
    /// 64 bits.
    QuadWord,
}

impl Size {
    /// The size with so many bytes.
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        Some(match bytes {
            1 => Self::Byte,
            2 => Self::Word,
            4 => Self::DoubleWord,
            8 => Self::QuadWord,
            _ => return None,
        })
    }

    /// 1, 2, 4 or 8.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::DoubleWord => 4,
            Self::QuadWord => 8,
        }
    }

    /// The same, for distances.
    pub const fn distance(self) -> i64 {
        self.bytes().cast_signed() as i64
    }

    /// 8, 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        8 * self.bytes() as u32
    }

    /// The largest unsigned value.
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// The highest bit.
    pub const fn sign(self) -> u64 {
        1 << (self.bits() - 1)
    }

    /// `value`, whose upper bits do not count, as a signed number.
    pub const fn signed(self, value: u64) -> i64 {
        let unused = 64 - self.bits();
        (value << unused).cast_signed() >> unused
    }
}
