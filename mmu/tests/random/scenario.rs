//! What a random machine does, as data: which VMs there are, and step by step what happens.

/// Which entry of each level's table an address goes through (the last for the lowest level first),
/// and how far into the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub indices: [u8; 5],
    pub offset: u16,
}

/// What is written into a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub target: u8,
    pub flags: u16,
    pub key: u8,
}

/// Something that happens to one VM, or by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Access {
        cpu: u8,
        place: Place,
        kind: u8,
        user: bool,
        ac: bool,
    },
    Write {
        cpu: u8,
        place: Place,
        user: bool,
        ac: bool,
        width: u8,
        entry: Entry,
    },
    HostWrite {
        table: u8,
        index: u8,
        entry: Entry,
    },
    Load {
        cpu: u8,
        root: u8,
    },
    Mode {
        cpu: u8,
        mode: u8,
        flags: u8,
        root: u8,
    },
    Pkru {
        cpu: u8,
        value: u32,
    },
    Invlpg {
        cpu: u8,
        place: Place,
    },
    Flush {
        cpu: u8,
    },
    Limit(u8),
    /// Memory runs low on the whole host.
    Pressure(u8),
    /// All VMs together get another limit.
    Total(u8),
    ZapAll,
    Unprotect(u8),
    Slot(u8),
    Dirty,
    Accessed(u8),
    Flags(u8),
}

/// A VM with two processors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmSetup {
    pub modes: [u8; 2],
    pub flags: [u8; 2],
    pub fifo: bool,
}

/// The most VMs that share a pool.
pub const MOST_VMS: usize = 3;
/// The most entries that tables begin with.
pub const MOST_SEEDS: usize = 127;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scenario {
    /// One to [`MOST_VMS`].
    pub vms: Vec<VmSetup>,
    /// The limit of all VMs together, as in [`Op::Total`].
    pub total: u8,
    /// What is in all VMs' tables at first: table, index, entry.
    pub seed: Vec<(u8, u8, Entry)>,
    /// Each with the VM that it happens to, by its number modulo the VMs that there are.
    pub steps: Vec<(u8, Op)>,
}
