//! From a user's events to a packed batch: which events the model sees, and how they are laid end to end.
//!
//! [`View`] cuts a user's events into histories ([`Cut`], [`Feedback`]); [`Batch::pack`] lays histories and their
//! candidates end to end with every index the model needs; [`ahead`] makes batches on other threads before they
//! are used.

pub mod ahead;
mod history;
mod pack;

pub use history::{Cut, Feedback, Question, View, without_sharing};
pub use pack::{Batch, BatchError, Group, History, LabelSplit, Lists, Touched};
