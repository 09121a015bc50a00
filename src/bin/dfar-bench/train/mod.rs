//! Timing training steps: with and without what histories and candidates share, and by part.

pub mod floor;
pub mod sharing;
pub mod steps;
