//! Can `/dev/kvm` of this host run a machine, and does it offer VMX or SVM inside?
//!
//! A device that opens proves nothing: some hosts carry a KVM without hardware virtualization, which
//! stops with an internal error on ordinary instructions. So the preflight runs a few of them.

use std::io::ErrorKind;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Why this host's KVM is of no use to Umbra.
#[derive(Debug, Error)]
pub enum Unusable {
    /// There is no `/dev/kvm`.
    #[error("/dev/kvm does not exist")]
    Missing,
    /// The device is there, and may not be opened.
    #[error("/dev/kvm may not be opened by this user")]
    Forbidden,
    /// An `ioctl` failed before the first instruction.
    #[error("{step} failed: {source}")]
    Ioctl {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// The preflight's memory could not be had.
    #[error("no memory for the preflight: {0}")]
    Memory(String),
    /// The preflight's program did not run to its end.
    #[error("it opens, but stops on ordinary instructions ({0})")]
    Stopped(String),
    /// The preflight's program neither ended nor failed.
    #[error("it opens, but hangs on ordinary instructions")]
    Hung,
    /// KVM works, but its guests get neither VMX nor SVM.
    #[error("it offers its guests neither VMX nor SVM (nested virtualization is off)")]
    NotNested,
}

impl Unusable {
    /// What the user can do about it.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Missing => {
                "enable virtualization in the firmware, or take a machine with nested virtualization; \
                 then `modprobe kvm_intel` or `modprobe kvm_amd`"
            }
            Self::Forbidden => "add yourself to the group `kvm`: sudo usermod -aG kvm $USER",
            Self::NotNested => {
                "load the module with nested=1: modprobe -r kvm_intel; modprobe kvm_intel nested=1 \
                 (or kvm_amd)"
            }
            Self::Ioctl { .. } | Self::Memory(_) | Self::Stopped(_) | Self::Hung => {
                "this host's KVM has no working hardware virtualization; take another machine"
            }
        }
    }
}

/// What KVM offers its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nested {
    /// Intel VMX.
    Vmx,
    /// AMD SVM.
    Svm,
}

/// Where the preflight's program lies in its guest's memory.
const PROGRAM_ADDRESS: u64 = 0x1000;
const MEMORY_BYTES: usize = 0x4000;
/// The port to which the program writes its result.
const RESULT_PORT: u16 = 0x10;
/// What the program writes when every instruction did what it should.
const RESULT: u8 = 42;

/// Real mode: a loop, memory, the stack, a string instruction, x87 and SSE; then the result and `hlt`.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0xb9, 0x07, 0x00,             // mov cx, 7
    0x31, 0xc0,                   // xor ax, ax
    0x83, 0xc0, 0x03,             // next: add ax, 3
    0xe2, 0xfb,                   // loop next
    0xbc, 0x00, 0x30,             // mov sp, 0x3000
    0x50,                         // push ax
    0xa3, 0x00, 0x20,             // mov [0x2000], ax
    0xbe, 0x00, 0x20,             // mov si, 0x2000
    0xbf, 0x10, 0x20,             // mov di, 0x2010
    0xfc,                         // cld
    0xa5,                         // movsw
    0x5b,                         // pop bx
    0x03, 0x1e, 0x10, 0x20,       // add bx, [0x2010]
    0x0f, 0xa2,                   // cpuid (overwrites bx)
    0xdb, 0xe3,                   // fninit
    0xdf, 0x06, 0x10, 0x20,       // fild word [0x2010]
    0xd8, 0xc0,                   // fadd st0, st0
    0xdf, 0x1e, 0x10, 0x20,       // fistp word [0x2010]
    0x0f, 0x20, 0xe0,             // mov eax, cr4
    0x80, 0xcc, 0x02,             // or ah, 2 (CR4.OSFXSR)
    0x0f, 0x22, 0xe0,             // mov cr4, eax
    0xf3, 0x0f, 0x7e, 0x06, 0x10, 0x20, // movq xmm0, [0x2010]
    0x0f, 0x57, 0xc9,             // xorps xmm1, xmm1
    0x66, 0x0f, 0xfe, 0xc1,       // paddd xmm0, xmm1
    0x66, 0x0f, 0xd6, 0x06, 0x10, 0x20, // movq [0x2010], xmm0
    0xa1, 0x10, 0x20,             // mov ax, [0x2010]
    0xe6, RESULT_PORT as u8,      // out RESULT_PORT, al
    0xf4,                         // hlt
];

/// Tries KVM by running a guest of a few instructions, at most for two seconds.
///
/// # Errors
/// Says what is missing.
pub fn preflight() -> Result<Nested, Unusable> {
    let (sender, receiver) = mpsc::channel();
    // A hung KVM_RUN cannot be cancelled from here; its thread ends with the process.
    thread::spawn(move || sender.send(try_everything()));
    receiver
        .recv_timeout(Duration::from_secs(2))
        .unwrap_or(Err(Unusable::Hung))
}

fn try_everything() -> Result<Nested, Unusable> {
    let kvm = Kvm::new().map_err(|error| {
        match std::io::Error::from_raw_os_error(error.errno()).kind() {
            ErrorKind::NotFound => Unusable::Missing,
            ErrorKind::PermissionDenied => Unusable::Forbidden,
            _ => Unusable::Ioctl {
                step: "opening /dev/kvm",
                source: error,
            },
        }
    })?;
    let vm = kvm
        .create_vm()
        .map_err(ioctl("creating a virtual machine"))?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .map_err(|error| Unusable::Memory(error.to_string()))?;
    memory
        .write_slice(PROGRAM, GuestAddress(PROGRAM_ADDRESS))
        .map_err(|error| Unusable::Memory(error.to_string()))?;
    give_memory(&vm, &memory)?;
    run_program(&vm)?;
    nested(&kvm)
}

fn ioctl(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Unusable {
    move |source| Unusable::Ioctl { step, source }
}

#[allow(unsafe_code)]
fn give_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Unusable> {
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| Unusable::Memory(error.to_string()))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is the whole of `memory`'s only mapping, which nobody else uses, and which
    // outlives the virtual CPU: the caller drops `memory` after the last KVM_RUN.
    unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("giving the guest memory"))
}

fn run_program(vm: &VmFd) -> Result<(), Unusable> {
    let mut vcpu = vm.create_vcpu(0).map_err(ioctl("creating a virtual CPU"))?;
    let mut system = vcpu.get_sregs().map_err(ioctl("reading registers"))?;
    for segment in [
        &mut system.cs,
        &mut system.ds,
        &mut system.es,
        &mut system.ss,
    ] {
        segment.base = 0;
        segment.selector = 0;
    }
    vcpu.set_sregs(&system)
        .map_err(ioctl("writing registers"))?;
    let mut registers = vcpu.get_regs().map_err(ioctl("reading registers"))?;
    registers.rip = PROGRAM_ADDRESS;
    registers.rflags = 2;
    vcpu.set_regs(&registers)
        .map_err(ioctl("writing registers"))?;

    let mut result = None;
    loop {
        match vcpu.run().map_err(ioctl("running the guest"))? {
            VcpuExit::IoOut(RESULT_PORT, &[value]) => result = Some(value),
            VcpuExit::Hlt if result == Some(RESULT) => return Ok(()),
            VcpuExit::Hlt => {
                return Err(Unusable::Stopped(format!(
                    "it computed {result:?}, not {RESULT}"
                )));
            }
            VcpuExit::InternalError => return Err(Unusable::Stopped("internal error".into())),
            other => return Err(Unusable::Stopped(format!("{other:?}"))),
        }
    }
}

/// What KVM's offered CPUID says, whether or not KVM can run anything; `None` without a usable
/// device.
pub fn offered() -> Option<Result<Nested, Unusable>> {
    Some(nested(&Kvm::new().ok()?))
}

/// AMD APM volume 3, appendix E: CPUID 8000_0001h ECX bit 2; Intel SDM volume 2: CPUID 1 ECX bit 5.
fn nested(kvm: &Kvm) -> Result<Nested, Unusable> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(ioctl("reading the offered CPUID"))?;
    let has = |function, bit: u32| {
        cpuid
            .as_slice()
            .iter()
            .any(|leaf| leaf.function == function && leaf.ecx >> bit & 1 == 1)
    };
    if has(1, 5) {
        Ok(Nested::Vmx)
    } else if has(0x8000_0001, 2) {
        Ok(Nested::Svm)
    } else {
        Err(Unusable::NotNested)
    }
}
