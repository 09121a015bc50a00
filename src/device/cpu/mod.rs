//! The CPU engine.

pub mod simd;

mod elementwise;
pub mod linear;
mod product;
mod scratch;
pub mod target_attention;
