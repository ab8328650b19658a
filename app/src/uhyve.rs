//! The hypercalls of a Hermit guest: version 1 of the uhyve interface.
//!
//! A hypercall is a 32-bit write to a port; the value is the guest-physical address of the call's
//! parameters, which the crate `uhyve-interface` defines. The guest has a console, arguments, an
//! environment and an exit code, but no files.
//!
//! Whatever the parameters point to is the guest's word: what is not RAM ends the guest with a message.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use uhyve_interface::parameters::{EBADF, ENOENT};
use uhyve_interface::{HypercallAddress, MAX_ARGC_ENVC};
use umbra_machine::ConsoleOutput;
use umbra_mmu::AccessKind;
use umbra_report::Outcome;
use umbra_vcpu::address::{Gpa, Gva, PAGE_SIZE};
use umbra_vcpu::event::Exception;
use umbra_vcpu::exit::{IoAccess, IoDirection, IoOperand};
use umbra_vcpu::registers::Gpr;

use crate::guest::{End, Guest};

const STANDARD_INPUT: i32 = 0;
const STANDARD_STREAMS: core::ops::RangeInclusive<i32> = 0..=2;
/// The longest text of one call, in bytes: no call may keep the host from its watchdog.
const LONGEST_TEXT: u64 = 1 << 20;

/// What a Hermit guest has of its hypervisor.
pub struct Uhyve {
    console: Box<dyn ConsoleOutput>,
    arguments: Vec<String>,
    environment: Vec<String>,
}

impl Uhyve {
    /// For a guest of this name and command line, which prints to `console`.
    pub fn new(name: &str, command_line: &str, console: Box<dyn ConsoleOutput>) -> Self {
        let mut words = shell_words::split(command_line)
            .unwrap_or_default()
            .into_iter();
        let kernel_words: Vec<_> = words.by_ref().take_while(|word| word != "--").collect();
        let variables = kernel_words.iter().filter_map(|word| {
            let variable = word.strip_prefix("env=")?;
            variable.contains('=').then(|| variable.into())
        });
        let arguments = core::iter::once(name.into()).chain(words);
        Self {
            console,
            arguments: arguments.take(MAX_ARGC_ENVC).collect(),
            environment: variables.take(MAX_ARGC_ENVC).collect(),
        }
    }
}

/// Carries out a port access if it is a hypercall of a guest that makes any; `None` if it is none.
pub fn access(guest: &mut Guest, access: IoAccess) -> Option<Result<(), End>> {
    guest.uhyve.as_ref()?;
    let is_call = access.operand == IoOperand::Accumulator
        && access.direction == IoDirection::Out
        && access.width.bytes() == 4;
    let call = HypercallAddress::try_from(access.port)
        .ok()
        .filter(|_| is_call)?;
    let data = guest.vcpu.registers().get(Gpr::Rax) & u64::from(u32::MAX);
    let result = match call {
        HypercallAddress::Uart => {
            print(guest, &[data as u8]);
            Ok(())
        }
        HypercallAddress::SerialBufferWrite => write_buffer(guest, Gpa::new(data)),
        HypercallAddress::FileWrite => write_file(guest, Gpa::new(data)),
        HypercallAddress::FileRead => read_file(guest, Gpa::new(data)),
        HypercallAddress::FileOpen => put(guest, Gpa::new(data + 16), &(-ENOENT).to_le_bytes()),
        HypercallAddress::FileClose => close_file(guest, Gpa::new(data)),
        HypercallAddress::FileLseek => {
            put(guest, Gpa::new(data + 4), &i64::from(-EBADF).to_le_bytes())
        }
        HypercallAddress::FileUnlink => put(guest, Gpa::new(data + 8), &(-ENOENT).to_le_bytes()),
        HypercallAddress::Cmdsize => sizes(guest, Gpa::new(data)),
        HypercallAddress::Cmdval => values(guest, Gpa::new(data)),
        HypercallAddress::Exit => take(guest, Gpa::new(data)).and_then(|code| {
            let code = i32::from_le_bytes(code);
            Err(end(code))
        }),
        // The network's, which never were in use.
        _ => return None,
    };
    Some(match result {
        Ok(()) => {
            guest.vcpu.skip_instruction();
            Ok(())
        }
        Err(Stop::End(end)) => Err(end),
        Err(Stop::Exception(exception)) => guest.raise(exception),
    })
}

/// Why a call was not carried out.
enum Stop {
    /// It raises an exception in the guest.
    Exception(Exception),
    /// It ends the guest.
    End(End),
}

fn end(code: i32) -> Stop {
    let outcome = match code {
        0 => Outcome::Succeeded,
        _ => Outcome::Failed,
    };
    Stop::End(End {
        guest_status: Some(code.cast_unsigned()),
        ..End::new(outcome, format!("the guest exited with {code}"))
    })
}

/// Parameters: address (guest-physical) and length, 8 bytes each.
fn write_buffer(guest: &mut Guest, parameters: Gpa) -> Result<(), Stop> {
    let [address, length] = words(take(guest, parameters)?);
    check_length(guest, length)?;
    let address = Gpa::new(address);
    if !guest.paging.is_ram(address, length as usize) {
        return Err(no_ram(guest, address, length as usize));
    }
    print_ram(guest, address, length)
}

/// Parameters: file descriptor of 4 bytes, address (guest-virtual) and length of 8 each.
fn write_file(guest: &mut Guest, parameters: Gpa) -> Result<(), Stop> {
    let descriptor = i32::from_le_bytes(take(guest, parameters)?);
    let [address, length] = words(take(guest, offset(parameters, 4))?);
    // The call has no way to say that nothing was written.
    if !STANDARD_STREAMS.contains(&descriptor) || descriptor == STANDARD_INPUT {
        return Ok(());
    }
    check_length(guest, length)?;
    // A fault repeats the instruction, so nothing is printed before all of the text is there.
    for pass in [Pass::Check, Pass::Print] {
        let mut done = 0;
        while done < length {
            let at = Gva::new(address).wrapping_add(done);
            let part = (PAGE_SIZE - at.page_offset()).min(length - done);
            let translated = guest.paging.translate(&*guest.vcpu, at, AccessKind::Read);
            let physical = translated
                .map_err(|fault| Stop::Exception(Exception::page_fault(fault.gva, fault.error)))?;
            if !guest.paging.is_ram(physical, part as usize) {
                return Err(no_ram(guest, physical, part as usize));
            }
            if pass == Pass::Print {
                print_ram(guest, physical, part)?;
            }
            done += part;
        }
    }
    Ok(())
}

/// What is done with the pages of a text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Check,
    Print,
}

/// Prints a text piece by piece: the guest says how long it is, so it must not cost memory.
fn print_ram(guest: &mut Guest, at: Gpa, length: u64) -> Result<(), Stop> {
    const PIECE: u64 = 256;
    let mut bytes = [0; PIECE as usize];
    for done in (0..length).step_by(PIECE as usize) {
        let piece = &mut bytes[..PIECE.min(length - done) as usize];
        read(guest, offset(at, done), piece)?;
        print(guest, piece);
    }
    Ok(())
}

/// Parameters: file descriptor of 4 bytes, address and length of 8 each, result of 8. The standard
/// input is at its end.
fn read_file(guest: &mut Guest, parameters: Gpa) -> Result<(), Stop> {
    let descriptor = i32::from_le_bytes(take(guest, parameters)?);
    let result = match descriptor {
        STANDARD_INPUT => 0,
        _ => i64::from(-EBADF),
    };
    put(guest, offset(parameters, 20), &result.to_le_bytes())
}

/// Parameters: file descriptor and result, 4 bytes each.
fn close_file(guest: &mut Guest, parameters: Gpa) -> Result<(), Stop> {
    let descriptor = i32::from_le_bytes(take(guest, parameters)?);
    let result = if STANDARD_STREAMS.contains(&descriptor) {
        0
    } else {
        -EBADF
    };
    put(guest, offset(parameters, 4), &result.to_le_bytes())
}

/// Parameters: the number of arguments and the size of each, then the same for the environment; 4
/// bytes each.
fn sizes(guest: &mut Guest, parameters: Gpa) -> Result<(), Stop> {
    let Some(uhyve) = &guest.uhyve else {
        return Ok(());
    };
    let mut bytes = Vec::new();
    for strings in [&uhyve.arguments, &uhyve.environment] {
        bytes.extend((strings.len() as i32).to_le_bytes());
        let sizes = strings.iter().map(|string| string.len() as i32 + 1);
        let all = sizes.chain(core::iter::repeat(0)).take(MAX_ARGC_ENVC);
        bytes.extend(all.flat_map(i32::to_le_bytes));
    }
    put(guest, parameters, &bytes)
}

/// Parameters: the guest-physical addresses of two lists, of which each holds the guest-physical
/// addresses of where the strings go.
fn values(guest: &mut Guest, parameters: Gpa) -> Result<(), Stop> {
    let Some(uhyve) = &guest.uhyve else {
        return Ok(());
    };
    let strings = [uhyve.arguments.clone(), uhyve.environment.clone()];
    let lists = words(take(guest, parameters)?);
    for (strings, list) in strings.iter().zip(lists) {
        for (number, string) in (0..).zip(strings) {
            let entry = offset(Gpa::new(list), number * 8);
            let at = u64::from_le_bytes(take(guest, entry)?);
            let bytes: Vec<u8> = string.bytes().chain([0]).collect();
            put(guest, Gpa::new(at), &bytes)?;
        }
    }
    Ok(())
}

fn print(guest: &mut Guest, text: &[u8]) {
    if let Some(uhyve) = &mut guest.uhyve {
        for &byte in text {
            uhyve.console.write(byte);
        }
    }
}

fn check_length(guest: &Guest, length: u64) -> Result<(), Stop> {
    if length <= LONGEST_TEXT {
        return Ok(());
    }
    Err(Stop::End(guest.unsupported(format!(
        "a hypercall prints {length:#x} bytes; {LONGEST_TEXT:#x} is the most at once"
    ))))
}

fn offset(at: Gpa, by: u64) -> Gpa {
    at.wrapping_add(by)
}

fn words(bytes: [u8; 16]) -> [u64; 2] {
    let number = u128::from_le_bytes(bytes);
    [number as u64, (number >> 64) as u64]
}

fn take<const N: usize>(guest: &Guest, at: Gpa) -> Result<[u8; N], Stop> {
    let mut bytes = [0; N];
    read(guest, at, &mut bytes)?;
    Ok(bytes)
}

fn read(guest: &Guest, at: Gpa, bytes: &mut [u8]) -> Result<(), Stop> {
    if !guest.paging.is_ram(at, bytes.len()) {
        return Err(no_ram(guest, at, bytes.len()));
    }
    guest.paging.read_ram(at, bytes);
    Ok(())
}

fn put(guest: &Guest, at: Gpa, bytes: &[u8]) -> Result<(), Stop> {
    if !guest.paging.is_ram(at, bytes.len()) {
        return Err(no_ram(guest, at, bytes.len()));
    }
    guest.paging.write_ram(at, bytes).map_err(|cause| {
        let message = format!("a hypercall writes its result: {cause}");
        Stop::End(End::new(Outcome::HostOutOfMemory, message))
    })
}

fn no_ram(guest: &Guest, at: Gpa, length: usize) -> Stop {
    Stop::End(guest.unsupported(format!(
        "a hypercall uses {length:#x} bytes at {at}, where the guest has no RAM"
    )))
}
