//! The bytes of logs, decompressed and extracted from archives.
//!
//! Containers are recognized by their first bytes, not by the name of the file: gzip and zstd
//! (several members end to end form one stream), tar, and both combined. The error for an
//! unsupported container names it.

use super::{DataError, Progress};
use flate2::bufread::GzDecoder;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

/// Number of bytes needed to recognize a container; the magic of tar is at 257.
const MAGIC_BYTES: usize = 512;
/// Deepest nesting of compression that is read.
const DEEPEST: usize = 3;

/// One log, from a file or an archive.
pub(super) struct Log<'a> {
    /// The path of the file; for a member of an archive, `logs.tar.gz/data/log.csv`.
    pub name: PathBuf,
    /// The first bytes of `bytes`.
    pub magic: Vec<u8>,
    /// All bytes, including `magic`.
    pub bytes: Box<dyn Read + 'a>,
    /// The file itself, if the log is not compressed.
    pub file: Option<File>,
}

/// Decides by its path whether a member of an archive is a log.
pub(super) type Choose<'a> = &'a dyn Fn(&Path) -> bool;

/// Calls `each` with the log in a file, or with every log in an archive.
pub(super) fn each_log(
    path: &Path,
    progress: &dyn Progress,
    choose: Choose,
    each: &mut dyn FnMut(Log) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let unpack = Unpack { path, progress, choose };
    if path == Path::new("-") {
        return unpack.open(path, Box::new(Counted { inner: io::stdin(), progress }), None, 0, each);
    }
    let file = File::open(path).map_err(DataError::read(path))?;
    if file.metadata().is_ok_and(|data| data.is_dir()) {
        let reason = "it is a folder; name the files in it";
        return Err(DataError::read(path)(io::Error::new(ErrorKind::IsADirectory, reason)));
    }
    let again = file.try_clone().map_err(DataError::read(path))?;
    unpack.open(path, Box::new(Counted { inner: file, progress }), Some(again), 0, each)
}

struct Unpack<'a> {
    path: &'a Path,
    progress: &'a dyn Progress,
    choose: Choose<'a>,
}

impl Unpack<'_> {
    fn open(
        &self,
        name: &Path,
        mut bytes: Box<dyn Read + '_>,
        file: Option<File>,
        depth: usize,
        each: &mut dyn FnMut(Log) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let mut magic = Vec::with_capacity(MAGIC_BYTES);
        (&mut bytes).take(MAGIC_BYTES as u64).read_to_end(&mut magic).map_err(DataError::read(name))?;
        let bytes = Box::new(Cursor::new(magic.clone()).chain(bytes));
        let refuse =
            |reason: String| Err(DataError::read(name)(io::Error::new(ErrorKind::Unsupported, reason)));
        if depth > DEEPEST {
            return refuse(format!("it is packed more than {DEEPEST} times"));
        }
        match &magic[..] {
            [0x1f, 0x8b, ..] => {
                let members = Members { decoder: None, rest: Some(buffered(bytes)) };
                self.open(name, Box::new(members), None, depth + 1, each)
            }
            // The second is a skippable frame, with which pzstd begins.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                let decoder = zstd::Decoder::with_buffer(buffered(bytes)).map_err(DataError::read(name))?;
                self.open(name, Box::new(decoder), None, depth + 1, each)
            }
            magic if magic.get(257..262) == Some(b"ustar") => self.members(name, bytes, depth, each),
            _ => match unread_container(&magic) {
                Some(container) => refuse(format!("{container} is not read; unpack or convert it first")),
                None => each(Log { name: name.to_owned(), magic, bytes, file }),
            },
        }
    }

    fn members(
        &self,
        name: &Path,
        bytes: Box<dyn Read + '_>,
        depth: usize,
        each: &mut dyn FnMut(Log) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        if name != self.path {
            let reason = "an archive within an archive is not read; unpack it first";
            return Err(DataError::read(name)(io::Error::new(ErrorKind::Unsupported, reason)));
        }
        let mut archive = tar::Archive::new(Tail { bytes, last: Vec::new() });
        let mut chosen = false;
        for entry in archive.entries().map_err(DataError::read(name))? {
            let entry = entry.map_err(DataError::read(name))?;
            let member = entry.path().map_err(DataError::read(name))?.into_owned();
            let kind = entry.header().entry_type();
            if kind.is_dir() {
                continue;
            }
            let whole = name.join(member.strip_prefix("/").unwrap_or(&member));
            if !kind.is_file() || hidden(&member) || !(self.choose)(&member) {
                self.progress.note(&format!("{}: not read", whole.display()));
                continue;
            }
            chosen = true;
            self.open(&whole, Box::new(entry), None, depth + 1, each)?;
        }
        if archive.into_inner().last.iter().any(|byte| *byte != 0) {
            self.progress.note(&format!("{}: no end mark: it may be cut short", name.display()));
        }
        if chosen {
            return Ok(());
        }
        let reason = "no member of the archive was read; choose with --member";
        Err(DataError::read(name)(io::Error::new(ErrorKind::NotFound, reason)))
    }
}

/// A tar archive, which ends with blocks of zeros.
struct Tail<'a> {
    bytes: Box<dyn Read + 'a>,
    /// The last bytes read, at most a block.
    last: Vec<u8>,
}

impl Read for Tail<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        const BLOCK: usize = 512;
        let count = self.bytes.read(buffer)?;
        let keep = self.last.len().min(BLOCK.saturating_sub(count));
        self.last.drain(..self.last.len() - keep);
        self.last.extend_from_slice(&buffer[count.saturating_sub(BLOCK)..count]);
        Ok(count)
    }
}

/// Files that archivers and editors add: `.DS_Store`, `._log.csv`, `.ipynb_checkpoints/log.csv`.
fn hidden(member: &Path) -> bool {
    member.components().any(|part| match part {
        Component::Normal(name) => name.as_encoded_bytes().starts_with(b"."),
        _ => false,
    })
}

/// Whether `path` or its last component matches `pattern`, in which `*` stands for any text and `?`
/// for any byte.
pub(super) fn matches(pattern: &str, path: &Path) -> bool {
    fn fits(pattern: &[u8], text: &[u8]) -> bool {
        let (mut p, mut t) = (0, 0);
        // The last star, and the end of the text that it stands for so far.
        let mut star = None;
        while t < text.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    star = Some((p, t));
                    p += 1;
                }
                Some(&byte) if byte == b'?' || byte == text[t] => (p, t) = (p + 1, t + 1),
                _ => {
                    // Only the last star can still help: it takes one more byte.
                    let Some((at, end)) = star else { return false };
                    star = Some((at, end + 1));
                    (p, t) = (at + 1, end + 1);
                }
            }
        }
        pattern[p..].iter().all(|byte| *byte == b'*')
    }
    let last = path.file_name().unwrap_or_default();
    [path.as_os_str(), last].iter().any(|text| fits(pattern.as_bytes(), text.as_encoded_bytes()))
}

fn unread_container(magic: &[u8]) -> Option<&'static str> {
    const CONTAINERS: [(&[u8], &str); 17] = [
        (b"PK\x03\x04", "a zip archive (or a spreadsheet)"),
        (b"PK\x05\x06", "an empty zip archive"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\xff\x06\0\0sNaPpY", "snappy"),
        (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
        (b"Rar!", "a RAR archive"),
        (b"\x1f\x9d", "compress (.Z)"),
        (b"ORC", "ORC"),
        (b"Obj\x01", "Avro"),
        (b"\x89HDF", "HDF5"),
        (b"SQLite format 3", "an SQLite database"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"FEA1", "Feather version 1"),
        (b"\xff\xfe", "UTF-16 text"),
        (b"\xfe\xff", "UTF-16 text"),
    ];
    if magic.starts_with(&crate::data::format::MAGIC) {
        return Some("a data set (.dfar), which is imported already,");
    }
    // Logs may begin with the words "BZh" and "ORC", so the following bytes are examined.
    let found = CONTAINERS.into_iter().find(|(start, _)| magic.starts_with(start));
    match found {
        Some((_, container)) => (!magic.iter().all(is_text)).then_some(container),
        None => is_utf_16(magic).then_some("UTF-16 text"),
    }
}

fn is_text(byte: &u8) -> bool {
    matches!(byte, b' '..=b'~' | b'\t' | b'\r' | b'\n')
}

/// Whether the text is ASCII in UTF-16 without a byte order mark.
fn is_utf_16(magic: &[u8]) -> bool {
    let (pairs, _) = magic.as_chunks::<2>();
    let all = |low: usize| pairs.iter().all(|pair| is_text(&pair[low]) && pair[1 - low] == 0);
    pairs.len() >= 2 && (all(0) || all(1))
}

/// Whether text begins with a UTF-8 byte order mark.
pub(super) fn starts_with_bom(text: &[u8]) -> bool {
    text.starts_with(b"\xef\xbb\xbf")
}

type Buffered<'a> = BufReader<Box<dyn Read + 'a>>;

fn buffered<'a>(bytes: Box<dyn Read + 'a>) -> Buffered<'a> {
    BufReader::with_capacity(1 << 17, bytes)
}

/// The members of a gzip stream, end to end. Zeros after the last member are padding (of tapes, and
/// of some object stores); other bytes are an error.
struct Members<'a> {
    decoder: Option<GzDecoder<Buffered<'a>>>,
    /// The bytes between members.
    rest: Option<Buffered<'a>>,
}

impl Read for Members<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(decoder) = &mut self.decoder {
                match decoder.read(buffer)? {
                    0 if !buffer.is_empty() => {
                        let decoder = self.decoder.take().expect("it was just read");
                        self.rest = Some(decoder.into_inner());
                    }
                    count => return Ok(count),
                }
            }
            let Some(mut rest) = self.rest.take() else { return Ok(0) };
            match next_byte_that_is_not_zero(&mut rest)? {
                None => return Ok(0),
                Some(0x1f) => self.decoder = Some(GzDecoder::new(rest)),
                Some(_) => {
                    let reason = "bytes that are no gzip data follow the gzip data";
                    return Err(io::Error::new(ErrorKind::InvalidData, reason));
                }
            }
        }
    }
}

fn next_byte_that_is_not_zero(rest: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let bytes = rest.fill_buf()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
        let next = bytes.get(zeros).copied();
        rest.consume(zeros);
        if next.is_some() {
            return Ok(next);
        }
    }
}

/// Counts the bytes that pass through.
struct Counted<'a, R> {
    inner: R,
    progress: &'a dyn Progress,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.progress.bytes(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_choose_by_path_or_name() {
        for (pattern, path, fits) in [
            ("*.csv", "data/log.csv", true),
            ("log_*", "KuaiRand/data/log_a.csv", true),
            ("log_*.csv", "data/user_features.csv", false),
            ("data/*", "data/log.csv", true),
            ("*", "x", true),
            ("log", "log.csv", false),
            ("a*b?c", "a-b-bxc", true),
            ("a*b?c", "a-b-bc", false),
            ("*a*a*a*a*a*a*b", &"a".repeat(5000), false),
        ] {
            assert_eq!(matches(pattern, Path::new(path)), fits, "{pattern} {path}");
        }
    }

    #[test]
    fn words_that_look_like_magic_are_text() {
        assert_eq!(unread_container(b"BZhang,1,2,3\n"), None);
        assert_eq!(unread_container(b"ORC;label\n"), None);
        assert_eq!(unread_container(b"BZh91AY&SY\x07\x82"), Some("bzip2"));
        assert_eq!(unread_container(b"u\0s\0e\0r\0"), Some("UTF-16 text"));
        assert_eq!(unread_container(b"\0u\0s\0e\0r"), Some("UTF-16 text"));
        assert_eq!(unread_container(b"u\0ser"), None);
    }
}
