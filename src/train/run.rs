//! The run directory: its files, its lock, and the leftovers of killed processes.

use super::TrainError;
use super::checkpoint::ModelFile;
use super::config::Config;
use super::file::{self, FileError};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// An unusable run directory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// The directory already holds a run.
    #[error(
        "{} holds {} run; give another --out, or {}",
        dir.display(),
        if *finished { "a finished" } else { "an unfinished" },
        if *finished { "remove it first".into() } else { format!("continue it with --resume {}", dir.display()) }
    )]
    Exists {
        /// The directory.
        dir: PathBuf,
        /// Whether the run is finished (has metrics).
        finished: bool,
    },
    /// The directory holds a `config.toml` that no run wrote, which a new run would overwrite.
    #[error("{} holds a config.toml that no run wrote; move it, or give another --out", dir.display())]
    OtherConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory holds a file that no run wrote, which a new run would overwrite.
    #[error("{} is not of a run, and a run would overwrite it; move it, or give another --out", path.display())]
    OtherFile {
        /// The file.
        path: PathBuf,
    },
    /// The directory does not exist, or holds no run.
    #[error("{} holds no run: config.toml is missing; start one with --out {}", dir.display(), dir.display())]
    NoRun {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory holds a model but no checkpoint.
    #[error("{} holds a model but no checkpoint, so its run cannot be continued", dir.display())]
    NoCheckpoint {
        /// The directory.
        dir: PathBuf,
    },
    /// The run has not finished its first epoch.
    #[error("{} holds no model yet; continue its run with --resume {}", dir.display(), dir.display())]
    NoModel {
        /// The directory.
        dir: PathBuf,
    },
    /// Another process uses the directory.
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

/// A run directory, locked for this process until dropped.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    _lock: Lock,
}

const CONFIG: &str = "config.toml";
const CHECKPOINT: &str = "checkpoint.safetensors";
const MODEL: &str = "model.safetensors";
const LOG: &str = "log.jsonl";
const METRICS: &str = "metrics.json";
const CURVES: &str = "curves.svg";
const SYNTHETIC: &str = "synthetic.dfar";

impl Run {
    /// Creates a run in `dir`, which must not hold one. The files of a run that was killed before
    /// its first checkpoint are replaced.
    pub fn create(dir: &Path) -> Result<Self, RunError> {
        std::fs::create_dir_all(dir).map_err(io_error(dir))?;
        let run = Self::lock(dir)?;
        if run.checkpoint().exists() || run.model().exists() || run.metrics().exists() {
            return Err(RunError::Exists { dir: dir.to_owned(), finished: run.metrics().exists() });
        }
        let started = run.config().exists();
        if started && !is_written_by_a_run(&run.config()) {
            return Err(RunError::OtherConfig { dir: dir.to_owned() });
        }
        if !started
            && let Some(path) =
                [run.log(), run.synthetic_data(), run.curves()].into_iter().find(|path| path.exists())
        {
            return Err(RunError::OtherFile { path });
        }
        run.remove_leftovers()?;
        if started {
            // Removes the configuration last: it marks the other files as those of a run.
            for file in [run.log(), run.synthetic_data(), run.curves(), run.config()] {
                remove_file(&file).map_err(io_error(&file))?;
            }
        }
        Ok(run)
    }

    /// A new run in the first of `parent/name`, `parent/name-2`, `parent/name-3`, ... that does not
    /// exist.
    pub fn create_numbered(parent: &Path, name: &str) -> Result<Self, RunError> {
        std::fs::create_dir_all(parent).map_err(io_error(parent))?;
        for number in 1.. {
            let dir = parent.join(if number == 1 { name.to_owned() } else { format!("{name}-{number}") });
            // `create_dir` is atomic: of two processes, only one succeeds.
            match std::fs::create_dir(&dir) {
                Ok(()) => return Self::lock(&dir),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(io_error(&dir)(e)),
            }
        }
        unreachable!("the numbers do not end")
    }

    /// Opens an existing run. If it has no [`Run::checkpoint`], it was stopped before the first one
    /// and starts from the beginning, with the configuration in [`Run::config`].
    pub fn resume(dir: &Path) -> Result<Self, RunError> {
        if !dir.join(CHECKPOINT).exists() {
            if dir.join(MODEL).exists() {
                return Err(RunError::NoCheckpoint { dir: dir.to_owned() });
            }
            if !dir.join(CONFIG).exists() {
                return Err(RunError::NoRun { dir: dir.to_owned() });
            }
        }
        let run = Self::lock(dir)?;
        run.remove_leftovers()?;
        Ok(run)
    }

    fn lock(dir: &Path) -> Result<Self, RunError> {
        Ok(Self { dir: dir.to_owned(), _lock: Lock::take(dir)? })
    }

    /// Removes the temporary files of a killed process. The lock ensures that no live process
    /// writes them.
    fn remove_leftovers(&self) -> Result<(), RunError> {
        for name in [CONFIG, CHECKPOINT, MODEL, METRICS, CURVES] {
            let path = file::temporary(&self.dir.join(name));
            remove_file(&path).map_err(io_error(&path))?;
        }
        let workshop = self.synthetic_workshop();
        match std::fs::remove_dir_all(&workshop) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error(&workshop)(e)),
            _ => {}
        }
        Ok(())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// The configuration: repeats the run.
    pub fn config(&self) -> PathBuf {
        config_path(&self.dir)
    }
    /// The checkpoint: continues the run.
    pub fn checkpoint(&self) -> PathBuf {
        self.dir.join(CHECKPOINT)
    }
    /// The best model.
    pub fn model(&self) -> PathBuf {
        model_path(&self.dir)
    }
    /// Final metrics.
    pub fn metrics(&self) -> PathBuf {
        self.dir.join(METRICS)
    }
    /// Removes the final metrics, if there are any.
    ///
    /// # Errors
    /// [`RunError::Io`].
    pub fn remove_metrics(&self) -> Result<(), RunError> {
        remove_file(&self.metrics()).map_err(io_error(&self.metrics()))
    }
    /// The log: one JSON object per line.
    pub fn log(&self) -> PathBuf {
        self.dir.join(LOG)
    }
    /// Plot of loss and validation AUC by epoch.
    pub fn curves(&self) -> PathBuf {
        self.dir.join(CURVES)
    }
    /// The synthetic data set, if the run uses no other.
    pub fn synthetic_data(&self) -> PathBuf {
        synthetic_path(&self.dir)
    }

    /// Writes `config.toml`.
    pub fn write_config(&self, text: &str) -> Result<(), FileError> {
        file::replace_bytes(&self.config(), text.as_bytes())
    }

    /// Makes the synthetic data set by calling `write`, which may leave temporary files beside its
    /// path when it is killed.
    pub fn make_synthetic_data<E: From<TrainError>>(
        &self,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let path = self.synthetic_data();
        let workshop = self.synthetic_workshop();
        let failed = |source| TrainError::from(FileError::Write { path: path.clone(), source });
        std::fs::create_dir(&workshop).map_err(failed)?;
        let made = workshop.join(SYNTHETIC);
        let written = write(&made).and_then(|()| Ok(file::rename(&made, &path).map_err(failed)?));
        std::fs::remove_dir_all(&workshop).map_err(failed)?;
        written
    }

    fn synthetic_workshop(&self) -> PathBuf {
        file::temporary(&self.synthetic_data())
    }
}

/// An exclusive lock on a directory, held on its file `.lock`. Dropping it removes the file, which
/// remains after a kill.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Locks an existing directory.
    ///
    /// # Errors
    /// [`RunError::Locked`] if another process holds the lock, [`RunError::Io`].
    pub fn take(dir: &Path) -> Result<Self, RunError> {
        let path = dir.join(".lock");
        loop {
            let file = File::create(&path).map_err(io_error(dir))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(RunError::Locked { dir: dir.to_owned() }),
                // Some network file systems have no locks; the run continues without one.
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
                Err(TryLockError::Error(e)) => return Err(io_error(dir)(e)),
            }
            // Otherwise the last holder removed the file between the open and the lock, and another
            // process may lock a new file.
            if is_file_at(&file, &path) {
                return Ok(Self { _file: file, path });
            }
        }
    }
}

/// Whether `file` is the file at `path`.
#[cfg(unix)]
fn is_file_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |m: std::fs::Metadata| (m.dev(), m.ino());
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => id(open) == id(named),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_file_at(_: &File, _: &Path) -> bool {
    true
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed before the file is closed, while still locked. On other systems the file remains.
        if cfg!(unix) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The configuration and the best model of the run in `dir`. The feedback is the model's, also if
/// `config.toml` was edited since.
///
/// # Errors
/// [`RunError::NoRun`], [`RunError::NoModel`], and files that cannot be read.
pub fn open(dir: &Path) -> Result<(Config, ModelFile), TrainError> {
    let (config, model) = (config_path(dir), model_path(dir));
    if !config.exists() {
        return Err(RunError::NoRun { dir: dir.to_owned() }.into());
    }
    if !model.exists() {
        return Err(RunError::NoModel { dir: dir.to_owned() }.into());
    }
    let mut config = Config::layered(Some(&config), toml::Table::new())?;
    let file = ModelFile::load(&model)?;
    config.feedback = file.info.feedback;
    Ok((config, file))
}

/// The model file of the run in `dir`.
pub fn model_path(dir: &Path) -> PathBuf {
    dir.join(MODEL)
}

/// The configuration of the run in `dir`.
pub fn config_path(dir: &Path) -> PathBuf {
    dir.join(CONFIG)
}

/// The files that a run writes in its directory.
pub fn files(dir: &Path) -> [PathBuf; 7] {
    [CONFIG, CHECKPOINT, MODEL, LOG, METRICS, CURVES, SYNTHETIC].map(|name| dir.join(name))
}

/// The synthetic data set of the run in `dir`, if it uses no other.
pub fn synthetic_path(dir: &Path) -> PathBuf {
    dir.join(SYNTHETIC)
}

/// Whether this `config.toml` can be replaced without loss. A run writes every key, in a fixed
/// order, and no comments.
fn is_written_by_a_run(path: &Path) -> bool {
    let text = std::fs::read_to_string(path);
    let config = Config::layered(Some(path), toml::Table::new());
    matches!((text, config), (Ok(text), Ok(config)) if text == config.to_toml())
}

/// Removes a file that need not exist.
fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn io_error(dir: &Path) -> impl FnOnce(io::Error) -> RunError {
    let dir = dir.to_owned();
    move |source| RunError::Io { dir, source }
}
