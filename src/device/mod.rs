//! The operations of a model, on buffers that a device owns.
//!
//! The model is written against the trait [`Device`]. It runs on the [CPU engine](cpu) and on
//! [CUDA](cuda). The traits, their conventions and the CPU engine are the crate `dfar-engine`.

pub mod cuda;
mod precision;

pub use precision::Precision;

#[doc(inline)]
pub use dfar_engine::device::*;
