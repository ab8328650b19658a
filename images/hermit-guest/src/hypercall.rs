//! The hypercalls of version 1 that this kernel does not make: arguments and environment, as older
//! kernels ask for them.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::ffi::CStr;

use hermit::println;
use memory_addresses::PhysAddr;
use uhyve_interface::parameters::{CloseParams, CmdsizeParams, CmdvalParams, LseekParams};
use uhyve_interface::{HypercallAddress, MAX_ARGC_ENVC};

use crate::Checks;

const LONGEST: usize = 128;
/// How many arguments and variables there is room for.
const STRINGS: usize = 8;

/// Memory that is shared with the hypervisor. It is part of the image, which lies at its physical
/// address.
struct Shared<T>(UnsafeCell<T>);

// SAFETY: this application has one thread, and the hypervisor works while that one waits.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    fn address(&self) -> u64 {
        self.0.get() as u64
    }

    fn set(&self, value: T) {
        // SAFETY: nobody else has it, as above.
        unsafe { self.0.get().write_volatile(value) };
    }

    fn get(&self) -> T
    where
        T: Copy,
    {
        // SAFETY: as above.
        unsafe { self.0.get().read_volatile() }
    }
}

type Pointers = [u64; STRINGS];
type Strings = [[u8; LONGEST]; STRINGS];

static SIZES: Shared<CmdsizeParams> = Shared::new(CmdsizeParams {
    argc: -1,
    argsz: [-1; MAX_ARGC_ENVC],
    envc: -1,
    envsz: [-1; MAX_ARGC_ENVC],
});
static VALUES: Shared<CmdvalParams> = Shared::new(CmdvalParams {
    argv: PhysAddr::zero(),
    envp: PhysAddr::zero(),
});
static ARGV: Shared<Pointers> = Shared::new([0; STRINGS]);
static ENVP: Shared<Pointers> = Shared::new([0; STRINGS]);
static ARGUMENTS: Shared<Strings> = Shared::new([[0xff; LONGEST]; STRINGS]);
static VARIABLES: Shared<Strings> = Shared::new([[0xff; LONGEST]; STRINGS]);
static SEEK: Shared<LseekParams> = Shared::new(LseekParams {
    fd: 1234,
    offset: 0,
    whence: 0,
});
static CLOSE: Shared<CloseParams> = Shared::new(CloseParams { fd: 1234, ret: 0 });

/// Asks for arguments and environment, and prints them.
pub fn arguments(checks: &mut Checks) {
    call(HypercallAddress::Cmdsize, SIZES.address());
    let sizes = SIZES.get();
    let (argc, envc, argsz, envsz) = (sizes.argc, sizes.envc, sizes.argsz, sizes.envsz);
    let room = 0..=STRINGS.cast_signed() as i32;
    checks.check("the number of arguments", room.contains(&argc) && argc > 0);
    checks.check("the number of variables", room.contains(&envc));

    for (pointers, strings) in [(&ARGV, &ARGUMENTS), (&ENVP, &VARIABLES)] {
        let mut addresses = [0; STRINGS];
        for (number, address) in (0..).zip(&mut addresses) {
            *address = strings.address() + number * LONGEST as u64;
        }
        pointers.set(addresses);
    }
    VALUES.set(CmdvalParams {
        argv: PhysAddr::new(ARGV.address()),
        envp: PhysAddr::new(ENVP.address()),
    });
    call(HypercallAddress::Cmdval, VALUES.address());
    for (what, strings, count, sizes) in [
        ("argument", ARGUMENTS.get(), argc, argsz),
        ("variable", VARIABLES.get(), envc, envsz),
    ] {
        let count = usize::try_from(count).unwrap_or_default();
        for (string, size) in strings.iter().zip(sizes).take(count) {
            let text = CStr::from_bytes_until_nul(string).unwrap_or_default();
            checks.check("a string's size", text.count_bytes() + 1 == size as usize);
            println!("by hypercall, {what}: {}", text.to_str().unwrap_or("?"));
        }
    }

    call(HypercallAddress::FileLseek, SEEK.address());
    checks.check("the result of seeking", SEEK.get().offset < 0);
    call(HypercallAddress::FileClose, CLOSE.address());
    checks.check("the result of closing", CLOSE.get().ret < 0);
}

fn call(port: HypercallAddress, data: u64) {
    // SAFETY: the hypervisor reads and writes what `data` points to and nothing else.
    unsafe { asm!("out dx, eax", in("dx") port as u16, in("eax") data as u32) };
}
