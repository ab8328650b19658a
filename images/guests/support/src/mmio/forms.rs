//! The instructions, each with what it does to memory and which flags the manual leaves undefined.
//!
//! An operand is at (E)BX, a string at (E)SI and (E)DI, with 5 elements in (E)CX. In 64-bit mode
//! `[ebx]` makes an address-size prefix.

use core::arch::global_asm;

use super::Access;

/// One instruction, or a few of which one accesses memory.
pub struct Form {
    /// Its text.
    pub text: &'static str,
    /// What it does to the operand.
    pub access: Access,
    /// Flags without a defined value afterwards.
    pub undefined: usize,
}

impl Form {
    /// Whether it is RCL or RCR.
    pub fn rotates_through_carry(&self) -> bool {
        self.text.starts_with("rcl") || self.text.starts_with("rcr")
    }

    /// Whether the stack is in the window meanwhile.
    pub fn moves_stack(&self) -> bool {
        self.text.contains("xchg esp") || self.text.contains("xchg rsp")
    }
}

const NONE: usize = 0;
const AF: usize = 1 << 4;
const OF: usize = 1 << 11;
const CF: usize = 1 << 0;
const PF: usize = 1 << 2;
const ZF: usize = 1 << 6;
const SF: usize = 1 << 7;
/// After BT and the like.
const BIT: usize = OF | SF | AF | PF;
/// After MUL and IMUL.
const PRODUCT: usize = SF | ZF | AF | PF;
/// After BSF and BSR.
const SCAN: usize = CF | OF | SF | AF | PF;
/// After DIV.
const ALL: usize = SCAN | ZF;

/// Bytes from one instruction's code to the next one's.
const STRIDE: usize = 32;

/// Some forms with their code.
pub struct Table {
    /// The forms.
    pub forms: &'static [Form],
    code: usize,
    end: usize,
}

impl Table {
    /// Whether every form's code is as long as it should be at most.
    pub const fn is_regular(&self) -> bool {
        self.end - self.code == self.forms.len() * STRIDE
    }

    /// Where the code of form `index` is.
    pub fn code(&self, index: usize) -> usize {
        self.code + index * STRIDE
    }
}

macro_rules! forms {
    ($name:ident, $label:ident, $end:ident; $($text:literal, $access:ident, $undefined:expr;)*) => {
        global_asm!(
            ".pushsection .text.forms, \"ax\"",
            ".balign 32",
            concat!(stringify!($label), ":"),
            $($text, "jmp guest_form_return", ".balign 32, 0x90",)*
            concat!(stringify!($end), ":"),
            ".popsection",
        );

        unsafe extern "C" {
            static $label: u8;
            static $end: u8;
        }

        /// A table of instructions.
        pub fn $name() -> Table {
            Table {
                forms: &[$(Form {
                    text: $text,
                    access: Access::$access,
                    undefined: $undefined,
                }),*],
                code: &raw const $label as usize,
                end: &raw const $end as usize,
            }
        }
    };
}

forms! {
    common, guest_forms_common, guest_forms_common_end;
    "mov byte ptr [ebx], al", Write, NONE;
    "mov byte ptr [ebx], ch", Write, NONE;
    "mov word ptr [ebx], ax", Write, NONE;
    "mov dword ptr [ebx], eax", Write, NONE;
    "mov byte ptr [ebx], 0x5a", Write, NONE;
    "mov word ptr [ebx], 0x5a5b", Write, NONE;
    "mov dword ptr [ebx], 0x8a5b5c5d", Write, NONE;
    "mov dword ptr [ebx + ecx*4 - 20], edx", Write, NONE;
    "mov word ptr [ebx], ds", Write, NONE;
    "mov al, byte ptr [ebx]", Read, NONE;
    "mov dh, byte ptr [ebx]", Read, NONE;
    "mov ax, word ptr [ebx]", Read, NONE;
    "mov eax, dword ptr [ebx]", Read, NONE;
    "mov edi, dword ptr [ebx + ecx - 5]", Read, NONE;
    "movzx eax, byte ptr [ebx]", Read, NONE;
    "movzx eax, word ptr [ebx]", Read, NONE;
    "movzx ax, byte ptr [ebx]", Read, NONE;
    "movsx eax, byte ptr [ebx]", Read, NONE;
    "movsx eax, word ptr [ebx]", Read, NONE;
    "movsx ax, byte ptr [ebx]", Read, NONE;
    "movnti dword ptr [ebx], eax", Write, NONE;
    "movbe eax, dword ptr [ebx]", Read, NONE;
    "movbe ax, word ptr [ebx]", Read, NONE;
    "movbe dword ptr [ebx], eax", Write, NONE;
    "movbe word ptr [ebx], dx", Write, NONE;
    "add byte ptr [ebx], al", ReadWrite, NONE;
    "add word ptr [ebx], dx", ReadWrite, NONE;
    "add dword ptr [ebx], eax", ReadWrite, NONE;
    "add dword ptr [ebx], -3", ReadWrite, NONE;
    "lock add dword ptr [ebx], eax", ReadWrite, NONE;
    "add eax, dword ptr [ebx]", Read, NONE;
    "add dl, byte ptr [ebx]", Read, NONE;
    "or byte ptr [ebx], al", ReadWrite, AF;
    "or word ptr [ebx], dx", ReadWrite, AF;
    "or dword ptr [ebx], eax", ReadWrite, AF;
    "or dword ptr [ebx], -3", ReadWrite, AF;
    "lock or dword ptr [ebx], eax", ReadWrite, AF;
    "or eax, dword ptr [ebx]", Read, AF;
    "or dl, byte ptr [ebx]", Read, AF;
    "adc byte ptr [ebx], al", ReadWrite, NONE;
    "adc word ptr [ebx], dx", ReadWrite, NONE;
    "adc dword ptr [ebx], eax", ReadWrite, NONE;
    "adc dword ptr [ebx], -3", ReadWrite, NONE;
    "lock adc dword ptr [ebx], eax", ReadWrite, NONE;
    "adc eax, dword ptr [ebx]", Read, NONE;
    "adc dl, byte ptr [ebx]", Read, NONE;
    "sbb byte ptr [ebx], al", ReadWrite, NONE;
    "sbb word ptr [ebx], dx", ReadWrite, NONE;
    "sbb dword ptr [ebx], eax", ReadWrite, NONE;
    "sbb dword ptr [ebx], -3", ReadWrite, NONE;
    "lock sbb dword ptr [ebx], eax", ReadWrite, NONE;
    "sbb eax, dword ptr [ebx]", Read, NONE;
    "sbb dl, byte ptr [ebx]", Read, NONE;
    "and byte ptr [ebx], al", ReadWrite, AF;
    "and word ptr [ebx], dx", ReadWrite, AF;
    "and dword ptr [ebx], eax", ReadWrite, AF;
    "and dword ptr [ebx], -3", ReadWrite, AF;
    "lock and dword ptr [ebx], eax", ReadWrite, AF;
    "and eax, dword ptr [ebx]", Read, AF;
    "and dl, byte ptr [ebx]", Read, AF;
    "sub byte ptr [ebx], al", ReadWrite, NONE;
    "sub word ptr [ebx], dx", ReadWrite, NONE;
    "sub dword ptr [ebx], eax", ReadWrite, NONE;
    "sub dword ptr [ebx], -3", ReadWrite, NONE;
    "lock sub dword ptr [ebx], eax", ReadWrite, NONE;
    "sub eax, dword ptr [ebx]", Read, NONE;
    "sub dl, byte ptr [ebx]", Read, NONE;
    "xor byte ptr [ebx], al", ReadWrite, AF;
    "xor word ptr [ebx], dx", ReadWrite, AF;
    "xor dword ptr [ebx], eax", ReadWrite, AF;
    "xor dword ptr [ebx], -3", ReadWrite, AF;
    "lock xor dword ptr [ebx], eax", ReadWrite, AF;
    "xor eax, dword ptr [ebx]", Read, AF;
    "xor dl, byte ptr [ebx]", Read, AF;
    "cmp byte ptr [ebx], al", Read, NONE;
    "cmp dword ptr [ebx], eax", Read, NONE;
    "cmp eax, dword ptr [ebx]", Read, NONE;
    "cmp word ptr [ebx], 0x1234", Read, NONE;
    "test byte ptr [ebx], 0x81", Read, AF;
    "test dword ptr [ebx], eax", Read, AF;
    "test word ptr [ebx], 0x8001", Read, AF;
    "inc byte ptr [ebx]", ReadWrite, NONE;
    "inc word ptr [ebx]", ReadWrite, NONE;
    "inc dword ptr [ebx]", ReadWrite, NONE;
    "lock inc dword ptr [ebx]", ReadWrite, NONE;
    "dec byte ptr [ebx]", ReadWrite, NONE;
    "dec word ptr [ebx]", ReadWrite, NONE;
    "dec dword ptr [ebx]", ReadWrite, NONE;
    "lock dec dword ptr [ebx]", ReadWrite, NONE;
    "neg byte ptr [ebx]", ReadWrite, NONE;
    "neg word ptr [ebx]", ReadWrite, NONE;
    "neg dword ptr [ebx]", ReadWrite, NONE;
    "lock neg dword ptr [ebx]", ReadWrite, NONE;
    "not byte ptr [ebx]", ReadWrite, NONE;
    "not word ptr [ebx]", ReadWrite, NONE;
    "not dword ptr [ebx]", ReadWrite, NONE;
    "lock not dword ptr [ebx]", ReadWrite, NONE;
    "shl dword ptr [ebx], 1", ReadWrite, AF;
    "shl dword ptr [ebx], cl", ReadWrite, AF | OF;
    "shl word ptr [ebx], cl", ReadWrite, AF | OF;
    "shl byte ptr [ebx], 3", ReadWrite, AF | OF;
    "shr dword ptr [ebx], 1", ReadWrite, AF;
    "shr dword ptr [ebx], cl", ReadWrite, AF | OF;
    "shr word ptr [ebx], cl", ReadWrite, AF | OF;
    "shr byte ptr [ebx], 3", ReadWrite, AF | OF;
    "sar dword ptr [ebx], 1", ReadWrite, AF;
    "sar dword ptr [ebx], cl", ReadWrite, AF | OF;
    "sar word ptr [ebx], cl", ReadWrite, AF | OF;
    "sar byte ptr [ebx], 3", ReadWrite, AF | OF;
    "rol dword ptr [ebx], 1", ReadWrite, NONE;
    "rol dword ptr [ebx], cl", ReadWrite, OF;
    "rol word ptr [ebx], cl", ReadWrite, OF;
    "rol byte ptr [ebx], 3", ReadWrite, OF;
    "ror dword ptr [ebx], 1", ReadWrite, NONE;
    "ror dword ptr [ebx], cl", ReadWrite, OF;
    "ror word ptr [ebx], cl", ReadWrite, OF;
    "ror byte ptr [ebx], 3", ReadWrite, OF;
    "rcl dword ptr [ebx], 1", ReadWrite, NONE;
    "rcl dword ptr [ebx], cl", ReadWrite, OF;
    "rcl word ptr [ebx], cl", ReadWrite, OF;
    "rcl byte ptr [ebx], 3", ReadWrite, OF;
    "rcr dword ptr [ebx], 1", ReadWrite, NONE;
    "rcr dword ptr [ebx], cl", ReadWrite, OF;
    "rcr word ptr [ebx], cl", ReadWrite, OF;
    "rcr byte ptr [ebx], 3", ReadWrite, OF;
    "shld dword ptr [ebx], eax, cl", ReadWrite, AF | OF;
    "shld word ptr [ebx], dx, 7", ReadWrite, AF | OF;
    "shrd dword ptr [ebx], eax, cl", ReadWrite, AF | OF;
    "shrd word ptr [ebx], dx, 7", ReadWrite, AF | OF;
    "bt dword ptr [ebx], ecx", Read, BIT;
    "mov edx, -5; bt dword ptr [ebx], edx", Read, BIT;
    "mov edx, -5; bt word ptr [ebx], dx", Read, BIT;
    "bt dword ptr [ebx], 9", Read, BIT;
    "bts dword ptr [ebx], ecx", ReadWrite, BIT;
    "mov edx, -5; bts dword ptr [ebx], edx", ReadWrite, BIT;
    "mov edx, -5; bts word ptr [ebx], dx", ReadWrite, BIT;
    "bts dword ptr [ebx], 9", ReadWrite, BIT;
    "lock bts dword ptr [ebx], ecx", ReadWrite, BIT;
    "btr dword ptr [ebx], ecx", ReadWrite, BIT;
    "mov edx, -5; btr dword ptr [ebx], edx", ReadWrite, BIT;
    "mov edx, -5; btr word ptr [ebx], dx", ReadWrite, BIT;
    "btr dword ptr [ebx], 9", ReadWrite, BIT;
    "lock btr dword ptr [ebx], ecx", ReadWrite, BIT;
    "btc dword ptr [ebx], ecx", ReadWrite, BIT;
    "mov edx, -5; btc dword ptr [ebx], edx", ReadWrite, BIT;
    "mov edx, -5; btc word ptr [ebx], dx", ReadWrite, BIT;
    "btc dword ptr [ebx], 9", ReadWrite, BIT;
    "lock btc dword ptr [ebx], ecx", ReadWrite, BIT;
    "xchg byte ptr [ebx], al", ReadWrite, NONE;
    "xchg word ptr [ebx], ax", ReadWrite, NONE;
    "xchg dword ptr [ebx], edx", ReadWrite, NONE;
    "xadd byte ptr [ebx], dl", ReadWrite, NONE;
    "lock xadd dword ptr [ebx], eax", ReadWrite, NONE;
    "cmpxchg byte ptr [ebx], dl", ReadWrite, NONE;
    "cmpxchg word ptr [ebx], dx", ReadWrite, NONE;
    "lock cmpxchg dword ptr [ebx], edx", ReadWrite, NONE;
    "cmpxchg dword ptr [ebx], esi", ReadWrite, NONE;
    "cmpxchg8b qword ptr [edi]", ReadWrite, NONE;
    "lock cmpxchg8b qword ptr [edi]", ReadWrite, NONE;
    "mul dword ptr [ebx]", Read, PRODUCT;
    "mul byte ptr [ebx]", Read, PRODUCT;
    "imul word ptr [ebx]", Read, PRODUCT;
    "imul eax, dword ptr [ebx]", Read, PRODUCT;
    "imul ax, word ptr [ebx], -7", Read, PRODUCT;
    "div dword ptr [ebx]", Read, ALL;
    "idiv byte ptr [ebx]", Read, ALL;
    "xor edx, edx; div dword ptr [ebx]", Read, ALL;
    "cmovc eax, dword ptr [ebx]", Read, NONE;
    "cmovnc eax, dword ptr [ebx]", Read, NONE;
    "cmovs dx, word ptr [ebx]", Read, NONE;
    "setc byte ptr [ebx]", Write, NONE;
    "setnc byte ptr [ebx]", Write, NONE;
    "setle byte ptr [ebx]", Write, NONE;
    "bsf eax, dword ptr [ebx]; mov eax, eax", Read, SCAN;
    "bsr eax, dword ptr [ebx]; mov eax, eax", Read, SCAN;
    "popcnt eax, dword ptr [ebx]", Read, NONE;
    "movsb", Write, NONE;
    "stosb", Write, NONE;
    "lodsb", Read, NONE;
    "rep movsb", Write, NONE;
    "rep stosb", Write, NONE;
    "rep lodsb", Read, NONE;
    "std; rep movsb", Write, NONE;
    "std; rep stosb", Write, NONE;
    "std; rep lodsb", Read, NONE;
    "cmpsb", Read, NONE;
    "repe cmpsb", Read, NONE;
    "std; repne cmpsb", Read, NONE;
    "scasb", Read, NONE;
    "repne scasb", Read, NONE;
    "repe scasb", Read, NONE;
    "mov edx, 0xe0; rep insb", Write, NONE;
    "mov edx, 0xe0; rep outsb; in eax, dx", Read, NONE;
    "movsw", Write, NONE;
    "stosw", Write, NONE;
    "lodsw", Read, NONE;
    "rep movsw", Write, NONE;
    "rep stosw", Write, NONE;
    "rep lodsw", Read, NONE;
    "std; rep movsw", Write, NONE;
    "std; rep stosw", Write, NONE;
    "std; rep lodsw", Read, NONE;
    "cmpsw", Read, NONE;
    "repe cmpsw", Read, NONE;
    "std; repne cmpsw", Read, NONE;
    "scasw", Read, NONE;
    "repne scasw", Read, NONE;
    "repe scasw", Read, NONE;
    "mov edx, 0xe0; rep insw", Write, NONE;
    "mov edx, 0xe0; rep outsw; in eax, dx", Read, NONE;
    "movsd", Write, NONE;
    "stosd", Write, NONE;
    "lodsd", Read, NONE;
    "rep movsd", Write, NONE;
    "rep stosd", Write, NONE;
    "rep lodsd", Read, NONE;
    "std; rep movsd", Write, NONE;
    "std; rep stosd", Write, NONE;
    "std; rep lodsd", Read, NONE;
    "cmpsd", Read, NONE;
    "repe cmpsd", Read, NONE;
    "std; repne cmpsd", Read, NONE;
    "scasd", Read, NONE;
    "repne scasd", Read, NONE;
    "repe scasd", Read, NONE;
    "mov edx, 0xe0; rep insd", Write, NONE;
    "mov edx, 0xe0; rep outsd; in eax, dx", Read, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movdqu xmmword ptr [ebx], xmm1", Write, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movups xmmword ptr [ebx], xmm1", Write, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movd dword ptr [ebx], xmm1", Write, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movq qword ptr [ebx], xmm1", Write, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movss dword ptr [ebx], xmm1", Write, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movsd qword ptr [ebx], xmm1", Write, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movlps qword ptr [ebx], xmm1", Write, NONE;
    "movdqu xmm1, xmmword ptr [ebx]; movd eax, xmm1; psrldq xmm1, 8; movd edx, xmm1", Read, NONE;
    "movups xmm1, xmmword ptr [ebx]; movd eax, xmm1; psrldq xmm1, 8; movd edx, xmm1", Read, NONE;
    "movd xmm1, dword ptr [ebx]; movd eax, xmm1; psrldq xmm1, 8; movd edx, xmm1", Read, NONE;
    "movq xmm1, qword ptr [ebx]; movd eax, xmm1; psrldq xmm1, 8; movd edx, xmm1", Read, NONE;
    "movss xmm1, dword ptr [ebx]; movd eax, xmm1; psrldq xmm1, 8; movd edx, xmm1", Read, NONE;
    "pxor xmm1, xmm1; movhps xmm1, qword ptr [ebx]; movd eax, xmm1; psrldq xmm1, 8; movd edx, xmm1", Read, NONE;
}

forms! {
    aligned, guest_forms_aligned, guest_forms_aligned_end;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movdqa xmmword ptr [ebx], xmm1", Write, NONE;
    "movd xmm1, eax; pshufd xmm1, xmm1, 0; movaps xmmword ptr [ebx], xmm1", Write, NONE;
    "movdqa xmm1, xmmword ptr [ebx]; movd eax, xmm1; psrldq xmm1, 8; movd edx, xmm1", Read, NONE;
    "pxor xmm1, xmm1; movntdq xmmword ptr [ebx], xmm1", Write, NONE;
}

#[cfg(target_arch = "x86")]
forms! {
    native, guest_forms_native, guest_forms_native_end;
    "push dword ptr [ebx]; pop eax", Read, NONE;
    "pop dword ptr [ebx]", Write, NONE;
    "xchg esp, ebx; push ecx; xchg esp, ebx", Write, NONE;
    "xchg esp, ebx; pop ecx; xchg esp, ebx", Read, NONE;
    "mov dword ptr [0x40000ff0], eax", Write, NONE;
    "mov al, byte ptr [0x40000ff0]", Read, NONE;
}

#[cfg(target_arch = "x86_64")]
forms! {
    native, guest_forms_native, guest_forms_native_end;
    "mov qword ptr [rbx], rax", Write, NONE;
    "mov qword ptr [rbx], -2", Write, NONE;
    "mov byte ptr [rbx], r9b", Write, NONE;
    "mov byte ptr [rbx], sil", Write, NONE;
    "mov dword ptr [rbx], r12d", Write, NONE;
    "movabs byte ptr [0x40000ff0], al", Write, NONE;
    "movabs qword ptr [0x40000ff0], rax", Write, NONE;
    "movnti qword ptr [rbx], rax", Write, NONE;
    "mov qword ptr gs:[rcx], rax", Write, NONE;
    "mov rax, qword ptr [rbx]", Read, NONE;
    "mov r10, qword ptr [rbx + rcx*8 - 40]", Read, NONE;
    "mov r9b, byte ptr [rbx]", Read, NONE;
    "movsxd rax, dword ptr [rbx]", Read, NONE;
    "movsx r8, byte ptr [rbx]", Read, NONE;
    "movzx r15d, word ptr [rbx]", Read, NONE;
    "movabs eax, dword ptr [0x40000ff0]", Read, NONE;
    "mov eax, dword ptr gs:[rcx]", Read, NONE;
    "cmovc rax, qword ptr [rbx]", Read, NONE;
    "lock add qword ptr [rbx], rax", ReadWrite, NONE;
    "add qword ptr [rbx], -3", ReadWrite, NONE;
    "add r13, qword ptr [rbx]", Read, NONE;
    "lock or qword ptr [rbx], rax", ReadWrite, AF;
    "or qword ptr [rbx], -3", ReadWrite, AF;
    "or r13, qword ptr [rbx]", Read, AF;
    "lock adc qword ptr [rbx], rax", ReadWrite, NONE;
    "adc qword ptr [rbx], -3", ReadWrite, NONE;
    "adc r13, qword ptr [rbx]", Read, NONE;
    "lock sbb qword ptr [rbx], rax", ReadWrite, NONE;
    "sbb qword ptr [rbx], -3", ReadWrite, NONE;
    "sbb r13, qword ptr [rbx]", Read, NONE;
    "lock and qword ptr [rbx], rax", ReadWrite, AF;
    "and qword ptr [rbx], -3", ReadWrite, AF;
    "and r13, qword ptr [rbx]", Read, AF;
    "lock sub qword ptr [rbx], rax", ReadWrite, NONE;
    "sub qword ptr [rbx], -3", ReadWrite, NONE;
    "sub r13, qword ptr [rbx]", Read, NONE;
    "lock xor qword ptr [rbx], rax", ReadWrite, AF;
    "xor qword ptr [rbx], -3", ReadWrite, AF;
    "xor r13, qword ptr [rbx]", Read, AF;
    "inc qword ptr [rbx]", ReadWrite, NONE;
    "dec qword ptr [rbx]", ReadWrite, NONE;
    "neg qword ptr [rbx]", ReadWrite, NONE;
    "not qword ptr [rbx]", ReadWrite, NONE;
    "shl qword ptr [rbx], cl", ReadWrite, AF | OF;
    "shr qword ptr [rbx], cl", ReadWrite, AF | OF;
    "sar qword ptr [rbx], cl", ReadWrite, AF | OF;
    "rol qword ptr [rbx], cl", ReadWrite, OF;
    "ror qword ptr [rbx], cl", ReadWrite, OF;
    "rcl qword ptr [rbx], cl", ReadWrite, OF;
    "rcr qword ptr [rbx], cl", ReadWrite, OF;
    "mov rdx, -5; bts qword ptr [rbx], rdx", ReadWrite, BIT;
    "mov rdx, -5; btr qword ptr [rbx], rdx", ReadWrite, BIT;
    "mov rdx, -5; btc qword ptr [rbx], rdx", ReadWrite, BIT;
    "xchg qword ptr [rbx], rdx", ReadWrite, NONE;
    "lock xadd qword ptr [rbx], rdx", ReadWrite, NONE;
    "lock cmpxchg qword ptr [rbx], rdx", ReadWrite, NONE;
    "mul qword ptr [rbx]", Read, PRODUCT;
    "cmp qword ptr [rbx], rax", Read, NONE;
    "test qword ptr [rbx], rax", Read, AF;
    "div qword ptr [rbx]", Read, ALL;
    "movsq", Write, NONE;
    "stosq", Write, NONE;
    "lodsq", Read, NONE;
    "rep movsq", Write, NONE;
    "rep stosq", Write, NONE;
    "rep lodsq", Read, NONE;
    "std; rep movsq", Write, NONE;
    "std; rep stosq", Write, NONE;
    "std; rep lodsq", Read, NONE;
    "repe cmpsq", Read, NONE;
    "repne scasq", Read, NONE;
    "push qword ptr [rbx]; pop rax", Read, NONE;
    "pop qword ptr [rbx]", Write, NONE;
    "xchg rsp, rbx; push rcx; xchg rsp, rbx", Write, NONE;
    "xchg rsp, rbx; pop rcx; xchg rsp, rbx", Read, NONE;
    "movq xmm1, qword ptr [rbx]; movq rax, xmm1", Read, NONE;
}

#[cfg(target_arch = "x86_64")]
forms! {
    native_aligned, guest_forms_native_aligned, guest_forms_native_aligned_end;
    "cmpxchg16b xmmword ptr [rbp]", ReadWrite, NONE;
    "lock cmpxchg16b xmmword ptr [rbp]", ReadWrite, NONE;
}
