//! Training and serving recommenders on **mixed feedback**: likes and skips.
//!
//! dfar implements DFAR (Lin et al., WWW 2023): factorization-heads attention (FHA) over a user's
//! events, a positive and a negative interest read out of it, and target attention over candidates.
//! Forward and backward passes are written by hand. Sequences of any length are packed end to end,
//! without padding.
//!
//! A batch passes through the modules in this order:
//!
//! ```text
//! log file -> data (memory-mapped file) -> batch (packed histories) -> model -> train, evaluate
//!                                                                        |
//!                                                           device (CPU or CUDA) -> attention
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`data`] | log import, the `.dfar` file, splits, evaluation candidates, synthetic logs |
//! | [`batch`] | the events that a model sees, packed; batches prepared ahead by threads |
//! | [`attention`] | FHA on packed slices, and its definition in float64 |
//! | [`device`] | the operations of the model, on buffers that a device owns |
//! | [`model`] | the network: parameters, forward, backward, Adam |
//! | [`train`] | the training loop, its configuration, checkpoints |
//! | [`evaluate`] | scores of candidate groups, ranking metrics |
//!
//! # Examples
//!
//! Four programs in the `examples/` folder of the source are short enough to read in full:
//!
//! - `attention`: FHA alone on slices, forward and backward, checked against a naive loop;
//! - `train_and_score`: a log in memory, a trained model, a ranking for a new user;
//! - `training_loop`: a training loop over [`model::Model`], with batches drawn on other threads;
//! - `read_dfar`: a CSV log imported into a `.dfar` file and read back.
//!
//! Run one with `cargo run --release --example attention`.
//!
//! # A model in a few lines
//!
//! ```
//! use dfar::batch::{Batch, Group, History};
//! use dfar::device::{Clip, cpu::Cpu};
//! use dfar::model::{AdamOptions, Initialization, LossOptions, Model, ModelConfig, Optimizer};
//! use std::sync::Arc;
//!
//! // A user liked item 3, skipped 7, liked 2, and then liked 5 rather than 1 or 8.
//! let history = History {
//!     items: vec![3, 7, 2],
//!     labels: vec![1, 0, 1],
//!     groups: vec![Group { length: 3, candidates: vec![5, 1, 8], targets: vec![1.0, 0.0, 0.0] }],
//! };
//! let batch = Batch::pack(&[history])?;
//!
//! let (cpu, config) = (Arc::new(Cpu::new()), ModelConfig::new(10, 20));
//! let mut model = Model::initialized(cpu, config, 2020, Initialization::Scaled)?;
//! let mut optimizer = Optimizer::new(&model)?;
//! let loss = LossOptions { bpr: 0.1, idl: 0.001, embed_l2: 1e-6 };
//! let adam = AdamOptions { lr: 1e-2, clip: Some(Clip::PerTensor(2.0)), dense_embeddings: false };
//! for _ in 0..30 {
//!     model.train_step(&batch, &loss, &adam, &mut optimizer)?;
//! }
//! let logits = model.score(&batch)?;
//! assert!(logits[0] > logits[1] && logits[0] > logits[2]);
//! # Ok::<(), dfar::Error>(())
//! ```

mod auc;
pub mod batch;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod model;
#[doc(hidden)]
pub mod replacement;
#[doc(hidden)]
pub mod threads;
pub mod train;

#[doc(inline)]
pub use dfar_engine::attention;
#[doc(hidden)]
pub use dfar_engine::{memory, simd};
pub use error::{Error, Result};
