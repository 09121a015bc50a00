//! dfar: train and serve recommenders on mixed feedback.

pub mod attention;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;

pub use error::{Error, Result};
