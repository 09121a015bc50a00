//! The bytes of a data set: mapped from a file or held in memory, aligned for every section's
//! element type.

use std::fs::File;
use std::ops::Deref;

/// Bytes that start on an 8-byte boundary at least (a map starts on a page).
#[derive(Debug)]
pub(super) enum Bytes {
    /// A file's pages.
    Map(memmap2::Mmap),
    /// A copy in memory, in words for their alignment.
    Memory {
        /// The bytes, zero-padded to a whole word.
        words: Vec<u64>,
        /// Number of bytes without padding.
        length: usize,
    },
}

impl Bytes {
    /// Maps a whole file.
    ///
    /// Mapping a file cannot be made safe in Rust's sense: a process that changes or truncates the
    /// mapped file changes bytes behind a shared reference, and a read beyond the new end raises
    /// SIGBUS. The damage is limited as follows. The file is opened read-only. All of it is
    /// validated before use. Bytes are only cast to integers and floats, for which every bit
    /// pattern is valid; text is checked again on access. The writer of this crate never writes
    /// into an existing file: it renames a finished file over it, which leaves the old pages
    /// unchanged.
    pub(super) fn map(file: &File) -> std::io::Result<Bytes> {
        // SAFETY: data set files are not modified while mapped: this crate's writer replaces them
        // by renaming. Another process that modifies one breaks this, which no program that maps
        // files can exclude (see above).
        unsafe { memmap2::Mmap::map(file) }.map(Bytes::Map)
    }

    /// Copies bytes into aligned memory.
    pub(super) fn copy(bytes: &[u8]) -> Bytes {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Bytes::Memory { words, length: bytes.len() }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Map(map) => map,
            Bytes::Memory { words, length } => &bytemuck::cast_slice(words)[..*length],
        }
    }
}
