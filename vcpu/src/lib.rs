#![no_std]
pub mod address;
