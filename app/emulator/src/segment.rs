//! Loading segment registers: in real and virtual-8086 mode, and from descriptors with protected
//! mode's checks (SDM vol. 3A 3.4, 5.5, 5.6; vol. 2B "MOV").

use umbra_vcpu::address::{Gva, PAGE_SIZE};
use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::registers::{CodeWidth, Segment, SegmentAttributes, SegmentRegister};

use crate::environment::{Environment, Intent, Stop, TableRegister};
use crate::mode::{Mode, is_long_mode, level, mode};

const ACCESSED: u32 = SegmentAttributes::ACCESSED.bits();
const IN_LOCAL_TABLE: u16 = 1 << 2;
/// The selector's bits that an exception's error code has.
const INDEX: u16 = !3;

/// A descriptor as it stands in its table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// The linear address.
    pub address: Gva,
    /// The two double words.
    low: u32,
    high: u32,
    /// The upper half of a system descriptor in IA-32e mode.
    upper: u32,
}

impl Descriptor {
    /// The type field: bits 3:0 of the access rights.
    pub const fn kind(&self) -> u32 {
        self.high >> 8 & 0xf
    }

    /// Whether it describes code or data.
    pub const fn is_code_or_data(&self) -> bool {
        self.high & 1 << 12 != 0
    }

    /// Whether it describes code.
    pub const fn is_code(&self) -> bool {
        self.is_code_or_data() && self.high & 1 << 11 != 0
    }

    /// Whether the segment is present.
    pub const fn is_present(&self) -> bool {
        self.high & 1 << 15 != 0
    }

    /// The descriptor privilege level.
    pub const fn privilege_level(&self) -> u8 {
        (self.high >> 13 & 3) as u8
    }

    /// The L bit.
    const fn is_long(&self) -> bool {
        self.high & 1 << 21 != 0
    }

    const fn is_conforming_code(&self) -> bool {
        self.is_code() && self.high & 1 << 10 != 0
    }

    /// Writable for data, readable for code.
    const fn is_read_write(&self) -> bool {
        self.high & 1 << 9 != 0
    }

    /// The parts of a gate.
    pub const fn gate(&self) -> Gate {
        Gate {
            selector: (self.low >> 16) as u16,
            offset: (self.high & 0xffff_0000 | self.low & 0xffff) as u64
                | (self.upper as u64) << 32,
        }
    }

    /// The segment register that `selector`, which names this descriptor, loads.
    pub const fn segment(&self, selector: u16) -> Segment {
        let limit = self.high & 0xf_0000 | self.low & 0xffff;
        let base = self.low >> 16 | (self.high & 0xff) << 16 | self.high & 0xff00_0000;
        Segment {
            selector,
            base: Gva::new(base as u64 | (self.upper as u64) << 32),
            limit: if self.high & 1 << 23 == 0 {
                limit
            } else {
                limit << 12 | 0xfff
            },
            attributes: SegmentAttributes::from_bits_retain(self.high >> 8 & 0xf0ff),
        }
    }
}

/// What a gate says.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// The code segment, or a task gate's task-state segment.
    pub selector: u16,
    /// Where to go.
    pub offset: u64,
}

/// An exception that names a selector.
pub const fn selector_fault(vector: u8, selector: u16) -> Exception {
    Exception::with_error_code(vector, (selector & INDEX) as u32)
}

/// #GP that names a selector.
pub const fn protection_fault(selector: u16) -> Exception {
    selector_fault(vector::GENERAL_PROTECTION, selector)
}

/// Whether the selector is null, whatever its privilege.
pub const fn is_null(selector: u16) -> bool {
    selector & INDEX == 0
}

/// Reads what the processor reads itself.
pub fn read_system<E: Environment>(
    environment: &mut E,
    address: Gva,
    bytes: &mut [u8],
) -> Result<(), Stop<E::Failure>> {
    let mut done = 0;
    while done < bytes.len() {
        let at = address.wrapping_add(done as u64);
        let part = ((PAGE_SIZE - at.page_offset()) as usize).min(bytes.len() - done);
        let physical = environment.translate_system(at, Intent::Read)?;
        environment.read(physical, &mut bytes[done..done + part])?;
        done += part;
    }
    Ok(())
}

/// Writes what the processor writes itself. Every page is translated before the first byte is written.
pub fn write_system<E: Environment>(
    environment: &mut E,
    address: Gva,
    bytes: &[u8],
) -> Result<(), Stop<E::Failure>> {
    let split = ((PAGE_SIZE - address.page_offset()) as usize).min(bytes.len());
    let (first, second) = bytes.split_at(split);
    let start = environment.translate_system(address, Intent::Write)?;
    if !second.is_empty() {
        let rest =
            environment.translate_system(address.wrapping_add(split as u64), Intent::Write)?;
        environment.write(rest, second)?;
    }
    environment.write(start, first)
}

/// Reads the descriptor that `selector` names; `fault` is raised where the table ends before it.
pub fn descriptor<E: Environment>(
    environment: &mut E,
    selector: u16,
    fault: u8,
) -> Result<Descriptor, Stop<E::Failure>> {
    let outside = || selector_fault(fault, selector);
    let (base, limit) = if selector & IN_LOCAL_TABLE == 0 {
        let table = environment.table(TableRegister::Global);
        (table.base, u32::from(table.limit))
    } else {
        let table = environment.segment(SegmentRegister::Ldtr);
        if table.attributes.contains(SegmentAttributes::UNUSABLE) || is_null(table.selector) {
            return Err(outside().into());
        }
        (table.base, table.limit)
    };
    let offset = u32::from(selector & !7);
    if offset + 7 > limit {
        return Err(outside().into());
    }
    let address = base.wrapping_add(offset.into());
    let mut descriptor = read_descriptor(environment, address)?;
    if is_long_mode(environment) && !descriptor.is_code_or_data() {
        if offset + 15 > limit {
            return Err(outside().into());
        }
        let mut upper = [0; 4];
        read_system(environment, address.wrapping_add(8), &mut upper)?;
        descriptor.upper = u32::from_le_bytes(upper);
    }
    Ok(descriptor)
}

/// Reads eight bytes as a descriptor.
pub fn read_descriptor<E: Environment>(
    environment: &mut E,
    address: Gva,
) -> Result<Descriptor, Stop<E::Failure>> {
    let mut bytes = [0; 8];
    read_system(environment, address, &mut bytes)?;
    let value = u64::from_le_bytes(bytes);
    Ok(Descriptor {
        address,
        low: value as u32,
        high: (value >> 32) as u32,
        upper: 0,
    })
}

/// Sets bits in a descriptor's type where it stands.
fn mark<E: Environment>(
    environment: &mut E,
    descriptor: &mut Descriptor,
    bits: u32,
) -> Result<(), Stop<E::Failure>> {
    if descriptor.kind() & bits != bits {
        descriptor.high |= bits << 8;
        let byte = [(descriptor.high >> 8) as u8];
        write_system(environment, descriptor.address.wrapping_add(5), &byte)?;
    }
    Ok(())
}

/// Whether a task-state segment's descriptor says that the task runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// Another task may switch to it.
    No,
    /// It runs, or waits for a nested one.
    Yes,
}

/// Changes the busy bit of the task-state segment that `selector` names.
pub fn set_busy<E: Environment>(
    environment: &mut E,
    selector: u16,
    busy: Busy,
) -> Result<(), Stop<E::Failure>> {
    const BUSY: u8 = 1 << 1;
    let descriptor = descriptor(environment, selector, vector::INVALID_TSS)?;
    let old = (descriptor.high >> 8) as u8;
    let new = match busy {
        Busy::Yes => old | BUSY,
        Busy::No => old & !BUSY,
    };
    write_system(environment, descriptor.address.wrapping_add(5), &[new])
}

/// The segment that a selector loads in real or virtual-8086 mode. Limit and rights stay in real
/// mode, as the processors leave them (SDM vol. 3A 21.1.1 and 10.9.2).
pub fn real_segment<E: Environment>(
    environment: &E,
    register: SegmentRegister,
    selector: u16,
) -> Segment {
    let old = environment.segment(register);
    let base = Gva::new(u64::from(selector) << 4);
    if mode(environment) == Mode::Virtual8086 {
        return virtual_8086_segment(selector);
    }
    Segment {
        selector,
        base,
        attributes: if old.attributes.contains(SegmentAttributes::UNUSABLE) {
            SegmentAttributes::from_bits_retain(0x93)
        } else {
            old.attributes
        },
        limit: if old.attributes.contains(SegmentAttributes::UNUSABLE) {
            0xffff
        } else {
            old.limit
        },
    }
}

/// Any segment of a virtual-8086 task.
pub const fn virtual_8086_segment(selector: u16) -> Segment {
    Segment {
        selector,
        base: Gva::new((selector as u64) << 4),
        limit: 0xffff,
        attributes: SegmentAttributes::from_bits_retain(0xf3),
    }
}

/// What MOV, POP and LDS load into a data or stack segment register.
///
/// # Errors
/// [`Stop::Exception`] if the selector or its descriptor is refused.
pub fn load<E: Environment>(
    environment: &mut E,
    register: SegmentRegister,
    selector: u16,
) -> Result<Segment, Stop<E::Failure>> {
    if mode(environment) != Mode::Protected {
        return Ok(real_segment(environment, register, selector));
    }
    let current = level(environment);
    load_at_level(
        environment,
        register,
        selector,
        current,
        vector::GENERAL_PROTECTION,
    )
}

/// As [`load`] in protected mode, for code at privilege level `current`; a refused selector raises
/// `fault`, which is #TS in a task switch.
pub fn load_at_level<E: Environment>(
    environment: &mut E,
    register: SegmentRegister,
    selector: u16,
    current: u8,
    fault: u8,
) -> Result<Segment, Stop<E::Failure>> {
    let requested = (selector & 3) as u8;
    let refused = || selector_fault(fault, selector);
    if is_null(selector) {
        if register != SegmentRegister::Ss {
            return Ok(null(selector));
        }
        let allowed =
            environment.code_width() == CodeWidth::Bits64 && current != 3 && requested == current;
        return if allowed {
            Ok(null_stack(selector))
        } else {
            Err(refused().into())
        };
    }
    let mut found = descriptor(environment, selector, fault)?;
    let accepted = if register == SegmentRegister::Ss {
        requested == current
            && found.is_code_or_data()
            && !found.is_code()
            && found.is_read_write()
            && found.privilege_level() == current
    } else {
        let readable = found.is_code_or_data() && (!found.is_code() || found.is_read_write());
        let privileged = found.is_conforming_code()
            || requested <= found.privilege_level() && current <= found.privilege_level();
        readable && privileged
    };
    if !accepted {
        return Err(refused().into());
    }
    if !found.is_present() {
        let absent = if register == SegmentRegister::Ss {
            vector::STACK_FAULT
        } else {
            vector::SEGMENT_NOT_PRESENT
        };
        return Err(selector_fault(absent, selector).into());
    }
    mark(environment, &mut found, ACCESSED)?;
    Ok(found.segment(selector))
}

/// A register that a null selector was loaded into.
pub const fn null(selector: u16) -> Segment {
    Segment {
        selector,
        ..Segment::UNUSABLE
    }
}

/// A null SS of 64-bit mode, which keeps its privilege level.
const fn null_stack(selector: u16) -> Segment {
    let level = (selector & 3) as u32;
    Segment {
        selector,
        attributes: SegmentAttributes::from_bits_retain(
            SegmentAttributes::UNUSABLE.bits() | level << 5,
        ),
        ..Segment::UNUSABLE
    }
}

/// How control comes to a code segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// By a far JMP or CALL that names it.
    Direct,
    /// By a gate, at this privilege level or an inner one.
    Gate,
    /// By a far RET or IRET, at the selector's privilege level.
    Return,
    /// By a task switch.
    Task,
}

/// The CS that a far transfer loads. Its DPL, or for conforming code the old level, is the new
/// privilege level, which the selector's RPL says.
///
/// # Errors
/// [`Stop::Exception`] if the selector or its descriptor is refused.
pub fn load_code<E: Environment>(
    environment: &mut E,
    selector: u16,
    arrival: Arrival,
) -> Result<Segment, Stop<E::Failure>> {
    let fault = match arrival {
        Arrival::Task => vector::INVALID_TSS,
        _ => vector::GENERAL_PROTECTION,
    };
    if is_null(selector) {
        let code = if arrival == Arrival::Task {
            fault
        } else {
            vector::GENERAL_PROTECTION
        };
        return Err(Exception::with_error_code(code, 0).into());
    }
    let found = descriptor(environment, selector, fault)?;
    let current = level(environment);
    let requested = (selector & 3) as u8;
    let described = found.privilege_level();
    let conforming = found.is_conforming_code();
    let privileged = match arrival {
        Arrival::Direct if conforming => described <= current,
        Arrival::Direct => requested <= current && described == current,
        Arrival::Gate => described <= current,
        Arrival::Return if conforming => requested >= current && described <= requested,
        Arrival::Return => requested >= current && described == requested,
        Arrival::Task if conforming => described <= requested,
        Arrival::Task => described == requested,
    };
    let both_widths = is_long_mode(environment)
        && found.is_long()
        && found
            .segment(0)
            .attributes
            .contains(SegmentAttributes::DEFAULT_32);
    if !found.is_code() || !privileged || both_widths {
        return Err(selector_fault(fault, selector).into());
    }
    if !found.is_present() {
        return Err(selector_fault(vector::SEGMENT_NOT_PRESENT, selector).into());
    }
    let level = match arrival {
        Arrival::Direct => current,
        Arrival::Gate if conforming => current,
        Arrival::Gate => described,
        Arrival::Return | Arrival::Task => requested,
    };
    let mut found = found;
    mark(environment, &mut found, ACCESSED)?;
    Ok(found.segment(selector & INDEX | u16::from(level)))
}

/// What LLDT loads.
///
/// # Errors
/// [`Stop::Exception`] if the selector or its descriptor is refused, with `fault` as its vector.
pub fn load_local_table<E: Environment>(
    environment: &mut E,
    selector: u16,
    fault: u8,
) -> Result<Segment, Stop<E::Failure>> {
    const LOCAL_TABLE: u32 = 2;
    if is_null(selector) {
        return Ok(null(selector));
    }
    if selector & IN_LOCAL_TABLE != 0 {
        return Err(selector_fault(fault, selector).into());
    }
    let found = descriptor(environment, selector, fault)?;
    if found.is_code_or_data() || found.kind() != LOCAL_TABLE {
        return Err(selector_fault(fault, selector).into());
    }
    if !found.is_present() {
        let absent = if fault == vector::INVALID_TSS {
            fault
        } else {
            vector::SEGMENT_NOT_PRESENT
        };
        return Err(selector_fault(absent, selector).into());
    }
    Ok(found.segment(selector))
}

/// What LTR loads; the task-state segment becomes busy.
///
/// # Errors
/// [`Stop::Exception`] if the selector or its descriptor is refused.
pub fn load_task<E: Environment>(
    environment: &mut E,
    selector: u16,
) -> Result<Segment, Stop<E::Failure>> {
    const BUSY: u32 = 1 << 1;
    if is_null(selector) {
        return Err(Exception::GENERAL_PROTECTION.into());
    }
    if selector & IN_LOCAL_TABLE != 0 {
        return Err(protection_fault(selector).into());
    }
    let mut found = descriptor(environment, selector, vector::GENERAL_PROTECTION)?;
    let available = match found.kind() {
        9 => true,
        1 => !is_long_mode(environment),
        _ => false,
    };
    if found.is_code_or_data() || !available {
        return Err(protection_fault(selector).into());
    }
    if !found.is_present() {
        return Err(selector_fault(vector::SEGMENT_NOT_PRESENT, selector).into());
    }
    mark(environment, &mut found, BUSY)?;
    Ok(found.segment(selector))
}
