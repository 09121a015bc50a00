//! Where computation happens.
pub mod cpu;
pub mod cuda;
