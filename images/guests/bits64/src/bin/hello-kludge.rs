//! `hello-kludge`: 64-bit long mode; tells what the loader passed.

#![no_std]
#![no_main]

use umbra_guest::{guest, hello};

guest!("hello-kludge", kludge, hello::run);
