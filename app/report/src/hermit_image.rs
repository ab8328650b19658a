//! `hermit.toml`, the configuration inside a `.hermit` image, in its version 1.
//!
//! uhyve and Hermit's loader act on it and ignore keys that they do not know, so that a mistyped one is
//! never noticed. Whoever makes an image or runs in one calls [`HermitImage::read`], which notices.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use toml::Table;

use crate::file_error::FileError;

/// The file's name, in the image's root.
pub const FILE: &str = "hermit.toml";

/// The configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HermitImage {
    /// Of the format: `1`.
    pub version: String,
    /// The Hermit ELF's path in the image.
    pub kernel: String,
    /// What the kernel is given.
    pub input: Input,
    /// What the machine must have.
    #[serde(default)]
    pub requirements: Requirements,
}

/// What the kernel is given, if the command line gives it nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Input {
    /// The kernel's own arguments.
    pub kernel_args: Vec<String>,
    /// The application's arguments. They are put together with spaces and taken apart as a shell does.
    pub app_args: Vec<String>,
    /// Environment variables, each as `NAME=VALUE`.
    #[serde(default)]
    pub env_vars: Vec<String>,
}

/// What the machine must have.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Requirements {
    /// The least memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// The least number of processors.
    #[serde(default)]
    pub cpus: u32,
}

/// An amount of memory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Memory {
    /// A number with a unit, as in `256 MiB`.
    Text(String),
    /// Bytes.
    Bytes(u64),
}

const VERSION: &str = "1";
const TOP: &[&str] = &["version", "kernel", "input", "requirements"];
/// The keys of each table.
const TABLES: &[(&str, &[&str])] = &[
    ("input", &["kernel_args", "app_args", "env_vars"]),
    ("requirements", &["memory", "cpus"]),
];

impl HermitImage {
    /// Of an image whose kernel is Umbra.
    pub fn new(input: Input, requirements: Requirements) -> Self {
        Self {
            version: VERSION.into(),
            kernel: "umbra".into(),
            input,
            requirements,
        }
    }

    /// Reads and checks the file's text.
    ///
    /// # Errors
    /// The first mistake.
    pub fn read(text: &str) -> Result<Self, FileError> {
        let table: Table = text
            .parse()
            .map_err(|error| FileError::parser(FILE, &error))?;
        check_keys("", &table, TOP)?;
        for (name, keys) in TABLES {
            if let Some(inner) = table.get(*name).and_then(toml::Value::as_table) {
                check_keys(&format!("{name}."), inner, keys)?;
            }
        }
        let image: Self = toml::from_str(text).map_err(|error| FileError::parser(FILE, &error))?;
        image.check_values()?;
        Ok(image)
    }

    fn check_values(&self) -> Result<(), FileError> {
        let refuse = |message| Err(FileError::new(FILE, message));
        if self.version != VERSION {
            return refuse(format!(
                "version must be {VERSION:?}, not {:?}",
                self.version
            ));
        }
        for argument in &self.input.app_args {
            if argument.contains(char::is_whitespace) && !argument.contains(['\'', '"', '\\']) {
                return refuse(format!(
                    "input.app_args: {argument:?} would become several arguments: write it so, or \
                     with quotes inside: {:?}",
                    format!("'{argument}'")
                ));
            }
        }
        for variable in &self.input.env_vars {
            if !variable.contains('=') {
                return refuse(format!("input.env_vars: {variable:?} is no NAME=VALUE"));
            }
        }
        Ok(())
    }
}

fn check_keys(prefix: &str, table: &Table, known: &[&str]) -> Result<(), FileError> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => {
            let known: Vec<_> = known.iter().map(|name| format!("{prefix}{name}")).collect();
            let key = format!("{prefix}{key}");
            Err(FileError::unknown(FILE, "key", &key, &known))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use proptest::prelude::*;

    const GOOD: &str = "version = \"1\"\nkernel = \"umbra\"\n[input]\nkernel_args = []\n\
        app_args = [\"--append\", \"'a b'\"]\nenv_vars = [\"A=b c\"]\n\
        [requirements]\nmemory = \"256 MiB\"\ncpus = 1\n";

    fn error(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "{from}");
        HermitImage::read(&GOOD.replace(from, to))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_good_file_is_read() {
        let image = HermitImage::read(GOOD).unwrap();
        assert_eq!(image.kernel, "umbra");
        assert_eq!(image.input.app_args, ["--append", "'a b'"]);
        let memory = image.requirements.memory;
        assert_eq!(memory, Some(Memory::Text("256 MiB".into())));
        let short = "version=\"1\"\nkernel=\"k\"\n[input]\nkernel_args=[]\napp_args=[]";
        let expected = Requirements::default();
        assert_eq!(HermitImage::read(short).unwrap().requirements, expected);
    }

    #[test]
    fn mistyped_keys_name_the_nearest() {
        for (from, to, hint) in [
            (
                "kernel =",
                "kernal =",
                "\"kernal\": did you mean \"kernel\"?",
            ),
            (
                "env_vars",
                "env_var",
                "\"input.env_var\": did you mean \"input.env_vars\"?",
            ),
            (
                "requirements",
                "requirement",
                "\"requirement\": did you mean \"requirements\"?",
            ),
            (
                "kernel =",
                "zzzzzzzz =",
                "\"zzzzzzzz\": there are: version, kernel, input, requirements",
            ),
        ] {
            assert_eq!(error(from, to), format!("hermit.toml: unknown key {hint}"));
        }
    }

    #[test]
    fn wrong_values_are_refused() {
        assert!(error("\"1\"", "\"2\"").contains("version must be \"1\", not \"2\""));
        assert!(error("'a b'", "a b").contains("with quotes inside: \"'a b'\""));
        assert!(error("A=b c", "HOME").contains("\"HOME\" is no NAME=VALUE"));
        assert!(error("kernel_args = []", "kernel_args = 3").contains("invalid type"));
        assert!(error("kernel_args = []", "").contains("missing field"));
        assert!(error("version = ", "version ").starts_with("hermit.toml: at byte 8"));
    }

    proptest! {
        #[test]
        fn every_mistake_is_one_line(text in "(?s).*") {
            if let Err(error) = HermitImage::read(&text) {
                prop_assert!(!error.to_string().contains(['\n', '\r']));
            }
        }
    }
}
