//! Imports small logs in tests.

use dfar::data::import::{ImportOptions, LogFormat, import};
use dfar::data::{BadRow, DataError, Dataset, Split};
use std::path::PathBuf;
use tempfile::TempDir;

/// A folder with logs and the options to import them.
pub struct Bench {
    pub folder: TempDir,
    pub options: ImportOptions,
}

impl Bench {
    /// No filter and one negative, so that small logs are accepted.
    pub fn new(format: LogFormat, logs: &[&str]) -> Bench {
        let bytes: Vec<&[u8]> = logs.iter().map(|log| log.as_bytes()).collect();
        Bench::of_bytes(format, &bytes)
    }

    pub fn of_bytes(format: LogFormat, logs: &[&[u8]]) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let inputs: Vec<PathBuf> = logs
            .iter()
            .enumerate()
            .map(|(place, text)| {
                let path = folder.path().join(format!("log{place}"));
                std::fs::write(&path, text).unwrap();
                path
            })
            .collect();
        let mut options = ImportOptions::new(format, inputs, folder.path().join("out.dfar"));
        options.k_core = None;
        options.split = Split::LeaveLast;
        options.candidates.negatives = 1;
        Bench { folder, options }
    }

    pub fn run(&self) -> Result<Dataset, DataError> {
        import(&self.options, &())?;
        Dataset::open(&self.options.output)
    }

    /// All events as (user, item, time, feedback), by user and time.
    #[track_caller]
    pub fn events(&self) -> Vec<(String, String, i64, u8)> {
        events(&self.run().unwrap())
    }

    #[track_caller]
    pub fn bad_row(&self) -> BadRow {
        match self.run().unwrap_err() {
            DataError::BadRow(row) => *row,
            other => panic!("expected a bad row, found: {other}"),
        }
    }
}

fn events(data: &Dataset) -> Vec<(String, String, i64, u8)> {
    let mut all = Vec::new();
    for user in 0..data.users() as u32 {
        let own = data.user(user);
        for place in 0..own.items.len() {
            let item = data.item_name(own.items[place]).to_owned();
            all.push((data.user_name(user).to_owned(), item, own.times[place], own.feedback[place]));
        }
    }
    all
}
