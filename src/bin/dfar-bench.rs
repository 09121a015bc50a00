//! `dfar-bench`: verify against reference cases, and measure.
fn main() {}
