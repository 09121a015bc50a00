//! A GPU as a [`Runtime`](super::runtime::Runtime): every foreign function of the driver, NVRTC and cuBLASLt is called
//! in this room and in no other.

pub(crate) mod blas;
pub mod compile;
pub(crate) mod context;
pub mod graph;
pub mod landing;
mod launch;
pub mod nvrtc;
mod once;
