//! From the events of a user to a packed batch.
//!
//! [`View`] cuts the events of a user into histories, according to [`Cut`] and [`Feedback`].
//! [`Batch::pack`] packs histories and their candidates end to end, with all indices of the model.
//! [`ahead`] prepares batches on worker threads.

pub mod ahead;
mod history;
mod pack;

pub use history::{Cut, Feedback, Question, View, without_sharing};
#[doc(hidden)]
pub use pack::touched;
pub use pack::{Batch, BatchError, BatchIndices, Group, History, LabelSplit, Lists, Touched};
