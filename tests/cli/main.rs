//! The commands, run as a user runs them.

mod bench_attention;
mod bench_train;
mod data;
mod manual;
mod score;
mod train;
mod verify;
