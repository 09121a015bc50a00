//! A data set: validated once when it is opened, then read as plain slices.

use super::format::{self, Contents, Section};
use super::map::Bytes;
use super::split::Part;
use super::{DataError, Protocol, validate};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A validated data set, mapped from its file. Threads share it by reference; nothing is copied.
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    bytes: Bytes,
    contents: Contents,
    protocol: Protocol,
}

/// The events of one user in time order; events at the same time keep the order of the log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UserEvents<'a> {
    /// Items.
    pub items: &'a [u32],
    /// 0 skipped, 1 liked.
    pub feedback: &'a [u8],
    /// Milliseconds since 1970.
    pub times: &'a [i64],
    /// `[..train_end]` are training events.
    pub train_end: usize,
    /// `[train_end..valid_end]` are validation events, `[valid_end..]` test events.
    pub valid_end: usize,
}

/// The events of all users, end to end; those of user `u` are at `offsets[u]..offsets[u + 1]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Histories<'a> {
    /// `[users + 1]`, from 0 to the number of events.
    pub offsets: &'a [u64],
    /// `[events]` items.
    pub items: &'a [u32],
    /// `[events]` 0 skipped, 1 liked.
    pub feedback: &'a [u8],
    /// `[events]` milliseconds since 1970.
    pub times: &'a [i64],
    /// `[users]` of `[train_end, valid_end]`, counted from the first event of the user.
    pub split: &'a [[u32; 2]],
}

/// The evaluation groups of a part, G of them: one for every event of the part, liked or skipped,
/// by user and event. The history of a group is all events of the user before its event; it is
/// empty where `event` is 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaluationGroups<'a> {
    /// `[G]` users.
    pub user: &'a [u32],
    /// `[G]` the target's index within the user's events. The feedback of this event decides
    /// whether the group counts in the main metrics (liked) or in the separate ones (skipped).
    pub event: &'a [u32],
    /// `[G, negatives_per_group]` items: never the target, none twice within a group.
    pub negatives: &'a [u32],
    /// Negatives per group.
    pub negatives_per_group: usize,
    /// `[G, 1 + negatives_per_group]` the generating process's score of the target, then of each
    /// negative. Synthetic sets only.
    pub ceiling: Option<&'a [f32]>,
}

/// One evaluation group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group<'a> {
    /// User.
    pub user: u32,
    /// The target's index within the user's events.
    pub event: u32,
    /// Sampled items.
    pub negatives: &'a [u32],
    /// Scores of the generating process: target, then negatives. Synthetic sets only.
    pub ceiling: Option<&'a [f32]>,
}

impl Dataset {
    /// Maps a file and validates every byte of it (see [`mod@format`]).
    pub fn open(path: impl AsRef<Path>) -> Result<Dataset, DataError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(DataError::read(path))?;
        if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
            let reason = "it is a folder, not a data set file";
            return Err(DataError::read(path)(io::Error::new(io::ErrorKind::IsADirectory, reason)));
        }
        let bytes = Bytes::map(&file).map_err(DataError::read(path))?;
        Dataset::validated(path.to_owned(), bytes)
    }

    /// Validates a copy of the bytes of a file. `path` is only for messages.
    pub fn from_bytes(bytes: &[u8], path: impl AsRef<Path>) -> Result<Dataset, DataError> {
        Dataset::validated(path.as_ref().to_owned(), Bytes::copy(bytes))
    }

    fn validated(path: PathBuf, bytes: Bytes) -> Result<Dataset, DataError> {
        let contents = format::read_contents(&bytes, &path)?;
        let bad_protocol = |reason| DataError::Protocol { path: path.clone(), reason };
        let protocol: Protocol = serde_json::from_slice(contents.slice(&bytes, Section::Protocol))
            .map_err(|error| bad_protocol(error.to_string()))?;
        if protocol.candidates.negatives != contents.negatives {
            return Err(bad_protocol("its number of negatives is not the header's".to_owned()));
        }
        validate::validate(&contents, &bytes, &path)?;
        Ok(Dataset { path, bytes, contents, protocol })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of users.
    pub fn users(&self) -> usize {
        self.contents.users
    }

    /// Number of items.
    pub fn items(&self) -> usize {
        self.contents.items
    }

    /// Number of events of all users.
    pub fn events(&self) -> usize {
        self.contents.events
    }

    /// How the data set was made.
    pub fn protocol(&self) -> &Protocol {
        &self.protocol
    }

    /// The events of one user, in time order.
    ///
    /// # Panics
    /// If there is no such user.
    pub fn user(&self, user: u32) -> UserEvents<'_> {
        let user = user as usize;
        let offsets: &[u64] = self.slice(Section::UserOffsets);
        let own = offsets[user] as usize..offsets[user + 1] as usize;
        let [train_end, valid_end] = self.slice::<[u32; 2]>(Section::Split)[user];
        UserEvents {
            items: &self.slice(Section::Items)[own.clone()],
            feedback: &self.slice(Section::Feedback)[own.clone()],
            times: &self.slice(Section::Times)[own],
            train_end: train_end as usize,
            valid_end: valid_end as usize,
        }
    }

    /// The events of all users.
    pub fn histories(&self) -> Histories<'_> {
        Histories {
            offsets: self.slice(Section::UserOffsets),
            items: self.slice(Section::Items),
            feedback: self.slice(Section::Feedback),
            times: self.slice(Section::Times),
            split: self.slice(Section::Split),
        }
    }

    /// The evaluation groups of a part.
    pub fn groups(&self, part: Part) -> EvaluationGroups<'_> {
        let [users, events, negatives, ceiling] = part.sections();
        EvaluationGroups {
            user: self.slice(users),
            event: self.slice(events),
            negatives: self.slice(negatives),
            negatives_per_group: self.contents.negatives,
            ceiling: self.contents.ceiling.then(|| self.slice(ceiling)),
        }
    }

    /// The number of training events of each item.
    pub fn train_popularity(&self) -> Vec<u32> {
        let mut counts = vec![0; self.items()];
        for user in 0..self.users() as u32 {
            let events = self.user(user);
            for &item in &events.items[..events.train_end] {
                let count: &mut u32 = &mut counts[item as usize];
                *count = count.saturating_add(1);
            }
        }
        counts
    }

    /// The id of an item in the log.
    ///
    /// # Panics
    /// If there is no such item.
    pub fn item_name(&self, item: u32) -> &str {
        self.name(Section::ItemNameOffsets, Section::ItemNames, item)
    }

    /// The id of a user in the log.
    ///
    /// # Panics
    /// If there is no such user.
    pub fn user_name(&self, user: u32) -> &str {
        self.name(Section::UserNameOffsets, Section::UserNames, user)
    }

    /// The item with this id in the log; a binary search.
    pub fn find_item(&self, name: &str) -> Option<u32> {
        let order: &[u32] = self.slice(Section::ItemOrder);
        let place = order.binary_search_by(|&item| self.item_name(item).cmp(name)).ok()?;
        Some(order[place])
    }

    /// The user with this id in the log; a binary search.
    pub fn find_user(&self, name: &str) -> Option<u32> {
        let order: &[u32] = self.slice(Section::UserOrder);
        let place = order.binary_search_by(|&user| self.user_name(user).cmp(name)).ok()?;
        Some(order[place])
    }

    fn name(&self, offsets: Section, names: Section, index: u32) -> &str {
        let offsets: &[u64] = self.slice(offsets);
        let own = offsets[index as usize] as usize..offsets[index as usize + 1] as usize;
        let name = &self.slice::<u8>(names)[own];
        // Checked again: another process may have changed the file after it was validated.
        std::str::from_utf8(name).expect("names were valid UTF-8 when the file was opened")
    }

    fn slice<T: bytemuck::Pod>(&self, section: Section) -> &[T] {
        self.contents.slice(&self.bytes, section)
    }
}

impl<'a> EvaluationGroups<'a> {
    /// Number of groups.
    pub fn len(&self) -> usize {
        self.user.len()
    }

    /// Whether there is no group.
    pub fn is_empty(&self) -> bool {
        self.user.is_empty()
    }

    /// One group.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn get(&self, index: usize) -> Group<'a> {
        let n = self.negatives_per_group;
        Group {
            user: self.user[index],
            event: self.event[index],
            negatives: &self.negatives[index * n..(index + 1) * n],
            ceiling: self.ceiling.map(|scores| &scores[index * (n + 1)..(index + 1) * (n + 1)]),
        }
    }

    /// All groups in order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = Group<'a>> {
        (0..self.len()).map(move |index| self.get(index))
    }
}
