//! The events of a log by user and time, in a temporary file.

use super::DataError;
use super::external_sort::{Record, RecordFile};
use super::names::Names;
use bytemuck::{Pod, Zeroable};

/// One row of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Event {
    /// Milliseconds since 1970; in the log's unit until the unit is known.
    pub time: i64,
    /// Billionths of the log's unit until the unit is known, then 0.
    pub fraction: u32,
    pub user: u32,
    pub item: u32,
    /// 0 skipped, 1 liked. (As a byte it would only add padding to the record.)
    pub feedback: u32,
}

impl Event {
    pub(super) fn liked(&self) -> bool {
        self.feedback == 1
    }
}

impl Record for Event {
    type Key = (u32, i64, u32);

    fn key(&self) -> (u32, i64, u32) {
        (self.user, self.time, self.fraction)
    }
}

/// A log whose users and items are numbered without gaps.
#[derive(Debug)]
pub(super) struct Log {
    /// Events by user, then time, then position in the input.
    pub events: RecordFile<Event>,
    pub users: Names,
    pub items: Names,
}

/// Calls `each` with the events of every user, in order of users. Holds one history in memory.
pub(super) fn each_user(
    events: &mut RecordFile<Event>,
    mut each: impl FnMut(u32, &[Event]) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let mut reader = events.read()?;
    let mut history: Vec<Event> = Vec::new();
    while let Some(event) = reader.next()? {
        if history.first().is_some_and(|first| first.user != event.user) {
            each(history[0].user, &history)?;
            history.clear();
        }
        history.push(event);
    }
    match history.first() {
        Some(first) => each(first.user, &history),
        None => Ok(()),
    }
}

/// A set of items with a constant-time clear.
#[derive(Debug)]
pub(super) struct ItemSet {
    marks: Vec<u32>,
    round: u32,
}

impl ItemSet {
    pub(super) fn new(items: usize) -> ItemSet {
        ItemSet { marks: vec![0; items], round: 1 }
    }

    pub(super) fn clear(&mut self) {
        self.round = self.round.checked_add(1).unwrap_or_else(|| {
            self.marks.fill(0);
            1
        });
    }

    /// Inserts an item; returns whether it was new.
    pub(super) fn insert(&mut self, item: u32) -> bool {
        std::mem::replace(&mut self.marks[item as usize], self.round) != self.round
    }

    pub(super) fn contains(&self, item: u32) -> bool {
        self.marks[item as usize] == self.round
    }
}
