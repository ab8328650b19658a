//! Tells the linker where the stub lies, and cargo when the embedded image has changed.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rerun-if-env-changed=UMBRA_HERMIT_ELF");

    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    // The target's default is a position-independent executable, which no boot protocol loads.
    for argument in ["--no-pie", "--no-dynamic-linker", "-zmax-page-size=4096"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rustc-link-arg-bins=-T{directory}/link.ld");

    match std::env::var("UMBRA_HERMIT_ELF") {
        Ok(path) if Path::new(&path).is_absolute() && Path::new(&path).is_file() => {
            println!("cargo::rerun-if-changed={path}");
        }
        Ok(path) => println!(
            "cargo::error=UMBRA_HERMIT_ELF is `{path}`, but must be the absolute path of the \
             Hermit image to embed"
        ),
        Err(_) => println!(
            "cargo::error=set UMBRA_HERMIT_ELF to the absolute path of the Hermit image to embed \
             (`cargo xtask` does)"
        ),
    }
}
