//! The files that the boot loader has passed, or that uhyve has for us.
//!
//! Each boot module is one file, named after its path; a module that is a tar archive is its members
//! instead. A guest finds its files by name, and a single guest also by their order: the archive's
//! members `guest` and `initrd`, or else the first module and the second. Without any module the
//! embedded guest runs. uhyve's files are found by name only, because it does not list them.
//!
//! Protocol: [`BootFiles::new`], which finds the configuration files; then [`BootFiles::fetch`] once the
//! options are known; then [`BootFiles::of_guest`].

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use tar_no_std::TarArchiveRef;
use umbra_report::config;
use umbra_report::hermit_image::{self, HermitImage};
use umbra_report::options::{GuestOptions, Options};

use crate::host_files::{self, ReadError};
use crate::platform::BootModule;

/// The guest that runs if the boot loader passes none.
const EMBEDDED_GUEST: &[u8] = include_bytes!(env!("UMBRA_DEFAULT_GUEST"));
/// Its name.
pub const EMBEDDED_GUEST_NAME: &str = "hello";
/// The names of a single guest's files, if they are not called otherwise.
const GUEST: &str = "guest";
const INITRD: &str = "initrd";

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
    /// Lists the modules' files, and finds uhyve's configuration files.
    ///
    /// # Errors
    /// What is wrong with an archive, or uhyve's reason.
    pub fn new(modules: Vec<BootModule>) -> Result<Self, ReadError> {
        let mut files = Self {
            files: list(modules).map_err(ReadError::Failed)?,
        };
        for name in [hermit_image::FILE, config::FILE] {
            files.fetch_file(name)?;
        }
        Ok(files)
    }

    /// Gets from uhyve what the guests' options name and no module has.
    ///
    /// # Errors
    /// uhyve's reason, for a file that is there.
    pub fn fetch(&mut self, options: &Options) -> Result<(), ReadError> {
        for guest in &options.guests {
            match &guest.image {
                Some(image) => self.fetch_file(image)?,
                None => self.fetch_file(guest.name.as_deref().unwrap_or(EMBEDDED_GUEST_NAME))?,
            }
            if let Some(initrd) = &guest.initrd {
                self.fetch_file(initrd)?;
            }
        }
        if options.guests.len() == 1 {
            self.fetch_file(GUEST)?;
            self.fetch_file(INITRD)?;
        }
        Ok(())
    }

    fn fetch_file(&mut self, path: &str) -> Result<(), ReadError> {
        let name = file_name(path);
        if self.find(name).is_none()
            && let Some(data) = host_files::read(path)?
        {
            let name = name.into();
            self.files.push(File { name, data });
        }
        Ok(())
    }

    /// The text of the configuration of Umbra's own options, if there is one.
    ///
    /// # Errors
    /// One line if it is not a text.
    pub fn configuration(&self) -> Result<Option<&'static str>, String> {
        self.text(config::FILE)
    }

    /// Checks the configuration of the `.hermit` image, if there is one, and leaves only those of its
    /// files that may be guests'.
    ///
    /// # Errors
    /// One line that says what is wrong with it.
    pub fn check_hermit_image(&mut self) -> Result<(), String> {
        if let Some(text) = self.text(hermit_image::FILE)? {
            let image = HermitImage::read(text).map_err(|error| error.to_string())?;
            let kernel = file_name(&image.kernel);
            self.files
                .retain(|file| file.name != hermit_image::FILE && file.name != kernel);
        }
        Ok(())
    }

    fn text(&self, name: &str) -> Result<Option<&'static str>, String> {
        self.find(name)
            .map(|data| core::str::from_utf8(data))
            .transpose()
            .map_err(|error| format!("{name}: {error}"))
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
            None => match self.find(GUEST) {
                Some(image) => (image, self.find(INITRD)),
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
        let guests = self.files.iter().filter(|file| file.name != config::FILE);
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

/// The modules' files.
fn list(modules: Vec<BootModule>) -> Result<Vec<File>, String> {
    let mut files = Vec::new();
    for module in modules {
        if !is_tar(module.data) {
            let name = file_name(&module.name).into();
            let data = module.data;
            files.push(File { name, data });
            continue;
        }
        let archive = TarArchiveRef::new(module.data)
            .map_err(|_| format!("the boot module {:?} is a damaged tar archive", module.name))?;
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
    Ok(files)
}

/// A path's last component.
fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Whether the data begin with a tar header (POSIX.1-1988 ustar: magic at byte 257).
fn is_tar(data: &[u8]) -> bool {
    data.get(257..262) == Some(b"ustar")
}
