//! How work is cut for the kernels: pure functions of shapes and of a device's limits, tested without a device.

pub mod attention;
pub mod params;
pub(crate) mod rows;
mod shared_memory;
pub(crate) mod target;
pub(crate) mod target_params;
pub mod target_shape;
pub mod tile;
