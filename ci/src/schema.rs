//! `cargo xtask schema`: JSON schemas of umbra.toml and of scenario files, for editors.
//!
//! Both come from what reads the files: the options' table and their help, and the scenario's type. They
//! lie in `docs`, and a test keeps them current.

use std::path::PathBuf;

use anyhow::Result;
use schemars::schema_for;
use serde_json::{Map, Value, json};
use umbra_report::config::{self, Key};
use umbra_report::options::{HELP, Kind};

use crate::project::{Project, write_if_changed};
use crate::scenario::Scenario;

/// Writes the schemas, and prints where they are.
///
/// # Errors
/// When they cannot be written.
pub fn schema(project: &Project) -> Result<()> {
    for (path, schema) in files(project) {
        write_if_changed(&path, schema.as_bytes())?;
        println!("{}", path.display());
    }
    Ok(())
}

/// The schemas by their paths.
fn files(project: &Project) -> [(PathBuf, String); 2] {
    let docs = project.root().join("docs");
    [
        (docs.join("umbra.schema.json"), configuration()),
        (
            docs.join("scenario.schema.json"),
            schema_for!(Scenario).into(),
        ),
    ]
    .map(|(path, schema): (_, Value)| (path, format!("{schema:#}\n")))
}

/// The schema of umbra.toml.
fn configuration() -> Value {
    let keys: Map<_, _> = config::keys()
        .map(|key| (key.name.to_owned(), property(&key)))
        .collect();
    let mut top = keys.clone();
    top.remove("name");
    let guest = json!({
        "type": "object",
        "properties": keys,
        "required": ["name"],
        "additionalProperties": false,
    });
    top.insert(
        "guest".to_owned(),
        json!({ "description": "a guest", "type": "array", "items": guest }),
    );
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "umbra.toml",
        "description": "Guests of Umbra; what stands at the top holds for each of them",
        "type": "object",
        "properties": top,
        "additionalProperties": false,
    })
}

fn property(key: &Key) -> Value {
    let mut property = match &key.kind {
        Kind::Text => json!({ "type": "string" }),
        Kind::Size => json!({ "type": ["string", "integer"], "pattern": "^[0-9]+[KMGkmg]?$" }),
        Kind::Number(bounds) => {
            json!({ "type": "integer", "minimum": bounds.start(), "maximum": bounds.end() })
        }
        Kind::Choice(names) => json!({ "enum": names }),
    };
    property["description"] = help_on(key.option).into();
    property
}

/// What the help says about an option, which may take several lines.
fn help_on(option: &str) -> String {
    let is_option = |line: &str| line.starts_with("  --");
    let mut lines = HELP
        .lines()
        .skip_while(|line| !line.trim_start().starts_with(option) || !is_option(line));
    let first = lines.next().unwrap_or_default();
    let column = first.rfind("  ").map_or(0, |end| end + 2);
    let rest = lines.take_while(|line| !line.is_empty() && !is_option(line));
    let words = [&first[column..]].into_iter().chain(rest.map(str::trim));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use boon::{Compiler, SchemaIndex, Schemas};

    use super::*;

    /// Says what is wrong about a file.
    struct Validator {
        schemas: Schemas,
        index: SchemaIndex,
    }

    impl Validator {
        fn new(schema: &str) -> Self {
            const NAME: &str = "schema.json";
            let mut compiler = Compiler::new();
            compiler
                .add_resource(NAME, schema.parse().unwrap())
                .unwrap();
            let mut schemas = Schemas::new();
            let index = compiler.compile(NAME, &mut schemas).unwrap();
            Self { schemas, index }
        }

        fn complaint(&self, file: &Value) -> Option<String> {
            let result = self.schemas.validate(file, self.index);
            result.err().map(|error| error.to_string())
        }
    }

    fn validators() -> [Validator; 2] {
        files(&Project::find().unwrap()).map(|(_, text)| Validator::new(&text))
    }

    fn toml_files(directory: &Path) -> impl Iterator<Item = (PathBuf, Value)> {
        let entries = fs::read_dir(directory).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "toml")
            })
            .map(|path| {
                let table: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
                (path, serde_json::to_value(table).unwrap())
            })
    }

    #[test]
    fn the_schemas_in_docs_are_current() {
        for (path, schema) in files(&Project::find().unwrap()) {
            let current = fs::read_to_string(&path).unwrap_or_default();
            let path = path.display();
            assert!(current == schema, "{path} is old: run `cargo xtask schema`");
        }
    }

    #[test]
    fn our_own_files_are_valid() {
        let [configuration, scenario] = validators();
        let scenarios = Project::find().unwrap().root().join("ci/scenarios");
        let valid = |validator: &Validator, directory: &Path| {
            let files = toml_files(directory);
            files
                .map(|(path, file)| {
                    let complaint = validator.complaint(&file);
                    assert_eq!(complaint, None, "{}", path.display());
                })
                .count()
        };
        assert!(valid(&scenario, &scenarios) > 20);
        assert!(valid(&configuration, &scenarios.join("configs")) > 2);
    }

    #[test]
    fn mistakes_are_invalid() {
        let [configuration, scenario] = validators();
        for file in [
            json!({ "memroy": "64M" }),
            json!({ "memory": "much" }),
            json!({ "repeat": 0 }),
            json!({ "guest": [{ "memory": "64M" }] }),
            json!({ "mmu-policy": "random" }),
        ] {
            assert!(configuration.complaint(&file).is_some(), "{file}");
        }
        for file in [
            json!({}),
            json!({ "exit_code": 0, "guset": "hello" }),
            json!({ "exit_code": 0, "platforms": ["qemo"] }),
            json!({ "exit_code": 256 }),
        ] {
            assert!(scenario.complaint(&file).is_some(), "{file}");
        }
    }

    #[test]
    fn every_key_is_described() {
        for key in config::keys() {
            let help = help_on(key.option);
            assert!(
                help.len() > 10 && !help.contains("  "),
                "{}: {help}",
                key.name
            );
        }
        let help = help_on("--mmu-pages");
        assert!(
            help.starts_with("limit on its shadow pages (default"),
            "{help}"
        );
        assert!(!help.contains("--"), "{help}");
    }

    #[test]
    fn the_schema_has_the_keys_that_are_checked() {
        let schema: Value = schema_for!(Scenario).into();
        let properties = schema["properties"].as_object().unwrap();
        let described: Vec<_> = properties.keys().map(String::as_str).collect();
        let mut checked: Vec<_> = Scenario::keys().collect();
        checked.sort_unstable();
        assert_eq!(described, checked);
    }
}
