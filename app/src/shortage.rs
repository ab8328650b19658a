//! A guest that needs more shadow pages at once than it may have: it is stopped, or its limit is raised
//! and it goes on where it was.
//!
//! With a limit below [`umbra_mmu::MINIMUM_PAGES`] each page that one instruction touches may drive
//! out the table of another, so that every fault is fixed and the instruction never completes. That
//! is a shortage, too.

use umbra_mmu::{MINIMUM_PAGES, Mmu, MmuError, NoPageAvailable};
use umbra_report::options::OnExhausted;
use umbra_vcpu::registers::Registers;

use crate::memory::GuestHost;

/// So many faults in a row no instruction takes that gets on: it touches fewer pages.
const MOST_FAULTS: u32 = 64;

/// What happens to one guest at a shortage.
pub struct Shortage {
    on_exhausted: OnExhausted,
    raised: u64,
    /// The last faults, while one instruction may need more pages than there are.
    faults: Option<Faults>,
}

/// Faults that were fixed, one after the other, while the guest's registers stayed as they were.
struct Faults {
    registers: Registers,
    count: u32,
}

impl Shortage {
    /// For a guest that may have `limit` shadow pages.
    pub fn new(on_exhausted: OnExhausted, limit: usize) -> Self {
        Self {
            on_exhausted,
            raised: 0,
            faults: (limit < MINIMUM_PAGES).then(|| Faults {
                registers: Registers::default(),
                count: 0,
            }),
        }
    }

    /// How often the limit was raised.
    pub const fn raised(&self) -> u64 {
        self.raised
    }

    /// Takes note that a fault was fixed of a guest that stands at `registers`.
    ///
    /// # Errors
    /// [`MmuError::NoPageAvailable`] if the guest doesn't get on, and its limit isn't raised.
    #[inline]
    pub fn fixed(&mut self, mmu: &Mmu<GuestHost>, registers: &Registers) -> Result<(), MmuError> {
        match &mut self.faults {
            None => Ok(()),
            Some(faults) if faults.registers != *registers => {
                faults.registers = *registers;
                faults.count = 0;
                Ok(())
            }
            Some(faults) => {
                faults.count += 1;
                if faults.count < MOST_FAULTS {
                    return Ok(());
                }
                faults.count = 0;
                let missing = mmu.limit().saturating_sub(mmu.used()) + 1;
                self.resolve(mmu, mmu.shortage(missing).into())
            }
        }
    }

    /// Raises the limit to what is needed, if that is wanted and the error is that there are too few
    /// pages. The guest can go on then.
    ///
    /// # Errors
    /// The error itself otherwise.
    pub fn resolve(&mut self, mmu: &Mmu<GuestHost>, error: MmuError) -> Result<(), MmuError> {
        match (error, self.on_exhausted) {
            (MmuError::NoPageAvailable(shortage), OnExhausted::Raise) => {
                self.raise(mmu, shortage).ok_or(error)
            }
            _ => Err(error),
        }
    }

    /// `None` if there is no higher limit.
    fn raise(&mut self, mmu: &Mmu<GuestHost>, shortage: NoPageAvailable) -> Option<()> {
        let before = mmu.limit();
        mmu.set_limit(shortage.used + shortage.needed);
        let limit = mmu.limit();
        if limit >= MINIMUM_PAGES {
            self.faults = None;
        }
        (limit > before).then(|| self.raised += 1)
    }
}
