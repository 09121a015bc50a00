//! One file for each system.

pub mod sasrec;
