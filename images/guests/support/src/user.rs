//! Ring 3: three tiny position-independent programs, and the way into them.
//!
//! A program ends by `int 0x80`, whose trap [`run`] returns, or by an exception, which it returns
//! as well.

use core::arch::asm;
use core::slice;

use crate::memory::VirtAddr;
use crate::tables::{USER_CODE, USER_DATA};
use crate::trap::{Trap, catch};

/// What ring 3 does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    /// Loads 32 bits from the first argument's address; the trap's `ax` has them.
    Read,
    /// Stores the second argument's low 32 bits at the first argument's address.
    Write,
    /// Jumps to the first argument's address.
    Jump,
    /// Only ends.
    End,
}

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".balign 16",
    "guest_user_programs:",
    "mov eax, [rbx]",
    "int 0x80",
    ".balign 16",
    "mov [rbx], ecx",
    "int 0x80",
    ".balign 16",
    "jmp rbx",
    ".balign 16",
    "int 0x80",
    "guest_user_programs_end:",
);

#[cfg(target_arch = "x86")]
core::arch::global_asm!(
    ".balign 16",
    "guest_user_programs:",
    "mov eax, [ebx]",
    "int 0x80",
    ".balign 16",
    "mov [ebx], ecx",
    "int 0x80",
    ".balign 16",
    "jmp ebx",
    ".balign 16",
    "int 0x80",
    "guest_user_programs_end:",
);

unsafe extern "C" {
    static guest_user_programs: u8;
    static guest_user_programs_end: u8;
}

/// The machine code of all programs, for tests to copy into a page of ring 3.
pub fn programs() -> &'static [u8] {
    let start = &raw const guest_user_programs;
    let end = &raw const guest_user_programs_end;
    // SAFETY: the assembler put both labels around the same bytes, which nothing writes.
    unsafe { slice::from_raw_parts(start, end as usize - start as usize) }
}

impl Program {
    /// Where the program is when [`programs`] lies at `base`.
    pub const fn at(self, base: VirtAddr) -> VirtAddr {
        base.plus(self as usize * 16)
    }

    /// Where the program is in the image itself.
    pub fn in_image(self) -> VirtAddr {
        self.at(VirtAddr((&raw const guest_user_programs) as usize))
    }
}

/// Runs the ring 3 code at `code` with two arguments in (R)BX and (R)CX and flags beside IF = 0,
/// and returns the trap that ended it.
pub fn run(code: VirtAddr, arguments: [usize; 2], flags: usize) -> Trap {
    let ended = catch(|| {
        // SAFETY: it does not come back here: a trap ends it, and `catch` restores the stack.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            asm!("push {ss}", "push 0", "push {flags}", "push {cs}", "push {ip}", "mov rbx, {b}",
                "iretq", ss = const USER_DATA, cs = const USER_CODE, flags = in(reg) flags | 2,
                ip = in(reg) code.0, b = in(reg) arguments[0], in("rcx") arguments[1],
                options(noreturn));
            #[cfg(target_arch = "x86")]
            asm!("push {ss}", "push 0", "push {flags}", "push {cs}", "push eax", "mov eax, {ss}",
                "mov ds, eax", "mov es, eax", "mov ebx, edx", "iretd", ss = const USER_DATA,
                cs = const USER_CODE, flags = in(reg) flags | 2, in("eax") code.0,
                in("edx") arguments[0], in("ecx") arguments[1], options(noreturn));
        }
    });
    match ended {
        Err(trap) => trap,
        Ok(never) => never,
    }
}
