//! The pairs of entries that are tried: one of the page directory, one of the page table.

use umbra_guest::paging::space::bits;

/// The protection key of a page that has one; pages without have key 0.
pub const KEY: u64 = 1;
/// The key in an entry.
pub const KEY_BITS: u64 = KEY << 59;
/// A reserved bit of every present entry on processors with narrower physical addresses.
pub const RESERVED: u64 = 1 << 51;
/// A reserved bit of entries that map a large page.
pub const RESERVED_LARGE: u64 = 1 << 13;

/// What all kinds of entries have besides the present bit.
const COMMON: [u64; 5] = [bits::W, bits::U, bits::A, bits::NX, RESERVED];
/// What only matters where an entry maps a page.
const LEAF: [u64; 7] = [
    bits::W,
    bits::U,
    bits::A,
    bits::NX,
    RESERVED,
    bits::D,
    KEY_BITS,
];

const ABSENT: u32 = 1 << 6;
const LARGE: u32 = 3 << 6;
const TABLE: u32 = 1 << COMMON.len();
const PAGE_ABSENT: u32 = 8;
const PAGE: u32 = 1 << LEAF.len();

/// Two entries without the addresses in them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pair {
    /// The page directory's entry.
    pub directory: u64,
    /// The page table's entry, which counts if the other one points to the table.
    pub table: u64,
}

impl Pair {
    /// How many there are.
    pub const COUNT: u32 = ABSENT + LARGE + TABLE * (PAGE_ABSENT + PAGE);

    /// Pair number `number`, below [`Self::COUNT`].
    pub fn numbered(number: u32) -> Self {
        if number < ABSENT {
            return Self::without_table(choose(&COMMON, number) | chosen(number, 5, bits::PS));
        }
        let number = number - ABSENT;
        if number < LARGE {
            let large = [bits::W, bits::U, bits::A, bits::NX, bits::D, KEY_BITS];
            let reserved = [0, RESERVED, RESERVED_LARGE][(number >> 6) as usize];
            let page = choose(&large, number & 0x3f);
            return Self::without_table(page | reserved | bits::P | bits::PS);
        }
        let number = number - LARGE;
        let (above, below) = (number / (PAGE_ABSENT + PAGE), number % (PAGE_ABSENT + PAGE));
        // Bits that an entry for a table ignores must not matter: the dirty bit and the key.
        let ignored = chosen(
            above.count_ones() + below.count_ones(),
            0,
            bits::D | KEY_BITS,
        );
        let table = match below.checked_sub(PAGE_ABSENT) {
            None => choose(&[bits::W | bits::U, bits::A | bits::NX, RESERVED], below),
            Some(page) => choose(&LEAF, page) | bits::P,
        };
        Self {
            directory: choose(&COMMON, above) | ignored | bits::P,
            table,
        }
    }

    /// One that needs no page table; the table would allow everything.
    const fn without_table(directory: u64) -> Self {
        Self {
            directory,
            table: bits::PWU | bits::A | bits::D,
        }
    }

    /// Whether a processor whose physical addresses have `width` bits reserves what counts as
    /// reserved.
    pub const fn exists(self, width: u32) -> bool {
        (self.directory | self.table) & RESERVED == 0 || width < 52
    }

    /// Whether the page directory's entry maps the page itself.
    pub const fn is_large(self) -> bool {
        self.directory & (bits::P | bits::PS) == bits::P | bits::PS
    }
}

/// Those of `bits` whose places are set in `choice`.
fn choose(bits: &[u64], choice: u32) -> u64 {
    bits.iter()
        .enumerate()
        .map(|(place, bit)| chosen(choice, place, *bit))
        .sum()
}

fn chosen(choice: u32, place: usize, bits: u64) -> u64 {
    if choice >> place & 1 != 0 { bits } else { 0 }
}
