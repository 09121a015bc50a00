//! Training: drawing batches, the loop with early stopping, checkpoints, the run directory.

pub mod checkpoint;
pub mod config;
pub mod draw;
pub mod file;
pub mod negatives;
pub mod run;
