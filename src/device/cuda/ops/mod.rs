//! The model's operations, one file for each `.cu` of `kernels/`: modules, entry points, launches.
//!
//! Lengths are checked before every launch. Index values are in device memory and are not checked:
//! [`crate::batch::Batch`] guarantees that they agree with each other, and [`crate::model`] checks
//! them against the sizes of the tables before it copies them to the device.

pub mod attention;
pub(crate) mod convert;
pub(crate) mod embedding;
pub(crate) mod layer_norm;
pub mod limits;
pub(crate) mod linear;
pub(crate) mod loss;
pub mod naive_attention;
pub(crate) mod optimizer;
pub(crate) mod prefix_mean;
pub(crate) mod rows;
pub(crate) mod target_attention;
