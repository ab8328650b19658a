//! The guest's walk and the shadow's, side by side.

use core::fmt;

use umbra_mmu::{GuestEnd, Inspection, Level, Permission, Permissions, ShadowEnd, ShadowKind};

/// An inspection as a table of one row a level.
#[derive(Clone, Copy, Debug)]
pub struct WalkText<'a>(pub &'a Inspection);

impl fmt::Display for WalkText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(inspection) = self;
        for level in Level::ALL.into_iter().rev() {
            let slot = usize::from(level.number()) - 1;
            let (guest, shadow) = (inspection.guest[slot], inspection.shadow[slot]);
            if guest.is_none() && shadow.is_none() {
                continue;
            }
            write!(f, "    {} ", level.number())?;
            match guest {
                Some(entry) => write!(
                    f,
                    "guest {:>12x} [{:>4}] {:016x} {}",
                    entry.at,
                    entry.index,
                    entry.value,
                    Bits(entry.value)
                )?,
                // 12 + 4 + 16 digits, 8 letters, and what stands between them.
                None => write!(f, "guest {:<45}", "-")?,
            }
            match shadow {
                Some(entry) => writeln!(
                    f,
                    " | shadow {:>12x} [{:>3}] {:016x} {} {}",
                    entry.table,
                    entry.index,
                    entry.value,
                    Bits(entry.value),
                    match entry.kind {
                        ShadowKind::Direct => "direct",
                        ShadowKind::Synced => "synced",
                        ShadowKind::Unsync => "unsync",
                    }
                )?,
                None => writeln!(f, " | shadow -")?,
            }
        }
        writeln!(f, "    guest: {}", GuestEndText(inspection.guest_end))?;
        writeln!(f, "    shadow: {}", ShadowEndText(inspection.shadow_end))
    }
}

/// The flags of an entry: present, write, user, accessed, dirty, page size, global, no-execute.
struct Bits(u64);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LETTERS: [(u32, &str); 8] = [
            (0, "P"),
            (1, "W"),
            (2, "U"),
            (5, "A"),
            (6, "D"),
            (7, "S"),
            (8, "G"),
            (63, "X"),
        ];
        for (bit, letter) in LETTERS {
            f.write_str(if self.0 >> bit & 1 != 0 { letter } else { "-" })?;
        }
        Ok(())
    }
}

/// Where the guest's walk ends, in words.
pub(crate) struct GuestEndText(pub GuestEnd);

impl fmt::Display for GuestEndText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            GuestEnd::Unpaged { gpa } => write!(f, "no paging, physical address {gpa}"),
            GuestEnd::Page {
                gpa,
                level,
                permits,
            } => write!(
                f,
                "physical address {gpa} by a level-{} entry, {}",
                level.number(),
                PermissionsText(permits)
            ),
            GuestEnd::NotPresent(level) => {
                write!(f, "the level-{} entry is not present", level.number())
            }
            GuestEnd::Malformed(level) => {
                write!(
                    f,
                    "the level-{} entry has reserved bits set",
                    level.number()
                )
            }
            GuestEnd::NotCanonical => f.write_str("the address is not canonical"),
        }
    }
}

/// Where the shadow's walk ends, in words.
pub(crate) struct ShadowEndText(pub ShadowEnd);

impl fmt::Display for ShadowEndText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ShadowEnd::NoRoot => f.write_str("there is no root"),
            ShadowEnd::Empty(level) => write!(f, "empty at level {}", level.number()),
            ShadowEnd::Mmio => f.write_str("no memory there"),
            ShadowEnd::Page {
                hpa,
                level,
                permits,
            } => write!(
                f,
                "host address {hpa} by a level-{} entry, {}",
                level.number(),
                PermissionsText(permits)
            ),
        }
    }
}

struct PermissionsText(Permissions);

impl fmt::Display for PermissionsText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(permits) = self;
        f.write_str("read")?;
        if permits.write == Permission::Granted {
            f.write_str(" write")?;
        }
        if permits.execute == Permission::Granted {
            f.write_str(" execute")?;
        }
        f.write_str(match permits.user {
            Permission::Granted => " for all",
            Permission::Denied => " for the supervisor",
        })
    }
}
