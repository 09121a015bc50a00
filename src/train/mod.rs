//! Training: drawing batches, the loop with early stopping, checkpoints, the run directory.

pub mod checkpoint;
pub mod config;
pub mod draw;
pub mod file;
mod fit;
mod log;
pub mod negatives;
pub mod run;
pub mod stopping;
mod tensorboard;

pub use config::Config;
pub use fit::{Event, Fit, Outcome, check_data, score_options};

use crate::batch::BatchError;
use crate::device::cuda::CudaError;
use crate::evaluate::EvaluateError;
use crate::model::ModelError;
use std::io::ErrorKind;
use std::path::PathBuf;
use thiserror::Error;

/// An error of a training or scoring run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainError {
    /// Invalid configuration.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// Unusable run directory.
    #[error(transparent)]
    Run(#[from] run::RunError),
    /// Unusable run file.
    #[error(transparent)]
    File(#[from] file::FileError),
    /// The model could not be built or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A batch could not be packed.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// Validation or test failed.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// Training diverged.
    #[error(
        "non-finite value in {tensor} at step {step} (epoch {epoch}, batch {batch}); \
         a lower --lr or --max-grad-norm may help"
    )]
    NonFinite {
        /// Epoch, from 1.
        epoch: usize,
        /// Batch of the epoch, from 1.
        batch: usize,
        /// Optimizer step, from 1.
        step: u64,
        /// The tensor.
        tensor: String,
    },
    /// The data set has no training target.
    #[error("{} has no training target: {reason}", path.display())]
    NoTargets {
        /// The data set.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// Another data set than that of the run.
    #[error("{} is not the data set of this run: {what} differ", path.display())]
    OtherData {
        /// The data set.
        path: PathBuf,
        /// The parts that differ.
        what: &'static str,
    },
    /// The model file is not the one in the checkpoint.
    #[error("{} is not the best model of this run's checkpoint", path.display())]
    OtherModel {
        /// The model file.
        path: PathBuf,
    },
    /// A user that is not in the data set.
    #[error("unknown user `{user}` in {argument}")]
    UnknownUser {
        /// Original id.
        user: String,
        /// The argument that names it.
        argument: String,
    },
    /// A bad line in a file of users or histories.
    #[error("{file}:{line}: {reason}")]
    Line {
        /// The file, or `<stdin>`.
        file: String,
        /// Number of the line, from 1.
        line: usize,
        /// The reason.
        reason: String,
    },
    /// An item that is not in the model.
    #[error("unknown item `{item}` in {argument}")]
    UnknownItem {
        /// Original id.
        item: String,
        /// The argument or line that names it.
        argument: String,
    },
    /// An invalid argument that clap cannot detect.
    #[error("{argument}: {reason}")]
    Usage {
        /// The argument.
        argument: &'static str,
        /// The reason.
        reason: String,
    },
    /// Stopped by the user.
    #[error("interrupted")]
    Interrupted,
}

impl TrainError {
    /// Exit code: 1 the run failed, 2 usage, 3 bad input data, 4 no usable GPU, 5 non-finite, 130
    /// interrupted.
    pub fn exit_code(&self) -> u8 {
        use file::FileError;
        use run::RunError;
        match self {
            TrainError::Config(config::ConfigError::Read { source, .. })
            | TrainError::File(FileError::Read { source, .. })
                if source.kind() == ErrorKind::OutOfMemory =>
            {
                1
            }
            TrainError::Config(_) | TrainError::Usage { .. } => 2,
            TrainError::Model(ModelError::Config { .. }) => 2,
            TrainError::Run(
                RunError::Exists { .. } | RunError::OtherConfig { .. } | RunError::OtherFile { .. },
            ) => 2,
            TrainError::Run(
                RunError::NoRun { .. } | RunError::NoCheckpoint { .. } | RunError::NoModel { .. },
            ) => 3,
            TrainError::File(FileError::Write { .. }) => 1,
            TrainError::File(_) => 3,
            TrainError::NoTargets { .. } | TrainError::OtherData { .. } | TrainError::OtherModel { .. } => 3,
            TrainError::UnknownItem { .. } | TrainError::UnknownUser { .. } | TrainError::Line { .. } => 3,
            TrainError::NonFinite { .. }
            | TrainError::Model(ModelError::NonFinite { .. })
            | TrainError::Evaluate(
                EvaluateError::NonFinite { .. }
                | EvaluateError::NonFiniteScore { .. }
                | EvaluateError::Model(ModelError::NonFinite { .. }),
            ) => 5,
            TrainError::Model(ModelError::Device(error))
            | TrainError::Evaluate(EvaluateError::Model(ModelError::Device(error))) => {
                CudaError::of(error).map_or(1, CudaError::exit_code)
            }
            TrainError::Interrupted | TrainError::Evaluate(EvaluateError::Interrupted) => 130,
            TrainError::Run(_) | TrainError::Model(_) | TrainError::Batch(_) | TrainError::Evaluate(_) => 1,
        }
    }
}
