//! JSON logs: one object per line, or an array of objects.
//!
//! Only scalars under the keys of the needed columns are read: a string as it is, a number by its
//! digits.

use super::Liked;
use super::fields::SLOTS;
use super::label::Rule;
use super::layout::{Column, Context, Role};
use super::lines::Lines;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Longer objects are bad rows.
const LONGEST_OBJECT: usize = super::lines::LONGEST_LINE;

/// The keys of a role, the preferred one first.
type Keys<'a> = [Vec<&'a str>; SLOTS];

/// The keys of the columns, the names of the columns in messages, and the rule for labels.
pub(super) struct JsonLayout<'a> {
    keys: Keys<'a>,
    pub columns: [Option<Column>; SLOTS],
    pub rule: Rule,
}

impl<'a> JsonLayout<'a> {
    /// The keys given by options, or else those of the format.
    pub(super) fn new(context: &'a Context) -> JsonLayout<'a> {
        let options = context.options;
        let mut keys: Keys = Default::default();
        let mut columns = [const { None }; SLOTS];
        for role in Role::ALL {
            let slot = role as usize;
            keys[slot] = match role.wanted(&options.columns) {
                Some(key) => vec![key],
                None if role == Role::Date || role == Role::Label && options.liked == Liked::Every => {
                    continue;
                }
                None => context.schema.names[slot].to_vec(),
            };
            columns[slot] = Some(Column { index: slot, name: keys[slot].join(" or ") });
        }
        let rule = context.rule(keys[Role::Label as usize].first().copied());
        JsonLayout { keys, columns, rule }
    }

    /// The values of an object, or the reason why it is malformed.
    pub(super) fn values<'t>(&self, text: &'t [u8]) -> Result<[Option<Cow<'t, [u8]>>; SLOTS], String> {
        let text = std::str::from_utf8(text).map_err(|_| "not UTF-8".to_owned())?;
        let found = match self.object(text) {
            Ok(found) => found.map(|value| value.map(Cow::Borrowed)),
            // Python writes NaN and Infinity, which JSON does not have, for missing values.
            Err(error) => match without_nan(text).map(|text| self.object(&text).map(owned)) {
                Some(Ok(found)) => found,
                _ => return Err(error.to_string()),
            },
        };
        let mut values = [const { None }; SLOTS];
        for (value, found) in values.iter_mut().zip(found) {
            *value = match found {
                None => None,
                Some(Cow::Borrowed(raw)) => scalar(raw)?,
                Some(Cow::Owned(raw)) => scalar(&raw)?.map(|value| Cow::Owned(value.into_owned())),
            };
        }
        Ok(values)
    }

    fn object<'t>(&self, text: &'t str) -> Result<[Option<&'t str>; SLOTS], serde_json::Error> {
        let mut json = serde_json::Deserializer::from_str(text);
        let found = json.deserialize_map(Find { keys: &self.keys })?;
        json.end()?;
        Ok(found)
    }
}

fn owned<'t>(found: [Option<&str>; SLOTS]) -> [Option<Cow<'t, str>>; SLOTS] {
    found.map(|value| value.map(|text| Cow::Owned(text.to_owned())))
}

/// The text of a scalar, trimmed; `None` for null.
fn scalar(raw: &str) -> Result<Option<Cow<'_, [u8]>>, String> {
    match raw.as_bytes().first() {
        Some(b'"') => match serde_json::from_str(raw).map_err(|error| error.to_string())? {
            Text(Cow::Borrowed(text)) => Ok(Some(Cow::Borrowed(text.trim_ascii().as_bytes()))),
            Text(Cow::Owned(text)) => Ok(Some(Cow::Owned(text.trim_ascii().as_bytes().to_vec()))),
        },
        Some(b'n') => Ok(None),
        Some(b'{' | b'[') => Err("a needed value is an object or an array".to_owned()),
        _ => Ok(Some(Cow::Borrowed(raw.as_bytes()))),
    }
}

/// Finds the values of the needed keys.
struct Find<'k> {
    keys: &'k Keys<'k>,
}

impl<'t> Visitor<'t> for Find<'_> {
    type Value = [Option<&'t str>; SLOTS];

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'t>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found: [Option<(usize, &'t str)>; SLOTS] = [None; SLOTS];
        while let Some(key) = map.next_key::<Text<'t>>()? {
            // Several roles may have the same key.
            let preferences: [Option<usize>; SLOTS] =
                std::array::from_fn(|slot| self.keys[slot].iter().position(|wanted| **wanted == *key.0));
            if preferences.iter().all(Option::is_none) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let raw = map.next_value::<&'t RawValue>()?.get();
            for (slot, preference) in preferences.into_iter().enumerate() {
                let Some(preference) = preference else { continue };
                match found[slot] {
                    Some((other, _)) if other == preference => {
                        return Err(serde::de::Error::custom(format!("the key {} occurs twice", key.0)));
                    }
                    // A null is no value: another key of the role may have one.
                    Some((other, value)) if other < preference && value != "null" => {}
                    _ if raw == "null" && found[slot].is_some() => {}
                    _ => found[slot] = Some((preference, raw)),
                }
            }
        }
        Ok(found.map(|value| value.map(|(_, raw)| raw)))
    }
}

/// A string, copied only where it has escapes.
struct Text<'t>(Cow<'t, str>);

impl<'t> Deserialize<'t> for Text<'t> {
    fn deserialize<D: Deserializer<'t>>(deserializer: D) -> Result<Self, D::Error> {
        struct Whole;
        impl<'t> Visitor<'t> for Whole {
            type Value = Text<'t>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'t str) -> Result<Text<'t>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'t>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Whole)
    }
}

/// The text with null for `NaN`, `Infinity` and `-Infinity`; `None` if it contains none.
fn without_nan(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut found) = (text, false);
    while let Some(at) = rest.find(['"', 'N', 'I', '-']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = match rest.as_bytes()[0] {
            b'"' => string_length(rest.as_bytes())?,
            _ => match ["NaN", "Infinity", "-Infinity"].iter().find(|word| rest.starts_with(**word)) {
                Some(word) => {
                    found = true;
                    out.push_str("null");
                    rest = &rest[word.len()..];
                    continue;
                }
                None => 1,
            },
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    found.then_some(out)
}

/// Length of the string at the start of `text`, its quotes included; `None` if it is not closed.
fn string_length(text: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        match text.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// An object of the log, or malformed text in its place.
pub(super) struct Object<'b> {
    /// The line on which it begins.
    pub line: u64,
    pub text: &'b [u8],
    /// Why the text is not an object.
    pub fault: Option<&'static str>,
}

/// Splits a JSON text into its objects.
///
/// Objects may follow one another or form an array. If most objects of the first lines end on the
/// line where they begin, all must: an object still open at the end of its line is then a bad row,
/// and reading continues with the next line. No string may contain a line end.
pub(super) struct Objects<'a> {
    lines: Lines<'a>,
    /// Whether the text is an array.
    array: bool,
    /// Whether an array is open.
    open: bool,
    /// Whether every object ends on the line on which it begins.
    one_line: bool,
    text: Vec<u8>,
    /// `pending[at..]` is read but not used: the rest of a line, or a part of the rest.
    pending: Vec<u8>,
    at: usize,
    /// The number of that line.
    line: u64,
    /// Whether all of that line is read.
    line_ends: bool,
}

impl<'a> Objects<'a> {
    pub(super) fn new(lines: Lines<'a>) -> Objects<'a> {
        let array = lines.head().next().is_some_and(|line| line.text.trim_ascii().starts_with(b"["));
        let (mut whole, mut open) = (0, 0);
        for line in lines.head() {
            let begin = line.text.iter().take_while(|byte| b" \t[,".contains(byte)).count();
            if line.text[begin..].starts_with(b"{") {
                let (mut depth, mut fault) = (0, None);
                object_part(&line.text[begin..], &mut depth, &mut fault);
                *(if depth == 0 && fault.is_none() { &mut whole } else { &mut open }) += 1;
            }
        }
        // Brackets and commas separate the objects of an array, so a doubt costs nothing there.
        let one_line = if array { whole > open } else { whole >= open };
        let (text, pending) = (Vec::new(), Vec::new());
        Objects { lines, array, open: false, one_line, text, pending, at: 0, line: 0, line_ends: true }
    }

    pub(super) fn next(&mut self) -> std::io::Result<Option<Object<'_>>> {
        self.text.clear();
        let mut begun = 0;
        let mut depth = 0;
        loop {
            if self.rest().is_empty() && !self.read()? {
                if self.text.is_empty() {
                    let fault = Some("the array does not end: the file is cut short");
                    let unclosed = std::mem::take(&mut self.open);
                    return Ok(unclosed.then_some(Object { line: self.line, text: b"[", fault }));
                }
                // One row for the object and its array.
                self.open = false;
                let fault = Some("it does not end");
                return Ok(Some(Object { line: begun, text: &self.text, fault }));
            }
            if depth == 0 {
                self.skip_punctuation();
                if self.rest().is_empty() {
                    continue;
                }
                begun = self.line;
            }
            let mut fault = self.take_part(&mut depth)?;
            let ended = depth == 0 && fault.is_none();
            // Objects of an array are separated by a comma, others by a line end.
            if ended && self.one_line && !self.separated()? {
                fault = Some("more text follows the object");
            }
            if depth > 0 && self.one_line {
                fault = fault.or(Some("it does not end on its line"));
            }
            if self.text.len() > LONGEST_OBJECT {
                fault = Some("it is longer than 16 MiB");
            }
            if fault.is_some() {
                // The rest of the line is lost: one line counts as one bad row.
                self.text.extend_from_slice(&self.pending[self.at..]);
                self.skip_line()?;
                return Ok(Some(Object { line: begun, text: &self.text, fault }));
            }
            if ended {
                return Ok(Some(Object { line: begun, text: &self.text, fault: None }));
            }
            self.text.push(b'\n');
        }
    }

    /// Moves what belongs to an object, of this line, from the unread text to `text`. Returns its
    /// fault.
    fn take_part(&mut self, depth: &mut usize) -> std::io::Result<Option<&'static str>> {
        loop {
            let (mut deep, mut fault) = (*depth, None);
            let length = object_part(self.rest(), &mut deep, &mut fault);
            let whole = deep == 0 && fault.is_none();
            // What is read may end within the object, or within one of its strings.
            if !whole && !self.line_ends && length == self.rest().len() && length <= LONGEST_OBJECT {
                self.read()?;
                continue;
            }
            self.text.extend_from_slice(&self.pending[self.at..self.at + length]);
            self.at += length;
            *depth = deep;
            return Ok(fault);
        }
    }

    fn rest(&self) -> &[u8] {
        &self.pending[self.at..]
    }

    /// Reads the next part of the line, or of the next line. Returns whether there is one.
    fn read(&mut self) -> std::io::Result<bool> {
        self.pending.drain(..self.at);
        self.at = 0;
        let Some(part) = self.lines.next_part()? else { return Ok(false) };
        self.pending.extend_from_slice(part.text);
        (self.line, self.line_ends) = (part.number, part.ends);
        Ok(true)
    }

    fn skip_line(&mut self) -> std::io::Result<()> {
        loop {
            self.at = self.pending.len();
            if self.line_ends {
                return Ok(());
            }
            self.read()?;
        }
    }

    /// Skips what is before the next object: brackets and commas of the array, and blanks.
    fn skip_punctuation(&mut self) {
        while let Some(byte) = self.pending.get(self.at) {
            match byte {
                b'[' if self.array => self.open = true,
                b']' if self.array => self.open = false,
                b',' if self.array => {}
                byte if byte.is_ascii_whitespace() => {}
                _ => break,
            }
            self.at += 1;
        }
    }

    /// Whether the text after an object is valid there.
    fn separated(&mut self) -> std::io::Result<bool> {
        while self.rest().trim_ascii().is_empty() && !self.line_ends {
            self.read()?;
        }
        let rest = self.rest().trim_ascii_start();
        Ok(rest.is_empty() || self.array && (rest.starts_with(b",") || rest.starts_with(b"]")))
    }
}

/// Number of bytes of `text` that belong to an object nested `depth` brackets deep. Sets `fault` if
/// a string is not closed, or if the text is not an object.
fn object_part(text: &[u8], depth: &mut usize, fault: &mut Option<&'static str>) -> usize {
    if *depth == 0 && text.first() != Some(&b'{') {
        *fault = Some("not a JSON object");
        return text.len();
    }
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'{' | b'[' => *depth += 1,
            b'}' | b']' => *depth -= 1,
            b'"' => match string_length(&text[at..]) {
                Some(length) => {
                    at += length;
                    continue;
                }
                None => {
                    *fault = Some("a quote is not closed on this line");
                    return text.len();
                }
            },
            _ => {}
        }
        at += 1;
        if *depth == 0 {
            break;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(text: &str) -> Vec<(u64, String, bool)> {
        let mut objects = Objects::new(Lines::new(Box::new(text.as_bytes())).unwrap());
        let mut out = Vec::new();
        while let Some(object) = objects.next().unwrap() {
            let text = String::from_utf8_lossy(object.text).into_owned();
            out.push((object.line, text, object.fault.is_none()));
        }
        out
    }

    #[test]
    fn objects_stand_on_lines_or_in_arrays() {
        let good = |line, text: &str| (line, text.to_owned(), true);
        let bad = |line, text: &str| (line, text.to_owned(), false);
        for (text, expected) in [
            ("{\"a\":1}\n\n{\"b\":[{}]}\n", vec![good(1, "{\"a\":1}"), good(3, "{\"b\":[{}]}")]),
            ("[{\"a\":1},\n{\"b\":2}]\n", vec![good(1, "{\"a\":1}"), good(2, "{\"b\":2}")]),
            ("[{\"a\":1},{\"b\":2}]", vec![good(1, "{\"a\":1}"), good(1, "{\"b\":2}")]),
            ("[\n  {\n \"a\": \"}\"\n },\n {\n}\n]\n", vec![good(2, "{\n\"a\": \"}\"\n}"), good(5, "{\n}")]),
            ("{\n\"a\":1\n}\n{\n}\n", vec![good(1, "{\n\"a\":1\n}"), good(4, "{\n}")]),
            ("[]\n", vec![]),
            ("[\n{\"a\":\n1},\n{}]\n", vec![good(2, "{\"a\":\n1}"), good(4, "{}")]),
            ("[\n{},\n{},\n", vec![good(2, "{}"), good(3, "{}"), bad(3, "[")]),
            ("[{}", vec![good(1, "{}"), bad(1, "[")]),
            ("[{},\n{\"a\":1,", vec![good(1, "{}"), bad(2, "{\"a\":1,\n")]),
            ("{}\n{\"a\":\n{}\n", vec![good(1, "{}"), bad(2, "{\"a\":"), good(3, "{}")]),
            ("{}\n{\"a\n{}\n", vec![good(1, "{}"), bad(2, "{\"a"), good(3, "{}")]),
            ("{}\n{}{}\n{}\n", vec![good(1, "{}"), bad(2, "{}{}"), good(3, "{}")]),
            ("{}\nnonsense\n{}", vec![good(1, "{}"), bad(2, "nonsense"), good(3, "{}")]),
            ("{\n\"a\"", vec![bad(1, "{\n\"a\"\n")]),
        ] {
            assert_eq!(objects(text), expected, "{text}");
        }
    }

    #[test]
    fn an_array_may_be_one_long_line() {
        let object = |i: usize| format!("{{\"user\": {i}, \"text\": \"{}\"}}", "[{".repeat(i % 50));
        for separator in [",", ",\n", " , "] {
            let rows: Vec<String> = (0..300_000).map(object).collect();
            let text = format!("[{}]", rows.join(separator));
            assert!(text.len() > LONGEST_OBJECT);
            let found = objects(&text);
            assert_eq!(found.len(), rows.len());
            assert!(found.iter().zip(&rows).all(|((_, text, good), row)| *good && text == row));
        }
    }

    #[test]
    fn an_object_of_more_than_16_mib_is_one_bad_row() {
        let long = format!("{{\"a\": \"{}\"}}", "x".repeat(LONGEST_OBJECT + 1));
        let found = objects(&format!("{{}}\n{long}\n{{}}\n"));
        let places: Vec<(u64, bool)> = found.iter().map(|(line, _, good)| (*line, *good)).collect();
        assert_eq!(places, [(1, true), (2, false), (3, true)]);
    }

    #[test]
    fn a_key_may_have_every_role() {
        let layout = JsonLayout {
            keys: std::array::from_fn(|_| vec!["a"]),
            columns: [const { None }; SLOTS],
            rule: Rule::Every,
        };
        let values = layout.values(b"{\"b\":2,\"a\":1}").unwrap();
        assert!(values.iter().all(|value| value.as_deref() == Some(b"1")), "{values:?}");
    }

    #[test]
    fn nan_is_null() {
        assert_eq!(without_nan("{\"NaN\":\"-Infinity\\\"\"}"), None);
        let text = "{\"a\":NaN,\"b\":[-Infinity,-1],\"c\":\"NaN\"}";
        assert_eq!(without_nan(text).unwrap(), "{\"a\":null,\"b\":[null,-1],\"c\":\"NaN\"}");
    }
}
