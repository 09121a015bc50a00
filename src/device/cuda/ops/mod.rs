//! The model's operations, a file for each `.cu` of `kernels/`: its modules, its entry points, and the launches.
//!
//! Lengths are checked before every launch. Index values are not: they live on the device, and their producer
//! guarantees them. [`crate::model`] checks a batch before it is copied to the device.

pub mod attention;
pub mod convert;
pub mod embedding;
pub mod layer_norm;
pub mod limits;
pub(crate) mod linear;
pub mod loss;
pub mod naive_attention;
pub mod optimizer;
pub mod prefix_mean;
pub mod rows;
pub mod target_attention;
