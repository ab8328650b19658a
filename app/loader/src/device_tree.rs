//! Writes flattened device trees (Devicetree Specification 0.4, chapter 5).
//!
//! `vm-fdt` does the same, but its `hashbrown` does not build next to the Hermit kernel, which switches
//! `allocator-api2` to the compiler's own unstable interface.

use alloc::vec::Vec;

const MAGIC: u32 = 0xd00d_feed;
const VERSION: u32 = 17;
const LAST_COMPATIBLE_VERSION: u32 = 16;
const HEADER_SIZE: usize = 40;
/// The end of the list of reserved memory, which is empty.
const RESERVATIONS: [u8; 16] = [0; 16];

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const END: u32 = 9;

/// A device tree that is being written. Nodes are closed in the reverse order of their beginnings;
/// a node's properties come before its children.
#[derive(Debug, Default)]
pub struct DeviceTree {
    structure: Vec<u8>,
    strings: Vec<u8>,
}

impl DeviceTree {
    /// Begins a node; the root has no name. The name must not have a zero byte.
    pub fn begin_node(&mut self, name: &str) {
        self.word(BEGIN_NODE);
        self.text(name);
    }

    /// Ends the node that was begun last.
    pub fn end_node(&mut self) {
        self.word(END_NODE);
    }

    /// A text without a zero byte.
    pub fn string(&mut self, name: &str, value: &str) {
        self.property(name, value.len() + 1);
        self.text(value);
    }

    /// A cell.
    pub fn cell(&mut self, name: &str, value: u32) {
        self.property(name, size_of::<u32>());
        self.word(value);
    }

    /// Pairs of cells.
    pub fn wide_cells(&mut self, name: &str, values: &[u64]) {
        self.property(name, size_of_val(values));
        let bytes = values.iter().flat_map(|value| value.to_be_bytes());
        self.structure.extend(bytes);
    }

    /// The whole tree, whose nodes have all been ended.
    pub fn finish(mut self) -> Vec<u8> {
        self.word(END);
        let structure_at = HEADER_SIZE + RESERVATIONS.len();
        let strings_at = structure_at + self.structure.len();
        let header = [
            MAGIC,
            (strings_at + self.strings.len()) as u32,
            structure_at as u32,
            strings_at as u32,
            HEADER_SIZE as u32,
            VERSION,
            LAST_COMPATIBLE_VERSION,
            0, // the processor that boots
            self.strings.len() as u32,
            self.structure.len() as u32,
        ];
        let header: Vec<u8> = header.into_iter().flat_map(u32::to_be_bytes).collect();
        [&header[..], &RESERVATIONS, &self.structure, &self.strings].concat()
    }

    fn property(&mut self, name: &str, length: usize) {
        self.word(PROPERTY);
        self.word(length as u32);
        self.word(self.strings.len() as u32);
        self.strings.extend(name.bytes().chain([0]));
    }

    fn word(&mut self, word: u32) {
        self.structure.extend(word.to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        self.structure.extend(text.bytes().chain([0]));
        let length = self.structure.len().next_multiple_of(size_of::<u32>());
        self.structure.resize(length, 0);
    }
}
