//! Timing the attention operation by sequence length, and predicting it.

pub mod batch;
pub mod gpu;
pub mod predict;
