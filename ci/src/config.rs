//! A configuration of several guests: an `umbra.toml`, and the files that it names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use umbra_report::config;
use umbra_report::options::{self, Options, Request};

use crate::archive::{self, Entry};
use crate::build::Builder;
use crate::guest::{self, Source};
use crate::input::BadInput;
use crate::project::Project;

/// Which of a guest's files is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Image,
    Initrd,
}

/// What is added to the name of a guest that this tool puts together, to name its initial RAM disk.
const INITRD: &str = "-initrd";

/// A configuration file that Umbra will accept.
pub struct Config {
    text: String,
    options: Options,
    /// What its guests' files are, by their names in the configuration.
    files: BTreeMap<String, (Source, Part)>,
}

impl Config {
    /// Reads the file at `path`. Its guests are ours by name, or files beside it.
    ///
    /// # Errors
    /// When the file cannot be read, Umbra would refuse it, or a guest's file is missing.
    pub fn read(project: &Project, path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let place = path.display();
        let refuse = |error: String| BadInput(format!("{place}: {error}"));
        let arguments = config::merge(&text, &[]).map_err(|e| refuse(e.to_string()))?;
        let request = options::parse(arguments.iter().map(String::as_str))
            .map_err(|error| refuse(error.to_string()))?;
        let Request::Run(options) = request else {
            return Err(refuse("it asks for help".into()).into());
        };
        let own = guest::own(project)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        let mut files = BTreeMap::new();
        for guest in &options.guests {
            let image = guest.image.as_ref().or(guest.name.as_ref());
            let Some(image) = image.cloned() else {
                continue;
            };
            let source = match file(directory, &image) {
                Some(file) => Source::File(file),
                None => Source::find(&own, &image).with_context(|| place.to_string())?,
            };
            files.insert(image, (source, Part::Image));
            if let Some(initrd) = &guest.initrd {
                let part = match (file(directory, initrd), initrd.strip_suffix(INITRD)) {
                    (Some(file), _) => (Source::File(file), Part::Image),
                    (None, Some(guest)) => {
                        let source = Source::find(&own, guest);
                        (source.with_context(|| place.to_string())?, Part::Initrd)
                    }
                    (None, None) => {
                        return Err(refuse(format!("there is no file {initrd}")).into());
                    }
                };
                files.insert(initrd.clone(), part);
            }
        }
        Ok(Self {
            text,
            options,
            files,
        })
    }

    /// What Umbra makes of it, as a configuration.
    pub fn effective(&self) -> String {
        config::text(&self.options)
    }

    /// How many reports its guests give, if none fails.
    pub fn reports(&self) -> usize {
        usize::try_from(self.options.runs()).unwrap_or(usize::MAX)
    }

    /// The memory of the machine in MiB.
    pub fn machine_memory_mib(&self) -> u64 {
        self.options.machine_memory_mib()
    }

    /// The archive that Umbra reads as its boot module.
    ///
    /// # Errors
    /// When a guest cannot be built or a file cannot be read.
    pub fn archive(&self, builder: &Builder<'_>) -> Result<Vec<u8>> {
        let mut files = Vec::new();
        for (name, (source, part)) in &self.files {
            let guest = builder.guest_files(source)?;
            let path = match part {
                Part::Image => guest.image,
                Part::Initrd => guest
                    .initrd
                    .with_context(|| format!("{name}: that guest has no initial RAM disk"))?,
            };
            let data =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.push((guest::display_name(name), data));
        }
        let mut entries = vec![Entry {
            name: "umbra.toml",
            data: self.text.as_bytes(),
        }];
        entries.extend(files.iter().map(|(name, data)| Entry { name, data }));
        archive::ustar(&entries)
    }
}

fn file(directory: &Path, name: &str) -> Option<PathBuf> {
    let file = directory.join(name);
    file.is_file().then_some(file)
}

#[cfg(test)]
mod tests {
    use umbra_report::options::HOST_MEMORY_MIB;

    use super::*;

    fn read(text: &str) -> Result<Config> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("several.toml");
        fs::write(directory.path().join("kernel"), "x").unwrap();
        fs::write(&path, text).unwrap();
        Config::read(&Project::find().unwrap(), &path)
    }

    #[test]
    fn guests_are_ours_or_files() {
        let text = "memory = \"8M\"\n[[guest]]\nname = \"hello\"\n\
            [[guest]]\nname = \"b\"\nimage = \"kernel\"\n[[guest]]\nname = \"c\"\nimage = \"hello\"\n";
        let config = read(text).unwrap();
        assert_eq!(config.reports(), 3);
        assert_eq!(config.machine_memory_mib(), 24 + HOST_MEMORY_MIB);
        let names: Vec<_> = config.files.keys().map(String::as_str).collect();
        assert_eq!(names, ["hello", "kernel"]);
    }

    #[test]
    fn mistakes_name_the_file() {
        let error = |text: &str| format!("{:#}", read(text).err().unwrap());
        let unknown = error("[[guest]]\nname = \"helo\"\n");
        assert!(
            unknown.contains("several.toml") && unknown.contains("hello"),
            "{unknown}"
        );
        let missing = error("[[guest]]\nname = \"hello\"\ninitrd = \"none\"\n");
        assert!(missing.contains("there is no file none"), "{missing}");
        assert!(error("memory = \"1\"\n").contains("several.toml"));
    }
}
