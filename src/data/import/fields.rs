//! The fields of one line.
//!
//! A field may be quoted with `"`; `""` inside it stands for `"`. No other character is special. A
//! general CSV reader would not do: it reads on past an open quote and joins text after a closing
//! quote to the field, and reports neither.

use memchr::{memchr, memchr_iter, memmem};
use std::borrow::Cow;

/// Columns read of a row: user, item, time, label, date.
pub(super) const SLOTS: usize = 5;

/// The separator of fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delimiter {
    Byte(u8),
    /// `::`, in MovieLens 1M and 10M.
    Colons,
}

/// Why a line cannot be split into fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// A quoted field does not end on its line.
    OpenQuote,
    /// Text follows a closing quote.
    TextAfterQuote,
}

impl Broken {
    pub(super) fn reason(self) -> &'static str {
        match self {
            Broken::OpenQuote => "a quote is not closed on this line",
            Broken::TextAfterQuote => "text follows a closing quote",
        }
    }
}

/// A field within its line.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: usize,
    to: usize,
    /// Whether `""` in the field stands for `"`.
    doubled: bool,
}

impl Span {
    fn text(self, line: &[u8]) -> Cow<'_, [u8]> {
        let raw = &line[self.from..self.to];
        if !self.doubled {
            return Cow::Borrowed(raw);
        }
        let mut text = Vec::with_capacity(raw.len());
        let mut rest = raw;
        while let Some(at) = memchr(b'"', rest) {
            text.extend_from_slice(&rest[..=at]);
            rest = &rest[at + 2..];
        }
        text.extend_from_slice(rest);
        Cow::Owned(text)
    }
}

impl Delimiter {
    fn length(self) -> usize {
        match self {
            Delimiter::Byte(_) => 1,
            Delimiter::Colons => 2,
        }
    }

    /// The first delimiter in `text`.
    fn find(self, text: &[u8]) -> Option<usize> {
        match self {
            Delimiter::Byte(byte) => memchr(byte, text),
            Delimiter::Colons => memmem::find(text, b"::"),
        }
    }

    fn starts(self, text: &[u8]) -> bool {
        match self {
            Delimiter::Byte(byte) => text.first() == Some(&byte),
            Delimiter::Colons => text.starts_with(b"::"),
        }
    }

    /// Number of blanks at the start of `text`, delimiters not counted.
    fn blanks(self, text: &[u8]) -> usize {
        let blank = |&byte: &u8| byte.is_ascii_whitespace() && self != Delimiter::Byte(byte);
        text.iter().take_while(|byte| blank(byte)).count()
    }
}

/// Calls `each` with the number and span of every field. Returns the number of fields.
fn walk(line: &[u8], delimiter: Delimiter, mut each: impl FnMut(usize, Span)) -> Result<usize, Broken> {
    let mut count = 0;
    let mut field = |from, to, doubled| {
        each(count, Span { from, to, doubled });
        count += 1;
    };
    if memchr(b'"', line).is_none() {
        let mut from = 0;
        let mut end = |at| {
            field(from, at, false);
            from = at + delimiter.length();
        };
        match delimiter {
            Delimiter::Byte(byte) => memchr_iter(byte, line).for_each(&mut end),
            Delimiter::Colons => memmem::find_iter(line, b"::").for_each(&mut end),
        }
        end(line.len());
        return Ok(count);
    }
    let mut from = 0;
    loop {
        let quote = from + delimiter.blanks(&line[from..]);
        if line.get(quote) == Some(&b'"') {
            let (mut close, mut doubled) = (quote + 1, false);
            loop {
                close += memchr(b'"', &line[close..]).ok_or(Broken::OpenQuote)?;
                if line.get(close + 1) != Some(&b'"') {
                    break;
                }
                doubled = true;
                close += 2;
            }
            field(quote + 1, close, doubled);
            from = close + 1 + delimiter.blanks(&line[close + 1..]);
            if from < line.len() && !delimiter.starts(&line[from..]) {
                return Err(Broken::TextAfterQuote);
            }
        } else {
            let length = delimiter.find(&line[from..]).unwrap_or(line.len() - from);
            field(from, from + length, false);
            from += length;
        }
        if from == line.len() {
            return Ok(count);
        }
        from += delimiter.length();
    }
}

/// All fields, trimmed.
pub(super) fn split(line: &[u8], delimiter: Delimiter) -> Result<Vec<Cow<'_, [u8]>>, Broken> {
    let mut spans = Vec::new();
    walk(line, delimiter, |_, span| spans.push(span))?;
    Ok(spans.into_iter().map(|span| trim(span.text(line))).collect())
}

/// Number of delimiters outside quotes; in a broken line, number of all delimiters.
pub(super) fn count_delimiters(line: &[u8], delimiter: Delimiter) -> usize {
    match (walk(line, delimiter, |_, _| {}), delimiter) {
        (Ok(fields), _) => fields - 1,
        (Err(_), Delimiter::Byte(byte)) => memchr_iter(byte, line).count(),
        (Err(_), Delimiter::Colons) => memmem::find_iter(line, b"::").count(),
    }
}

/// Splits lines into fields and keeps only the needed columns.
#[derive(Debug)]
pub(super) struct Splitter {
    delimiter: Delimiter,
    /// Number of fields of a whole row.
    expected: usize,
    /// Column and slot, in the order of the columns.
    wanted: Vec<(usize, usize)>,
    /// The numbers of the delimiters around the wanted columns, in order.
    edges: Vec<usize>,
    /// For each wanted column, the index in `edges` of the delimiter before it (none before the
    /// first column) and after it.
    places: Vec<(Option<usize>, usize)>,
}

/// The wanted fields of a row, trimmed; `None` beyond the row's end.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    pub slots: [Option<Cow<'a, [u8]>>; SLOTS],
    /// Number of fields of the row; empty fields beyond the expected number are not counted.
    pub count: usize,
}

impl Splitter {
    pub(super) fn new(delimiter: Delimiter, expected: usize, columns: [Option<usize>; SLOTS]) -> Splitter {
        let mut wanted: Vec<(usize, usize)> =
            columns.iter().enumerate().filter_map(|(slot, column)| Some(((*column)?, slot))).collect();
        wanted.sort_unstable();
        let mut edges: Vec<usize> = wanted
            .iter()
            .flat_map(|&(column, _)| column.checked_sub(1).into_iter().chain([column]))
            .collect();
        edges.sort_unstable();
        edges.dedup();
        let place = |edge: usize| edges.iter().position(|&other| other == edge).expect("it is one of them");
        let places =
            wanted.iter().map(|&(column, _)| (column.checked_sub(1).map(place), place(column))).collect();
        Splitter { delimiter, expected, wanted, edges, places }
    }

    /// The wanted fields of a line. The caller must refuse a count above the expected one.
    pub(super) fn split<'a>(&self, line: &'a [u8]) -> Result<Fields<'a>, Broken> {
        match self.delimiter {
            Delimiter::Byte(byte) if memchr(b'"', line).is_none() => match self.split_plain(line, byte) {
                Some(fields) => Ok(fields),
                None => self.split_any(line),
            },
            _ => self.split_any(line),
        }
    }

    /// The wanted fields of a line without quotes; `None` if it has more fields than expected.
    fn split_plain<'a>(&self, line: &'a [u8], delimiter: u8) -> Option<Fields<'a>> {
        let mut places = [line.len(); 2 * SLOTS];
        let (mut found, mut count) = (0, 0);
        // Finds delimiters eight bytes at a time: fields are too short for one search each.
        let mut take = |word: [u8; 8], at: usize| {
            let mut matches = equal_bytes(word, delimiter);
            let after = count + bits(matches);
            while let Some(&edge) = self.edges.get(found)
                && edge < after
            {
                while count < edge {
                    matches &= matches - 1;
                    count += 1;
                }
                places[found] = at + matches.trailing_zeros() as usize / 8;
                found += 1;
            }
            count = after;
        };
        let (words, rest) = line.as_chunks::<8>();
        for (number, word) in words.iter().enumerate() {
            take(*word, 8 * number);
        }
        let mut word = [!delimiter; 8];
        word[..rest.len()].copy_from_slice(rest);
        take(word, 8 * words.len());
        if count >= self.expected {
            return None;
        }
        let mut slots = [const { None }; SLOTS];
        for (&(column, slot), &(before, end)) in self.wanted.iter().zip(&self.places) {
            if column <= count {
                let from = before.map_or(0, |edge| places[edge] + 1);
                slots[slot] = Some(Cow::Borrowed(line[from..places[end]].trim_ascii()));
            }
        }
        Some(Fields { slots, count: count + 1 })
    }

    fn split_any<'a>(&self, line: &'a [u8]) -> Result<Fields<'a>, Broken> {
        let mut slots = [const { None }; SLOTS];
        let mut next = 0;
        let mut longest = 0;
        let count = walk(line, self.delimiter, |index, span| {
            while let Some(&(column, slot)) = self.wanted.get(next)
                && column == index
            {
                slots[slot] = Some(trim(span.text(line)));
                next += 1;
            }
            if index >= self.expected && !line[span.from..span.to].trim_ascii().is_empty() {
                longest = index + 1;
            }
        })?;
        Ok(Fields { slots, count: longest.max(count.min(self.expected)) })
    }
}

/// Sets the top bit of every byte of `word` that equals `byte`.
fn equal_bytes(word: [u8; 8], byte: u8) -> u64 {
    const LOW: u64 = u64::from_ne_bytes([0x7f; 8]);
    let word = u64::from_le_bytes(word) ^ u64::from_ne_bytes([byte; 8]);
    // The top bit of a byte stays clear only if all its bits are zero.
    !(((word & LOW) + LOW) | word | LOW)
}

/// Number of bytes with their top bit set; all other bits must be zero.
fn bits(matches: u64) -> usize {
    ((matches >> 7).wrapping_mul(u64::from_ne_bytes([1; 8])) >> 56) as usize
}

/// Trims ASCII blanks only, in every format, so that an id has the same bytes everywhere.
fn trim(text: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.trim_ascii()),
        Cow::Owned(text) => Cow::Owned(text.trim_ascii().to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fields(line: &str, delimiter: Delimiter) -> Result<Vec<String>, Broken> {
        let text = |field: Cow<'_, [u8]>| String::from_utf8(field.into_owned()).unwrap();
        Ok(split(line.as_bytes(), delimiter)?.into_iter().map(text).collect())
    }

    #[test]
    fn quotes_are_read_or_refused() {
        let comma = Delimiter::Byte(b',');
        for (line, expected) in [
            ("a,b", Ok(vec!["a", "b"])),
            ("", Ok(vec![""])),
            (",", Ok(vec!["", ""])),
            (" a , \tb ", Ok(vec!["a", "b"])),
            ("\"a,b\",c", Ok(vec!["a,b", "c"])),
            ("\"\",\"\"", Ok(vec!["", ""])),
            (" \"a\" ,b", Ok(vec!["a", "b"])),
            ("\"say \"\"hi\"\"\",b", Ok(vec!["say \"hi\"", "b"])),
            ("\"\"\"\",b", Ok(vec!["\"", "b"])),
            ("5\" nail,b", Ok(vec!["5\" nail", "b"])),
            ("a,\"b\"", Ok(vec!["a", "b"])),
            ("a,\"b\",", Ok(vec!["a", "b", ""])),
            ("\"5in nail,b", Err(Broken::OpenQuote)),
            ("a,\"", Err(Broken::OpenQuote)),
            ("a,\"b\"\"", Err(Broken::OpenQuote)),
            ("\"a\"b,c", Err(Broken::TextAfterQuote)),
            ("\"a\\\"b\",c", Err(Broken::TextAfterQuote)),
        ] {
            let expected = expected.map(|fields| fields.into_iter().map(str::to_owned).collect());
            assert_eq!(fields(line, comma), expected, "{line}");
        }
        let own = |fields: &[&str]| Ok(fields.iter().map(|&field| field.to_owned()).collect());
        assert_eq!(fields("1::\"a:b\"::3", Delimiter::Colons), own(&["1", "a:b", "3"]));
        assert_eq!(fields("\t\"a\t\"\t", Delimiter::Byte(b'\t')), own(&["", "a", ""]));
    }

    proptest! {
        #[test]
        fn written_fields_are_read(texts in prop::collection::vec("[a\", ]{0,5}", 1..6)) {
            let quoted: Vec<String> = texts.iter().map(|text| format!("\"{}\"", text.replace('"', "\"\""))).collect();
            let trimmed: Vec<String> = texts.iter().map(|text| text.trim_ascii().to_owned()).collect();
            prop_assert_eq!(fields(&quoted.join(","), Delimiter::Byte(b',')), Ok(trimmed));
        }

        #[test]
        fn splitting_is_reading_some_of_all_fields(line in "[ab,\" ]{0,20}") {
            let comma = Delimiter::Byte(b',');
            let splitter = Splitter::new(comma, 3, [Some(2), Some(0), Some(2), Some(0), Some(7)]);
            match (split(line.as_bytes(), comma), splitter.split(line.as_bytes())) {
                (Ok(all), Ok(some)) => {
                    let at = |column: usize| all.get(column).cloned();
                    prop_assert_eq!(some.slots, [at(2), at(0), at(2), at(0), at(7)]);
                    let beyond = all.iter().rposition(|field| !field.is_empty()).map_or(0, |last| last + 1);
                    prop_assert_eq!(some.count, if beyond > 3 { beyond } else { all.len().min(3) });
                }
                (Err(all), Err(some)) => prop_assert_eq!(all, some),
                (all, some) => prop_assert!(false, "{:?} but {:?}", all, some),
            }
        }
    }
}
