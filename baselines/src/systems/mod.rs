//! One file for each system.

pub mod caser;
pub mod dfn;
pub mod dien;
pub mod din;
pub mod feedrec;
pub mod gru4rec;
pub mod sasrec;
pub mod tha4rec;
