//! The CPU engine of [dfar](https://docs.rs/dfar), and the operations that every device has.
//!
//! | module | contents |
//! |---|---|
//! | [`attention`] | factorization-heads attention (FHA) on packed slices, and its definition in float64 |
//! | [`device`] | the operations of the model as traits, and [`device::cpu`], which implements them |
//!
//! `dfar` has these modules under the same names. This is a crate of its own because its code needs
//! optimization also in tests; the rest of `dfar` does not.

pub mod attention;
pub mod device;
#[doc(hidden)]
pub mod memory;
#[doc(hidden)]
pub mod simd;
#[cfg(test)]
#[path = "../../tests/common/skip.rs"]
mod skip;
