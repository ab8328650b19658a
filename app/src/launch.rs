//! From options to a running guest: finds its files, builds its memory, loads it, and runs it.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hermit::mm::with_fallible_requests;
use umbra_inspect::ExitLog;
use umbra_inspect::trace::Trace;
use umbra_loader::{
    Bios, BootClock, Format, LinuxEntry, LoadError, LoadRequest, MemoryMap, Module,
};
use umbra_machine::devices::fw_cfg::{E820Entry, FwCfg};
use umbra_machine::processor::cpuid::CpuidPolicy;
use umbra_machine::{Configuration, Machine, ProcessorNumber, TimeBase, acpi};
use umbra_mmu::{MmuConfig, OutOfMemory, SlotError, VictimPolicy};
use umbra_report::options::{Device, Entry, GuestOptions, MmuPolicy, Options, Traced};
use umbra_report::{ExitCode, Outcome, Report};
use umbra_vcpu::address::{Gfn, PAGE_SIZE};
use umbra_vcpu::instruction;

use crate::archive::{BootFiles, GuestFiles};
use crate::console::Console;
use crate::driver::Driver;
use crate::gdb::{Debugged, ImageWidth};
use crate::guest::{End, ExitCounts, Guest, Halted};
use crate::injection::Shrinks;
use crate::memory::{GuestHost, LoaderRam, RamRange};
use crate::paging::Paging;
use crate::physical::{self, HostAddressSpace};
use crate::schedule::Schedule;
use crate::shared::{Shared, SharedMachine};
use crate::shortage::Shortage;
use crate::uhyve::Uhyve;
use crate::vm::Vm;
use crate::{advice, archive, bios, control, entry, injection, platform, pressure, timestamp};

/// Runs the guests that `options` ask for to their ends, and returns the image's exit code.
pub fn run_guests(options: &Options, files: &BootFiles) -> ExitCode {
    instruction::initialize();
    physical::initialize();
    pressure::pool();
    let launcher = Launcher {
        guests: &options.guests,
        files,
        driver: Driver::enable(&HostAddressSpace),
    };
    Schedule::start(&launcher).run()
}

/// Prepares guests to run, each as often as it shall.
pub struct Launcher<'a> {
    guests: &'a [GuestOptions],
    files: &'a BootFiles,
    driver: Result<Driver, String>,
}

impl Launcher<'_> {
    /// How many guests there are.
    pub const fn guests(&self) -> usize {
        self.guests.len()
    }

    /// Whether the guest at `index` shall run again after its run with this number, which ended so.
    pub fn runs_again(&self, index: usize, run: u64, outcome: Outcome) -> bool {
        let options = &self.guests[index];
        let expected = match outcome {
            Outcome::Succeeded => true,
            Outcome::HostOutOfMemory => options.fail_allocation.is_some(),
            _ => false,
        };
        expected && run < options.repeat
    }

    /// Ends what was prepared for a run of the guest at `index`.
    pub fn ended(&self, index: usize) {
        if self.guests[index].fail_allocation.is_some() {
            injection::disarm();
        }
    }

    /// Builds and loads the guest at `index` for its run with this number.
    ///
    /// # Errors
    /// The report of a guest that cannot even start.
    pub fn prepare(&self, index: usize, run: u64) -> Result<Vm, Report> {
        let options = &self.guests[index];
        if let Some(fail) = options.fail_allocation {
            injection::arm(fail, run);
        }
        let name = options
            .name
            .as_deref()
            .unwrap_or(archive::EMBEDDED_GUEST_NAME);
        let prepared = match &self.driver {
            Ok(driver) => self
                .files
                .of_guest(options, self.guests())
                .map_err(|message| End::new(Outcome::BadImage, message))
                .and_then(|files| prepare(name, options, self.guests(), files, driver)),
            Err(error) => Err(End::new(Outcome::NoVirtualization, error.as_str())),
        };
        prepared.map_err(|end| {
            self.ended(index);
            advice::complete(Report::new(name, end.outcome, end.message))
        })
    }
}

/// Builds and loads one guest `of` several.
fn prepare(
    name: &str,
    options: &GuestOptions,
    of: usize,
    files: GuestFiles,
    driver: &Driver,
) -> Result<Vm, End> {
    let memory_map = MemoryMap::new(options.memory);
    let ranges: Vec<RamRange> = memory_map
        .ram()
        .map(|range| RamRange {
            base: Gfn::containing(range.start),
            pages: range.length / PAGE_SIZE,
        })
        .collect();
    let out_of_memory = |OutOfMemory| {
        End::new(
            Outcome::HostOutOfMemory,
            format!(
                "a guest of {} bytes does not fit the image's heap",
                options.memory
            ),
        )
    };
    if !pressure::has_room_for_start() {
        return Err(out_of_memory(OutOfMemory));
    }
    let shrinks = Shrinks::new(options.shrink_at);
    let host =
        with_fallible_requests(|| GuestHost::new(&ranges, shrinks)).map_err(out_of_memory)?;

    let module = files.initrd.map(|data| Module {
        name: "initrd",
        data,
    });
    let request = LoadRequest {
        name,
        command_line: &options.append,
        modules: module.as_slice(),
        memory_map: &memory_map,
        acpi_root: Some(acpi::ADDRESS),
        linux_entry: match options.entry {
            Entry::Kernel => LinuxEntry::Kernel,
            Entry::RealMode => LinuxEntry::RealMode,
        },
        clock: BootClock {
            tsc_khz: u32::try_from(timestamp::frequency() / 1000).unwrap_or(u32::MAX),
            unix_nanoseconds: platform::unix_time().saturating_mul(1_000_000_000),
        },
    };
    let loaded =
        umbra_loader::load(files.image, &request, &mut LoaderRam::new(&host)).map_err(|error| {
            let outcome = match error {
                LoadError::HostMemory => Outcome::HostOutOfMemory,
                _ => Outcome::BadImage,
            };
            End::new(outcome, format!("{error}"))
        })?;

    if loaded.format == Format::Hermit && options.processors > 1 {
        return Err(End::new(
            Outcome::BadOption,
            format!(
                "--smp {}: a Hermit application has one processor, as version 1 of the uhyve interface \
                 cannot start others",
                options.processors
            ),
        ));
    }
    host.write(acpi::ADDRESS, &acpi::tables(options.processors))
        .map_err(|cause| {
            End::new(
                Outcome::HostOutOfMemory,
                format!("no place for the guest's ACPI tables: {cause}"),
            )
        })?;

    let console = || Console::new((of > 1).then_some(name));
    let cpuid = CpuidPolicy::new(&control::host_cpuid, &driver.limits());
    let mut machine = Machine::new(Configuration {
        time_base: TimeBase::new(platform::timestamp(), timestamp::frequency()),
        processors: options.processors,
        features: *cpuid.features(),
        console: Box::new(console()),
    });
    machine.set_wall_clock(platform::unix_time());
    match options.device {
        Some(Device::TestDevice) => machine.add_test_device(),
        None => {}
    }
    describe_machine(machine.fw_cfg_mut(), options, &memory_map);
    machine.fw_cfg_mut().set_kernel(files.image);
    if let Some(initrd) = files.initrd {
        machine.fw_cfg_mut().set_initrd(initrd);
    }
    let firmware = match loaded.bios {
        Bios::Absent => None,
        Bios::Present => {
            let disk = (loaded.format == Format::BootSector).then_some(files.image);
            let installed = bios::install(&host, &mut machine, &memory_map, disk);
            Some(installed.map_err(|cause| {
                End::new(
                    Outcome::HostOutOfMemory,
                    format!("no place for the guest's BIOS: {cause}"),
                )
            })?)
        }
    };
    let guest_pages = (options.memory / PAGE_SIZE) as usize;
    let config = MmuConfig {
        features: control::mmu_features(cpuid.features()),
        limit: options.mmu_pages.map_or_else(
            || umbra_mmu::default_limit(guest_pages),
            |pages| pages as usize,
        ),
        victims: match options.mmu_policy {
            MmuPolicy::Clock => VictimPolicy::Clock,
            MmuPolicy::Fifo => VictimPolicy::Fifo,
        },
        batch: options.mmu_batch.map_or(usize::MAX, |pages| pages as usize),
        ..MmuConfig::default()
    };
    let slots: Vec<_> = host.memory_slots().collect();
    let mmu = pressure::pool().create(host, config);
    for slot in slots {
        with_fallible_requests(|| mmu.add_slot(slot)).map_err(|error| match error {
            SlotError::OutOfMemory => out_of_memory(OutOfMemory),
            _ => End::new(
                Outcome::Unsupported,
                format!("the guest's memory map is refused: {error}"),
            ),
        })?;
    }

    let tsc_offset = machine.msrs().tsc_offset();
    let deadline = options.timeout.map(|timeout| {
        let ticks = platform::ticks_in_microseconds(timeout.as_micros() as u64);
        platform::timestamp().saturating_add(ticks)
    });
    let shared = Arc::new(Shared::new(Box::new(machine), deadline));
    let mut processors = Vec::new();
    for number in ProcessorNumber::first(options.processors) {
        let mut vcpu = with_fallible_requests(|| driver.create_vcpu(&HostAddressSpace))?;
        vcpu.set_tsc_offset(tsc_offset);
        processors.push(Guest {
            vcpu,
            paging: with_fallible_requests(|| Paging::new(Arc::clone(&mmu), number))?,
            machine: SharedMachine::new(Arc::clone(&shared), number),
            uhyve: None,
            cpuid,
            shortage: Shortage::new(options.on_exhausted, config.limit),
            exits: ExitCounts::default(),
            exit_log: ExitLog::default(),
            debugged: None,
            watched: false,
            trace: (options.trace != Traced::NOTHING).then(|| Box::new(Trace::new(options.trace))),
            halted: Halted::Reset,
            firmware: None,
            blocking: None,
        });
    }
    let boot = &mut processors[ProcessorNumber::BOOT.index()];
    boot.halted = Halted::No;
    boot.firmware = firmware;
    let width = image_width(loaded.format, files.image);
    boot.debugged = options.gdb.map(|start| Debugged::new(start, width));
    boot.uhyve = (loaded.format == Format::Hermit)
        .then(|| Uhyve::new(name, &options.append, Box::new(console())));
    entry::enter_state(&mut *boot.vcpu, &loaded.entry);
    boot.paging
        .load_registers(&boot.vcpu.control_registers())
        .map_err(|error| {
            End::new(
                Outcome::EntryFailed,
                format!("the guest's first state is refused: {error:?}"),
            )
        })?;

    let mut report = Report::new(name, Outcome::Failed, "");
    report.driver = Some(driver.kind());
    Ok(Vm::new(processors, shared, report, options.trace_format))
}

/// How wide the code is that a debugger expects in an image.
fn image_width(format: Format, image: &[u8]) -> ImageWidth {
    const ELF64: &[u8] = b"\x7fELF\x02";
    match format {
        Format::Linux | Format::Hermit => ImageWidth::Wide,
        Format::Multiboot | Format::Pvh if image.starts_with(ELF64) => ImageWidth::Wide,
        Format::Multiboot | Format::Pvh | Format::BootSector => ImageWidth::Narrow,
    }
}

/// Tells the guest through the configuration device what its loader knows.
fn describe_machine(fw_cfg: &mut FwCfg, options: &GuestOptions, memory_map: &MemoryMap) {
    let entries: Vec<_> = memory_map
        .ranges()
        .iter()
        .map(|range| E820Entry {
            address: range.start,
            size: range.length,
            kind: range.kind as u32,
        })
        .collect();
    fw_cfg.set_ram_size(options.memory);
    fw_cfg.set_cpu_count(options.processors.into());
    fw_cfg.set_command_line(options.append.as_bytes());
    fw_cfg.set_memory_map(&entries);
}
