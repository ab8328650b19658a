//! `exceptions32`: every exception that a 32-bit guest can raise at will.

#![no_std]
#![no_main]

use umbra_guest::{exceptions, guest};

guest!("exceptions32", multiboot, exceptions::run);
