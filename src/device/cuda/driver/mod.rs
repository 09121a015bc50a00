//! A GPU as a [`Runtime`](super::runtime::Runtime). Only this module calls foreign functions: the
//! driver, NVRTC and cuBLASLt.

pub(crate) mod blas;
pub mod compile;
pub(crate) mod context;
pub mod graph;
pub mod landing;
mod launch;
mod library;
pub mod nvrtc;
pub(crate) mod once;
