//! Train and serve recommenders on **mixed feedback**: what a user liked and what they skipped.
//!
//! dfar implements DFAR (Lin et al., WWW 2023): factorization-heads attention over a user's events, two interests
//! disentangled from it, and target attention over candidates. Forward and backward passes are written by hand;
//! sequences of any length are packed end to end, so there is no padding anywhere.
//!
//! One batch travels this line, a module a station:
//!
//! ```text
//! log file -> data (one mmap'd file) -> batch (packed histories) -> model -> train -> evaluate
//!                                                                      |
//!                                                        device (CPU) and attention (FHA)
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`attention`] | FHA as an operation on packed slices, and its naive float64 form |
//! | [`data`] | importing logs, the `.dfar` file, splits, synthetic logs |
//! | [`batch`] | what a model sees of a user's events, packed end to end |
//! | [`device`] | the operations a model needs, on buffers a device owns |
//! | [`model`] | DFAR: parameters, forward, backward, Adam |
//! | [`train`] | the training loop, its configuration, checkpoints |
//! | [`evaluate`] | scoring candidate groups, ranking metrics |
//!
//! # A model in a few lines
//!
//! ```
//! use dfar::batch::{Batch, Group, History};
//! use dfar::device::{Clip, cpu::Cpu};
//! use dfar::model::{AdamOptions, LossOptions, Model, ModelConfig, Optimizer};
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
//! let mut model = Model::new(Arc::new(Cpu::new()), ModelConfig::new(10, 20), 2020)?;
//! let mut optimizer = Optimizer::new(&model)?;
//! let loss = LossOptions { bpr: 0.1, idl: 0.1, embed_l2: 1e-6 };
//! let adam = AdamOptions { lr: 1e-2, clip: Some(Clip::PerTensor(2.0)), dense_embeddings: false };
//! for _ in 0..30 {
//!     model.train_step(&batch, &loss, &adam, &mut optimizer)?;
//! }
//! let logits = model.score(&batch)?;
//! assert!(logits[0] > logits[1] && logits[0] > logits[2]);
//! # Ok::<(), dfar::Error>(())
//! ```

pub mod attention;
mod auc;
pub mod batch;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod model;
pub mod train;

pub use error::{Error, Result};
