//! From log files to a memory-mapped data set.
//!
//! A log passes through these steps, each a module:
//!
//! 1. [`import`](mod@import) reads rows of one of the known formats and numbers users and items;
//! 2. `external_sort` orders the events by user and time with bounded memory;
//! 3. `k_core` drops repeated pairs, rare items and rare users;
//! 4. `split` cuts every history into training, validation and test events;
//! 5. [`candidates`] draws the negatives that every model is scored against;
//! 6. `writer` and [`mod@format`] write one file, which [`Dataset`] maps and validates.
//!
//! [`synthetic`] enters at step 4 with a log whose true probabilities are known.

mod assemble;
pub mod candidates;
mod dataset;
mod error;
mod external_sort;
pub mod format;
pub mod import;
mod k_core;
mod log;
mod map;
mod names;
mod protocol;
mod split;
pub mod statistics;
pub mod synthetic;
mod validate;
mod writer;

pub use dataset::{Dataset, EvaluationGroups, Group, Histories, UserEvents};
pub use error::{BadRow, DataError, PreparationStep, TimeSighting};
pub use protocol::{Candidates, CountedRecords, KCore, Made, Protocol, Repeats, Source, Weighting};
pub use split::{Part, Split};
