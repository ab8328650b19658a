# Entry in 32-bit protected mode without paging, by PVH or by Multiboot2; then to long mode with the
# first 4 GiB identity-mapped, and into Rust.
#
# Protocol: edi carries the boot protocol (0 PVH, 1 Multiboot2) and esi the physical address of its
# information structure from the first instructions to `start`. Interrupts stay off.
#
# Intel SDM vol. 3A, 10.8.5 (initializing IA-32e mode).

.set MULTIBOOT2_MAGIC, 0xe85250d6
.set MULTIBOOT2_LOADED, 0x36d76289
.set EXIT_NO_CPU, 3
.set EXIT_BAD_BOOT, 2

.section .note.pvh, "a", @note
    .balign 4
    .long 4                             # size of the name
    .long 8                             # size of the description
    .long 18                            # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "ax"
.code32

    .balign 8
multiboot2_header:
    .long MULTIBOOT2_MAGIC
    .long 0                             # i386, protected mode
    .long multiboot2_header_end - multiboot2_header
    .long -(MULTIBOOT2_MAGIC + (multiboot2_header_end - multiboot2_header))
    .balign 8
    .word 6, 0                          # modules start at page boundaries
    .long 8
    .balign 8
    .word 0, 0                          # end
    .long 8
multiboot2_header_end:

.global pvh_entry
pvh_entry:
    xor edi, edi
    jmp enter

.global multiboot2_entry
multiboot2_entry:
    mov edi, 1
    cmp eax, MULTIBOOT2_LOADED
    je enter
    mov esp, offset boot_stack_end
    mov ebx, EXIT_BAD_BOOT
    mov esi, offset not_multiboot2
    jmp fail

enter:
    cli
    cld
    mov esi, ebx
    mov esp, offset boot_stack_end

    # Is there CPUID? (SDM vol. 1, 20.1.2: bit 21 of EFLAGS can be changed.)
    pushfd
    pop eax
    mov ecx, eax
    xor eax, 1 << 21
    push eax
    popfd
    pushfd
    pop eax
    cmp eax, ecx
    je no_long_mode

    # Is there long mode? (CPUID 8000_0001h, EDX bit 29.)
    mov eax, 0x80000000
    cpuid
    cmp eax, 0x80000001
    jb no_long_mode
    mov eax, 0x80000001
    cpuid
    test edx, 1 << 29
    jz no_long_mode

    # Identity-map 4 GiB by 2 MiB pages: 2048 entries in four consecutive page directories.
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 21
    or eax, 0x83                        # present, writable, large
    mov [boot_page_directories + ecx * 8], eax
    mov dword ptr [boot_page_directories + ecx * 8 + 4], 0
    inc ecx
    cmp ecx, 2048
    jne 2b

    mov eax, offset boot_page_directories
    or eax, 3
    mov [boot_page_directory_pointers], eax
    add eax, 0x1000
    mov [boot_page_directory_pointers + 8], eax
    add eax, 0x1000
    mov [boot_page_directory_pointers + 16], eax
    add eax, 0x1000
    mov [boot_page_directory_pointers + 24], eax
    mov eax, offset boot_page_directory_pointers
    or eax, 3
    mov [boot_page_map], eax

    mov eax, 1 << 5                     # PAE, and nothing else
    mov cr4, eax
    mov eax, offset boot_page_map
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 1 << 8                      # LME
    wrmsr
    mov eax, 0x80000011                 # PG, ET, PE
    mov cr0, eax

    lgdt [boot_gdt_pointer]
    push 8
    mov eax, offset long_mode
    push eax
    retf

no_long_mode:
    mov ebx, EXIT_NO_CPU
    mov esi, offset no_long_mode_message
    jmp fail

# Prints the string at esi on COM1 and ends with exit code ebx, by every way out there is.
fail:
    mov edx, 0x3fb                      # line control: 8n1, divisor latch
    mov al, 0x83
    out dx, al
    mov edx, 0x3f8                      # divisor 1: 115200 baud
    mov al, 1
    out dx, al
    inc edx
    xor eax, eax
    out dx, al
    mov edx, 0x3fb
    mov al, 3
    out dx, al
2:  mov edx, 0x3fd                      # wait until everything is sent: a power-off loses the rest
    mov ecx, 0x100000
3:  in al, dx
    test al, 0x40
    loopz 3b
    lodsb
    test al, al
    jz 4f
    mov edx, 0x3f8
    out dx, al
    jmp 2b
4:  mov eax, ebx                        # isa-debug-exit
    mov edx, 0xf4
    out dx, eax
    mov esi, offset bochs_shutdown      # Bochs
    mov edx, 0x8900
    mov ecx, 8
    rep outsb
5:  hlt
    jmp 5b

not_multiboot2:
    .asciz "umbra-boot: entered by something that is neither Multiboot2 nor PVH\nexit status 2\n"
no_long_mode_message:
    .asciz "umbra-boot: this processor has no long mode (64 bits)\nexit status 3\n"
bochs_shutdown:
    .ascii "Shutdown"

    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 64-bit code
    .quad 0x00cf93000000ffff            # data
boot_gdt_pointer:
    .word boot_gdt_pointer - boot_gdt - 1
    .quad boot_gdt

.code64
long_mode:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov edi, edi                        # clear the upper halves
    mov esi, esi
    mov esp, offset boot_stack_end
    call start
    ud2

.section .bss.boot, "aw", @nobits
    .balign 4096
boot_page_map:
    .skip 4096
boot_page_directory_pointers:
    .skip 4096
boot_page_directories:
    .skip 4 * 4096
boot_stack:
    .skip 64 * 1024
boot_stack_end:
