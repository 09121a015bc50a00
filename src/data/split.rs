//! Splits every history into training, validation and test events, in this order in time.

use super::DataError;
use super::external_sort::{ExternalSorter, RecordFile};
use super::format::Section;
use super::log::Event;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::path::Path;

/// One of the two parts that models are evaluated on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Validation.
    Valid,
    /// Test.
    Test,
}

impl Part {
    /// The part's range within a history of `length` events with this split.
    pub(super) fn events(self, [train_end, valid_end]: [u32; 2], length: usize) -> Range<usize> {
        match self {
            Part::Valid => train_end as usize..valid_end as usize,
            Part::Test => valid_end as usize..length,
        }
    }

    /// The sections with the part's groups: users, events, negatives, ceiling.
    pub(super) fn sections(self) -> [Section; 4] {
        use Section::*;
        match self {
            Part::Valid => [ValidUsers, ValidEvents, ValidNegatives, ValidCeiling],
            Part::Test => [TestUsers, TestEvents, TestNegatives, TestCeiling],
        }
    }
}

/// How histories are split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Split {
    /// The last event of every user is for testing, the one before it for validation. All events of
    /// users with fewer than three events are for training.
    LeaveLast,
    /// Two points in time for all users: the first `train` of all events are for training, the next
    /// `valid` for validation, the rest for testing. Events at the exact time of a cut go to the
    /// later part, so no part contains events of the next.
    Temporal {
        /// Share of the events, 0 to 1.
        train: f64,
        /// Share of the events, 0 to 1.
        valid: f64,
    },
    /// Whole users, shuffled: `train` of them for training, `valid` for validation, the rest for
    /// testing (as in the published code for micro-video). The model is evaluated on users it has
    /// not seen.
    ByUser {
        /// Share of the users, 0 to 1.
        train: f64,
        /// Share of the users, 0 to 1.
        valid: f64,
    },
}

impl Split {
    /// [`Split::Temporal`] with the usual shares: 0.8, 0.1, and the rest for testing.
    pub const TEMPORAL: Split = Split::Temporal { train: 0.8, valid: 0.1 };
    /// [`Split::ByUser`] with the usual shares.
    pub const BY_USER: Split = Split::ByUser { train: 0.8, valid: 0.1 };

    /// Checks the shares.
    pub(super) fn check(&self) -> Result<(), DataError> {
        match *self {
            Split::LeaveLast => Ok(()),
            Split::Temporal { train, valid } | Split::ByUser { train, valid } => {
                places(train, valid, 0).map(|_| ())
            }
        }
    }

    /// The split with the given shares in place of its own. None: shares were given, but
    /// [`Split::LeaveLast`] has none.
    pub fn with_shares(mut self, new_train: Option<f64>, new_valid: Option<f64>) -> Option<Split> {
        match &mut self {
            Split::LeaveLast if new_train.or(new_valid).is_some() => return None,
            Split::LeaveLast => {}
            Split::Temporal { train, valid } | Split::ByUser { train, valid } => {
                *train = new_train.unwrap_or(*train);
                *valid = new_valid.unwrap_or(*valid);
            }
        }
        Some(self)
    }
}

/// A split with its times or users fixed for one log.
#[derive(Debug)]
pub(super) enum Cuts {
    LeaveLast,
    Temporal { valid_from: i64, test_from: i64 },
    ByUser { places: Vec<u32>, valid_from: u32, test_from: u32 },
}

impl Cuts {
    /// Determines the cut times, or shuffles the users.
    pub(super) fn new(
        split: Split,
        events: &mut RecordFile<Event>,
        users: usize,
        seed: u64,
        folder: &Path,
        sort_memory: usize,
    ) -> Result<Cuts, DataError> {
        match split {
            Split::LeaveLast => Ok(Cuts::LeaveLast),
            Split::Temporal { train, valid } => {
                let [first, second] = places(train, valid, events.len())?;
                let mut times = ExternalSorter::new(folder, sort_memory);
                let mut reader = events.read()?;
                while let Some(event) = reader.next()? {
                    times.push(event.time)?;
                }
                // A cut after the last event leaves the later parts empty.
                let (mut valid_from, mut test_from) = (i64::MAX, i64::MAX);
                let mut place = 0;
                times.drain(|time| {
                    if place == first {
                        valid_from = time;
                    }
                    if place == second {
                        test_from = time;
                    }
                    place += 1;
                    Ok(())
                })?;
                Ok(Cuts::Temporal { valid_from, test_from })
            }
            Split::ByUser { train, valid } => {
                let [first, second] = places(train, valid, users as u64)?;
                let mut places: Vec<u32> = (0..users as u32).collect();
                places.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
                Ok(Cuts::ByUser { places, valid_from: first as u32, test_from: second as u32 })
            }
        }
    }

    /// `[train_end, valid_end]` of one history.
    pub(super) fn cut(&self, user: u32, history: &[Event]) -> [u32; 2] {
        let length = history.len() as u32;
        match self {
            Cuts::LeaveLast if length < 3 => [length, length],
            Cuts::LeaveLast => [length - 2, length - 1],
            Cuts::Temporal { valid_from, test_from } => {
                let before = |cut: i64| history.partition_point(|event| event.time < cut) as u32;
                [before(*valid_from), before(*test_from)]
            }
            Cuts::ByUser { places, valid_from, test_from } => match places[user as usize] {
                place if place < *valid_from => [length, length],
                place if place < *test_from => [0, length],
                _ => [0, 0],
            },
        }
    }
}

/// The indices where validation and test begin among `count` ordered elements.
fn places(train: f64, valid: f64, count: u64) -> Result<[u64; 2], DataError> {
    let refuse = |option, value: f64, reason| {
        Err(DataError::InvalidOption { option, value: value.to_string(), reason })
    };
    if !(train > 0.0 && train <= 1.0) {
        return refuse("train-share", train, "is not above 0 and at most 1");
    }
    if !(valid >= 0.0 && train + valid <= 1.0 + 1e-9) {
        return refuse("valid-share", valid, "is negative, or more than the training share leaves");
    }
    // Shares such as 0.8 are not exact: without the 1e-6, 0.8 + 0.1 of 10 would round down to 8.
    let place = |share: f64| ((share * count as f64 + 1e-6).floor() as u64).min(count);
    Ok([place(train), place(train + valid)])
}
