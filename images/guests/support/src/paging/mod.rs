//! Page tables of all modes, and the checks that run in each of them.

pub mod space;
