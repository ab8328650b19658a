//! How a guest ended, and the exit code that every way out of the image carries for it.

use core::fmt;

use serde::{Deserialize, Serialize};

/// The code that the image ends with, the same by every way out: uhyve's exit, `isa-debug-exit`
/// (see [`ExitCode::isa_debug_exit_status`]) and the `exit status N` line elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
#[repr(u8)]
pub enum ExitCode {
    /// The guest ended and said that it succeeded.
    Success = 0,
    /// The guest ended and said that it failed, or can never go on.
    GuestFailed = 1,
    /// An option or the guest image is bad.
    BadInput = 2,
    /// The processor offers neither VMX nor SVM that Umbra can use.
    NoVirtualization = 3,
    /// The guest needs more shadow pages than its limit allows.
    NoMmuPages = 4,
    /// The host's heap is exhausted.
    HostOutOfMemory = 5,
    /// The guest met a triple fault.
    TripleFault = 6,
    /// The guest ran longer than its time limit.
    Watchdog = 7,
    /// Umbra itself panicked.
    Panicked = 101,
}

impl ExitCode {
    /// Every exit code.
    pub const ALL: [Self; 9] = [
        Self::Success,
        Self::GuestFailed,
        Self::BadInput,
        Self::NoVirtualization,
        Self::NoMmuPages,
        Self::HostOutOfMemory,
        Self::TripleFault,
        Self::Watchdog,
        Self::Panicked,
    ];

    /// The number.
    pub const fn as_u8(self) -> u8 {
        self as u8
    }

    /// The status that QEMU ends with after this code was written to its `isa-debug-exit` device:
    /// `(code << 1) | 1`.
    pub const fn isa_debug_exit_status(self) -> u8 {
        (self as u8) << 1 | 1
    }

    /// The exit code behind a status of QEMU; `None` if the status is not one of
    /// [`ExitCode::isa_debug_exit_status`]'s.
    pub fn from_isa_debug_exit_status(status: u8) -> Option<Self> {
        if status & 1 == 1 {
            Self::try_from(status >> 1).ok()
        } else {
            None
        }
    }
}

impl From<ExitCode> for u8 {
    fn from(code: ExitCode) -> Self {
        code.as_u8()
    }
}

impl TryFrom<u8> for ExitCode {
    type Error = UnknownExitCode;

    fn try_from(number: u8) -> Result<Self, UnknownExitCode> {
        Self::ALL
            .into_iter()
            .find(|code| code.as_u8() == number)
            .ok_or(UnknownExitCode(number))
    }
}

impl fmt::Display for ExitCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meaning = match self {
            Self::Success => "guest succeeded",
            Self::GuestFailed => "guest failed",
            Self::BadInput => "bad option or guest image",
            Self::NoVirtualization => "no usable VMX or SVM",
            Self::NoMmuPages => "no MMU page available",
            Self::HostOutOfMemory => "host out of memory",
            Self::TripleFault => "guest triple fault",
            Self::Watchdog => "watchdog",
            Self::Panicked => "Umbra panicked",
        };
        write!(formatter, "{} ({meaning})", self.as_u8())
    }
}

/// A number that is no [`ExitCode`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnknownExitCode(pub u8);

impl fmt::Display for UnknownExitCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} is not an exit code of Umbra", self.0)
    }
}

impl core::error::Error for UnknownExitCode {}

/// How a guest ended. Finer than [`ExitCode`]: several outcomes may share one code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest wrote 0 to its `isa-debug-exit` port.
    Succeeded,
    /// The guest wrote another value there (see [`crate::Report::guest_status`]).
    Failed,
    /// The guest halted with interrupts disabled: nothing but an NMI could wake it.
    Halted,
    /// The guest asked for a reset.
    Reset,
    /// The guest did what Umbra does not emulate; the message says what and where.
    Unsupported,
    /// The processor refused to enter the guest; the message names the field and the check.
    EntryFailed,
    /// An option of the image is bad; no guest ran.
    BadOption,
    /// The guest image is malformed or of no known format.
    BadImage,
    /// The processor offers neither VMX nor SVM that Umbra can use.
    NoVirtualization,
    /// The guest needs more shadow pages than its limit allows (see [`crate::Report::exhausted`]).
    NoMmuPages,
    /// The host's heap is exhausted.
    HostOutOfMemory,
    /// The guest met a triple fault.
    TripleFault,
    /// The guest ran longer than its time limit.
    Watchdog,
    /// The user ended the guest, by the monitor.
    Stopped,
    /// Umbra itself panicked.
    Panicked,
}

impl Outcome {
    /// The exit code that stands for this outcome.
    pub const fn exit_code(self) -> ExitCode {
        match self {
            Self::Succeeded => ExitCode::Success,
            Self::Failed
            | Self::Halted
            | Self::Reset
            | Self::Unsupported
            | Self::EntryFailed
            | Self::Stopped => ExitCode::GuestFailed,
            Self::BadOption | Self::BadImage => ExitCode::BadInput,
            Self::NoVirtualization => ExitCode::NoVirtualization,
            Self::NoMmuPages => ExitCode::NoMmuPages,
            Self::HostOutOfMemory => ExitCode::HostOutOfMemory,
            Self::TripleFault => ExitCode::TripleFault,
            Self::Watchdog => ExitCode::Watchdog,
            Self::Panicked => ExitCode::Panicked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_documented_ones() {
        let numbers = ExitCode::ALL.map(ExitCode::as_u8);
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7, 101]);
    }

    #[test]
    fn every_code_survives_isa_debug_exit() {
        for code in ExitCode::ALL {
            let status = code.isa_debug_exit_status();
            assert_eq!(ExitCode::from_isa_debug_exit_status(status), Some(code));
        }
        assert_eq!(ExitCode::Success.isa_debug_exit_status(), 1);
        assert_eq!(ExitCode::Panicked.isa_debug_exit_status(), 203);
    }

    #[test]
    fn other_statuses_are_no_codes() {
        let known =
            (0..=u8::MAX).filter(|status| ExitCode::from_isa_debug_exit_status(*status).is_some());
        assert_eq!(known.count(), ExitCode::ALL.len());
        assert_eq!(ExitCode::from_isa_debug_exit_status(0), None);
        assert_eq!(ExitCode::try_from(8), Err(UnknownExitCode(8)));
    }
}
