//! Hardware task switches (SDM vol. 3A 8.2, 8.3, 8.6).
//!
//! Protocol: until both task-state segments are known to be accessible, a fault belongs to the old
//! task and nothing has happened. From then on the new task runs: a fault while its segments are
//! loaded is its own, before its first instruction.

use umbra_vcpu::event::{Exception, vector};
use umbra_vcpu::exit::TaskSwitchSource;
use umbra_vcpu::registers::{Gpr, Segment, SegmentAttributes, SegmentRegister};
use x86_64::registers::control::Cr0Flags;
use x86_64::registers::rflags::RFlags;

use crate::environment::{Environment, Stop};
use crate::flags::{DEFINED, FIXED};
use crate::mode::is_long_mode;
use crate::segment::{self, Arrival, Busy};
use crate::size::Size;
use crate::stack;

const NESTED_TASK: u64 = RFlags::NESTED_TASK.bits();
const VIRTUAL_8086: u64 = RFlags::VIRTUAL_8086_MODE.bits();
/// The longest task-state segment without its permission map, in bytes.
const LONGEST: usize = 104;

/// A task switch that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// The selector of the new task-state segment.
    pub selector: u16,
    /// What asked for it.
    pub source: TaskSwitchSource,
    /// The error code that the new task finds on its stack.
    pub error_code: Option<u32>,
    /// Where the old task goes on.
    pub resume_rip: u64,
}

/// The new task is in the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskEntry {
    /// The value for RIP.
    pub next_rip: u64,
    /// What the new task must be given before its first instruction.
    pub fault: Option<Exception>,
}

/// The two layouts (SDM vol. 3A figures 8-2 and 8-10).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Bits16,
    Bits32,
}

/// The order in which both layouts have segment selectors; the shorter one ends after DS.
const SELECTORS: [SegmentRegister; 6] = [
    SegmentRegister::Es,
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
];

impl Layout {
    /// By the type of a task-state segment's descriptor.
    const fn of(kind: u32) -> Self {
        if kind & 8 == 0 {
            Self::Bits16
        } else {
            Self::Bits32
        }
    }

    const fn size(self) -> Size {
        match self {
            Self::Bits16 => Size::Word,
            Self::Bits32 => Size::DoubleWord,
        }
    }

    /// The least limit.
    const fn limit(self) -> u32 {
        match self {
            Self::Bits16 => 0x2b,
            Self::Bits32 => 0x67,
        }
    }

    /// Where the instruction pointer is; flags, general registers and selectors follow.
    const fn instruction_pointer(self) -> usize {
        match self {
            Self::Bits16 => 0x0e,
            Self::Bits32 => 0x20,
        }
    }

    const fn selectors(self) -> &'static [SegmentRegister] {
        match self {
            Self::Bits16 => SELECTORS.split_at(4).0,
            Self::Bits32 => &SELECTORS,
        }
    }

    /// Where the selector of the local descriptor table is.
    const fn local_table(self) -> usize {
        match self {
            Self::Bits16 => 0x2a,
            Self::Bits32 => 0x60,
        }
    }
}

/// A task-state segment's dynamic part, in memory order.
struct State {
    layout: Layout,
    bytes: [u8; LONGEST],
}

impl State {
    fn get(&self, at: usize) -> u64 {
        let mut value = [0; 8];
        let length = self.layout.size().bytes();
        value[..length].copy_from_slice(&self.bytes[at..at + length]);
        u64::from_le_bytes(value)
    }

    /// Slot `index` from the instruction pointer on.
    fn slot(&self, index: usize) -> u64 {
        self.get(self.layout.instruction_pointer() + index * self.layout.size().bytes())
    }

    fn set_slot(&mut self, index: usize, value: u64) {
        let length = self.layout.size().bytes();
        let at = self.layout.instruction_pointer() + index * length;
        self.bytes[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    fn selector(&self, index: usize) -> u16 {
        self.slot(GENERAL + 8 + index) as u16
    }
}

/// The slot of the first general register.
const GENERAL: usize = 2;

/// Switches tasks.
///
/// # Errors
/// [`Stop::Exception`] for the old task, whose RIP is still at what asked for the switch.
pub fn switch_task<E: Environment>(
    environment: &mut E,
    request: &TaskSwitch,
) -> Result<TaskEntry, Stop<E::Failure>> {
    let TaskSwitch {
        selector,
        source,
        error_code,
        resume_rip,
    } = *request;
    let returns = source == TaskSwitchSource::InterruptReturn;
    let nests = matches!(source, TaskSwitchSource::Call | TaskSwitchSource::Gate);
    if is_long_mode(environment) {
        return Err(Exception::GENERAL_PROTECTION.into());
    }
    let (new_task, layout) = new_task(environment, selector, source)?;
    let old_task = environment.segment(SegmentRegister::Tr);

    let mut new = State {
        layout,
        bytes: [0; LONGEST],
    };
    let length = layout.limit() as usize + 1;
    segment::read_system(environment, new_task.base, &mut new.bytes[..length])?;
    save(environment, &old_task, resume_rip, source)?;

    if !nests {
        segment::set_busy(environment, old_task.selector, Busy::No)?;
    }
    if nests {
        let link = old_task.selector.to_le_bytes();
        segment::write_system(environment, new_task.base, &link)?;
    }
    if !returns {
        segment::set_busy(environment, selector, Busy::Yes)?;
    }
    environment.set_task_switched();
    environment.set_segment(SegmentRegister::Tr, busy(new_task));
    load(environment, &new, nests)?;
    let next_rip = new.slot(0);
    let fault = match load_segments(environment, &new, error_code) {
        Ok(()) => None,
        Err(Stop::Exception(fault)) => Some(fault),
        Err(stop) => return Err(stop),
    };
    Ok(TaskEntry { next_rip, fault })
}

/// The task register as it must be while the task runs.
fn busy(task: Segment) -> Segment {
    let attributes = task.attributes | SegmentAttributes::READ_WRITE;
    Segment { attributes, ..task }
}

/// Finds and checks the new task-state segment.
fn new_task<E: Environment>(
    environment: &mut E,
    selector: u16,
    source: TaskSwitchSource,
) -> Result<(Segment, Layout), Stop<E::Failure>> {
    const IN_LOCAL_TABLE: u16 = 1 << 2;
    const BUSY: u32 = 1 << 1;
    let fault = match source {
        TaskSwitchSource::InterruptReturn => vector::INVALID_TSS,
        _ => vector::GENERAL_PROTECTION,
    };
    let refused = || Stop::Exception(segment::selector_fault(fault, selector));
    if segment::is_null(selector) || selector & IN_LOCAL_TABLE != 0 {
        return Err(refused());
    }
    let found = segment::descriptor(environment, selector, fault)?;
    let is_task = !found.is_code_or_data() && found.kind() & 5 == 1;
    let is_busy = found.kind() & BUSY != 0;
    if !is_task || is_busy != (source == TaskSwitchSource::InterruptReturn) {
        return Err(refused());
    }
    if !found.is_present() {
        let absent = vector::SEGMENT_NOT_PRESENT;
        return Err(segment::selector_fault(absent, selector).into());
    }
    let layout = Layout::of(found.kind());
    let task = found.segment(selector);
    if task.limit < layout.limit() {
        return Err(segment::selector_fault(vector::INVALID_TSS, selector).into());
    }
    Ok((task, layout))
}

/// Writes the old task's registers to its task-state segment.
fn save<E: Environment>(
    environment: &mut E,
    task: &Segment,
    resume_rip: u64,
    source: TaskSwitchSource,
) -> Result<(), Stop<E::Failure>> {
    let layout = Layout::of(task.attributes.bits());
    if task.limit < layout.limit() {
        return Err(segment::selector_fault(vector::INVALID_TSS, task.selector).into());
    }
    let mut old = State {
        layout,
        bytes: [0; LONGEST],
    };
    let mut rflags = environment.registers().rflags;
    if source == TaskSwitchSource::InterruptReturn {
        rflags &= !NESTED_TASK;
    }
    old.set_slot(0, resume_rip);
    old.set_slot(1, rflags);
    for (index, register) in Gpr::ALL[..8].iter().enumerate() {
        old.set_slot(GENERAL + index, environment.registers().get(*register));
    }
    for (index, register) in layout.selectors().iter().enumerate() {
        let selector = environment.segment(*register).selector;
        old.set_slot(GENERAL + 8 + index, selector.into());
    }
    // What comes before and after stays as software has set it.
    let (start, end) = (layout.instruction_pointer(), layout.local_table());
    let address = task.base.wrapping_add(start as u64);
    segment::write_system(environment, address, &old.bytes[start..end])
}

/// Loads what needs no descriptor.
fn load<E: Environment>(
    environment: &mut E,
    new: &State,
    nests: bool,
) -> Result<(), Stop<E::Failure>> {
    /// Where a 32-bit task-state segment has CR3.
    const PAGE_TABLE: usize = 0x1c;
    let pages = environment.control_registers().cr0 & Cr0Flags::PAGING.bits() != 0;
    if new.layout == Layout::Bits32 && pages {
        environment.load_page_table(new.get(PAGE_TABLE))?;
    }
    let registers = environment.registers_mut();
    registers.rflags = new.slot(1) & DEFINED | FIXED | if nests { NESTED_TASK } else { 0 };
    for (index, register) in Gpr::ALL[..8].iter().enumerate() {
        let value = new.slot(GENERAL + index);
        registers.set(*register, value);
    }
    // Every register has its new selector before the first one can fault.
    for (index, register) in SELECTORS.iter().enumerate() {
        let selector = if index < new.layout.selectors().len() {
            new.selector(index)
        } else {
            0
        };
        environment.set_segment(*register, segment::null(selector));
    }
    environment.set_segment(SegmentRegister::Ldtr, segment::null(0));
    Ok(())
}

/// Loads the segment registers of the new task, and gives it its error code.
fn load_segments<E: Environment>(
    environment: &mut E,
    new: &State,
    error_code: Option<u32>,
) -> Result<(), Stop<E::Failure>> {
    let selectors = new.layout.selectors();
    let fault = vector::INVALID_TSS;
    let local = new.get(new.layout.local_table()) as u16;
    let virtual_8086 = environment.registers().rflags & VIRTUAL_8086 != 0;
    if virtual_8086 {
        for (index, register) in selectors.iter().enumerate() {
            let loaded = segment::virtual_8086_segment(new.selector(index));
            environment.set_segment(*register, loaded);
        }
    } else {
        // A task whose stack is refused has the privilege level of its code.
        let level = new.selector(1) & 3;
        let stack = Segment {
            attributes: SegmentAttributes::UNUSABLE
                | SegmentAttributes::from_bits_retain(u32::from(level) << 5),
            ..segment::null(new.selector(2))
        };
        environment.set_segment(SegmentRegister::Ss, stack);
    }
    let table = segment::load_local_table(environment, local, fault)?;
    environment.set_segment(SegmentRegister::Ldtr, table);
    if !virtual_8086 {
        let code = segment::load_code(environment, new.selector(1), Arrival::Task)?;
        environment.set_segment(SegmentRegister::Cs, code);
        let level = (new.selector(1) & 3) as u8;
        let stack = new.selector(2);
        let stack = segment::load_at_level(environment, SegmentRegister::Ss, stack, level, fault)?;
        environment.set_segment(SegmentRegister::Ss, stack);
        for (index, register) in selectors.iter().enumerate() {
            if matches!(register, SegmentRegister::Cs | SegmentRegister::Ss) {
                continue;
            }
            let selector = new.selector(index);
            let loaded = segment::load_at_level(environment, *register, selector, level, fault)?;
            environment.set_segment(*register, loaded);
        }
    }
    if let Some(error_code) = error_code {
        stack::push_all(environment, new.layout.size(), &[error_code.into()])?;
    }
    let code = environment.segment(SegmentRegister::Cs);
    if new.slot(0) > u64::from(code.limit) {
        return Err(Exception::GENERAL_PROTECTION.into());
    }
    Ok(())
}
