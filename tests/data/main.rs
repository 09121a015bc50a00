//! Logs and data sets: import, the file format, and real logs.

mod bench;
mod checksums;

mod format;
mod import;
mod model;
mod real;
