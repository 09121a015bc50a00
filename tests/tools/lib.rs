//! The modules of `dfar-bench` as a library: tests, benches and `dfar-compare` judge and measure
//! with the command's own code.

#[path = "../../src/bin/dfar-bench/attention/mod.rs"]
pub mod attention;
#[path = "../../src/bin/dfar-bench/limits/mod.rs"]
pub mod limits;
#[path = "../../src/bin/dfar-bench/timing.rs"]
pub mod timing;
#[path = "../../src/bin/dfar-bench/train/mod.rs"]
pub mod train;
#[path = "../../src/bin/dfar-bench/verify/mod.rs"]
pub mod verify;
