//! dfar: train and serve recommenders on mixed feedback.

pub mod attention;
pub mod batch;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod history;
pub mod model;
pub mod report;
pub mod train;

pub use error::{Error, Result};
