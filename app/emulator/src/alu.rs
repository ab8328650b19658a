//! Integer arithmetic with its flags (SDM vol. 1 3.4.3.1 and the instructions' own pages).
//!
//! Operands have no bits above their size, and neither have results. Flags that the manual leaves
//! undefined become what processors make of them, as far as they agree.

use x86_64::registers::rflags::RFlags;

use crate::size::Size;

/// Which flags an instruction sets, and to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlagChange {
    changed: RFlags,
    value: RFlags,
}

/// The six status flags.
const STATUS: RFlags = RFlags::CARRY_FLAG
    .union(RFlags::PARITY_FLAG)
    .union(RFlags::AUXILIARY_CARRY_FLAG)
    .union(RFlags::ZERO_FLAG)
    .union(RFlags::SIGN_FLAG)
    .union(RFlags::OVERFLOW_FLAG);

impl FlagChange {
    /// No flag changes.
    pub const NONE: Self = Self {
        changed: RFlags::empty(),
        value: RFlags::empty(),
    };

    const fn new(changed: RFlags, value: RFlags) -> Self {
        Self { changed, value }
    }

    /// Only `flag` changes: it is set if `condition` holds.
    pub fn only(flag: RFlags, condition: bool) -> Self {
        Self::new(flag, when(flag, condition))
    }

    /// SF, ZF and PF of a byte, and CF and AF if `carries` names them; without, both are cleared as
    /// OF always is.
    pub fn of_byte(result: u8, carries: Option<(bool, bool)>) -> Self {
        let (carry, auxiliary) = carries.unwrap_or_default();
        Self::new(
            STATUS,
            result_flags(Size::Byte, result.into())
                | when(RFlags::CARRY_FLAG, carry)
                | when(RFlags::AUXILIARY_CARRY_FLAG, auxiliary),
        )
    }

    /// All but `kept`.
    fn without(self, kept: RFlags) -> Self {
        Self::new(self.changed - kept, self.value - kept)
    }

    /// RFLAGS after the change.
    pub fn apply(self, rflags: u64) -> u64 {
        rflags & !self.changed.bits() | (self.value & self.changed).bits()
    }
}

fn when(flag: RFlags, condition: bool) -> RFlags {
    if condition { flag } else { RFlags::empty() }
}

/// SF, ZF and PF of a result.
fn result_flags(size: Size, result: u64) -> RFlags {
    when(RFlags::SIGN_FLAG, result & size.sign() != 0)
        | when(RFlags::ZERO_FLAG, result == 0)
        | when(
            RFlags::PARITY_FLAG,
            (result as u8).count_ones().is_multiple_of(2),
        )
}

/// A result with its flags.
pub type Computed = (u64, FlagChange);

/// An operation on two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// ADD.
    Add,
    /// ADC.
    AddWithCarry,
    /// SUB, CMP.
    Subtract,
    /// SBB.
    SubtractWithBorrow,
    /// AND, TEST.
    And,
    /// OR.
    Or,
    /// XOR.
    Xor,
}

impl Binary {
    /// Computes it; `rflags` are those before.
    pub fn compute(self, size: Size, left: u64, right: u64, rflags: u64) -> Computed {
        let carry = rflags & RFlags::CARRY_FLAG.bits();
        match self {
            Self::Add => add(size, left, right, 0),
            Self::AddWithCarry => add(size, left, right, carry),
            Self::Subtract => subtract(size, left, right, 0),
            Self::SubtractWithBorrow => subtract(size, left, right, carry),
            Self::And => logic(size, left & right),
            Self::Or => logic(size, left | right),
            Self::Xor => logic(size, left ^ right),
        }
    }
}

fn add(size: Size, left: u64, right: u64, carry: u64) -> Computed {
    let wide = u128::from(left) + u128::from(right) + u128::from(carry);
    let result = wide as u64 & size.mask();
    let flags = result_flags(size, result)
        | when(RFlags::CARRY_FLAG, wide > u128::from(size.mask()))
        | when(
            RFlags::AUXILIARY_CARRY_FLAG,
            (left ^ right ^ result) & 0x10 != 0,
        )
        | when(
            RFlags::OVERFLOW_FLAG,
            (left ^ result) & (right ^ result) & size.sign() != 0,
        );
    (result, FlagChange::new(STATUS, flags))
}

fn subtract(size: Size, left: u64, right: u64, borrow: u64) -> Computed {
    let result = left.wrapping_sub(right).wrapping_sub(borrow) & size.mask();
    let flags = result_flags(size, result)
        | when(
            RFlags::CARRY_FLAG,
            u128::from(left) < u128::from(right) + u128::from(borrow),
        )
        | when(
            RFlags::AUXILIARY_CARRY_FLAG,
            (left ^ right ^ result) & 0x10 != 0,
        )
        | when(
            RFlags::OVERFLOW_FLAG,
            (left ^ right) & (left ^ result) & size.sign() != 0,
        );
    (result, FlagChange::new(STATUS, flags))
}

fn logic(size: Size, result: u64) -> Computed {
    (result, FlagChange::new(STATUS, result_flags(size, result)))
}

/// An operation on one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unary {
    /// INC.
    Increment,
    /// DEC.
    Decrement,
    /// NEG.
    Negate,
    /// NOT.
    Not,
}

impl Unary {
    /// Computes it.
    pub fn compute(self, size: Size, operand: u64) -> Computed {
        let without_carry = |(result, flags): Computed| (result, flags.without(RFlags::CARRY_FLAG));
        match self {
            Self::Increment => without_carry(add(size, operand, 1, 0)),
            Self::Decrement => without_carry(subtract(size, operand, 1, 0)),
            Self::Negate => subtract(size, 0, operand, 0),
            Self::Not => (!operand & size.mask(), FlagChange::NONE),
        }
    }
}

/// A shift or rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    /// SHL, SAL.
    Left,
    /// SHR.
    Right,
    /// SAR.
    ArithmeticRight,
    /// ROL.
    RotateLeft,
    /// ROR.
    RotateRight,
    /// RCL.
    RotateLeftThroughCarry,
    /// RCR.
    RotateRightThroughCarry,
}

/// The part of a shift count that counts: 5 bits, or 6 for 64-bit operands.
const fn masked_count(size: Size, count: u64) -> u32 {
    let mask = match size {
        Size::QuadWord => 0x3f,
        _ => 0x1f,
    };
    (count & mask) as u32
}

impl Shift {
    /// Computes it; `rflags` are those before. OF is computed as for a count of one.
    pub fn compute(self, size: Size, operand: u64, count: u64, rflags: u64) -> Computed {
        let count = masked_count(size, count);
        if count == 0 {
            return (operand, FlagChange::NONE);
        }
        match self {
            Self::Left => {
                let wide = u128::from(operand) << count;
                shifted(size, operand, wide as u64, wide >> size.bits() & 1 != 0)
            }
            Self::Right => {
                let last = operand >> (count - 1) & 1 != 0;
                let result = if count < 64 { operand >> count } else { 0 };
                shifted(size, operand, result, last)
            }
            Self::ArithmeticRight => {
                let signed = size.signed(operand);
                let last = signed >> (count - 1) & 1 != 0;
                shifted(size, operand, (signed >> count).cast_unsigned(), last)
            }
            Self::RotateLeft => {
                let result = rotate_left(operand, size.bits(), count);
                rotated(size, result, result & 1 != 0, left_overflow(size, result))
            }
            Self::RotateRight => {
                let bits = size.bits();
                let result = rotate_left(operand, bits, bits - count % bits);
                let carry = result & size.sign() != 0;
                rotated(size, result, carry, right_overflow(size, result))
            }
            Self::RotateLeftThroughCarry => {
                through_carry(size, operand, count, rflags, |bits| bits)
            }
            Self::RotateRightThroughCarry => {
                let all = size.bits() + 1;
                through_carry(size, operand, count, rflags, |count| all - count)
            }
        }
    }
}

fn shifted(size: Size, operand: u64, result: u64, carry: bool) -> Computed {
    let result = result & size.mask();
    let overflow = (operand ^ result) & size.sign() != 0;
    let flags = result_flags(size, result)
        | when(RFlags::CARRY_FLAG, carry)
        | when(RFlags::OVERFLOW_FLAG, overflow);
    (result, FlagChange::new(STATUS, flags))
}

fn rotated(size: Size, result: u64, carry: bool, overflow: bool) -> Computed {
    let flags = when(RFlags::CARRY_FLAG, carry) | when(RFlags::OVERFLOW_FLAG, overflow);
    (
        result & size.mask(),
        FlagChange::new(RFlags::CARRY_FLAG | RFlags::OVERFLOW_FLAG, flags),
    )
}

/// OF of a rotation to the left by one: CF and the highest bit differ.
const fn left_overflow(size: Size, result: u64) -> bool {
    (result & 1 != 0) != (result & size.sign() != 0)
}

/// OF of a rotation to the right by one: the two highest bits differ.
const fn right_overflow(size: Size, result: u64) -> bool {
    (result ^ result << 1) & size.sign() != 0
}

/// The low `bits` of `value`, rotated.
fn rotate_left(value: u64, bits: u32, count: u32) -> u64 {
    wide_rotate_left(value.into(), bits, count) as u64
}

fn wide_rotate_left(value: u128, bits: u32, count: u32) -> u128 {
    let count = count % bits;
    let mask = (1 << bits) - 1;
    (value << count | value >> (bits - count)) & mask
}

/// Rotates the operand with CF above it; `to_left` turns the count into one to the left.
fn through_carry(
    size: Size,
    operand: u64,
    count: u32,
    rflags: u64,
    to_left: impl Fn(u32) -> u32,
) -> Computed {
    let bits = size.bits() + 1;
    let count = count % bits;
    let carry = rflags & RFlags::CARRY_FLAG.bits();
    let value = u128::from(operand) | u128::from(carry) << size.bits();
    let wide = wide_rotate_left(value, bits, to_left(count));
    let result = wide as u64 & size.mask();
    let carry = wide >> size.bits() & 1 != 0;
    // To the left CF was the highest bit, to the right the highest bit was CF.
    let overflow = if to_left(1) == 1 {
        carry != (result & size.sign() != 0)
    } else {
        right_overflow(size, result)
    };
    rotated(size, result, carry, overflow)
}

/// SHLD and SHRD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoubleShift {
    /// SHLD.
    Left,
    /// SHRD.
    Right,
}

impl DoubleShift {
    /// Computes it; `None` where the manual leaves the result undefined: a count above the size.
    pub fn compute(self, size: Size, operand: u64, fill: u64, count: u64) -> Option<Computed> {
        let count = masked_count(size, count);
        let bits = size.bits();
        if count == 0 {
            return Some((operand, FlagChange::NONE));
        }
        if count > bits {
            return None;
        }
        Some(match self {
            Self::Left => {
                let wide = (u128::from(operand) << bits | u128::from(fill)) << count;
                let carry = operand >> (bits - count) & 1 != 0;
                shifted(size, operand, (wide >> bits) as u64, carry)
            }
            Self::Right => {
                let wide = u128::from(fill) << bits | u128::from(operand);
                let carry = wide >> (count - 1) & 1 != 0;
                shifted(size, operand, (wide >> count) as u64, carry)
            }
        })
    }
}

/// BT, BTS, BTR and BTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitTest {
    /// BT.
    Keep,
    /// BTS.
    Set,
    /// BTR.
    Reset,
    /// BTC.
    Complement,
}

impl BitTest {
    /// Computes it for the bit `index`, of which as many low bits count as the operand has numbers
    /// for.
    pub fn compute(self, size: Size, operand: u64, index: u64) -> Computed {
        let bit = 1 << (index & u64::from(size.bits() - 1));
        let result = match self {
            Self::Keep => operand,
            Self::Set => operand | bit,
            Self::Reset => operand & !bit,
            Self::Complement => operand ^ bit,
        };
        let flags = FlagChange::only(RFlags::CARRY_FLAG, operand & bit != 0);
        (result, flags)
    }
}

/// Whether a product is taken of signed or unsigned numbers, and how large it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signedness {
    /// MUL, DIV.
    Unsigned,
    /// IMUL, IDIV.
    Signed,
}

/// MUL and IMUL: the low and the high half of the product. CF and OF say that the high half counts.
pub fn multiply(
    size: Size,
    signedness: Signedness,
    left: u64,
    right: u64,
) -> (u64, u64, FlagChange) {
    let (low, high, overflow) = match signedness {
        Signedness::Unsigned => {
            let product = u128::from(left) * u128::from(right);
            let high = (product >> size.bits()) as u64;
            (product as u64, high, high != 0)
        }
        Signedness::Signed => {
            let product = i128::from(size.signed(left)) * i128::from(size.signed(right));
            let low = product.cast_unsigned() as u64;
            let overflow = i128::from(size.signed(low)) != product;
            let high = (product >> size.bits()).cast_unsigned() as u64;
            (low, high, overflow)
        }
    };
    let low = low & size.mask();
    let flags =
        result_flags(size, low) | when(RFlags::CARRY_FLAG | RFlags::OVERFLOW_FLAG, overflow);
    (low, high & size.mask(), FlagChange::new(STATUS, flags))
}

/// DIV and IDIV of `high:low`: quotient and remainder; `None` for #DE.
pub fn divide(
    size: Size,
    signedness: Signedness,
    (high, low): (u64, u64),
    divisor: u64,
) -> Option<(u64, u64)> {
    let dividend = u128::from(high) << size.bits() | u128::from(low);
    match signedness {
        Signedness::Unsigned => {
            let quotient = dividend.checked_div(divisor.into())?;
            let remainder = dividend % u128::from(divisor);
            (quotient <= u128::from(size.mask())).then_some((quotient as u64, remainder as u64))
        }
        Signedness::Signed => {
            let unused = 128 - 2 * size.bits();
            let dividend = (dividend << unused).cast_signed() >> unused;
            let divisor = i128::from(size.signed(divisor));
            let quotient = dividend.checked_div(divisor)?;
            let remainder = dividend % divisor;
            let low = quotient.cast_unsigned() as u64;
            let fits = i128::from(size.signed(low)) == quotient;
            fits.then_some((
                low & size.mask(),
                remainder.cast_unsigned() as u64 & size.mask(),
            ))
        }
    }
}

/// BSF, BSR and POPCNT. A processor without TZCNT and LZCNT takes them for BSF and BSR, so they are
/// left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitCount {
    /// BSF.
    ScanForward,
    /// BSR.
    ScanReverse,
    /// POPCNT.
    Ones,
}

impl BitCount {
    /// Computes it; without a result the destination keeps its value.
    pub fn compute(self, size: Size, source: u64) -> (Option<u64>, FlagChange) {
        let zero = RFlags::ZERO_FLAG;
        let trailing = u64::from(source.trailing_zeros().min(size.bits()));
        let leading = u64::from(source.leading_zeros() - (64 - size.bits()));
        match self {
            Self::ScanForward => (
                (source != 0).then_some(trailing),
                FlagChange::only(zero, source == 0),
            ),
            Self::ScanReverse => (
                (source != 0).then(|| u64::from(size.bits()) - 1 - leading),
                FlagChange::only(zero, source == 0),
            ),
            Self::Ones => (
                Some(source.count_ones().into()),
                FlagChange::new(STATUS, when(zero, source == 0)),
            ),
        }
    }
}
