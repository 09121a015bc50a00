//! Scoring a data set's candidate groups, and what the scores are worth.

pub mod metrics;
