//! `log.jsonl`: one JSON object per line, truncated to the checkpoint when a run is resumed. Its
//! numbers also go to TensorBoard, if wanted.

use super::file::FileError;
use super::tensorboard::EventFile;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The log of a run.
pub struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    events: Option<EventFile>,
}

impl Log {
    /// Opens the log and truncates it to `bytes`: later steps will be repeated.
    pub fn open(path: &Path, bytes: u64, events: Option<EventFile>) -> Result<Self, FileError> {
        let open = || -> io::Result<(File, u64)> {
            let mut file = File::options().create(true).truncate(false).write(true).open(path)?;
            let bytes = bytes.min(file.metadata()?.len());
            file.set_len(bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(|source| FileError::Write { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file, bytes, events })
    }

    /// Appends a line.
    pub fn line(&mut self, value: &Value) -> Result<(), FileError> {
        if let Some(events) = &mut self.events {
            events.line(value)?;
        }
        let mut line = serde_json::to_vec(value).expect("log lines have string keys");
        line.push(b'\n');
        self.bytes += line.len() as u64;
        self.file.write_all(&line).map_err(|source| FileError::Write { path: self.path.clone(), source })
    }

    /// Forces the log to disk and returns its length in bytes.
    pub fn sync(&mut self) -> Result<u64, FileError> {
        self.file.sync_data().map_err(|source| FileError::Write { path: self.path.clone(), source })?;
        Ok(self.bytes)
    }
}
