//! The run directory: what lies where, and whose it is.

use super::file::{self, FileError};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A run directory that cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// There is a run in it already.
    #[error(
        "{} holds {} run; give another --out, or {}",
        dir.display(),
        if *finished { "a finished" } else { "an unfinished" },
        if *finished { "remove it first".into() } else { format!("continue it with --resume {}", dir.display()) }
    )]
    Exists {
        /// The directory.
        dir: PathBuf,
        /// Whether it has metrics.
        finished: bool,
    },
    /// No run is in it.
    #[error("{} holds no run: {what} is missing", dir.display())]
    Missing {
        /// The directory.
        dir: PathBuf,
        /// The file looked for.
        what: &'static str,
    },
    /// Another process works in it.
    #[error("{} is in use by another process", dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot use {}: {source}", dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A run directory, held by this process alone until dropped (or killed).
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    _lock: File,
}

const CONFIG: &str = "config.toml";
const CHECKPOINT: &str = "checkpoint.safetensors";
const MODEL: &str = "model.safetensors";
const METRICS: &str = "metrics.json";

impl Run {
    /// A new run in `dir`, which must hold none.
    pub fn create(dir: &Path) -> Result<Self, RunError> {
        std::fs::create_dir_all(dir).map_err(io_error(dir))?;
        let run = Self::lock(dir)?;
        if run.config().exists() || run.checkpoint().exists() || run.model().exists() {
            return Err(RunError::Exists { dir: dir.to_owned(), finished: run.metrics().exists() });
        }
        Ok(run)
    }

    /// A new run in the first of `parent/name`, `parent/name-2`, `parent/name-3`, ... that does not exist.
    pub fn create_numbered(parent: &Path, name: &str) -> Result<Self, RunError> {
        std::fs::create_dir_all(parent).map_err(io_error(parent))?;
        for number in 1.. {
            let dir = parent.join(if number == 1 { name.to_owned() } else { format!("{name}-{number}") });
            // Making the directory is what decides between two processes.
            match std::fs::create_dir(&dir) {
                Ok(()) => return Self::lock(&dir),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(io_error(&dir)(e)),
            }
        }
        unreachable!("the numbers do not end")
    }

    /// A run that was started before.
    pub fn resume(dir: &Path) -> Result<Self, RunError> {
        if !dir.join(CHECKPOINT).exists() {
            return Err(RunError::Missing { dir: dir.to_owned(), what: CHECKPOINT });
        }
        Self::lock(dir)
    }

    fn lock(dir: &Path) -> Result<Self, RunError> {
        let lock = File::create(dir.join(".lock")).map_err(io_error(dir))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir: dir.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(RunError::Locked { dir: dir.to_owned() }),
            // Some network file systems have no locks: do without.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                Ok(Self { dir: dir.to_owned(), _lock: lock })
            }
            Err(TryLockError::Error(e)) => Err(io_error(dir)(e)),
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// Everything needed to repeat the run.
    pub fn config(&self) -> PathBuf {
        self.dir.join(CONFIG)
    }
    /// Everything needed to continue it.
    pub fn checkpoint(&self) -> PathBuf {
        self.dir.join(CHECKPOINT)
    }
    /// The best model.
    pub fn model(&self) -> PathBuf {
        model_path(&self.dir)
    }
    /// Final figures.
    pub fn metrics(&self) -> PathBuf {
        self.dir.join(METRICS)
    }
    /// One JSON object a line.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log.jsonl")
    }
    /// Loss and validation AUC by epoch.
    pub fn curves(&self) -> PathBuf {
        self.dir.join("curves.svg")
    }
    /// The synthetic data set, where none was given.
    pub fn synthetic_data(&self) -> PathBuf {
        synthetic_path(&self.dir)
    }
    /// Writes `config.toml`.
    pub fn write_config(&self, text: &str) -> Result<(), FileError> {
        file::replace_bytes(&self.config(), text.as_bytes())
    }
}

/// The model file of the run in `dir`.
pub fn model_path(dir: &Path) -> PathBuf {
    dir.join(MODEL)
}

/// The configuration of the run in `dir`.
pub fn config_path(dir: &Path) -> PathBuf {
    dir.join(CONFIG)
}

/// The synthetic data set of the run in `dir`, where none was given.
pub fn synthetic_path(dir: &Path) -> PathBuf {
    dir.join("synthetic.dfar")
}

fn io_error(dir: &Path) -> impl FnOnce(io::Error) -> RunError {
    let dir = dir.to_owned();
    move |source| RunError::Io { dir, source }
}
