//! `exceptions`: every exception that a 64-bit guest can raise at will.

#![no_std]
#![no_main]

use umbra_guest::{exceptions, guest};

guest!("exceptions", kludge_and_pvh, exceptions::run);
