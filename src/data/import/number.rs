//! Numbers the users and items of rows and sorts their events: on a second thread, beside the
//! reading of the rows.

use super::DataError;
use super::rows::{Each, Row};
use super::time::RawTime;
use crate::data::external_sort::ExternalSorter;
use crate::data::log::Event;
use crate::data::names::Names;
use crate::threads;
use std::path::Path;
use std::sync::mpsc::{channel, sync_channel};
use std::thread::{ScopedJoinHandle, scope};

/// Number of batches that the reader may be ahead.
const AHEAD: usize = 32;

/// The users, items and events of the rows so far.
pub(super) struct Numbered {
    pub users: Names,
    pub items: Names,
    /// Events in the order of the log, with times in its unit.
    pub events: ExternalSorter<Event>,
    /// Number of liked events.
    pub liked: u64,
}

impl Numbered {
    pub(super) fn new(folder: &Path, sort_memory: usize) -> Numbered {
        Numbered {
            users: Names::new("users"),
            items: Names::new("items"),
            events: ExternalSorter::new(folder, sort_memory),
            liked: 0,
        }
    }

    /// Takes all rows that `read` finds, in their order.
    pub(super) fn take_all(
        &mut self,
        read: &mut dyn FnMut(Each) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        match self.take_on_second_thread(read) {
            Some(result) => result,
            None => self.take_here(read),
        }
    }

    fn take_here(&mut self, read: &mut dyn FnMut(Each) -> Result<(), DataError>) -> Result<(), DataError> {
        let mut batch = RowBatch::default();
        read(&mut |row| match batch.push(&row) {
            true => self.take(&mut batch),
            false => Ok(()),
        })?;
        self.take(&mut batch)
    }

    /// `None` if the system refuses a second thread; nothing is read then.
    fn take_on_second_thread(
        &mut self,
        read: &mut dyn FnMut(Each) -> Result<(), DataError>,
    ) -> Option<Result<(), DataError>> {
        scope(|scope| {
            let (filled, batches) = sync_channel::<RowBatch>(AHEAD);
            let (emptied, reuse) = channel();
            let take = move || {
                for mut batch in batches {
                    self.take(&mut batch)?;
                    // The reader may have finished.
                    let _ = emptied.send(batch);
                }
                Ok(())
            };
            let mut second = Some(threads::start(scope, take).ok()?);
            let mut send = |batch| match filled.send(batch) {
                Ok(()) => Ok(()),
                // Only an error ends the second thread before the channel is closed.
                Err(_) => second.take().map_or(Ok(()), join),
            };
            let mut batch = RowBatch::default();
            let mut result = read(&mut |row| match batch.push(&row) {
                true => send(std::mem::replace(&mut batch, reuse.try_recv().unwrap_or_default())),
                false => Ok(()),
            });
            if result.is_ok() {
                result = send(batch);
            }
            drop(filled);
            // An error of the second thread is of an earlier row.
            Some(second.map_or(Ok(()), join).and(result))
        })
    }

    /// Takes the rows of a batch, and empties it.
    fn take(&mut self, batch: &mut RowBatch) -> Result<(), DataError> {
        let (mut user, mut item) = (vec![0; batch.rows.len()], vec![0; batch.rows.len()]);
        let (users, items) = batch.names();
        self.users.intern_all(&users, &mut user)?;
        self.items.intern_all(&items, &mut item)?;
        for (row, (user, item)) in batch.rows.drain(..).zip(user.into_iter().zip(item)) {
            let RawTime { whole: time, billionths: fraction } = row.time;
            self.liked += u64::from(row.liked);
            self.events.push(Event { time, fraction, user, item, feedback: row.liked.into() })?;
        }
        // Long names leave no large buffer behind.
        batch.text.clear();
        batch.text.shrink_to(2 * RowBatch::FULL_BYTES);
        Ok(())
    }
}

/// The result of the thread; its panic goes on in this one.
fn join(thread: ScopedJoinHandle<Result<(), DataError>>) -> Result<(), DataError> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Rows that are handed over together.
#[derive(Default)]
struct RowBatch {
    /// The user and the item of each row, end to end.
    text: String,
    rows: Vec<BatchRow>,
}

struct BatchRow {
    /// Ends in the text.
    user: usize,
    item: usize,
    time: RawTime,
    liked: bool,
}

impl RowBatch {
    /// Rows of a full batch: they should stay in the second-level cache.
    const FULL: usize = 2048;
    /// Bytes of names that fill a batch, however few its rows: batches ahead are held in memory.
    const FULL_BYTES: usize = 128 << 10;

    /// Adds a row. Returns whether the batch is full.
    fn push(&mut self, row: &Row) -> bool {
        self.text.push_str(row.user);
        let user = self.text.len();
        self.text.push_str(row.item);
        self.rows.push(BatchRow { user, item: self.text.len(), time: row.time, liked: row.liked });
        self.rows.len() >= Self::FULL || self.text.len() >= Self::FULL_BYTES
    }

    /// The users and the items of the rows.
    fn names(&self) -> (Vec<&str>, Vec<&str>) {
        let mut from = 0;
        self.rows
            .iter()
            .map(|row| {
                let names = (&self.text[from..row.user], &self.text[row.user..row.item]);
                from = row.item;
                names
            })
            .unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(user: &str) -> Row<'_> {
        Row { user, item: "item", time: RawTime { whole: 1, billionths: 0 }, liked: true }
    }

    /// Finds `count` rows of different users, then fails if `fails`.
    fn find(count: usize, fails: bool) -> impl FnMut(Each) -> Result<(), DataError> {
        move |each| {
            (0..count).try_for_each(|user| each(row(&user.to_string())))?;
            if fails { Err(DataError::TooMany { what: "rows", limit: count as u64 }) } else { Ok(()) }
        }
    }

    #[test]
    fn rows_of_all_batches_are_taken_in_order() {
        for count in [0, 1, RowBatch::FULL, 3 * RowBatch::FULL + 1] {
            for second in [false, true] {
                let folder = tempfile::tempdir().unwrap();
                let mut numbered = Numbered::new(folder.path(), 1 << 20);
                let mut find = find(count, false);
                match second {
                    true => numbered.take_on_second_thread(&mut find).expect("a second thread"),
                    false => numbered.take_here(&mut find),
                }
                .unwrap();
                assert_eq!((numbered.users.len(), numbered.liked), (count, count as u64));
                assert!((0..count).all(|user| numbered.users.get(user as u32) == user.to_string()));
            }
        }
    }

    #[test]
    fn long_names_fill_a_batch_early() {
        let long = "x".repeat(1 << 14);
        let mut batch = RowBatch::default();
        let rows = (1..).find(|_| batch.push(&row(&long)));
        assert_eq!(rows, Some(RowBatch::FULL_BYTES >> 14));
    }

    #[test]
    fn the_error_of_the_earliest_row_ends_both_threads() {
        let folder = tempfile::tempdir().unwrap();
        let mut numbered = Numbered::new(folder.path(), 1 << 20);
        let error = numbered.take_all(&mut find(1, true));
        assert!(matches!(error, Err(DataError::TooMany { what: "rows", .. })), "{error:?}");

        // No folder for temporary files: the first run of the sort cannot be written.
        for (count, fails) in [(10_000 * RowBatch::FULL, false), (2 * RowBatch::FULL, true)] {
            let mut numbered = Numbered::new(&folder.path().join("missing"), 1 << 10);
            let error = numbered.take_all(&mut find(count, fails));
            assert!(matches!(error, Err(DataError::Write { .. })), "{error:?}");
        }
    }
}
