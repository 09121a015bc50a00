//! The model's operations, a file for each `.cu` of `kernels/`: its modules, its entry points, and the launches.
//!
//! Lengths are checked before every launch. Index values are not: they live on the device, and their producer
//! guarantees them. [`crate::model`] checks a batch before it is copied to the device.

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
