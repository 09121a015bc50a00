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
        /// The bytes, the last word filled up with zeros.
        words: Vec<u64>,
        /// How many of them count.
        length: usize,
    },
}

impl Bytes {
    /// Maps a whole file.
    ///
    /// A map cannot be made safe in Rust's sense: whoever changes or truncates the file while it is
    /// mapped changes bytes we hold by shared reference, and a read behind a new end raises SIGBUS.
    /// What we can do is done: the file is opened for reading only, everything is validated before
    /// use, nothing is ever cast to a type for which some bit pattern is invalid (only integers,
    /// floats and bytes; text is checked again when it is asked for), and our own writer never
    /// writes into an existing file but renames a finished one over it, which leaves the old pages
    /// alone.
    pub(super) fn map(file: &File) -> std::io::Result<Bytes> {
        // SAFETY: data set files are not modified in place while mapped: our writer replaces them
        // by renaming. A foreign process that does so breaks this, which no program that maps files
        // can exclude (see above).
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
