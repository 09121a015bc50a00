//! The layout of a `.dfar` file and its validation (docs/data-format.md describes it in prose).
//!
//! ```text
//! header   64 bytes: magic, version, section count, file length, counts, two checksums
//! table    one 32-byte entry per section: kind, offset, length, CRC-32
//! sections in the order of `Section`, each starting on the next multiple of 64, zeros between;
//!          the file ends with the last section
//! ```
//!
//! All numbers are little-endian. A file is untrusted: [`Dataset::open`](super::Dataset::open)
//! checks every offset, count, id, order and checksum once, so that all later indexing is in
//! bounds. A data set has exactly one encoding, so a flipped bit anywhere, padding included, is
//! detected.

use super::DataError;
use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;

#[cfg(target_endian = "big")]
compile_error!("data set files are little-endian and mapped as they are: big-endian hosts are not supported");

/// The first eight bytes. Like PNG's, they show when a transfer changed line ends or dropped the
/// eighth bit.
pub const MAGIC: [u8; 8] = *b"\x89DFAR\r\n\x1a";
/// The version this program writes, and the only one it reads.
pub const VERSION: u32 = 1;
/// Every section starts on a multiple of this many bytes: a cache line, and enough for any vector
/// load.
pub const ALIGNMENT: u64 = 64;
/// Bit of [`Header::flags`]: the groups have scores of the generating process.
pub const FLAG_CEILING: u32 = 1;

/// The first 64 bytes of a file.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: u32,
    /// Number of sections, always that of [`Section::ALL`].
    pub sections: u32,
    /// Bytes of the whole file.
    pub file_length: u64,
    /// Users.
    pub users: u64,
    /// Items.
    pub items: u64,
    /// Events of all users.
    pub events: u64,
    /// Negatives of each evaluation group.
    pub negatives: u32,
    /// [`FLAG_CEILING`] or 0.
    pub flags: u32,
    /// CRC-32 of the section table.
    pub table_checksum: u32,
    /// CRC-32 of the 60 bytes before this field.
    pub header_checksum: u32,
}

/// One entry of the section table.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Entry {
    /// [`Section`] as a number.
    pub kind: u32,
    /// 0.
    pub reserved: u32,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes, padding not counted.
    pub length: u64,
    /// CRC-32 of those bytes.
    pub checksum: u32,
    /// 0.
    pub reserved_too: u32,
}

/// Bytes of a header.
pub const HEADER_LENGTH: usize = size_of::<Header>();
/// Bytes of a table entry.
pub const ENTRY_LENGTH: usize = size_of::<Entry>();
const _: () = assert!(HEADER_LENGTH == 64 && ENTRY_LENGTH == 32);

/// The sections, in file order. U users, V items, E events, G groups of the part, n negatives per
/// group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Section {
    /// JSON of [`Protocol`](super::Protocol).
    Protocol,
    /// `u64 [U+1]`: events of user u are `[offsets[u], offsets[u+1])`.
    UserOffsets,
    /// `u32 [U][2]`: end of the training and of the validation events, counted from the user's
    /// first event.
    Split,
    /// `u32 [E]`.
    Items,
    /// `u8 [E]`: 0 skipped, 1 liked.
    Feedback,
    /// `i64 [E]`: milliseconds since 1970.
    Times,
    /// `u64 [U+1]` into [`Section::UserNames`].
    UserNameOffsets,
    /// Original user ids, UTF-8, end to end.
    UserNames,
    /// `u32 [U]`: users in the order of their names' bytes.
    UserOrder,
    /// `u64 [V+1]` into [`Section::ItemNames`].
    ItemNameOffsets,
    /// Original item ids, UTF-8, end to end.
    ItemNames,
    /// `u32 [V]`: items in the order of their names' bytes.
    ItemOrder,
    /// `u32 [G]`.
    ValidUsers,
    /// `u32 [G]`: index within the user's events.
    ValidEvents,
    /// `u32 [G][n]`.
    ValidNegatives,
    /// `f32 [G][1+n]`, or empty.
    ValidCeiling,
    /// `u32 [G]`.
    TestUsers,
    /// `u32 [G]`: index within the user's events.
    TestEvents,
    /// `u32 [G][n]`.
    TestNegatives,
    /// `f32 [G][1+n]`, or empty.
    TestCeiling,
}

impl Section {
    /// All sections in file order.
    pub const ALL: [Section; 20] = {
        use Section::*;
        [
            Protocol,
            UserOffsets,
            Split,
            Items,
            Feedback,
            Times,
            UserNameOffsets,
            UserNames,
            UserOrder,
            ItemNameOffsets,
            ItemNames,
            ItemOrder,
            ValidUsers,
            ValidEvents,
            ValidNegatives,
            ValidCeiling,
            TestUsers,
            TestEvents,
            TestNegatives,
            TestCeiling,
        ]
    };

    /// The name used in messages and in the documentation.
    pub fn name(self) -> &'static str {
        match self {
            Section::Protocol => "protocol",
            Section::UserOffsets => "user offsets",
            Section::Split => "split",
            Section::Items => "items",
            Section::Feedback => "feedback",
            Section::Times => "times",
            Section::UserNameOffsets => "user name offsets",
            Section::UserNames => "user names",
            Section::UserOrder => "user order",
            Section::ItemNameOffsets => "item name offsets",
            Section::ItemNames => "item names",
            Section::ItemOrder => "item order",
            Section::ValidUsers => "validation users",
            Section::ValidEvents => "validation events",
            Section::ValidNegatives => "validation negatives",
            Section::ValidCeiling => "validation ceiling",
            Section::TestUsers => "test users",
            Section::TestEvents => "test events",
            Section::TestNegatives => "test negatives",
            Section::TestCeiling => "test ceiling",
        }
    }
}

/// The sections of a file, after the header and the table have been checked.
#[derive(Debug, Clone)]
pub(super) struct Contents {
    pub users: usize,
    pub items: usize,
    pub events: usize,
    pub negatives: usize,
    pub ceiling: bool,
    ranges: [Range<usize>; Section::ALL.len()],
}

impl Contents {
    /// A section's elements. Casting cannot fail after [`read_contents`]: offsets are multiples of
    /// 64, the bytes start on a multiple of 8, and lengths were compared with the counts.
    pub fn slice<'a, T: Pod>(&self, bytes: &'a [u8], section: Section) -> &'a [T] {
        bytemuck::cast_slice(&bytes[self.ranges[section as usize].clone()])
    }
}

/// Bytes of padding between `offset` and the start of the next section.
pub(super) fn padding(offset: u64) -> u64 {
    offset.wrapping_neg() % ALIGNMENT
}

/// Checks the header, the table, and the offset and checksum of every section.
pub(super) fn read_contents(bytes: &[u8], path: &Path) -> Result<Contents, DataError> {
    let header = read_header(bytes, path)?;
    let table_end = HEADER_LENGTH + ENTRY_LENGTH * Section::ALL.len();
    let bad_table = |section, reason| DataError::SectionTable { path: path.to_owned(), section, reason };
    if header.sections as usize != Section::ALL.len() || bytes.len() < table_end {
        return Err(bad_table("table", "wrong number of sections"));
    }
    let table = &bytes[HEADER_LENGTH..table_end];
    if crc32fast::hash(table) != header.table_checksum {
        return Err(bad_table("table", "checksum mismatch"));
    }

    const EMPTY: Range<usize> = 0..0;
    let mut ranges = [EMPTY; Section::ALL.len()];
    let mut checksums = [0; Section::ALL.len()];
    let mut cursor = table_end as u64;
    for (section, entry) in Section::ALL.into_iter().zip(table.chunks_exact(ENTRY_LENGTH)) {
        let entry: Entry = bytemuck::pod_read_unaligned(entry);
        let bad = |reason| Err(bad_table(section.name(), reason));
        if entry.kind != section as u32 {
            return bad("holds another kind of section");
        }
        if entry.reserved != 0 || entry.reserved_too != 0 {
            return bad("reserved fields are not zero");
        }
        let start = cursor + padding(cursor);
        if entry.offset != start {
            return bad("does not start where the section before it ends");
        }
        let Some(end) = start.checked_add(entry.length).filter(|&end| end <= bytes.len() as u64) else {
            return bad("reaches past the end of the file");
        };
        if bytes[cursor as usize..start as usize].iter().any(|&byte| byte != 0) {
            return bad("the padding before it is not zero");
        }
        ranges[section as usize] = start as usize..end as usize;
        checksums[section as usize] = entry.checksum;
        cursor = end;
    }
    if cursor != bytes.len() as u64 {
        return Err(bad_table("table", "the file continues after the last section"));
    }

    let contents = Contents {
        users: header.users as usize,
        items: header.items as usize,
        events: header.events as usize,
        negatives: header.negatives as usize,
        ceiling: header.flags & FLAG_CEILING != 0,
        ranges,
    };
    check_lengths(&header, &contents, path)?;
    for section in Section::ALL {
        if checksum(&bytes[contents.ranges[section as usize].clone()]) != checksums[section as usize] {
            return Err(DataError::Checksum { path: path.to_owned(), section: section.name() });
        }
    }
    Ok(contents)
}

fn read_header(bytes: &[u8], path: &Path) -> Result<Header, DataError> {
    let actual = bytes.len() as u64;
    let seen = bytes.len().min(MAGIC.len());
    if bytes[..seen] != MAGIC[..seen] {
        return Err(DataError::NotADataset { path: path.to_owned() });
    }
    if bytes.len() < HEADER_LENGTH {
        return Err(DataError::Truncated { path: path.to_owned(), expected: HEADER_LENGTH as u64, actual });
    }
    let header: Header = bytemuck::pod_read_unaligned(&bytes[..HEADER_LENGTH]);
    // The version comes first: in a later version, every other byte may have another meaning.
    if header.version != VERSION {
        return Err(DataError::UnsupportedVersion {
            path: path.to_owned(),
            found: header.version,
            supported: VERSION,
        });
    }
    if crc32fast::hash(&bytes[..HEADER_LENGTH - 4]) != header.header_checksum {
        return Err(DataError::HeaderChecksum { path: path.to_owned() });
    }
    let expected = header.file_length;
    if actual < expected {
        return Err(DataError::Truncated { path: path.to_owned(), expected, actual });
    }
    if actual > expected {
        return Err(DataError::TrailingBytes { path: path.to_owned(), expected, actual });
    }
    let refuse = |reason| Err(DataError::SectionTable { path: path.to_owned(), section: "header", reason });
    if header.users.max(header.items) > u64::from(u32::MAX) {
        return refuse("it counts 2^32 or more users or items");
    }
    if header.flags & !FLAG_CEILING != 0 {
        return refuse("unknown flags are set");
    }
    Ok(header)
}

/// Compares every section's length with the counts. Name sections have any length (`validate`
/// checks their offsets), and the group counts are set by the sections of group users.
fn check_lengths(header: &Header, contents: &Contents, path: &Path) -> Result<(), DataError> {
    let length = |section: Section| contents.ranges[section as usize].len() as u64;
    let groups = |users: Section| length(users) / 4;
    let expected = |section: Section| -> Option<u64> {
        let product = |count: u64, size: u64| count.checked_mul(size);
        let candidates = u64::from(header.negatives) + 1;
        let ceiling = |groups: u64| product(if contents.ceiling { groups } else { 0 }, 4 * candidates);
        match section {
            Section::Protocol | Section::UserNames | Section::ItemNames => Some(length(section)),
            Section::UserOffsets | Section::UserNameOffsets => product(header.users + 1, 8),
            Section::Split => product(header.users, 8),
            Section::UserOrder => product(header.users, 4),
            Section::Items => product(header.events, 4),
            Section::Feedback => Some(header.events),
            Section::Times => product(header.events, 8),
            Section::ItemNameOffsets => product(header.items + 1, 8),
            Section::ItemOrder => product(header.items, 4),
            Section::ValidUsers | Section::ValidEvents => product(groups(Section::ValidUsers), 4),
            Section::ValidNegatives => product(groups(Section::ValidUsers), 4 * (candidates - 1)),
            Section::ValidCeiling => ceiling(groups(Section::ValidUsers)),
            Section::TestUsers | Section::TestEvents => product(groups(Section::TestUsers), 4),
            Section::TestNegatives => product(groups(Section::TestUsers), 4 * (candidates - 1)),
            Section::TestCeiling => ceiling(groups(Section::TestUsers)),
        }
    };
    for section in Section::ALL {
        let actual = length(section);
        let expected = expected(section).unwrap_or(u64::MAX);
        if actual != expected {
            return Err(DataError::SectionLength {
                path: path.to_owned(),
                section: section.name(),
                expected,
                actual,
            });
        }
    }
    Ok(())
}

/// CRC-32 of a section, on all cores: opening a data set reads all of it.
fn checksum(bytes: &[u8]) -> u32 {
    const CHUNK: usize = 1 << 22;
    bytes
        .par_chunks(CHUNK)
        .map(|chunk| {
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(chunk);
            hasher
        })
        .reduce(crc32fast::Hasher::new, |mut left, right| {
            left.combine(&right);
            left
        })
        .finalize()
}
