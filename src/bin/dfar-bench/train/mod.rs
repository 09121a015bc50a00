//! Training steps: with and without sharing of histories and candidates, and by part.

pub mod floor;
pub mod launches;
pub mod sharing;
pub mod steps;
