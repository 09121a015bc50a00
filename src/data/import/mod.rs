//! Imports interaction logs in the formats of public data sets.
//!
//! The module of a format finds, from the first lines of a log, its columns and its rule for liked
//! events. `rows` then reads the rows of all formats alike. Rows are streamed to `number`: users and
//! items are numbered in order of appearance, and events are sorted by user and time on disk.

mod amazon;
#[cfg(feature = "parquet")]
mod arrow_claims;
mod columnar;
mod csv;
mod fields;
mod inter;
mod json;
mod kuairand;
mod kuairec;
mod label;
mod layout;
mod lines;
mod movielens;
mod number;
mod rows;
mod source;
mod time;

use super::assemble::{Workplace, assemble};
use super::candidates::CandidateOptions;
use super::external_sort::RecordWriter;
use super::k_core::{self, RepeatFilter};
use super::log::Event;
use super::{
    Candidates, CountedRecords, DataError, KCore, Made, Protocol, Repeats, Source, Split, Weighting, writer,
};
use crate::replacement::{Replacement, folder_of, replaced};
use label::Rule;
use layout::Schema;
use number::Numbered;
use rows::Rows;
use std::path::{Path, PathBuf};
use time::RawTime;

/// The known formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `u.data`, `ratings.dat`, `ratings.csv`.
    MovieLens,
    /// Reviews or ratings of 2014, 2018 and 2023, csv or JSON lines.
    Amazon,
    /// KuaiRand's `log_*.csv`.
    KuaiRand,
    /// KuaiRec's `big_matrix.csv`, `small_matrix.csv`.
    KuaiRec,
    /// RecBole's atomic files.
    Inter,
    /// Any log with the columns `user`, `item`, `time` and `label`, or others that options give.
    Csv,
}

/// The columns to read, by name or by 0-based number; the format finds the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ColumnOptions {
    /// Users.
    pub user: Option<String>,
    /// Items.
    pub item: Option<String>,
    /// Times; only the time of day if there is a `date`.
    pub time: Option<String>,
    /// Dates, if they have a column of their own.
    pub date: Option<String>,
    /// Ratings or flags.
    pub label: Option<String>,
    /// The byte between fields.
    pub delimiter: Option<u8>,
}

/// The unit of a log's times. Data sets hold milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeUnit {
    /// One unit for the whole log, decided by its largest time in magnitude: below 10^11 seconds
    /// (until the year 5138), below 10^14 milliseconds, below 10^17 microseconds, else nanoseconds.
    /// If none of its times is between 1990 and 2100 by that unit, but more than half of them are
    /// by a coarser one, it is the coarser one. A log whose times lie between 1990 and 2100 by two
    /// different units is refused.
    #[default]
    Auto,
    /// Seconds, with a fraction or without.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// Microseconds.
    Microseconds,
    /// Nanoseconds.
    Nanoseconds,
}

/// Which events are liked.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Liked {
    /// By the format: ratings above 3, for KuaiRec watch ratios above 2, flags equal to 1.
    #[default]
    ByFormat,
    /// Events with a label above this threshold.
    Above(f64),
    /// All events: a log of likes. No label column is read.
    Every,
    /// By names in the label column.
    Named {
        /// Names of liked events.
        liked: Vec<String>,
        /// Names of skipped events.
        skipped: Vec<String>,
        /// Whether events with other names are ignored; otherwise they are an error.
        ignore_others: bool,
    },
}

/// Options of an import. [`ImportOptions::new`] sets the defaults of a format.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportOptions {
    /// Format of all inputs.
    pub format: LogFormat,
    /// Logs, read one after the other; `-` is standard input. gzip, zstd, tar, Parquet, Arrow IPC
    /// and JSON are recognized by their first bytes.
    pub inputs: Vec<PathBuf>,
    /// Members of tar archives to read, in which `*` stands for any text and `?` for any byte; `None`: all except those
    /// that the format is known to ship beside its logs.
    pub member: Option<String>,
    /// The data set file to make.
    pub output: PathBuf,
    /// Columns.
    pub columns: ColumnOptions,
    /// Which events are liked.
    pub liked: Liked,
    /// Unit of the times.
    pub time_unit: TimeUnit,
    /// Treatment of repeated (user, item) pairs.
    pub repeats: Repeats,
    /// Frequency filter.
    pub k_core: Option<KCore>,
    /// Training, validation, test.
    pub split: Split,
    /// Evaluation groups.
    pub candidates: CandidateOptions,
    /// Number of bad rows to skip before the import fails.
    pub skip_bad_rows: u64,
    /// Folder of temporary files; `None`: the folder of the output.
    pub temporary: Option<PathBuf>,
    /// Bytes of events sorted in memory at a time; the sort takes half as many again.
    pub sort_memory: usize,
}

impl ImportOptions {
    /// Folder of temporary files.
    #[doc(hidden)]
    pub fn folder(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(folder_of(&self.output))
    }

    /// The paper's preparation for this kind of log. Micro-video logs: k-core 10 on liked records,
    /// split in time (80 %, 10 %, 10 %). Others: k-core 10 on all records, last two events left
    /// out.
    pub fn new(format: LogFormat, inputs: Vec<PathBuf>, output: PathBuf) -> ImportOptions {
        ImportOptions {
            format,
            inputs,
            member: None,
            output,
            columns: ColumnOptions::default(),
            liked: Liked::ByFormat,
            time_unit: TimeUnit::Auto,
            repeats: Repeats::First,
            k_core: Some(KCore { k: 10, on: format.counted_records(), until_stable: false }),
            split: if format.micro_video() { Split::TEMPORAL } else { Split::LeaveLast },
            candidates: CandidateOptions::default(),
            skip_bad_rows: 0,
            temporary: None,
            sort_memory: 32 << 20,
        }
    }
}

impl LogFormat {
    /// The format's name on the command line and in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            LogFormat::MovieLens => "movielens",
            LogFormat::Amazon => "amazon",
            LogFormat::KuaiRand => "kuairand",
            LogFormat::KuaiRec => "kuairec",
            LogFormat::Inter => "inter",
            LogFormat::Csv => "csv",
        }
    }

    /// The records that the paper counts for the k-core of this kind of log.
    pub fn counted_records(self) -> CountedRecords {
        if self.micro_video() { CountedRecords::Positive } else { CountedRecords::All }
    }

    fn schema(self) -> Schema {
        match self {
            LogFormat::MovieLens => movielens::SCHEMA,
            LogFormat::Amazon => amazon::SCHEMA,
            LogFormat::KuaiRand => kuairand::SCHEMA,
            LogFormat::KuaiRec => kuairec::SCHEMA,
            LogFormat::Inter => inter::SCHEMA,
            LogFormat::Csv => csv::SCHEMA,
        }
    }

    fn micro_video(self) -> bool {
        matches!(self, LogFormat::KuaiRand | LogFormat::KuaiRec)
    }
}

/// Receives the progress of an import.
pub trait Progress {
    /// Another `count` bytes of the inputs, as stored on disk, have been read.
    fn bytes(&self, count: u64) {
        let _ = count;
    }

    /// A bad row was skipped.
    fn skipped(&self, row: &super::BadRow) {
        let _ = row;
    }

    /// A decision about a log: its columns, its rule for liked events, or the unit of its times.
    fn note(&self, decision: &str) {
        let _ = decision;
    }

    /// All rows are read; sorting, filtering and writing take a small part of the time.
    fn finishing(&self) {}
}

/// Ignores all reports.
impl Progress for () {}

/// Imports logs into a data set file.
///
/// Memory: one entry per user and item, one history, and one and a half times
/// [`ImportOptions::sort_memory`]. Only the temporary files grow with the number of rows (24 bytes
/// per row, up to three times).
///
/// `progress` is called on the calling thread.
pub fn import(options: &ImportOptions, progress: &dyn Progress) -> Result<Made, DataError> {
    check(options)?;
    // An output that cannot be written is reported before the logs are read.
    drop(Replacement::new(&options.output).map_err(DataError::write(&options.output))?);
    let folder = options.folder();
    let mut rows = Rows::new(options, progress);
    let mut numbered = Numbered::new(folder, options.sort_memory);
    numbered.take_all(&mut |each| options.inputs.iter().try_for_each(|input| rows.read(input, each)))?;
    let Numbered { users, items, events: sorter, liked } = numbered;
    rows.check_others()?;
    let unit = rows.clock.decide()?;
    let read = users.len() > 0;
    if read {
        rows.note(format!("times: {}", rows.clock.words(unit)));
    }
    if read && liked == 0 {
        rows.note("no event is liked: nothing can be trained on or evaluated".to_owned());
    }
    progress.finishing();

    let mut repeats = RepeatFilter::new(options.repeats, items.len());
    let mut events = RecordWriter::new(folder);
    sorter.drain(|event| {
        let time = RawTime { whole: event.time, billionths: event.fraction }
            .milliseconds(unit)
            .expect("the clock takes only times that fit");
        let event = Event { time, fraction: 0, ..event };
        if repeats.keeps(&event) { events.push(&event) } else { Ok(()) }
    })?;
    let log = k_core::filter(events.finish()?, users, items, options.k_core, folder)?;

    let file_name =
        |path: &PathBuf| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let protocol = Protocol {
        source: Source {
            format: options.format.name().to_owned(),
            files: options.inputs.iter().map(file_name).collect(),
            rows: rows.read,
            bad_rows: rows.skipped,
            repeated_rows: repeats.dropped,
            other_events: rows.other_events,
            decisions: rows.decisions.clone(),
        },
        positive: rows.rule(),
        repeats: options.repeats,
        k_core: options.k_core,
        split: options.split,
        candidates: Candidates {
            negatives: options.candidates.negatives,
            weighting: Weighting::TrainPopularity,
            exclude_seen: options.candidates.exclude_seen,
            seed: options.candidates.seed,
            hash: String::new(),
        },
        synthetic: None,
    };
    let workplace = Workplace { output: &options.output, folder, sort_memory: options.sort_memory };
    assemble(log, protocol, None, workplace)
}

/// Checks the options before any input is read.
fn check(options: &ImportOptions) -> Result<(), DataError> {
    let invalid = |option, value: String, reason| Err(DataError::InvalidOption { option, value, reason });
    // As the rule that judges has them: the names are trimmed.
    match Rule::new(options, None) {
        Rule::Above(threshold) if threshold.is_nan() => {
            return invalid("positive-above", "NaN".to_owned(), "is not a threshold");
        }
        Rule::Named { liked, skipped } => {
            for (option, names) in [("liked", &liked), ("skipped", &skipped)] {
                if names.iter().any(String::is_empty) {
                    return invalid(option, format!("`{}`", names.join(",")), "has an empty name");
                }
            }
            if let Some(both) = liked.iter().find(|name| skipped.contains(name)) {
                return invalid("liked", both.clone(), "is named under --skipped too");
            }
            if liked.is_empty() {
                return invalid("liked", String::new(), "names no event");
            }
        }
        _ => {}
    }
    options.split.check()?;
    if let Some(folder) = options.temporary.as_deref().filter(|folder| !folder.is_dir()) {
        return invalid("temp-dir", folder.display().to_string(), "is not a folder");
    }
    if options.inputs.iter().filter(|input| *input == Path::new("-")).count() > 1 {
        return invalid("input", "-".to_owned(), "is standard input, which can be read only once");
    }
    refuse_own_input(options)?;
    writer::check_output(&options.output)
}

/// The output replaces an existing file, which must not be one of the logs.
fn refuse_own_input(options: &ImportOptions) -> Result<(), DataError> {
    match replaced(&options.output, options.inputs.iter().map(PathBuf::as_path)) {
        Some(input) => Err(DataError::InvalidOption {
            option: "output",
            value: input.display().to_string(),
            reason: "is one of the inputs",
        }),
        None => Ok(()),
    }
}
