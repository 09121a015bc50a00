//! The bytes of a log: unpacked, counted, without a byte order mark.

use super::{DataError, Progress};
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{BufReader, Chain, Cursor, ErrorKind, Read};
use std::path::Path;

/// How much of a log is looked at to find its columns.
const HEAD_BYTES: usize = 1 << 16;

/// A log with its first bytes at hand.
pub(super) struct Source<'a> {
    /// The first bytes, unpacked; whole lines, unless the first line alone is longer.
    pub head: Vec<u8>,
    /// All bytes, those of the head included.
    pub all: Chain<Cursor<Vec<u8>>, Box<dyn Read + 'a>>,
}

/// Opens a log, whatever it is packed in.
pub(super) fn open<'a>(path: &Path, progress: &'a dyn Progress) -> Result<Source<'a>, DataError> {
    let raw: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(path).map_err(DataError::read(path))?)
    };
    let mut raw = BufReader::with_capacity(1 << 17, Counted { inner: raw, progress });
    let magic = peek(&mut raw, 4).map_err(DataError::read(path))?;
    let raw = Cursor::new(magic.clone()).chain(raw);
    let mut unpacked: Box<dyn Read + 'a> = match magic[..] {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(raw)),
        [b'P', b'K', 3, 4] => {
            let reason = "zip archives are not read, unpack it first";
            return Err(DataError::read(path)(std::io::Error::new(ErrorKind::Unsupported, reason)));
        }
        _ => Box::new(raw),
    };
    let mut start = peek(&mut unpacked, HEAD_BYTES).map_err(DataError::read(path))?;
    if start.starts_with(b"\xef\xbb\xbf") {
        start.drain(..3);
    }
    let mut head = start.clone();
    if head.len() >= HEAD_BYTES - 3 {
        let end = head.iter().rposition(|&byte| byte == b'\n').map_or(head.len(), |newline| newline + 1);
        head.truncate(end);
    }
    Ok(Source { head, all: Cursor::new(start).chain(unpacked) })
}

/// Reads up to `count` bytes.
fn peek(from: &mut impl Read, count: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(count as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Tells how many bytes went through.
struct Counted<'a> {
    inner: Box<dyn Read>,
    progress: &'a dyn Progress,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.progress.bytes(count as u64);
        Ok(count)
    }
}
