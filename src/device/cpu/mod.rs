//! The CPU engine.
pub mod attention;
pub mod simd;
