//! From the loader to the guest's `main`: headers, first instructions, and the panic handler.

use core::panic::PanicInfo;

use crate::boot::BootInfo;
use crate::check::{Checks, FAILED};
use crate::{console, cpu, println, tables};

/// Declares a guest: `guest!("name", multiboot, main)`, where `main` is a
/// `fn(&BootInfo, &mut Checks)`. The middle word is how the image may be loaded: `multiboot` (an
/// ELF32's own addresses; a 64-bit guest is made one after it is linked), `kludge` (Multiboot with the header's address fields), `pvh`, or
/// `kludge_and_pvh`. When `main` returns, the guest has passed.
#[macro_export]
macro_rules! guest {
    ($name:literal, $format:ident, $main:path) => {
        $crate::header!($format);

        #[unsafe(no_mangle)]
        fn guest_main(boot: &$crate::BootInfo, checks: &mut $crate::Checks) {
            $main(boot, checks);
            checks.finish($name)
        }
    };
}

/// Emits the header that makes an image loadable; see [`guest!`].
#[doc(hidden)]
#[macro_export]
macro_rules! header {
    (multiboot) => {
        core::arch::global_asm!(
            ".pushsection .boot.multiboot, \"a\"",
            ".balign 4",
            // Page-aligned modules, memory information.
            ".long 0x1badb002, 3, -(0x1badb002 + 3)",
            ".popsection",
        );
    };
    (kludge) => {
        core::arch::global_asm!(
            ".pushsection .boot.multiboot, \"a\"",
            ".balign 4",
            "guest_multiboot_header:",
            ".long 0x1badb002, 0x10003, -(0x1badb002 + 0x10003)",
            ".long guest_multiboot_header, guest_image_start, guest_data_end, guest_image_end",
            ".long guest_entry",
            ".popsection",
        );
    };
    (pvh) => {
        core::arch::global_asm!(
            ".pushsection .note.pvh, \"a\", @note",
            ".balign 4",
            // Owner "Xen", XEN_ELFNOTE_PHYS32_ENTRY.
            ".long 4, 8, 18",
            ".asciz \"Xen\"",
            ".quad guest_entry",
            ".popsection",
        );
    };
    (kludge_and_pvh) => {
        $crate::header!(kludge);
        $crate::header!(pvh);
    };
}

unsafe extern "Rust" {
    fn guest_main(boot: &BootInfo, checks: &mut Checks);
}

#[cfg(target_arch = "x86")]
core::arch::global_asm!(
    ".pushsection .boot.entry, \"ax\"",
    ".globl guest_entry",
    "guest_entry:",
    "cli",
    "cld",
    "lea esp, [guest_stack + {stack_bytes}]",
    "xor ebp, ebp",
    "sub esp, 8",
    "push ebx",
    "push eax",
    "call {start}",
    ".popsection",
    stack_bytes = const STACK_BYTES,
    start = sym start,
);

// Long mode with the first GiB identity-mapped by 2 MiB pages (SDM vol. 3, 10.8.5).
#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .boot.entry, \"ax\"",
    ".globl guest_entry",
    ".code32",
    "guest_entry:",
    "cli",
    "cld",
    "mov edi, eax",
    "mov esi, ebx",
    "lea eax, [guest_boot_tables + 0x1003]",
    "mov [guest_boot_tables], eax",
    "lea eax, [guest_boot_tables + 0x2003]",
    "mov [guest_boot_tables + 0x1000], eax",
    "mov eax, 0x83",
    "lea ebx, [guest_boot_tables + 0x2000]",
    "2:",
    "mov [ebx], eax",
    "add ebx, 8",
    "add eax, 0x200000",
    "cmp eax, 0x40000000",
    "jb 2b",
    "lea eax, [guest_boot_tables]",
    "mov cr3, eax",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000001",
    "mov cr0, eax",
    "lgdt [guest_boot_gdt_pointer]",
    // A far jump to 0x08:guest_entry64.
    ".byte 0xea",
    ".long guest_entry64",
    ".word 0x08",
    ".balign 8",
    "guest_boot_gdt:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "guest_boot_gdt_pointer:",
    ".word 23",
    ".long guest_boot_gdt",
    ".code64",
    "guest_entry64:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "lea rsp, [guest_stack + {stack_bytes}]",
    "xor ebp, ebp",
    "call {start}",
    ".popsection",
    ".pushsection .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    "guest_boot_tables: .skip 0x3000",
    ".popsection",
    stack_bytes = const STACK_BYTES,
    start = sym start,
);

core::arch::global_asm!(
    ".pushsection .bss.stack, \"aw\", @nobits",
    ".balign 16",
    "guest_stack: .skip {stack_bytes}",
    ".popsection",
    stack_bytes = const STACK_BYTES,
);

const STACK_BYTES: usize = 0x10000;

extern "C" fn start(magic: u32, info: u32) -> ! {
    console::init();
    tables::init();
    let Some(boot) = BootInfo::read(magic, info) else {
        println!("FAIL boot protocol: EAX {magic:#x} and EBX {info:#x} are no loader's");
        cpu::exit(FAILED);
    };
    // SAFETY: `guest!` defines this function with this signature.
    unsafe { guest_main(&boot, &mut Checks::default()) };
    cpu::exit(0)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("FAIL guest's own bug: {info}");
    cpu::exit(FAILED)
}
