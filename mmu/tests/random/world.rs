//! All VMs of a scenario, and what concerns more than one of them.

use std::sync::atomic::{AtomicU64, Ordering};

use umbra_mmu::MmuPool;

use super::host::total_limit;
use super::scenario::{Op, Scenario};
use super::vm::{LOW_PAGES, RAM_PAGES, Vm};
use crate::common::SimHost;

/// Pages that a VM's processors can stand on: two have four roots each under PAE paging.
const MOST_PINNED: usize = 8;

/// Steps from one comparison of the tables' memory to the next.
const COMPARED_EVERY: u64 = 8;

static STEPS: AtomicU64 = AtomicU64::new(0);

/// Steps of all scenarios so far.
pub fn steps_taken() -> u64 {
    STEPS.load(Ordering::Relaxed)
}

struct World {
    pool: MmuPool<SimHost>,
    vms: Vec<Vm>,
    steps: u64,
    /// Steps from one audit to the next.
    audited_every: u64,
}

impl World {
    fn step(&mut self, number: usize, op: Op) {
        STEPS.fetch_add(1, Ordering::Relaxed);
        self.steps += 1;
        let refused = self.vms[number].refused.get();
        match op {
            Op::Pressure(amount) if amount & 1 != 0 => self.scan(usize::from(amount / 8)),
            _ => self.vms[number].step(&self.pool, op),
        }
        if self.steps.is_multiple_of(self.audited_every) {
            self.audit(number, op);
        }
        if self.vms[number].refused.get() != refused {
            self.others_gave_all(number);
        }
        let used: usize = self.vms.iter().map(|vm| vm.mmu.used()).sum();
        assert_eq!(self.pool.count(), used);
        // What differs stays so until it is written again: it need not be looked for at every step.
        if self.steps.is_multiple_of(COMPARED_EVERY) {
            self.vms.iter().for_each(|vm| vm.compare(LOW_PAGES));
        }
    }

    fn audit(&self, number: usize, op: Op) {
        for (other, vm) in self.vms.iter().enumerate() {
            if let Err(problem) = vm.mmu.audit() {
                panic!("VM {other} after {op:?} of {number}: {problem}");
            }
        }
    }

    /// Where the common limit refused a VM a page, the others hold nothing but what they stand on.
    fn others_gave_all(&self, number: usize) {
        for (other, vm) in self.vms.iter().enumerate() {
            let held = vm.mmu.used();
            assert!(
                other == number || held <= MOST_PINNED,
                "VM {number} was refused a page while VM {other} held {held}"
            );
        }
    }

    /// The host is short of memory: what the pool says that it gave back has come free.
    fn scan(&self, wanted: usize) {
        let frames = || -> usize {
            let vms = self.vms.iter();
            vms.map(|vm| vm.host.0.frames_in_use.load(Ordering::Relaxed))
                .sum()
        };
        let before = frames();
        let shrunk = self.pool.scan(wanted);
        assert_eq!(before - frames(), shrunk.freed, "the shrinker miscounts");
        assert_eq!(shrunk.skipped, 0);
    }
}

/// Runs all steps of a scenario, and takes all VMs away again. Every step is audited.
pub fn run(scenario: &Scenario) {
    run_first(scenario, usize::MAX, 1);
}

/// The same for its first steps, with an audit now and then: for a fuzzer, which had rather try many
/// scenarios and runs what it finds again with [`run`].
pub fn run_quickly(scenario: &Scenario) {
    run_first(scenario, 160, 16);
}

fn run_first(scenario: &Scenario, steps: usize, audited_every: u64) {
    let pool = MmuPool::new(total_limit(scenario.total));
    let setups = scenario.vms.iter();
    let vms = setups
        .map(|setup| Vm::new(&pool, *setup, scenario))
        .collect();
    let mut world = World {
        pool,
        vms,
        steps: 0,
        audited_every,
    };
    for (vm, op) in scenario.steps.iter().take(steps) {
        let number = usize::from(*vm) % world.vms.len();
        world.step(number, *op);
    }
    for vm in &world.vms {
        vm.mmu.audit().expect("the structures agree at the end");
    }
    let World { pool, vms, .. } = world;
    for vm in vms {
        vm.compare(RAM_PAGES);
        let Vm {
            mmu,
            host,
            processors,
            ..
        } = vm;
        for processor in processors {
            mmu.destroy_vcpu(processor.cpu.vcpu);
        }
        drop(mmu);
        let frames = host.0.frames_in_use.load(Ordering::Relaxed);
        assert_eq!(frames, 0, "frames leaked");
    }
    assert_eq!(pool.count(), 0);
}
