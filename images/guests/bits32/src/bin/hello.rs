//! `hello`: 32-bit protected mode without paging; tells what the loader passed.

#![no_std]
#![no_main]

use umbra_guest::{guest, hello};

guest!("hello", multiboot, hello::run);
