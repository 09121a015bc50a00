//! One file for each system.

pub mod caser;
pub mod gru4rec;
pub mod sasrec;
