//! What a machine can do at most: the CPU's threads, a GPU, and a GPU by its datasheet.

pub mod cpu;
pub mod gpu;
