//! Reading rows, in one way for all formats: fields to user, item, time and feedback, or a bad row.

use super::layout::{Column, Delimited, Head, Layout};
use super::source::{self, Source};
use super::{ImportOptions, LogFormat, Progress, TimeUnit};
use super::{amazon, csv, inter, kuairand, kuairec, movielens};
use crate::data::{BadRow, DataError};
use serde::Deserialize;
use std::borrow::Cow;
use std::cell::Cell;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

/// A row longer than this is refused, so that a stray quote cannot pull a whole log into memory.
const ROW_BYTES: usize = 1 << 24;

/// One row of a log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row<'a> {
    pub user: &'a str,
    pub item: &'a str,
    /// Milliseconds.
    pub time: i64,
    pub liked: bool,
}

/// Reads the rows of several logs and counts the bad ones.
pub(super) struct Rows<'a> {
    options: &'a ImportOptions,
    progress: &'a dyn Progress,
    /// Rows read, bad ones included.
    pub read: u64,
    /// Bad rows.
    pub skipped: u64,
    /// What counts as liked, for the protocol.
    pub rule: String,
}

/// A field that cannot be used: its column, what stands there, why not.
struct Fault<'a> {
    field: &'a str,
    value: &'a [u8],
    reason: Cow<'static, str>,
}

/// What makes a row liked.
#[derive(Debug, Clone, Copy)]
enum Positive {
    Above(f64),
    Flag,
}

impl<'a> Rows<'a> {
    pub(super) fn new(options: &'a ImportOptions, progress: &'a dyn Progress) -> Self {
        Rows { options, progress, read: 0, skipped: 0, rule: String::new() }
    }

    /// Calls `each` with the rows of one log.
    pub(super) fn read(
        &mut self,
        path: &Path,
        each: impl FnMut(Row) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let source = source::open(path, self.progress)?;
        let format = self.options.format;
        let head = Head { path, format, options: &self.options.columns, text: &source.head };
        let layout = match format {
            LogFormat::MovieLens => movielens::layout(&head),
            LogFormat::Amazon => amazon::layout(&head),
            LogFormat::KuaiRand => kuairand::layout(&head),
            LogFormat::KuaiRec => kuairec::layout(&head),
            LogFormat::Inter => inter::layout(&head),
            LogFormat::Csv => csv::layout(&head),
        }?;
        match layout {
            Layout::Delimited(layout) => self.read_delimited(path, source, &layout, each),
            Layout::AmazonJson => self.read_json(path, source, each),
        }
    }

    fn read_delimited(
        &mut self,
        path: &Path,
        source: Source,
        layout: &Delimited,
        mut each: impl FnMut(Row) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let positive = self.positive(&layout.label.name, layout.flag);
        let ration = Ration::default();
        let mut reader = ::csv::ReaderBuilder::new()
            .has_headers(layout.header)
            .flexible(true)
            .delimiter(layout.delimiter)
            .quoting(layout.quoted)
            // A carriage return before it is trimmed with the field; the crate's own CRLF handling leaves it
            // open which line a record is on.
            .terminator(::csv::Terminator::Any(b'\n'))
            .from_reader(Rationed { inner: source.all, ration: &ration });
        if layout.header {
            reader.byte_headers().map_err(|error| read_error(error, path, 1))?;
        }
        let mut record = ::csv::ByteRecord::new();
        loop {
            ration.left.set(ROW_BYTES);
            let line = reader.position().line();
            match reader.read_byte_record(&mut record) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => return Err(read_error(error, path, line)),
            }
            if record.len() == 1 && record[0].trim_ascii().is_empty() {
                continue;
            }
            self.read += 1;
            match self.parse(&record, layout, positive) {
                Ok(row) => each(row)?,
                Err(fault) => {
                    // Only a record without a line end makes the parser look for more before it gives it out.
                    let end = reader.position().line() - u64::from(!ration.ended.get());
                    let within = record.as_slice().iter().filter(|&&byte| byte == b'\n').count() as u64;
                    self.skip(path, end - within, fault)?;
                }
            }
        }
    }

    fn parse<'r>(
        &self,
        record: &'r ::csv::ByteRecord,
        layout: &'r Delimited,
        positive: Positive,
    ) -> Result<Row<'r>, Fault<'r>> {
        let field = |column: &'r Column| {
            let value = record.get(column.index).map(<[u8]>::trim_ascii);
            let reason = || format!("the row has only {} fields", record.len());
            value.ok_or_else(|| Fault { field: &column.name, value: b"", reason: reason().into() })
        };
        let id = |column: &'r Column| {
            let value = field(column)?;
            let fault = |reason| Fault { field: &column.name, value, reason: Cow::Borrowed(reason) };
            let text = std::str::from_utf8(value).map_err(|_| fault("not UTF-8"))?;
            if text.is_empty() { Err(fault("empty")) } else { Ok(text) }
        };
        let (user, item) = (id(&layout.user)?, id(&layout.item)?);
        let (time, label) = (field(&layout.time)?, field(&layout.label)?);
        let time = milliseconds(time, self.options.time_unit).map_err(|reason| Fault {
            field: &layout.time.name,
            value: time,
            reason: reason.into(),
        })?;
        let liked = positive.judge(label).map_err(|reason| Fault {
            field: &layout.label.name,
            value: label,
            reason: reason.into(),
        })?;
        Ok(Row { user, item, time, liked })
    }

    fn read_json(
        &mut self,
        path: &Path,
        source: Source,
        mut each: impl FnMut(Row) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let positive = self.positive("rating", false);
        let mut reader = BufReader::new(source.all);
        let mut text = Vec::new();
        for line in 1.. {
            text.clear();
            let mut rationed = (&mut reader).take(ROW_BYTES as u64);
            let length = rationed.read_until(b'\n', &mut text).map_err(DataError::read(path))?;
            if length == 0 {
                break;
            }
            if length == ROW_BYTES && text.last() != Some(&b'\n') {
                return Err(too_long(path, line));
            }
            let text = text.trim_ascii();
            if text.is_empty() {
                continue;
            }
            self.read += 1;
            let fault = |field, reason| Fault { field, value: text, reason };
            let review: Result<Review, _> = serde_json::from_slice(text);
            let row = match &review {
                Ok(review) => review
                    .row(positive, self.options.time_unit)
                    .map_err(|(field, reason)| fault(field, reason.into())),
                Err(error) => Err(fault("review", error.to_string().into())),
            };
            match row {
                Ok(row) => each(row)?,
                Err(fault) => self.skip(path, line, fault)?,
            }
        }
        Ok(())
    }

    /// Counts a bad row, or gives up.
    fn skip(&mut self, path: &Path, line: u64, fault: Fault) -> Result<(), DataError> {
        const SHOWN: usize = 80;
        let value = String::from_utf8_lossy(fault.value);
        let row = BadRow {
            path: path.to_owned(),
            line,
            field: fault.field.to_owned(),
            value: value.chars().take(SHOWN).collect(),
            reason: fault.reason.into_owned(),
        };
        let allowed = self.options.skip_bad_rows;
        if self.skipped < allowed {
            self.skipped += 1;
            self.progress.skipped(&row);
            return Ok(());
        }
        let row = Box::new(row);
        Err(if allowed == 0 { DataError::BadRow(row) } else { DataError::TooManyBadRows { allowed, row } })
    }

    /// The rule for this column, noted for the protocol.
    fn positive(&mut self, column: &str, flag: bool) -> Positive {
        let usual = if self.options.format == LogFormat::KuaiRec { 2.0 } else { 3.0 };
        let positive = match self.options.positive_above {
            Some(threshold) => Positive::Above(threshold),
            None if flag => Positive::Flag,
            None => Positive::Above(usual),
        };
        self.rule = match positive {
            Positive::Above(threshold) => format!("{column} > {threshold}"),
            Positive::Flag => format!("{column} = 1"),
        };
        positive
    }
}

impl Positive {
    fn judge(self, label: &[u8]) -> Result<bool, &'static str> {
        match (self, label) {
            (Positive::Flag, b"0") => Ok(false),
            (Positive::Flag, b"1") => Ok(true),
            _ => self.judge_number(number(label).ok_or("not a number")?),
        }
    }

    fn judge_number(self, label: f64) -> Result<bool, &'static str> {
        match self {
            Positive::Above(threshold) => Ok(label > threshold),
            Positive::Flag if label == 0.0 => Ok(false),
            Positive::Flag if label == 1.0 => Ok(true),
            Positive::Flag => Err("a flag is 0 or 1 (for ratings give --positive-above)"),
        }
    }
}

/// A finite number.
fn number(field: &[u8]) -> Option<f64> {
    let number: f64 = std::str::from_utf8(field).ok()?.parse().ok()?;
    number.is_finite().then_some(number)
}

/// A time in milliseconds. Whole numbers stay exact.
fn milliseconds(field: &[u8], unit: TimeUnit) -> Result<i64, &'static str> {
    let whole = std::str::from_utf8(field).ok().and_then(|text| text.parse::<i64>().ok());
    match whole {
        Some(time) => match in_milliseconds(time as f64, unit)? {
            true => Ok(time),
            false => time.checked_mul(1000).ok_or("not a time: too large"),
        },
        None => milliseconds_of(number(field).ok_or("not a number")?, unit),
    }
}

/// As [`milliseconds`], for a number with a fraction, rounded to the nearest millisecond.
fn milliseconds_of(time: f64, unit: TimeUnit) -> Result<i64, &'static str> {
    let time = if in_milliseconds(time, unit)? { time } else { time * 1000.0 };
    match time.abs() < 9e18 {
        true => Ok(time.round() as i64),
        false => Err("not a time: too large"),
    }
}

/// Whether a time is in milliseconds already, rather than in seconds.
fn in_milliseconds(time: f64, unit: TimeUnit) -> Result<bool, &'static str> {
    match unit {
        TimeUnit::Seconds => Ok(false),
        TimeUnit::Milliseconds => Ok(true),
        TimeUnit::Auto if time.abs() < 1e11 => Ok(false),
        TimeUnit::Auto if time.abs() < 1e14 => Ok(true),
        TimeUnit::Auto => Err("neither seconds nor milliseconds since 1970 (see --time-unit)"),
    }
}

/// A review as the three generations spell it.
#[derive(Deserialize)]
struct Review<'a> {
    #[serde(borrow, alias = "reviewerID")]
    user_id: Option<Cow<'a, str>>,
    /// 2023: the product of which `asin` is one variant.
    #[serde(borrow)]
    parent_asin: Option<Cow<'a, str>>,
    #[serde(borrow)]
    asin: Option<Cow<'a, str>>,
    #[serde(alias = "overall")]
    rating: Option<f64>,
    #[serde(alias = "sortTimestamp", alias = "unixReviewTime")]
    timestamp: Option<f64>,
}

impl Review<'_> {
    fn row(&self, positive: Positive, unit: TimeUnit) -> Result<Row<'_>, (&'static str, &'static str)> {
        fn filled<'a>(id: &'a Option<Cow<'_, str>>) -> Option<&'a str> {
            id.as_deref().map(str::trim).filter(|id| !id.is_empty())
        }
        let user = filled(&self.user_id).ok_or(("user_id", "missing (nor is there a reviewerID)"))?;
        let item = filled(&self.parent_asin).or_else(|| filled(&self.asin));
        let item = item.ok_or(("parent_asin", "missing (nor is there an asin)"))?;
        let rating = self.rating.ok_or(("rating", "missing (nor is there an overall)"))?;
        let time = self.timestamp.ok_or(("timestamp", "missing (nor a sortTimestamp or unixReviewTime)"))?;
        let time = milliseconds_of(time, unit).map_err(|reason| ("timestamp", reason))?;
        let liked = positive.judge_number(rating).map_err(|reason| ("rating", reason))?;
        Ok(Row { user, item, time, liked })
    }
}

/// What may be read for one record.
#[derive(Debug)]
struct Ration {
    /// Bytes left; filled up before each record.
    left: Cell<usize>,
    /// Whether the end of the file was met.
    ended: Cell<bool>,
}

impl Default for Ration {
    fn default() -> Self {
        Ration { left: Cell::new(ROW_BYTES), ended: Cell::new(false) }
    }
}

/// Reads until the ration is used up.
struct Rationed<'a, R> {
    inner: R,
    ration: &'a Ration,
}

impl<R: Read> Read for Rationed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let left = self.ration.left.get().checked_sub(count);
        self.ration.left.set(left.ok_or_else(|| std::io::Error::from(ErrorKind::FileTooLarge))?);
        self.ration.ended.set(count == 0);
        Ok(count)
    }
}

fn read_error(error: ::csv::Error, path: &Path, line: u64) -> DataError {
    match error.into_kind() {
        ::csv::ErrorKind::Io(error) if error.kind() == ErrorKind::FileTooLarge => too_long(path, line),
        ::csv::ErrorKind::Io(error) => DataError::read(path)(error),
        other => DataError::read(path)(std::io::Error::other(format!("line {line}: {other:?}"))),
    }
}

fn too_long(path: &Path, line: u64) -> DataError {
    DataError::BadRow(Box::new(BadRow {
        path: path.to_owned(),
        line,
        field: "row".to_owned(),
        value: String::new(),
        reason: format!("longer than {ROW_BYTES} bytes (a quote that is not closed?)"),
    }))
}
