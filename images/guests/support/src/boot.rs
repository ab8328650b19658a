//! What the loader told us: Multiboot 1 (specification 0.6.96, section 3.3) or PVH (Xen's
//! `hvm_start_info`), read once at entry, before any paging.

use core::slice;

/// The command line's word that leaves out or loosens the few checks that QEMU's software emulation
/// fails by itself: reserved bits of control registers, MSRs and page faults.
pub const LENIENT: &str = "lenient";

const MULTIBOOT_MAGIC: u32 = 0x2bad_b002;
const PVH_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

/// Who started us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// Multiboot 1.
    Multiboot,
    /// Xen's PVH.
    Pvh,
}

/// One module that the loader put into memory.
#[derive(Clone, Copy)]
pub struct Module {
    /// Its bytes.
    pub data: &'static [u8],
    /// Its command line, without the terminating zero.
    pub command_line: &'static [u8],
}

/// The loader's information.
pub struct BootInfo {
    /// Who started us.
    pub protocol: Protocol,
    /// The command line, without the terminating zero; empty if there is none.
    pub command_line: &'static [u8],
    /// Bytes of RAM that the memory map lists.
    pub ram_bytes: u64,
    /// Where the highest RAM of the memory map ends; 0 without a map.
    pub ram_end: u64,
    /// Number of entries in the memory map.
    pub memory_map_entries: u32,
    modules: u32,
    module_table: u32,
}

impl BootInfo {
    /// Reads the information that `magic` and `address` (EAX and EBX at entry) stand for; `None` if
    /// they stand for nothing we know.
    pub fn read(magic: u32, address: u32) -> Option<Self> {
        if magic == MULTIBOOT_MAGIC {
            Some(Self::multiboot(address))
        } else if load(address) == PVH_MAGIC {
            Some(Self::pvh(address))
        } else {
            None
        }
    }

    fn multiboot(info: u32) -> Self {
        let flags = load(info);
        let field = |flag: u32, offset: u32| {
            if flags & flag != 0 {
                load(info + offset)
            } else {
                0
            }
        };
        let mut boot = Self {
            protocol: Protocol::Multiboot,
            command_line: text(field(1 << 2, 16)),
            ram_bytes: 0,
            ram_end: 0,
            memory_map_entries: 0,
            modules: field(1 << 3, 20),
            module_table: field(1 << 3, 24),
        };
        let (length, map) = (field(1 << 6, 44), field(1 << 6, 48));
        let mut offset = 0;
        while offset < length {
            let entry = map + offset;
            boot.add_memory(load64(entry + 4), load64(entry + 12), load(entry + 20));
            offset += load(entry) + 4;
        }
        boot
    }

    fn pvh(info: u32) -> Self {
        let version = load(info + 4);
        let mut boot = Self {
            protocol: Protocol::Pvh,
            command_line: text(load(info + 24)),
            ram_bytes: 0,
            ram_end: 0,
            memory_map_entries: 0,
            modules: load(info + 12),
            module_table: load(info + 16),
        };
        if version >= 1 {
            let map = load(info + 40);
            for index in 0..load(info + 48) {
                let entry = map + index * 24;
                boot.add_memory(load64(entry), load64(entry + 8), load(entry + 16));
            }
        }
        boot
    }

    fn add_memory(&mut self, start: u64, length: u64, kind: u32) {
        self.memory_map_entries += 1;
        if kind == RAM {
            self.ram_bytes += length;
            self.ram_end = self.ram_end.max(start + length);
        }
    }

    /// The modules, in the loader's order.
    pub fn modules(&self) -> impl Iterator<Item = Module> {
        let (protocol, table) = (self.protocol, self.module_table);
        (0..self.modules).map(move |index| match protocol {
            Protocol::Multiboot => {
                let entry = table + index * 16;
                let (start, end) = (load(entry), load(entry + 4));
                Module {
                    data: bytes(start, end - start),
                    command_line: text(load(entry + 8)),
                }
            }
            Protocol::Pvh => {
                let entry = table + index * 32;
                let data = bytes(load(entry), load(entry + 8));
                Module {
                    data,
                    command_line: text(load(entry + 16)),
                }
            }
        })
    }

    /// Whether [`LENIENT`] is asked for.
    pub fn is_lenient(&self) -> bool {
        self.has_word(LENIENT)
    }

    /// Whether a processor that leaves out rarely used checks shall fail.
    pub fn is_strict(&self) -> bool {
        self.has_word("strict")
    }

    /// Whether `word` is one of the command line's words.
    pub fn has_word(&self, word: &str) -> bool {
        self.words().any(|found| found == word.as_bytes())
    }

    /// The number N if one of the command line's words is `name=N`.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.words().find_map(|word| {
            let digits = word.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            str::from_utf8(digits).ok()?.parse().ok()
        })
    }

    fn words(&self) -> impl Iterator<Item = &'static [u8]> {
        self.command_line.split(|byte| *byte == b' ')
    }
}

fn load(address: u32) -> u32 {
    // SAFETY: the loader's structures lie in RAM below 4 GiB, which is identity-mapped or not
    // mapped at all while they are read, and nothing writes them.
    unsafe { (address as usize as *const u32).read_unaligned() }
}

fn load64(address: u32) -> u64 {
    u64::from(load(address)) | u64::from(load(address + 4)) << 32
}

fn bytes(address: u32, length: u32) -> &'static [u8] {
    if length == 0 {
        return &[];
    }
    // SAFETY: as in `load`; the loader reserves what it describes.
    unsafe { slice::from_raw_parts(address as usize as *const u8, length as usize) }
}

fn text(address: u32) -> &'static [u8] {
    if address == 0 {
        return &[];
    }
    let mut length = 0;
    while bytes(address + length, 1) != [0] {
        length += 1;
    }
    bytes(address, length)
}
