//! What the boot loader has passed: one guest image, and possibly an initial RAM disk for it.
//!
//! The first boot module is either a tar archive with the members `guest` and, if there is one,
//! `initrd`, or it is the guest image itself. Without a module the embedded guest runs.

use tar_no_std::TarArchiveRef;

use crate::platform::BootModule;

/// The guest that runs if the boot loader passes none.
const EMBEDDED_GUEST: &[u8] = include_bytes!(env!("UMBRA_DEFAULT_GUEST"));
/// Its name.
pub const EMBEDDED_GUEST_NAME: &str = "hello";

/// A guest image with what belongs to it.
#[derive(Clone, Copy, Debug)]
pub struct GuestFiles {
    /// The kernel image.
    pub image: &'static [u8],
    /// The initial RAM disk or first module.
    pub initrd: Option<&'static [u8]>,
}

/// Finds the guest among the boot loader's modules.
///
/// # Errors
/// One line that says what is wrong with the archive.
pub fn find_guest(modules: &[BootModule]) -> Result<GuestFiles, &'static str> {
    let Some(first) = modules.first() else {
        return Ok(GuestFiles {
            image: EMBEDDED_GUEST,
            initrd: None,
        });
    };
    if !is_tar(first.data) {
        return Ok(GuestFiles {
            image: first.data,
            initrd: modules.get(1).map(|module| module.data),
        });
    }
    let archive = TarArchiveRef::new(first.data)
        .map_err(|_| "the boot module is a damaged tar archive: pass one with a member `guest`")?;
    let member = |name: &str| {
        archive
            .entries()
            .find(|entry| {
                entry
                    .filename()
                    .as_str()
                    .is_ok_and(|entry_name| entry_name == name)
            })
            .map(|entry| entry.data())
    };
    let image = member("guest")
        .ok_or("the boot module is a tar archive without a member `guest`: add the guest image")?;
    Ok(GuestFiles {
        image,
        initrd: member("initrd"),
    })
}

/// Whether the data begin with a tar header (POSIX.1-1988 ustar: magic at byte 257).
fn is_tar(data: &[u8]) -> bool {
    data.get(257..262) == Some(b"ustar")
}
