//! Reading TOML files strictly: a mistyped key is an error that names the nearest right one.

use std::fmt::Display;
use std::path::Path;

use anyhow::{Result, bail};
use serde::de::DeserializeOwned;

/// The keys that a TOML table may have, each with the keys of the table below it, if that is one.
pub struct Keys(pub &'static [(&'static str, Keys)]);

/// A key whose value is no table with keys of its own.
pub const LEAF: Keys = Keys(&[]);

/// Reads `text`, which is the content of `path`.
///
/// # Errors
/// When it is not TOML, has an unknown key, or a value of the wrong type: in one line with the place.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str, keys: &Keys) -> Result<T> {
    let table: toml::Table = text.parse().map_err(|error| at(path, text, &error))?;
    check(path, "", &table, keys)?;
    toml::from_str(text).map_err(|error| at(path, text, &error))
}

fn at(path: &Path, text: &str, error: &toml::de::Error) -> anyhow::Error {
    let line = error
        .span()
        .map_or(1, |span| text[..span.start].matches('\n').count() + 1);
    let message = error.message().replace('\n', " ");
    anyhow::anyhow!("{}:{line}: {message}", path.display())
}

fn check(path: &Path, prefix: &str, table: &toml::Table, keys: &Keys) -> Result<()> {
    for (key, value) in table {
        let Some((_, below)) = keys.0.iter().find(|(name, _)| name == key) else {
            let names = keys.0.iter().map(|(name, _)| *name);
            let hint = nearest(key, names)
                .map_or(String::new(), |name| format!("; did you mean `{name}`?"));
            bail!("{}: unknown key `{prefix}{key}`{hint}", path.display());
        };
        match value {
            toml::Value::Table(inner) if !below.0.is_empty() => {
                check(path, &format!("{prefix}{key}."), inner, below)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// The most similar of `names`, if any is similar at all.
pub fn nearest<'a>(typed: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let similarity = |name: &str| strsim::jaro_winkler(typed, name);
    let best = names
        .into_iter()
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(best) > 0.7).then_some(best)
}

/// "; did you mean `name`?", or a list when no name is similar.
pub fn suggestion<'a>(
    typed: &str,
    names: impl IntoIterator<Item = &'a str> + Clone,
) -> impl Display {
    match nearest(typed, names.clone()) {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!(
            "there are: {}",
            names.into_iter().collect::<Vec<_>>().join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    const KEYS: Keys = Keys(&[("memory", LEAF), ("report", Keys(&[("pf_taken", LEAF)]))]);

    #[derive(Deserialize, Debug)]
    struct File {
        memory: Option<u32>,
    }

    fn read(text: &str) -> Result<File, String> {
        parse(Path::new("x.toml"), text, &KEYS).map_err(|error| error.to_string())
    }

    #[test]
    fn good_files_are_read() {
        assert_eq!(
            read("memory = 3\n[report]\npf_taken = 1").unwrap().memory,
            Some(3)
        );
    }

    #[test]
    fn a_mistyped_key_names_the_nearest() {
        assert_eq!(
            read("memroy = 3").unwrap_err(),
            "x.toml: unknown key `memroy`; did you mean `memory`?"
        );
        assert_eq!(
            read("[report]\npf_token = 3").unwrap_err(),
            "x.toml: unknown key `report.pf_token`; did you mean `pf_taken`?"
        );
        assert_eq!(read("zzz = 3").unwrap_err(), "x.toml: unknown key `zzz`");
    }

    #[test]
    fn errors_say_where_in_one_line() {
        let error = read("\nmemory = \"much\"").unwrap_err();
        assert!(
            error.starts_with("x.toml:2: ") && !error.contains('\n'),
            "{error}"
        );
        let error = read("memory = \n").unwrap_err();
        assert!(
            error.starts_with("x.toml:1: ") && !error.contains('\n'),
            "{error}"
        );
    }
}
