//! Several VMs under one limit, and the shrinker.

use crate::common::{Cpu, SimHost};
use crate::guest::*;
use umbra_mmu::*;
use umbra_vcpu::address::Gfn;
use x86_64::structures::idt::PageFaultErrorCode as Code;

#[test]
fn a_limit_of_all_vms_holds() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x1000, 100 << 12 | TABLE);
    guest.load(0, long_mode(root));
    guest.pool.set_limit(2);
    let vcpu = &mut guest.cpus[0].vcpu;
    guest.mmu.prepare_entry(vcpu).unwrap();
    let error = guest
        .mmu
        .handle_page_fault(vcpu, &read(0x1000).fault(Code::empty()))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "no MMU page available: needed 3, used 1 of 2, pinned 1"
    );
    guest.pool.set_limit(4);
    assert_eq!(guest.page(read(0x1000)), 100);
}

/// A small and a large VM of one pool, with 100 and 300 page tables, the last of which is not in use.
fn small_and_large() -> (MmuPool<SimHost>, [Guest; 2]) {
    let host = SimHost::new(PAGES as usize, 4000);
    host.set_slot(SLOT, 0);
    for page in 0..PAGES {
        host.touch(page);
    }
    let pool = MmuPool::new(100_000);
    let guests = [(100, 1), (300, 500)].map(|(tables, next_table)| {
        let mut guest = Guest::with(MmuConfig::default());
        guest.host = host.clone();
        let config = MmuConfig {
            limit: 1000,
            prefetch: 1,
            ..MmuConfig::default()
        };
        guest.mmu = pool.create(host.clone(), config);
        let memory = MemorySlot {
            id: SLOT,
            base: Gfn::new(0),
            pages: PAGES,
            flags: SlotFlags::empty(),
        };
        guest.mmu.add_slot(memory).unwrap();
        guest.cpus = vec![Cpu::new(&guest.mmu)];
        guest.next_table = next_table;
        regions(&mut guest, tables);
        for region in 0..tables - 1 {
            guest.page(read(region << 21));
        }
        guest
    });
    (pool, guests)
}

fn used(guests: &[Guest; 2]) -> [usize; 2] {
    guests.each_ref().map(|guest| guest.mmu.used())
}

#[test]
fn at_the_common_limit_all_give_in_proportion_and_none_below_its_floor() {
    let (pool, mut guests) = small_and_large();
    let before = used(&guests);
    pool.set_limit(pool.count());
    let [small, _] = &mut guests;
    let flushes = small.mmu.statistics().tlb_flush;
    small.page(read(99 << 21));
    assert!(small.mmu.statistics().tlb_flush <= flushes + 2);
    let after = used(&guests);
    let (from_small, from_large) = (before[0] + 1 - after[0], before[1] - after[1]);
    assert!(
        from_small > 0 && from_large > 3 * from_small,
        "{from_small} from the small VM, {from_large} from the large one"
    );
    // However much the one wants, the other keeps its floor.
    pool.set_limit(120);
    for round in 0..300 {
        guests[0].page(read(round % 100 << 21));
        assert!(pool.count() <= 120 || round == 0);
    }
    let held = used(&guests);
    assert!(held[1] >= 60 && held[0] + held[1] > 100, "{held:?}");
    for guest in &guests {
        guest.mmu.audit().unwrap();
    }
}

#[test]
fn the_shrinker_gives_caches_back_first_and_shares_the_rest() {
    let (pool, guests) = small_and_large();
    let before = used(&guests);
    assert_eq!(pool.count(), before.iter().sum());
    // A little is had from the caches alone.
    let shrunk = pool.scan(1);
    assert!(shrunk.freed >= 1);
    assert_eq!(used(&guests), before);
    for guest in &guests {
        guest.mmu.release_caches();
    }
    let shrunk = pool.scan(100);
    assert_eq!(
        shrunk,
        Shrunk {
            freed: 100,
            skipped: 0
        }
    );
    let after = used(&guests);
    assert_eq!(pool.count(), after.iter().sum());
    let (small, large) = (before[0] - after[0], before[1] - after[1]);
    assert!(
        large > 3 * small,
        "{small} from the small VM, {large} from the large one"
    );
    assert!(after[0] >= MINIMUM_PAGES);
}

#[test]
fn under_the_total_limit_one_vm_takes_from_another() {
    let mut large = Guest::new();
    regions(&mut large, 60);
    for region in 0..60 {
        large.page(read(region << 21));
    }
    let mut small = Guest::new();
    let config = MmuConfig {
        limit: 100,
        prefetch: 1,
        ..MmuConfig::default()
    };
    small.mmu = large.pool.create(small.host.clone(), config);
    let memory = MemorySlot {
        id: SLOT,
        base: Gfn::new(0),
        pages: PAGES,
        flags: SlotFlags::empty(),
    };
    small.mmu.add_slot(memory).unwrap();
    small.cpus = vec![Cpu::new(&small.mmu)];
    let root = small.table();
    small.map(root, 0, 100 << 12 | TABLE);
    small.load(0, long_mode(root));
    let held = large.mmu.used();
    large.pool.set_limit(held);
    assert_eq!(small.page(read(0)), 100);
    assert_eq!(small.mmu.used(), 4);
    assert_eq!(large.mmu.used(), held - 4);
    assert_eq!(large.pool.count(), held);
    large.mmu.audit().unwrap();
}
