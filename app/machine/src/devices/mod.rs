//! The devices, each a module of its own that knows neither the bus nor another device.
//!
//! Protocol: a device is told the time by whoever calls it, changes only by those calls, and
//! offers its outputs (interrupt level, next deadline) as plain functions. The machine reads them
//! after every access and every advance of time, and carries them to the interrupt controllers.

pub mod debug_exit;
pub mod fw_cfg;
pub mod io_apic;
pub mod keyboard;
pub mod local_apic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod power_management;
pub mod reset_control;
pub mod rtc;
pub mod serial;
pub mod test_device;

/// The level of an interrupt line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// Inactive.
    #[default]
    Low,
    /// Active.
    High,
}

impl Level {
    /// High if `condition` holds.
    pub(crate) const fn high_if(condition: bool) -> Self {
        if condition { Self::High } else { Self::Low }
    }

    /// Whether the line is active.
    pub const fn is_high(self) -> bool {
        matches!(self, Self::High)
    }
}
