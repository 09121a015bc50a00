//! Peak rates of a machine: of the CPU, of a GPU, and of a GPU by its datasheet.

pub mod cpu;
pub mod gpu;
