//! The systems that DFAR is compared with in Table 2 of its paper: DIN, Caser, GRU4REC, DIEN,
//! SASRec, THA4Rec, DFN and FeedRec.
//!
//! All of them read the batches, draw the negatives, take the optimizer steps and answer the
//! evaluation groups of DFAR. A [`System`] is what differs: how the history is encoded, how the
//! candidate enters, and an auxiliary loss. The head of each file in [`systems`] states the
//! equations of one. Gradients are derived by hand and checked against float64 cases of an
//! independent program ([`verify`]).
//!
//! ```text
//! histories -> Inputs -> System::encode -> parts -> tower -> logits -> loss
//!                               <- backward <- d parts <-
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`inputs`] | a packed batch, as all systems read it |
//! | [`system`] | the trait, and the systems by name |
//! | [`system_device`] | the systems that a device computes: all on the CPU, some on CUDA |
//! | [`systems`] | one file for each system |
//! | [`ops`] | operations that only these systems need; most are on slices, for the CPU alone |
//! | [`tower`], [`loss`] | what all systems share behind their encoders |
//! | [`model`] | forward, backward, Adam |
//! | [`learner`], [`fit`] | a model to train, and the training loop: that of DFAR, for all |
//! | [`plan`], [`tune`] | the runs of a comparison, and the settings that are tried |
//! | [`results`], [`users`], [`machine`] | the results of runs in files |
//! | [`table`], [`statistics`] | Tables 2 and 3 from them |
//! | [`markdown`], [`page`], [`svg`] | the tables as text and as a page |
//! | [`verify`] | comparison with reference cases |

pub mod fit;
pub mod inputs;
pub mod learner;
pub mod loss;
pub mod machine;
pub mod markdown;
pub mod model;
pub mod ops;
pub mod page;
pub mod plan;
pub mod results;
pub mod statistics;
pub mod svg;
pub mod system;
pub mod system_device;
pub mod systems;
pub mod table;
pub mod tower;
pub mod tune;
pub mod users;
pub mod verify;

pub use inputs::Inputs;
pub use model::{LossOptions, Model, Optimizer, StepLoss};
pub use system::{Kind, Settings, System};
pub use system_device::SystemDevice;

use dfar::device::cpu::Cpu;

/// `f32` values on a device; on the CPU, a slice by dereference.
pub type Floats<D = Cpu> = dfar::device::Floats<D>;
/// Indices on a device; on the CPU, a slice by dereference.
pub type Indices<D = Cpu> = dfar::device::Indices<D>;
/// One buffer per parameter: values, gradients or moments.
pub type Tensors<D = Cpu> = dfar::model::tensors::Tensors<D>;
/// Result of a step of a model.
pub type Result<T> = std::result::Result<T, dfar::model::ModelError>;
