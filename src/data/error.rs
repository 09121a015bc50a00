//! Errors of log files and data set files: one variant per cause.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A log file or data set file is unusable, or an option cannot be met with this data.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused to read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The operating system refused to write: a fault of the run, not of the data.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or the folder of temporary files.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },

    /// The operating system refused memory.
    #[error(
        "cannot allocate {bytes} bytes of memory for the ids of the {what}; free memory or raise the limit"
    )]
    Memory {
        /// Users or items.
        what: &'static str,
        /// Bytes needed.
        bytes: usize,
    },

    /// The magic bytes are missing: some other kind of file.
    #[error("{} is not a dfar data set (its first bytes are not the magic of one)", path.display())]
    NotADataset {
        /// The file.
        path: PathBuf,
    },
    /// The file has another version of the format, later or unknown.
    #[error("{} has data set version {found}, this program reads version {supported}", path.display())]
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version this program reads.
        supported: u32,
    },
    /// The file is shorter than its header says (or than a header is).
    #[error("{} is cut short: {actual} bytes of {expected}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// The file is longer than its header says.
    #[error("{} has {actual} bytes where its header says {expected}", path.display())]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// The header does not match its own checksum.
    #[error("{} has a damaged header (checksum mismatch)", path.display())]
    HeaderChecksum {
        /// The file.
        path: PathBuf,
    },
    /// The section table is damaged or does not describe a file of this version.
    #[error("{} has a bad section table at {section}: {reason}", path.display())]
    SectionTable {
        /// The file.
        path: PathBuf,
        /// The section, or `table`.
        section: &'static str,
        /// The reason.
        reason: &'static str,
    },
    /// A section's length contradicts the counts of the header.
    #[error("{}: section {section} has {actual} bytes, expected {expected}", path.display())]
    SectionLength {
        /// The file.
        path: PathBuf,
        /// The section.
        section: &'static str,
        /// Bytes by the counts of the header.
        expected: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// A section's bytes do not match their checksum.
    #[error(
        "{}: section {section} is damaged (checksum mismatch); copy the file again, or import the log again",
        path.display()
    )]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The section.
        section: &'static str,
    },
    /// An impossible value in a section with a correct checksum.
    #[error("{}: section {section}, entry {index}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The section.
        section: &'static str,
        /// Index of the entry within the section.
        index: u64,
        /// The reason.
        reason: &'static str,
    },
    /// The protocol section cannot be parsed.
    #[error("{}: section protocol cannot be read: {reason}", path.display())]
    Protocol {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },

    /// An unreadable row of a log.
    #[error("{0}")]
    BadRow(Box<BadRow>),
    /// More rows are unreadable than the caller allows.
    #[error("more than {allowed} bad rows, the last: {row}")]
    TooManyBadRows {
        /// Number of rows allowed.
        allowed: u64,
        /// The first row beyond them.
        row: Box<BadRow>,
    },
    /// The header lacks a column that the format or an option needs.
    #[error(
        "{}: no column {column} for the {role}: give --{role}-column{} (the columns are: {})",
        path.display(), if *role == "label" { " or --all-liked" } else { "" }, listed(available)
    )]
    MissingColumn {
        /// The log.
        path: PathBuf,
        /// What the column holds: user, item, time, label or date.
        role: &'static str,
        /// The missing column; `a or b` if either would do.
        column: String,
        /// The columns of the header.
        available: Vec<String>,
    },
    /// Two columns of the header have the name of a needed column.
    #[error(
        "{}: two columns are called {column}, number {} and number {}: give --{option}-column {} or {}",
        path.display(), numbers[0], numbers[1], numbers[0], numbers[1]
    )]
    AmbiguousColumn {
        /// The log.
        path: PathBuf,
        /// The name.
        column: String,
        /// The role of the column, as in the name of its option.
        option: &'static str,
        /// Their numbers, from 0.
        numbers: [usize; 2],
    },
    /// The times of a log have two units, so they have no order.
    #[error(
        "times are mixed: {} looks like {}, {} like {}. Give --time-unit if all have one, or convert them",
        sightings[0], kinds[0], sightings[1], kinds[1]
    )]
    MixedTimes {
        /// One time of each unit.
        sightings: Box<[TimeSighting; 2]>,
        /// The two units.
        kinds: [&'static str; 2],
    },
    /// Events of a log have a name that is neither among the liked nor among the skipped.
    #[error(
        "{count} rows have events that are neither --liked nor --skipped: {}. Name them, or give --ignore-others",
        names.iter().map(|(name, count)| format!("{name} ({count})")).collect::<Vec<_>>().join(", ")
    )]
    OtherEvents {
        /// Rows with such events.
        count: u64,
        /// The most frequent names, with their counts.
        names: Vec<(String, u64)>,
    },
    /// The log does not have the stated format, or an option must decide how to read it.
    #[error("{} cannot be read as {format}: {reason}", path.display())]
    UnknownLayout {
        /// The log.
        path: PathBuf,
        /// The stated format.
        format: &'static str,
        /// The reason, and the remedy.
        reason: String,
    },
    /// A step of the preparation left no events.
    #[error("{}", nothing_left(*step, *before))]
    NothingLeft {
        /// The step.
        step: PreparationStep,
        /// Events that entered it.
        before: u64,
    },
    /// Fewer distinct items can be drawn than a group needs negatives.
    #[error(
        "user {user} needs {needed} negatives for an evaluation group, but {available} other items may be \
         drawn from the training events; give a smaller --negatives (0: no evaluation groups)"
    )]
    NotEnoughItems {
        /// The user of the group, by original id.
        user: String,
        /// Negatives per group.
        needed: usize,
        /// Distinct items that may be drawn.
        available: usize,
    },
    /// More users, items or events than the format can number.
    #[error("more than {limit} {what}")]
    TooMany {
        /// Users, items or events.
        what: &'static str,
        /// The largest possible number.
        limit: u64,
    },
    /// An option with a value outside its range.
    #[error("option {option}: {value} {reason}")]
    InvalidOption {
        /// The option, as spelt on the command line without dashes.
        option: &'static str,
        /// The value given.
        value: String,
        /// The reason.
        reason: &'static str,
    },
}

fn nothing_left(step: PreparationStep, before: u64) -> String {
    let (step, remedy) = match step {
        _ if before == 0 => return "the log has no events: no rows, or none that is read".to_owned(),
        PreparationStep::KCore => ("the k-core filter", "give a smaller --k-core, or 0 for no filter"),
        PreparationStep::Split => {
            ("splitting off validation and test", "choose another --split, or a larger --train-share")
        }
    };
    format!("nothing is left after {step} ({before} events before it); {remedy}")
}

/// The first names of a list that may be long.
fn listed(names: &[String]) -> String {
    const MOST: usize = 20;
    const LONGEST: usize = 80;
    let shown = |name: &String| match name.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.clone(),
    };
    let mut list: Vec<String> = names.iter().take(MOST).map(shown).collect();
    if let Some(more) = names.len().checked_sub(MOST + 1) {
        list.push(format!("and {} more", more + 1));
    }
    list.join(", ")
}

/// A step of the preparation of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreparationStep {
    /// The k-core filter.
    KCore,
    /// The split into training, validation and test.
    Split,
}

/// A time and its place in a log.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}:{line}: `{value}`", path.display())]
pub struct TimeSighting {
    /// The log.
    pub path: PathBuf,
    /// Line, or row of a columnar file, counted from 1.
    pub line: u64,
    /// The time as the log spells it.
    pub value: String,
}

/// An unreadable row of a log.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}:{line}: {field} `{value}`: {reason}", path.display())]
pub struct BadRow {
    /// The log.
    pub path: PathBuf,
    /// Line, or row of a columnar file, counted from 1.
    pub line: u64,
    /// Column, by its name in the header or its role.
    pub field: String,
    /// The value (its first 80 characters).
    pub value: String,
    /// Why the value is unusable.
    pub reason: String,
}

impl DataError {
    /// Exit code of the binaries: 2 for an invalid option, 3 for bad input, 1 if only writing failed
    /// or memory is refused.
    pub fn exit_code(&self) -> u8 {
        match self {
            DataError::Read { source, .. } if source.kind() == ErrorKind::OutOfMemory => 1,
            DataError::Write { .. } | DataError::Memory { .. } => 1,
            DataError::InvalidOption { .. } => 2,
            _ => 3,
        }
    }

    /// Converts an error of reading `path`, for `map_err`.
    pub(crate) fn read(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> DataError {
        // Copies the path only for an error: the import asks for every row.
        move |source| DataError::Read { path: path.as_ref().to_owned(), source }
    }

    /// Converts an error of writing `path`, for `map_err`.
    pub(crate) fn write(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> DataError {
        move |source| DataError::Write { path: path.as_ref().to_owned(), source }
    }
}
