//! `dfar-train`: train, evaluate and score.
fn main() {}
