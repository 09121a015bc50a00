//! One file for each system.

pub mod caser;
pub mod dien;
pub mod gru4rec;
pub mod sasrec;
