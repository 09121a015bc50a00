//! The lines of a log, one at a time.
//!
//! In every text format, one line is one row. A quoted field therefore cannot contain a line end,
//! and damage in one line (a stray quote, a truncated field) does not affect the next.

use super::source::starts_with_bom;
use memchr::{memchr, memchr2};
use std::io::{self, Read};

/// A longer line is a bad row; it is skipped without being held in memory.
pub(super) const LONGEST_LINE: usize = 1 << 24;
/// Number of bytes used to find the columns of a log.
const HEAD_BYTES: usize = 1 << 16;
const FIRST_BUFFER: usize = 1 << 18;
const LONGEST_PART: usize = 1 << 20;
/// Number of bytes of an overlong line that messages show.
const SHOWN: usize = 80;

/// The non-blank lines of a text.
pub(super) struct Lines<'a> {
    source: Box<dyn Read + 'a>,
    /// `buffer[start..end]` has been read but not yet returned.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    source_ended: bool,
    terminator: u8,
    number: u64,
    /// Whether the last part did not end its line.
    within_line: bool,
}

/// A line without its line end and byte order mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line<'b> {
    /// Counted from 1, blank lines included.
    pub number: u64,
    /// The text, truncated if the line is too long.
    pub text: &'b [u8],
    /// Whether the line is longer than [`LONGEST_LINE`].
    pub too_long: bool,
}

/// A part of a line.
pub(super) struct Part<'b> {
    /// The number of the line.
    pub number: u64,
    pub text: &'b [u8],
    /// Whether the line ends here.
    pub ends: bool,
}

impl<'a> Lines<'a> {
    /// Reads ahead to find the columns: the first non-blank line, and at least 64 KiB.
    pub(super) fn new(source: Box<dyn Read + 'a>) -> io::Result<Self> {
        let mut lines = Lines {
            source,
            buffer: vec![0; FIRST_BUFFER],
            start: 0,
            end: 0,
            source_ended: false,
            terminator: b'\n',
            number: 0,
            within_line: false,
        };
        while !lines.source_ended && lines.end < LONGEST_LINE {
            let text = lines.buffer[..lines.end].trim_ascii();
            if lines.end >= HEAD_BYTES && memchr2(b'\n', b'\r', text).is_some() {
                break;
            }
            lines.fill()?;
        }
        // Files of classic Mac OS have only a carriage return at the end of a line. A program that
        // appends a line end to the whole file does not change that.
        let head = lines.buffer[..lines.end].trim_ascii();
        if memchr(b'\n', head).is_none() && memchr(b'\r', head).is_some() {
            lines.terminator = b'\r';
        }
        Ok(lines)
    }

    /// The non-blank lines read ahead. The last may be incomplete unless it is the only one.
    pub(super) fn head(&self) -> impl Iterator<Item = Line<'_>> {
        let text = &self.buffer[self.start..self.end];
        let numbered = self.number + 1..;
        text.split(|&byte| byte == self.terminator)
            .zip(numbered)
            .map(|(text, number)| Line { number, text: clean(text), too_long: text.len() > LONGEST_LINE })
            .filter(|line| line.too_long || !line.text.trim_ascii().is_empty())
    }

    /// The next line that is not blank.
    pub(super) fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        loop {
            let Some((from, to, too_long)) = self.next_raw()? else { return Ok(None) };
            // `clean` is called again below: a borrow returned from a loop would last for the whole
            // function.
            if too_long || !clean(&self.buffer[from..to]).trim_ascii().is_empty() {
                let text = clean(&self.buffer[from..to]);
                return Ok(Some(Line { number: self.number, text, too_long }));
            }
        }
    }

    /// The next part of a line of any length, at most 1 MiB long, without the blanks around the
    /// line.
    pub(super) fn next_part(&mut self) -> io::Result<Option<Part<'_>>> {
        let (from, to, ends) = loop {
            let text = &self.buffer[self.start..self.end];
            let from = self.start;
            if let Some(at) = memchr(self.terminator, &text[..text.len().min(LONGEST_PART)]) {
                self.start += at + 1;
                break (from, from + at, true);
            }
            if text.len() >= LONGEST_PART {
                self.start += LONGEST_PART;
                break (from, self.start, false);
            }
            if self.source_ended {
                if text.is_empty() && !self.within_line {
                    return Ok(None);
                }
                self.start = self.end;
                break (from, self.end, true);
            }
            self.fill()?;
        };
        let mut text = &self.buffer[from..to];
        if !self.within_line {
            self.number += 1;
            text = clean(text).trim_ascii_start();
        }
        if ends {
            text = text.trim_ascii_end();
        }
        self.within_line = !ends;
        Ok(Some(Part { number: self.number, text, ends }))
    }

    /// The span of the next line in the buffer.
    fn next_raw(&mut self) -> io::Result<Option<(usize, usize, bool)>> {
        let mut scanned = 0;
        loop {
            let found = memchr(self.terminator, &self.buffer[self.start + scanned..self.end]);
            if let Some(at) = found {
                let line = self.place(self.start + scanned + at);
                self.start = self.start + scanned + at + 1;
                self.number += 1;
                return Ok(Some(line));
            }
            if self.source_ended {
                let line = self.place(self.end);
                self.start = self.end;
                self.number += 1;
                return Ok((line.0 < line.1).then_some(line));
            }
            scanned = self.end - self.start;
            if scanned > LONGEST_LINE {
                self.skip_line()?;
                self.number += 1;
                return Ok(Some((0, SHOWN, true)));
            }
            self.fill()?;
        }
    }

    /// The span of a line that ends before `end`, and whether it is too long.
    fn place(&self, end: usize) -> (usize, usize, bool) {
        match end - self.start > LONGEST_LINE {
            true => (self.start, self.start + SHOWN, true),
            false => (self.start, end, false),
        }
    }

    /// Skips the rest of an overlong line; its first bytes stay at the front of the buffer.
    fn skip_line(&mut self) -> io::Result<()> {
        self.buffer.copy_within(self.start..self.start + SHOWN, 0);
        loop {
            (self.start, self.end) = (SHOWN, SHOWN);
            self.fill()?;
            match memchr(self.terminator, &self.buffer[self.start..self.end]) {
                Some(at) => {
                    self.start += at + 1;
                    return Ok(());
                }
                None if self.source_ended => {
                    self.start = self.end;
                    return Ok(());
                }
                None => {}
            }
        }
    }

    /// Reads more bytes to the end of the buffer.
    fn fill(&mut self) -> io::Result<()> {
        if self.end == self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            if self.end > self.buffer.len() / 2 {
                self.buffer.resize(2 * self.buffer.len(), 0);
            }
        }
        let count = loop {
            match self.source.read(&mut self.buffer[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.end += count;
        self.source_ended = count == 0;
        Ok(())
    }
}

/// Strips the other byte of a line end, and a byte order mark at the beginning. (Concatenated files
/// contain byte order marks in the middle.)
fn clean(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\r").or(line.strip_suffix(b"\n")).unwrap_or(line);
    if starts_with_bom(line) { &line[3..] } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns a few bytes per read.
    struct Drip<'a>(&'a [u8], usize);

    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(self.0.len()).min(buffer.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn all(text: &[u8], step: usize) -> Vec<(u64, Vec<u8>)> {
        let mut lines = Lines::new(Box::new(Drip(text, step))).unwrap();
        let mut out = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            out.push((line.number, line.text.to_vec()));
        }
        out
    }

    proptest! {
        #[test]
        fn lines_are_those_of_the_text(text in "[ab \r\n]{0,60}", step in 1usize..9) {
            let inside = text.trim_ascii();
            let terminator = if inside.contains('\n') || !inside.contains('\r') { '\n' } else { '\r' };
            let expected: Vec<(u64, Vec<u8>)> = (1..)
                .zip(text.split(terminator))
                .map(|(number, line)| (number, line.strip_suffix(['\r', '\n']).unwrap_or(line).as_bytes().to_vec()))
                .filter(|(_, line)| !line.trim_ascii().is_empty())
                .collect();
            prop_assert_eq!(all(text.as_bytes(), step), expected);
        }
    }

    #[test]
    fn a_long_line_is_reported_and_the_next_is_read() {
        for blanks in [0, SHOWN] {
            let mut text = b"first\n".to_vec();
            text.extend(std::iter::repeat_n(b' ', blanks));
            text.extend(std::iter::repeat_n(b'x', LONGEST_LINE + 500_000));
            text.extend(b"\nlast");
            let mut lines = Lines::new(Box::new(&text[..])).unwrap();
            assert_eq!(lines.next().unwrap().unwrap().text, b"first");
            let long = lines.next().unwrap().unwrap();
            assert_eq!((long.too_long, long.number, long.text.len()), (true, 2, SHOWN));
            assert_eq!(lines.next().unwrap(), Some(Line { number: 3, text: b"last", too_long: false }));
            assert_eq!(lines.next().unwrap(), None);
        }
    }

    #[test]
    fn carriage_returns_alone_end_lines_also_before_a_final_line_end() {
        for rows in [3, 40_000] {
            for end in ["\r", "\n", "\r\n", "\r\n\r\n"] {
                let text = "user,item".to_owned() + &"\r1,2".repeat(rows) + end;
                let lines = all(text.as_bytes(), 7000);
                assert_eq!(lines.len(), rows + 1, "{end:?}");
                assert_eq!(lines[rows], (rows as u64 + 1, b"1,2".to_vec()), "{end:?}");
            }
        }
    }

    #[test]
    fn byte_order_marks_are_dropped_at_the_start_of_any_line() {
        let lines = all("\u{feff}\r\na\n\u{feff}b\n".as_bytes(), 4);
        assert_eq!(lines, [(2, b"a".to_vec()), (3, b"b".to_vec())]);
    }

    #[test]
    fn a_first_line_longer_than_the_head_is_in_the_head() {
        let text = format!("\r\n{}\nrow", "c,".repeat(100_000));
        let lines = Lines::new(Box::new(Drip(text.as_bytes(), 7000))).unwrap();
        assert_eq!(lines.head().next().unwrap().text.len(), 200_000);
    }
}
