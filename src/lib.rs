//! dfar: train and serve recommenders on mixed feedback.

pub mod attention;
pub mod bench;
pub mod data;
pub mod device;
pub mod error;
pub mod verify;

pub use error::{Error, Result};
