//! The files that the boot loader has passed.
//!
//! Each boot module is one file, named after its path; a module that is a tar archive is its members
//! instead. A guest finds its files by name, and a single guest also by their order: the archive's
//! members `guest` and `initrd`, or else the first module and the second. Without any module the
//! embedded guest runs.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use tar_no_std::TarArchiveRef;
use umbra_report::options::GuestOptions;

use crate::platform::BootModule;

/// The guest that runs if the boot loader passes none.
const EMBEDDED_GUEST: &[u8] = include_bytes!(env!("UMBRA_DEFAULT_GUEST"));
/// Its name.
pub const EMBEDDED_GUEST_NAME: &str = "hello";
/// The name of the configuration file.
const CONFIGURATION: &str = "umbra.toml";

/// A guest image with what belongs to it.
#[derive(Clone, Copy, Debug)]
pub struct GuestFiles {
    /// The kernel image.
    pub image: &'static [u8],
    /// The initial RAM disk or first module.
    pub initrd: Option<&'static [u8]>,
}

/// A file.
struct File {
    name: String,
    data: &'static [u8],
}

/// All files that were passed.
pub struct BootFiles {
    files: Vec<File>,
}

impl BootFiles {
    /// Lists the modules' files.
    ///
    /// # Errors
    /// One line that says what is wrong with an archive.
    pub fn new(modules: Vec<BootModule>) -> Result<Self, String> {
        let mut files = Vec::new();
        for module in modules {
            if !is_tar(module.data) {
                let name = file_name(&module.name).into();
                let data = module.data;
                files.push(File { name, data });
                continue;
            }
            let archive = TarArchiveRef::new(module.data).map_err(|_| {
                format!("the boot module {:?} is a damaged tar archive", module.name)
            })?;
            for entry in archive.entries() {
                let name = entry.filename();
                let name = name.as_str().map_err(|_| {
                    format!(
                        "the boot module {:?} has a member whose name is not UTF-8",
                        module.name
                    )
                })?;
                files.push(File {
                    name: file_name(name).into(),
                    data: entry.data(),
                });
            }
        }
        Ok(Self { files })
    }

    /// The text of the configuration file, if there is one.
    ///
    /// # Errors
    /// One line if it is not a text.
    pub fn configuration(&self) -> Result<Option<&'static str>, String> {
        self.find(CONFIGURATION)
            .map(|data| core::str::from_utf8(data))
            .transpose()
            .map_err(|error| format!("{CONFIGURATION}: {error}"))
    }

    /// A guest's files; `of` says how many guests there are.
    ///
    /// # Errors
    /// One line that says what is missing.
    pub fn of_guest(&self, guest: &GuestOptions, of: usize) -> Result<GuestFiles, String> {
        let name = guest.name.as_deref().unwrap_or(EMBEDDED_GUEST_NAME);
        let by_name = match &guest.image {
            Some(image) => Some(self.require(image)?),
            None => self.find(name),
        };
        let (image, second) = match by_name {
            Some(image) => (image, None),
            None if of > 1 => (self.require(name)?, None),
            None => match self.find("guest") {
                Some(image) => (image, self.find("initrd")),
                None => (self.by_order(0).unwrap_or(EMBEDDED_GUEST), self.by_order(1)),
            },
        };
        let initrd = match &guest.initrd {
            Some(initrd) => Some(self.require(initrd)?),
            None => second,
        };
        Ok(GuestFiles { image, initrd })
    }

    fn find(&self, name: &str) -> Option<&'static [u8]> {
        let file = self.files.iter().find(|file| file.name == name)?;
        Some(file.data)
    }

    fn by_order(&self, index: usize) -> Option<&'static [u8]> {
        let guests = self.files.iter().filter(|file| file.name != CONFIGURATION);
        guests.map(|file| file.data).nth(index)
    }

    fn require(&self, name: &str) -> Result<&'static [u8], String> {
        let found = self.find(file_name(name));
        let embedded = (name == EMBEDDED_GUEST_NAME).then_some(EMBEDDED_GUEST);
        found.or(embedded).ok_or_else(|| {
            let names: Vec<_> = self.files.iter().map(|file| file.name.as_str()).collect();
            let there_are = match &names[..] {
                [] => "there is no module at all".into(),
                names => format!("there are: {}", names.join(", ")),
            };
            format!("no boot module is named {name:?}; {there_are}")
        })
    }
}

/// A path's last component.
fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Whether the data begin with a tar header (POSIX.1-1988 ustar: magic at byte 257).
fn is_tar(data: &[u8]) -> bool {
    data.get(257..262) == Some(b"ustar")
}
