//! The record of how a data set was made; result files carry it.

use super::split::Split;
use super::synthetic::SyntheticOptions;
use serde::{Deserialize, Serialize};

/// The result of an import or a generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// Users in the file.
    pub users: usize,
    /// Items in the file.
    pub items: usize,
    /// Events in the file.
    pub events: u64,
    /// Evaluation groups of the validation and of the test part.
    pub groups: [u64; 2],
    /// The protocol the file carries.
    pub protocol: Protocol,
}

/// How a data set was made. The file stores it, and every result computed from the file should
/// state it: metrics of two protocols cannot be compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// Where the events come from.
    pub source: Source,
    /// The rule for liked events, e.g. `rating > 3`.
    pub positive: String,
    /// Treatment of repeated (user, item) pairs.
    pub repeats: Repeats,
    /// The frequency filter, if any.
    pub k_core: Option<KCore>,
    /// How histories were cut into training, validation and test events.
    pub split: Split,
    /// The negatives of the evaluation groups.
    pub candidates: Candidates,
    /// The generating process, for synthetic sets.
    pub synthetic: Option<SyntheticOptions>,
}

/// Where the events come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Name of the log format, or `synthetic`.
    pub format: String,
    /// Names of the log files, without their folders, in the order read.
    pub files: Vec<String>,
    /// Rows read, bad ones included.
    pub rows: u64,
    /// Bad rows that were skipped, as `--skip-bad-rows` allowed.
    pub bad_rows: u64,
    /// Rows dropped because the user had an earlier event with the item.
    pub repeated_rows: u64,
    /// Rows with events that are neither liked nor skipped by name.
    #[serde(default)]
    pub other_events: u64,
    /// The reader's decisions about each log: header, columns, liked events, unit of the times.
    #[serde(default)]
    pub decisions: Vec<String>,
}

/// Treatment of repeated (user, item) pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Repeats {
    /// Keep the first in time (the paper's choice).
    #[default]
    First,
    /// Keep all.
    Keep,
}

/// The frequency filter: items first, then users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KCore {
    /// Fewest records of an item or a user.
    pub k: u32,
    /// The records that are counted. (The others are dropped with their item or user all the same.)
    pub on: CountedRecords,
    /// Whether the two passes were repeated until nothing changed. The paper makes one pass each,
    /// after which items may have fewer than `k` records again.
    pub until_stable: bool,
}

/// The records that count towards the k-core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CountedRecords {
    /// Liked and skipped records.
    All,
    /// Liked records.
    Positive,
}

/// The negatives of the evaluation groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidates {
    /// Negatives per group.
    pub negatives: usize,
    /// The weights of the draw.
    pub weighting: Weighting,
    /// Whether all items of the user's whole history were excluded.
    pub exclude_seen: bool,
    /// Seed of the draw (and of the by-user split).
    pub seed: u64,
    /// FNV-1a (64 bit, hexadecimal) over users, events and negatives of the validation and test
    /// groups: equal hashes mean identical groups.
    pub hash: String,
}

/// The weights that negatives are drawn by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// An item's number of training events.
    TrainPopularity,
}
