//! The CPU engine.

pub mod simd;
