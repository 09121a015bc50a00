//! Sorting more records than fit in memory: sorted runs go to temporary files and are merged.
//!
//! The sort is stable: records with equal keys keep the order in which they were pushed.

use super::DataError;
use crate::memory::fallible;
use bytemuck::Pod;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use tempfile::SpooledTempFile;

/// Files smaller than this stay in memory.
const SPOOL_BYTES: usize = 1 << 20;
/// Bytes read from a run at a time.
const BLOCK_BYTES: usize = 1 << 16;
/// Most runs of one level, each of which holds an open file: as many are merged into a run of the
/// next level. The last merge reads the runs of all levels.
const WIDEST: usize = 256;
/// The same, however small the memory.
const NARROWEST: usize = 16;

/// A record with a sort key.
pub(super) trait Record: Pod + Send + Sync {
    /// The sort key.
    type Key: Ord + Copy;

    /// The key of this record.
    fn key(&self) -> Self::Key;
}

impl Record for i64 {
    type Key = i64;

    fn key(&self) -> i64 {
        *self
    }
}

/// A sequence of records in a temporary file (in memory while it is small): written once, read any
/// number of times.
#[derive(Debug)]
pub(super) struct RecordFile<R> {
    file: SpooledTempFile,
    folder: PathBuf,
    length: u64,
    record: PhantomData<R>,
}

/// Appends to a [`RecordFile`].
#[derive(Debug)]
pub(super) struct RecordWriter<R> {
    file: BufWriter<SpooledTempFile>,
    folder: PathBuf,
    length: u64,
    record: PhantomData<R>,
}

impl<R: Pod> RecordWriter<R> {
    /// A file that moves to a nameless file in `folder` when it outgrows memory.
    pub(super) fn new(folder: &Path) -> Self {
        Self::spooled(folder, SPOOL_BYTES)
    }

    /// A file that holds its first `bytes` in memory.
    fn spooled(folder: &Path, bytes: usize) -> Self {
        let file = tempfile::spooled_tempfile_in(bytes, folder);
        RecordWriter {
            file: BufWriter::with_capacity(BLOCK_BYTES, file),
            folder: folder.to_owned(),
            length: 0,
            record: PhantomData,
        }
    }

    pub(super) fn push(&mut self, record: &R) -> Result<(), DataError> {
        self.extend(std::slice::from_ref(record))
    }

    pub(super) fn extend(&mut self, records: &[R]) -> Result<(), DataError> {
        self.length += records.len() as u64;
        self.file.write_all(bytemuck::cast_slice(records)).map_err(DataError::write(&self.folder))
    }

    pub(super) fn finish(self) -> Result<RecordFile<R>, DataError> {
        let RecordWriter { file, folder, length, record } = self;
        let file = file.into_inner().map_err(|error| DataError::write(&folder)(error.into_error()))?;
        Ok(RecordFile { file, folder, length, record })
    }
}

impl<R: Pod> RecordFile<R> {
    /// Number of records.
    pub(super) fn len(&self) -> u64 {
        self.length
    }

    /// Reads all records from the first.
    pub(super) fn read(&mut self) -> Result<RecordReader<'_, R>, DataError> {
        self.file.seek(SeekFrom::Start(0)).map_err(DataError::read(&self.folder))?;
        let block = vec![R::zeroed(); (BLOCK_BYTES / size_of::<R>()).max(1)];
        Ok(RecordReader { left: self.length, source: self, filled: 0, next: 0, block })
    }
}

/// Reads a [`RecordFile`] block by block.
#[derive(Debug)]
pub(super) struct RecordReader<'a, R> {
    source: &'a mut RecordFile<R>,
    left: u64,
    block: Vec<R>,
    filled: usize,
    next: usize,
}

impl<R: Pod> RecordReader<'_, R> {
    /// The next record, `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<R>, DataError> {
        if self.next == self.filled {
            self.filled = self.left.min(self.block.len() as u64) as usize;
            self.next = 0;
            if self.filled == 0 {
                return Ok(None);
            }
            let bytes = bytemuck::cast_slice_mut(&mut self.block[..self.filled]);
            self.source.file.read_exact(bytes).map_err(DataError::read(&self.source.folder))?;
            self.left -= self.filled as u64;
        }
        self.next += 1;
        Ok(Some(self.block[self.next - 1]))
    }
}

/// Collects records in any order and returns them sorted.
#[derive(Debug)]
pub(super) struct ExternalSorter<R> {
    folder: PathBuf,
    buffer: Vec<R>,
    capacity: usize,
    fan_in: usize,
    /// Sorted runs, oldest records first, and how often each has been merged: never less often than
    /// the run after it.
    runs: Vec<(RecordFile<R>, u32)>,
}

impl<R: Record> ExternalSorter<R> {
    /// Keeps at most `memory` bytes of records before a run is written to a file in `folder`.
    pub(super) fn new(folder: &Path, memory: usize) -> Self {
        let capacity = (memory / size_of::<R>()).max(2);
        // The blocks of a merge take at most as much memory as the buffer.
        let fan_in = (memory / BLOCK_BYTES).clamp(NARROWEST, WIDEST);
        ExternalSorter { folder: folder.to_owned(), buffer: Vec::new(), capacity, fan_in, runs: Vec::new() }
    }

    pub(super) fn push(&mut self, record: R) -> Result<(), DataError> {
        if self.buffer.len() == self.capacity {
            self.spill()?;
        } else if fallible(|| self.buffer.try_reserve(1)).is_err() && self.buffer.len() > 1 {
            // The operating system refused a larger buffer: sorts on disk with this one.
            self.capacity = self.buffer.len();
            self.spill()?;
        }
        self.buffer.push(record);
        Ok(())
    }

    /// Calls `each` with every record in order.
    pub(super) fn drain(mut self, mut each: impl FnMut(R) -> Result<(), DataError>) -> Result<(), DataError> {
        if self.runs.is_empty() {
            self.buffer.sort_by_key(R::key);
            return self.buffer.into_iter().try_for_each(each);
        }
        self.spill()?;
        self.buffer = Vec::new();
        let mut runs: Vec<RecordFile<R>> = self.runs.into_iter().map(|(run, _)| run).collect();
        merge(&mut runs, &mut each)
    }

    fn spill(&mut self) -> Result<(), DataError> {
        self.buffer.sort_by_key(R::key);
        // Written to disk at once: small runs kept in memory would add up.
        let mut run = RecordWriter::spooled(&self.folder, 0);
        run.extend(&self.buffer)?;
        self.buffer.clear();
        self.runs.push((run.finish()?, 0));
        // Runs that have been merged equally often are neighbours. Merging neighbours keeps the
        // sort stable and writes every record once per level.
        while let Some(first) = self.runs.len().checked_sub(self.fan_in)
            && self.runs[first].1 == self.runs[self.runs.len() - 1].1
        {
            let level = self.runs[first].1 + 1;
            let mut runs: Vec<RecordFile<R>> = self.runs.drain(first..).map(|(run, _)| run).collect();
            let mut merged = RecordWriter::spooled(&self.folder, 0);
            merge(&mut runs, &mut |record| merged.push(&record))?;
            self.runs.push((merged.finish()?, level));
        }
        Ok(())
    }
}

/// Merges sorted runs; among equal keys the earlier run goes first.
fn merge<R: Record>(
    runs: &mut [RecordFile<R>],
    each: &mut impl FnMut(R) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let mut readers = runs.iter_mut().map(RecordFile::read).collect::<Result<Vec<_>, _>>()?;
    let mut heads = Vec::with_capacity(readers.len());
    let mut heap = BinaryHeap::with_capacity(readers.len());
    for (run, reader) in readers.iter_mut().enumerate() {
        let head = reader.next()?;
        if let Some(record) = head {
            heap.push(Reverse((record.key(), run)));
        }
        heads.push(head);
    }
    while let Some(mut top) = heap.peek_mut() {
        let Reverse((_, run)) = *top;
        let record = heads[run].take().expect("a run in the heap has a head");
        heads[run] = readers[run].next()?;
        match heads[run] {
            Some(next) => *top = Reverse((next.key(), run)),
            None => {
                std::collections::binary_heap::PeekMut::pop(top);
            }
        }
        each(record)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
    #[repr(C)]
    struct Pair {
        key: u32,
        place: u32,
    }

    impl Record for Pair {
        type Key = u32;

        fn key(&self) -> u32 {
            self.key
        }
    }

    fn sorted(keys: &[u32], memory: usize) -> Vec<Pair> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut sorter = ExternalSorter::new(folder.path(), memory);
        for (place, &key) in keys.iter().enumerate() {
            sorter.push(Pair { key, place: place as u32 }).expect("pushing works");
        }
        let mut out = Vec::new();
        sorter
            .drain(|record| {
                out.push(record);
                Ok(())
            })
            .expect("draining works");
        out
    }

    proptest! {
        #[test]
        fn sorts_stably_whatever_the_memory(keys in prop::collection::vec(0u32..20, 0..900), memory in 0usize..200) {
            let mut expected: Vec<Pair> =
                keys.iter().enumerate().map(|(place, &key)| Pair { key, place: place as u32 }).collect();
            expected.sort_by_key(|pair| pair.key);
            prop_assert_eq!(sorted(&keys, memory), expected);
        }
    }

    #[test]
    fn merges_in_levels_when_there_are_many_runs() {
        // Each run has two records, so this makes more than two levels of NARROWEST runs.
        let keys: Vec<u32> =
            (0..3 * (NARROWEST * NARROWEST) as u32 * 2).map(|i| i.wrapping_mul(2_654_435_761) % 97).collect();
        let out = sorted(&keys, 0);
        assert_eq!(out.len(), keys.len());
        assert!(out.windows(2).all(|pair| (pair[0].key, pair[0].place) < (pair[1].key, pair[1].place)));
    }
}
