//! One file for each system.

pub mod gru4rec;
pub mod sasrec;
