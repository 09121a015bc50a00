//! From log files to a memory-mapped data set.

use thiserror::Error;

/// A log file or a data set file that cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {}
