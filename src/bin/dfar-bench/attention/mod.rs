//! The attention operation by sequence length: measured on the CPU and on a GPU, and predicted.

pub mod batch;
pub mod gpu;
pub mod predict;
