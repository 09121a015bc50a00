//! Where computation happens.
pub mod cpu;
