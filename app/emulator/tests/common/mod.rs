//! A processor and a piece of memory for the emulator to work on.
#![allow(dead_code, reason = "each test uses a part")]

use umbra_emulator::{Intent, Memory, Ports, Processor, Progress, Stop, TableRegister, emulate};
use umbra_vcpu::address::{Gpa, Gva, PAGE_SIZE};
use umbra_vcpu::event::{Blocking, Exception};
use umbra_vcpu::exit::IoWidth;
use umbra_vcpu::instruction::decode;
use umbra_vcpu::registers::{
    CodeWidth, ControlRegisters, DescriptorTable, Registers, Segment, SegmentRegister,
};
use x86_64::structures::idt::PageFaultErrorCode;

/// Why the machine cannot go on; it always can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Never {}

/// Everything that an instruction can change.
#[derive(Clone, Debug)]
pub struct Machine {
    pub registers: Registers,
    pub vectors: [u128; 16],
    pub segments: [Segment; 8],
    pub width: CodeWidth,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub tables: [DescriptorTable; 2],
    pub blocking: Option<Blocking>,
    pub mmx: [u64; 8],
    pub debug: [u64; 8],
    /// The linear address of the first byte of memory.
    pub base: u64,
    pub memory: Vec<u8>,
    /// Linear addresses of pages that cannot be written.
    pub read_only: Vec<u64>,
    /// How often memory was read and written.
    pub accesses: (usize, usize),
    /// What is read from a port, byte by byte, and what was written to one.
    pub input: Vec<u8>,
    pub output: Vec<(u16, u32)>,
}

impl Machine {
    pub fn new(width: CodeWidth, base: u64, bytes: usize) -> Self {
        let mut segments = [Segment::flat_data32(0x10); 8];
        segments[SegmentRegister::Cs as usize] = match width {
            CodeWidth::Bits64 => Segment::flat_code64(8),
            _ => Segment::flat_code32(8),
        };
        let mut registers = Registers::default();
        registers.rflags = 2;
        Self {
            registers,
            vectors: [0; 16],
            segments,
            width,
            cr0: 1,
            cr3: 0,
            cr4: 0,
            efer: 0,
            tables: [DescriptorTable::default(); 2],
            blocking: None,
            mmx: [0; 8],
            debug: [0; 8],
            base,
            memory: vec![0; bytes],
            read_only: Vec::new(),
            accesses: (0, 0),
            input: Vec::new(),
            output: Vec::new(),
        }
    }

    /// Decodes the bytes at RIP and carries them out once.
    pub fn step(&mut self, bytes: &[u8]) -> Result<Progress, Stop<Never>> {
        let instruction = decode(bytes, self.width, self.registers.rip).expect("an instruction");
        assert_eq!(instruction.len(), bytes.len(), "{bytes:02x?}");
        let progress = emulate(self, &instruction)?;
        if let Progress::Done { next_rip } = progress {
            self.registers.rip = next_rip;
        }
        Ok(progress)
    }

    fn index(&self, address: Gpa, length: usize) -> std::ops::Range<usize> {
        assert!(address.page_offset() as usize + length <= PAGE_SIZE as usize);
        let start = (address.as_u64() - self.base) as usize;
        start..start + length
    }

    pub fn bytes(&self, address: u64, length: usize) -> &[u8] {
        let start = (address - self.base) as usize;
        &self.memory[start..start + length]
    }
}

impl Processor for Machine {
    fn registers(&self) -> &Registers {
        &self.registers
    }

    fn registers_mut(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        self.segments[register as usize]
    }

    fn set_segment(&mut self, register: SegmentRegister, segment: Segment) {
        self.segments[register as usize] = segment;
    }

    fn table(&self, register: TableRegister) -> DescriptorTable {
        self.tables[register as usize]
    }

    fn set_table(&mut self, register: TableRegister, table: DescriptorTable) {
        self.tables[register as usize] = table;
    }

    fn block_interrupts(&mut self, blocking: Blocking) {
        self.blocking = Some(blocking);
    }

    fn debug_register(&mut self, number: u8) -> u64 {
        self.debug[usize::from(number)]
    }

    fn set_debug_register(&mut self, number: u8, value: u64) {
        self.debug[usize::from(number)] = value;
    }

    fn unblock_nmis(&mut self) {}

    fn x87_words(&mut self) -> (u16, u16) {
        (0x37f, 0)
    }

    fn reset_x87(&mut self) {}

    fn mmx_register(&mut self, index: u8) -> u64 {
        self.mmx[usize::from(index)]
    }

    fn set_mmx_register(&mut self, index: u8, value: u64) {
        self.mmx[usize::from(index)] = value;
    }

    fn control_registers(&self) -> ControlRegisters {
        ControlRegisters {
            cr0: self.cr0,
            cr2: Gva::new(0),
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: 0,
            efer: self.efer,
            xcr0: 1,
        }
    }

    fn code_width(&self) -> CodeWidth {
        self.width
    }

    fn vector_register(&mut self, index: u8) -> u128 {
        self.vectors[usize::from(index)]
    }

    fn set_vector_register(&mut self, index: u8, value: u128) {
        self.vectors[usize::from(index)] = value;
    }
}

impl Memory for Machine {
    type Failure = Never;

    fn translate(&mut self, address: Gva, intent: Intent) -> Result<Gpa, Stop<Never>> {
        let mut error = PageFaultErrorCode::empty();
        error.set(PageFaultErrorCode::CAUSED_BY_WRITE, intent == Intent::Write);
        let inside = address
            .as_u64()
            .checked_sub(self.base)
            .is_some_and(|offset| offset < self.memory.len() as u64);
        if !inside {
            return Err(Exception::page_fault(address, error).into());
        }
        let page = address.page_base().as_u64();
        if intent == Intent::Write && self.read_only.contains(&page) {
            error |= PageFaultErrorCode::PROTECTION_VIOLATION;
            return Err(Exception::page_fault(address, error).into());
        }
        Ok(Gpa::new(address.as_u64()))
    }

    fn translate_system(&mut self, address: Gva, intent: Intent) -> Result<Gpa, Stop<Never>> {
        self.translate(address, intent)
    }

    fn load_page_table(&mut self, cr3: u64) -> Result<(), Stop<Never>> {
        self.cr3 = cr3;
        Ok(())
    }

    fn set_task_switched(&mut self) {
        self.cr0 |= 8;
    }

    fn read(&mut self, address: Gpa, bytes: &mut [u8]) -> Result<(), Stop<Never>> {
        self.accesses.0 += 1;
        let range = self.index(address, bytes.len());
        bytes.copy_from_slice(&self.memory[range]);
        Ok(())
    }

    fn write(&mut self, address: Gpa, bytes: &[u8]) -> Result<(), Stop<Never>> {
        self.accesses.1 += 1;
        assert!(!self.read_only.contains(&address.page_base().as_u64()));
        let range = self.index(address, bytes.len());
        self.memory[range].copy_from_slice(bytes);
        Ok(())
    }
}

impl Ports for Machine {
    fn read_port(&mut self, _port: u16, width: IoWidth) -> u32 {
        let mut value = [0; 4];
        let length = usize::from(width.bytes());
        for (byte, read) in value.iter_mut().zip(self.input.drain(..length)) {
            *byte = read;
        }
        u32::from_le_bytes(value)
    }

    fn write_port(&mut self, port: u16, _width: IoWidth, value: u32) {
        self.output.push((port, value));
    }
}
