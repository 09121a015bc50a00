//! Cuts work into tiles and blocks: pure functions of shapes and device limits, tested without a
//! device.

pub mod attention;
pub mod params;
pub(crate) mod rows;
mod shared_memory;
pub(crate) mod target;
pub(crate) mod target_params;
pub mod target_shape;
pub mod tile;
