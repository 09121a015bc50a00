//! How a data set was made, in words a result file can carry.

use super::split::Split;
use super::synthetic::SyntheticOptions;
use serde::{Deserialize, Serialize};

/// What an import or a generation made.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// Users in the file.
    pub users: usize,
    /// Items in the file.
    pub items: usize,
    /// Events in the file.
    pub events: u64,
    /// The protocol the file carries.
    pub protocol: Protocol,
}

/// How a data set was made. Stored in the file; belongs in every result computed from it, since
/// figures of two protocols cannot be compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// Where the events come from.
    pub source: Source,
    /// Which events count as liked, e.g. `rating > 3`.
    pub positive: String,
    /// What happened to repeated (user, item) pairs.
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
    /// Bad rows that were allowed to be skipped.
    pub bad_rows: u64,
    /// Rows dropped because the user had met the item before.
    pub repeated_rows: u64,
    /// Rows with events that are neither liked nor skipped by name.
    #[serde(default)]
    pub other_events: u64,
    /// What the reader decided about each log: header, columns, liked, unit of the times.
    #[serde(default)]
    pub decisions: Vec<String>,
}

/// What happens to repeated (user, item) pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Repeats {
    /// Only the first in time stays (the paper's choice).
    #[default]
    First,
    /// All stay.
    Keep,
}

/// The frequency filter: items first, then users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KCore {
    /// Fewest records an item and a user must have.
    pub k: u32,
    /// Which records are counted. (Those not counted go with their item or user all the same.)
    pub on: CountedRecords,
    /// Whether the two passes were repeated until nothing changed. The paper makes one pass each,
    /// after which items may have fewer than `k` records again.
    pub until_stable: bool,
}

/// The records that count towards the k-core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CountedRecords {
    /// Liked and skipped ones.
    All,
    /// Liked ones.
    Positive,
}

/// The negatives of the evaluation groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidates {
    /// Negatives a group.
    pub negatives: usize,
    /// What they are drawn by.
    pub weighting: Weighting,
    /// Whether items that the user meets anywhere in the log were kept out.
    pub exclude_seen: bool,
    /// Seed of the draw (and of the by-user split).
    pub seed: u64,
    /// FNV-1a (64 bit, hexadecimal) over users, events and negatives of the validation and test
    /// groups: equal hashes mean identical groups.
    pub hash: String,
}

/// What negatives are drawn by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// An item's number of training events.
    TrainPopularity,
}
