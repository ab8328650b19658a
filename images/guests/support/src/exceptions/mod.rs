//! Every exception that a guest can raise at will, with its error code and the saved instruction
//! pointer: at the instruction for faults, behind it for traps (SDM vol. 3, chapter 6).
//!
//! Words on the command line: `int1` also runs INT1, which QEMU's software emulation takes for a
//! debugger's. `strict` turns what that emulation lacks even as a hypervisor's host into failures: #AC,
//! #XM, segment limits and types, and details of some error codes.

mod debug;
mod float;
mod protection;
mod ring3;
mod simple;

use crate::boot::BootInfo;
use crate::check::Checks;
use crate::trap::{Global, Trap};

/// Addresses of the instruction last tried and of the one behind it.
pub(crate) static TRIED: Global<[usize; 2]> = Global::new([0; 2]);

/// Runs `setup => instruction => cleanup` and catches what it raises; notes where the instruction
/// starts and ends.
#[cfg(target_arch = "x86_64")]
macro_rules! attempt {
    ($($setup:literal),* => $code:literal => $($cleanup:literal),*; $($operands:tt)*) => {
        $crate::trap::catch(|| {
            // SAFETY: each use runs instructions of its own whose effects it undoes; exceptions
            // come back through `catch`.
            #[allow(unused_unsafe)]
            unsafe {
                core::arch::asm!(
                    "lea {t}, [rip + 2f]", "mov [rip + {tried}], {t}",
                    "lea {t}, [rip + 3f]", "mov [rip + {tried} + 8], {t}",
                    $($setup,)* "2:", $code, "3:", $($cleanup,)*
                    t = out(reg) _, tried = sym $crate::exceptions::TRIED, $($operands)*
                )
            }
        })
    };
    ($code:literal) => { attempt!(=> $code =>;) };
}

/// Runs `setup => instruction => cleanup` and catches what it raises; notes where the instruction
/// starts and ends.
#[cfg(target_arch = "x86")]
macro_rules! attempt {
    ($($setup:literal),* => $code:literal => $($cleanup:literal),*; $($operands:tt)*) => {
        $crate::trap::catch(|| {
            // SAFETY: each use runs instructions of its own whose effects it undoes; exceptions
            // come back through `catch`.
            #[allow(unused_unsafe)]
            unsafe {
                core::arch::asm!(
                    "lea {t}, [2f]", "mov [{tried}], {t}",
                    "lea {t}, [3f]", "mov [{tried} + 4], {t}",
                    $($setup,)* "2:", $code, "3:", $($cleanup,)*
                    t = out(reg) _, tried = sym $crate::exceptions::TRIED, $($operands)*
                )
            }
        })
    };
    ($code:literal) => { attempt!(=> $code =>;) };
}

pub(crate) use attempt;

/// Runs everything.
pub fn run(boot: &BootInfo, checks: &mut Checks) {
    simple::run(boot, checks);
    protection::run(boot, checks);
    debug::run(boot, checks);
    float::run(boot, checks);
    ring3::run(boot, checks);
}

impl Checks {
    /// Checks for an exception whose saved instruction pointer is at the instruction tried.
    pub(crate) fn faults<T>(
        &mut self,
        what: &str,
        vector: u8,
        error_code: u32,
        result: Result<T, Trap>,
    ) -> Trap {
        let trap = self.raises(what, vector, error_code, result);
        self.equal(
            format_args!("{what}: instruction pointer"),
            TRIED.get()[0],
            trap.ip,
        );
        trap
    }

    /// Checks for an exception whose saved instruction pointer is behind the instruction tried.
    pub(crate) fn traps<T>(&mut self, what: &str, vector: u8, result: Result<T, Trap>) -> Trap {
        let trap = self.raises(what, vector, 0, result);
        self.equal(
            format_args!("{what}: instruction pointer"),
            TRIED.get()[1],
            trap.ip,
        );
        trap
    }
}
