//! Chooses the virtualization extension of this processor.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;

use umbra_machine::processor::cpuid::DriverLimits;
use umbra_machine::processor::features::Features;
use umbra_report::{Driver as Kind, Outcome};
use umbra_svm::{Core, SvmVcpu};
use umbra_vcpu::Vcpu;
use umbra_vcpu::host::HostMemory;
use umbra_vmx::{Vmx, VmxVcpu};

use crate::guest::End;

/// A virtualization extension that is switched on.
pub enum Driver {
    /// AMD SVM.
    Svm(Arc<Core>),
    /// Intel VMX.
    Vmx(Vmx),
}

impl Driver {
    /// Switches on what this processor has.
    ///
    /// # Errors
    /// One line that says why neither extension can be used.
    pub fn enable(memory: &dyn HostMemory) -> Result<Self, String> {
        // SAFETY: the image runs in ring 0 on its one core, which no task leaves, and this is the
        // only place that enables the extension. The image is built without floating-point
        // registers, and the kernel sets its tables up once, before the application starts.
        let vmx_error = match unsafe { Vmx::enable(memory) } {
            Ok(vmx) => return Ok(Self::Vmx(vmx)),
            Err(error) => error.to_string(),
        };
        // SAFETY: as above.
        match unsafe { Core::enable(memory) } {
            Ok(core) => Ok(Self::Svm(Arc::new(core))),
            Err(error) => Err(alloc::format!(
                "no usable VMX ({vmx_error}) or SVM ({error})"
            )),
        }
    }

    /// The extension's name in the report.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Svm(_) => Kind::Svm,
            Self::Vmx(_) => Kind::Vmx,
        }
    }

    /// What a guest cannot have under this driver.
    pub fn limits(&self) -> DriverLimits {
        DriverLimits {
            extended_state: match self {
                Self::Svm(core) => core.extended_components(),
                Self::Vmx(vmx) => vmx.extended_components(),
            },
            unsupported: Features::PCID | Features::LA57,
        }
    }

    /// A guest processor.
    ///
    /// # Errors
    /// [`End`] if there is no memory for it.
    pub fn create_vcpu(&self, memory: &dyn HostMemory) -> Result<Box<dyn Vcpu>, End> {
        let vcpu = match self {
            Self::Svm(core) => SvmVcpu::new(Arc::clone(core), memory)
                .map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>)
                .map_err(|error| error.to_string()),
            Self::Vmx(vmx) => VmxVcpu::new(vmx, memory)
                .map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>)
                .map_err(|error| error.to_string()),
        };
        vcpu.map_err(|message| End::new(Outcome::HostOutOfMemory, message))
    }
}
