//! `dfar-data`: import logs, describe data sets, make synthetic ones.
fn main() {}
