//! The error of the crate: a variant for each module, which defines its own error type.

use crate::attention::AttentionError;
use crate::data::DataError;
use crate::device::cuda::CudaError;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Result with [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of any module of this crate.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// An invalid argument of the attention operation.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// A log or data set file that cannot be read, used or written.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Histories that cannot be packed.
    #[error(transparent)]
    Batch(#[from] crate::batch::BatchError),
    /// A network that cannot be built, or failed.
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    /// A training run: its configuration, its files, or a failure during training.
    #[error(transparent)]
    Train(#[from] crate::train::TrainError),
    /// A GPU that is missing, unusable or failing.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The operating system refused threads.
    #[error("cannot start threads: {reason}; raise the limit (ulimit -u, ulimit -v), or use fewer threads")]
    Threads {
        /// Why.
        reason: String,
    },
    /// A file of input cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// Any other I/O error.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The verb of the message, e.g. `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
}

impl From<rayon::ThreadPoolBuildError> for Error {
    fn from(error: rayon::ThreadPoolBuildError) -> Self {
        Error::Threads { reason: error.to_string() }
    }
}

impl Error {
    /// Converts an error of reading input, for `map_err`.
    pub fn read(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Read { path, source }
    }

    /// Converts any other I/O error, for `map_err`: `file.flush().map_err(Error::io("write", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { action, path, source }
    }

    /// Exit code of the binaries: 1 the run failed, 2 wrong usage or configuration (as clap), 3 bad
    /// input data, 4 no usable GPU, 5 non-finite loss, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Data(error) => error.exit_code(),
            Error::Train(error) => error.exit_code(),
            Error::Cuda(error) => error.exit_code(),
            Error::Model(crate::model::ModelError::Device(error)) => {
                CudaError::of(error).map_or(1, CudaError::exit_code)
            }
            Error::Model(crate::model::ModelError::NonFinite { .. }) => 5,
            Error::Read { source, .. } if source.kind() != ErrorKind::OutOfMemory => 3,
            Error::Attention(_)
            | Error::Batch(_)
            | Error::Model(_)
            | Error::Threads { .. }
            | Error::Read { .. }
            | Error::Io { .. } => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DataError;
    use crate::train::TrainError;
    use crate::train::config::ConfigError;
    use crate::train::file::FileError;
    use std::io::ErrorKind::{NotFound, OutOfMemory};

    /// The address space can end in the middle of a read or of mapping a file.
    #[test]
    fn memory_that_a_read_is_refused_is_no_bad_input() {
        let codes = |kind: std::io::ErrorKind| {
            let path = || std::path::PathBuf::from("x");
            [
                Error::Read { path: path(), source: kind.into() },
                Error::from(DataError::Read { path: path(), source: kind.into() }),
                Error::from(TrainError::from(FileError::Read { path: path(), source: kind.into() })),
                Error::from(TrainError::from(ConfigError::Read { path: path(), source: kind.into() })),
            ]
            .map(|error| error.exit_code())
        };
        assert_eq!(codes(NotFound), [3, 3, 3, 2]);
        assert_eq!(codes(OutOfMemory), [1, 1, 1, 1]);
    }
}
