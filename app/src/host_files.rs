//! Files that uhyve has for us: what a `.hermit` image holds, and what `--file-mapping` names.
//!
//! They are read by version 1 of uhyve's interface: a 32-bit write to a port, of the physical address of
//! the call's parameters. There is no way to list them, so whoever wants one must know its path.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ptr;

use hermit::mm::{VirtAddr, virtual_to_physical};
use uhyve_interface::parameters::{
    CloseParams, LseekParams, O_RDONLY, OpenParams, ReadParams, SEEK_END, SEEK_SET,
};
use uhyve_interface::{GuestPhysAddr, GuestVirtAddr, HypercallAddress};
use umbra_vcpu::address::PAGE_SIZE;
use x86_64::instructions::port::Port;

/// Why a file cannot be read.
#[derive(Debug)]
pub enum ReadError {
    /// The heap has no room for it; its size in bytes.
    NoMemory(usize),
    /// uhyve does not give all of it.
    Failed(String),
}

/// The content of a file, for ever; `None` if there is none at this path, or no uhyve.
///
/// # Errors
/// If there is one that cannot be read.
pub fn read(path: &str) -> Result<Option<&'static [u8]>, ReadError> {
    if !hermit::env::is_uhyve() {
        return Ok(None);
    }
    let failed = |what: &str| ReadError::Failed(format!("{path}: uhyve cannot {what} it"));
    let Some(file) = File::open(path) else {
        return Ok(None);
    };
    let length = file.seek(0, SEEK_END).ok_or_else(|| failed("seek in"))?;
    file.seek(0, SEEK_SET).ok_or_else(|| failed("seek in"))?;
    let mut content = Vec::new();
    content
        .try_reserve_exact(length)
        .map_err(|_| ReadError::NoMemory(length))?;
    content.resize(length, 0);
    let mut rest = &mut content[..];
    while !rest.is_empty() {
        let contiguous = contiguous(rest);
        let read = file.read(&mut rest[..contiguous]);
        let read = read.filter(|read| (1..=contiguous).contains(read));
        rest = &mut rest[read.ok_or_else(|| failed("read"))?..];
    }
    Ok(Some(content.leak()))
}

/// An open file.
struct File {
    descriptor: i32,
}

impl File {
    fn open(path: &str) -> Option<Self> {
        let path = CString::new(path).ok()?.into_bytes_with_nul();
        // uhyve reads the path by its physical address.
        if contiguous(&path) != path.len() {
            return None;
        }
        let mut parameters = OpenParams {
            name: physical(&path[0]),
            flags: O_RDONLY,
            mode: 0,
            ret: -1,
        };
        call(HypercallAddress::FileOpen, &mut parameters);
        let descriptor = parameters.ret;
        (descriptor >= 0).then(|| Self { descriptor })
    }

    /// Moves to an offset, and returns where that is.
    fn seek(&self, offset: isize, whence: i32) -> Option<usize> {
        let mut parameters = LseekParams {
            fd: self.descriptor,
            offset,
            whence,
        };
        call(HypercallAddress::FileLseek, &mut parameters);
        usize::try_from(parameters.offset).ok()
    }

    /// Reads into a buffer that is contiguous in physical memory, and returns how much.
    fn read(&self, buffer: &mut [u8]) -> Option<usize> {
        let mut parameters = ReadParams {
            fd: self.descriptor,
            buf: GuestVirtAddr::new(buffer.as_mut_ptr() as u64),
            len: buffer.len(),
            ret: -1,
        };
        call(HypercallAddress::FileRead, &mut parameters);
        usize::try_from(parameters.ret).ok()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let mut parameters = CloseParams {
            fd: self.descriptor,
            ret: 0,
        };
        call(HypercallAddress::FileClose, &mut parameters);
    }
}

/// Parameters that lie within one page, as uhyve must find them.
#[repr(C, align(64))]
struct Aligned<T>(T);

fn call<T: Copy>(call: HypercallAddress, parameters: &mut T) {
    const { assert!(size_of::<T>() <= 64) };
    let mut aligned = Aligned(*parameters);
    // The hypervisor writes to it.
    let address = physical(ptr::from_mut(&mut aligned));
    // uhyve puts all memory of a kernel with this version of its interface below 3 GiB.
    let value = u32::try_from(address.as_u64()).unwrap_or_default();
    // SAFETY: the port is uhyve's, and the parameters are those of this call, whose buffers are alive
    // and used by no one else.
    unsafe { Port::new(call as u16).write(value) };
    // SAFETY: the pointer is that of a live value; the hypervisor may have changed it behind the
    // compiler's back.
    *parameters = unsafe { ptr::read_volatile(&raw const aligned.0) };
}

fn physical<T>(at: *const T) -> GuestPhysAddr {
    let address = virtual_to_physical(VirtAddr::from_ptr(at));
    GuestPhysAddr::new(address.map_or(0, |address| address.as_u64()))
}

/// How much of the beginning of `buffer` is contiguous in physical memory: at least what is in its first
/// page.
fn contiguous(buffer: &[u8]) -> usize {
    let start = buffer.as_ptr();
    let base = physical(start).as_u64();
    let first = PAGE_SIZE - (start as u64) % PAGE_SIZE;
    let pages = (first..buffer.len() as u64).step_by(PAGE_SIZE as usize);
    let is_next =
        |&offset: &u64| physical(start.wrapping_add(offset as usize)).as_u64() == base + offset;
    let end = pages.into_iter().find(|offset| !is_next(offset));
    end.map_or(buffer.len(), |end| end as usize)
}
