//! What GDB may ask of a guest: registers, memory, and to go on.

use core::convert::Infallible;
use core::fmt;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::BreakpointsOps;
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use umbra_inspect::GuestView;
use umbra_vcpu::address::Gva;

use super::breakpoints::physical;
use super::registers::{Values, X86};
use super::{PROCESSOR, Resumption};
use crate::guest::Guest;

/// GDB's answer to an address that is not mapped (EFAULT).
const FAULT: u8 = 14;
/// GDB's answer to a value that a register cannot get (EINVAL).
const INVALID: u8 = 22;

impl Target for Guest {
    type Arch = X86;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl TargetDescriptionXmlOverride for Guest {
    fn target_description_xml(
        &self,
        _annex: &[u8],
        offset: u64,
        length: usize,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let room = length.min(buffer.len());
        let mut window = Window {
            skip: usize::try_from(offset).unwrap_or(usize::MAX),
            buffer: &mut buffer[..room],
            length: 0,
        };
        // It always succeeds: what does not fit is asked for later.
        let _ = super::layout(self).describe(&mut window);
        Ok(window.length)
    }
}

/// A part of a text that is written as a whole.
struct Window<'a> {
    /// How much of the text comes before the part.
    skip: usize,
    buffer: &'a mut [u8],
    length: usize,
}

impl fmt::Write for Window<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let skipped = self.skip.min(text.len());
        self.skip -= skipped;
        let rest = &text.as_bytes()[skipped..];
        let part = rest.len().min(self.buffer.len() - self.length);
        self.buffer[self.length..self.length + part].copy_from_slice(&rest[..part]);
        self.length += part;
        Ok(())
    }
}

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, values: &mut Values, _: Tid) -> TargetResult<(), Self> {
        super::layout(self).read(&mut *self.vcpu, values);
        Ok(())
    }

    fn write_registers(&mut self, values: &Values, _: Tid) -> TargetResult<(), Self> {
        let written = super::layout(self).write(&mut *self.vcpu, values);
        written.map_err(|_| TargetError::Errno(INVALID))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], _: Tid) -> TargetResult<usize, Self> {
        match self.paging.read(Gva::new(start), data) {
            0 if !data.is_empty() => Err(TargetError::Errno(FAULT)),
            length => Ok(length),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], _: Tid) -> TargetResult<(), Self> {
        for (offset, byte) in (0..).zip(data) {
            let at = physical(self, Gva::new(start).wrapping_add(offset))
                .ok_or(TargetError::Errno(FAULT))?;
            let written = self.paging.write_ram(at, &[*byte]);
            written.map_err(|_| TargetError::Errno(FAULT))?;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, report: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        report(PROCESSOR);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), Infallible> {
        super::resume(self);
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        super::set_resumption(self, Resumption::Continue);
        Ok(())
    }

    fn set_resume_action_continue(&mut self, _: Tid, _: Option<Signal>) -> Result<(), Infallible> {
        super::set_resumption(self, Resumption::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Guest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        // There is no other processor that would have to wait.
        Ok(())
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(&mut self, _: Tid, _: Option<Signal>) -> Result<(), Infallible> {
        super::set_resumption(self, Resumption::Step);
        Ok(())
    }
}
