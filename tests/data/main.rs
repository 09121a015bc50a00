//! Logs and data sets: import, the file format, and real logs.

mod bench;
mod checksums;

mod format;
mod import;
mod model;
mod real;
#[path = "../common/skip.rs"]
mod skip;
