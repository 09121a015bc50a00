//! Converts rows of all formats to events: the fields become user, item, time and feedback, or the
//! row is bad.

use super::fields::{SLOTS, Splitter};
use super::json::{JsonLayout, Objects};
use super::label::{Rule, Verdict};
use super::layout::{Column, Columns, Context, Role, Schema};
use super::lines::Lines;
use super::source::{self, Log};
use super::time::{self, Clock, RawTime, Stamp};
use super::{ImportOptions, Liked, Progress};
use crate::data::{BadRow, DataError, TimeSighting};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Number of other event names that are listed individually.
const LISTED_NAMES: usize = 20;

const NO_HEADER: &str = "no header";

/// One row of a log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row<'a> {
    pub user: &'a str,
    pub item: &'a str,
    pub time: RawTime,
    pub liked: bool,
}

/// The consumer of rows.
pub(super) type Each<'a> = &'a mut dyn FnMut(Row) -> Result<(), DataError>;

/// A field, in the type of its format.
#[derive(Debug, Clone)]
pub(super) enum Cell<'a> {
    /// A missing field, or null.
    Absent,
    Text(Cow<'a, [u8]>),
    Whole(i64),
    Natural(u64),
    Real(f64),
    /// A number times a power of ten, `number / 10^scale`.
    Decimal {
        number: i128,
        scale: i8,
    },
    Flag(bool),
    /// A date and time of day, since 1970 in UTC.
    Instant(RawTime),
}

/// Reads the rows of several logs and counts bad rows.
pub(super) struct Rows<'a> {
    pub(super) options: &'a ImportOptions,
    progress: &'a dyn Progress,
    schema: Schema,
    /// Rows read, bad ones included.
    pub read: u64,
    /// Bad rows.
    pub skipped: u64,
    /// The unit of all times.
    pub clock: Clock,
    /// The rules for liked events, each with its logs.
    rules: Vec<(String, Vec<String>)>,
    /// The decisions about each log.
    pub decisions: Vec<String>,
    /// Events with names in neither list, by name.
    others: BTreeMap<String, u64>,
    /// Number of all such events.
    pub other_events: u64,
}

/// An unusable field: its column, its value, and the reason.
pub(super) struct Fault<'a> {
    pub field: &'a str,
    pub value: Cow<'a, [u8]>,
    pub reason: Cow<'static, str>,
}

/// A log that is being read.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub name: &'a Path,
    pub columns: &'a Columns,
    pub rule: &'a Rule,
}

impl<'a> Rows<'a> {
    pub(super) fn new(options: &'a ImportOptions, progress: &'a dyn Progress) -> Self {
        Rows {
            options,
            progress,
            schema: options.format.schema(),
            read: 0,
            skipped: 0,
            clock: Clock::new(options.time_unit),
            rules: Vec::new(),
            decisions: Vec::new(),
            others: BTreeMap::new(),
            other_events: 0,
        }
    }

    /// Calls `each` with the rows of one file, which may be an archive of logs.
    pub(super) fn read(&mut self, path: &Path, each: Each) -> Result<(), DataError> {
        let (schema, pattern) = (self.schema, self.options.member.as_deref());
        let choose = move |member: &Path| schema.is_log(member, pattern);
        source::each_log(path, self.progress, &choose, &mut |log| {
            if pattern.is_some() && log.name == path {
                let reason = "it is not a tar archive, so there is nothing to choose with --member";
                return Err(DataError::read(path)(io::Error::new(ErrorKind::InvalidInput, reason)));
            }
            self.read_log(log, each)
        })
    }

    fn read_log(&mut self, log: Log, each: Each) -> Result<(), DataError> {
        let Log { name, magic, bytes, file } = log;
        let (options, schema) = (self.options, self.schema);
        let context = Context { name: &name, options, schema: &schema };
        if let Some(kind) = super::columnar::Kind::of(&magic) {
            return super::columnar::read(self, &context, kind, bytes, file, each);
        }
        let lines = Lines::new(bytes).map_err(DataError::read(&name))?;
        let begins = |start: &[u8]| {
            lines.head().next().is_some_and(|line| line.text.trim_ascii_start().starts_with(start))
        };
        if begins(b"{") || begins(b"[{") || begins(b"[") && !begins(b"[\"") {
            return self.read_json(&context, lines, each);
        }
        self.read_delimited(&context, lines, each)
    }

    fn read_delimited(&mut self, context: &Context, mut lines: Lines, each: Each) -> Result<(), DataError> {
        let layout = context.delimited(&lines)?;
        let reading = Reading { name: context.name, columns: &layout.columns, rule: &layout.rule };
        let (expected, line_of_expected) = layout.fields;
        let header = match &layout.header {
            Some(_) => format!("line {line_of_expected} names the columns"),
            None => NO_HEADER.to_owned(),
        };
        self.decided(&reading, &header);
        let indices = layout.columns.each_ref().map(|column| column.as_ref().map(|column| column.index));
        let splitter = Splitter::new(layout.delimiter, expected, indices);
        let mut headers = 0u64;
        while let Some(line) = lines.next().map_err(DataError::read(context.name))? {
            // A concatenated file repeats its header.
            if layout.header.as_deref().is_some_and(|header| line.text.trim_ascii() == header) {
                headers += 1;
                continue;
            }
            self.read += 1;
            let whole = |reason: Cow<'static, str>| Fault { field: "row", value: line.text.into(), reason };
            let fields = match splitter.split(line.text) {
                _ if line.too_long => {
                    self.bad_row(&reading, line.number, whole("longer than 16 MiB".into()))?;
                    continue;
                }
                Err(broken) => {
                    self.bad_row(&reading, line.number, whole(broken.reason().into()))?;
                    continue;
                }
                Ok(fields) if fields.count > expected => {
                    let reason =
                        format!("{} fields, where line {line_of_expected} has {expected}", fields.count);
                    self.bad_row(&reading, line.number, whole(reason.into()))?;
                    continue;
                }
                Ok(fields) => fields,
            };
            let count = fields.count;
            let cells = fields.slots.map(|field| field.map_or(Cell::Absent, Cell::Text));
            let absent = || match count {
                1 => "the row has only 1 field".into(),
                _ => format!("the row has only {count} fields").into(),
            };
            self.row(&reading, line.number, cells, absent, each)?;
        }
        if headers > 1 {
            let decision = format!("{}: the header occurs {headers} times", last_part(context.name));
            self.note(decision);
        }
        Ok(())
    }

    fn read_json(&mut self, context: &Context, lines: Lines, each: Each) -> Result<(), DataError> {
        let layout = JsonLayout::new(context);
        let reading = Reading { name: context.name, columns: &layout.columns, rule: &layout.rule };
        self.decided(&reading, "JSON");
        let mut objects = Objects::new(lines);
        while let Some(object) = objects.next().map_err(DataError::read(context.name))? {
            self.read += 1;
            let values = match object.fault {
                Some(fault) => Err(fault.to_owned()),
                None => layout.values(object.text),
            };
            match values {
                Ok(values) => {
                    let cells = values.map(|value| value.map_or(Cell::Absent, Cell::Text));
                    let absent =
                        || "missing; if other keys hold it, name them with --user-column and the like".into();
                    self.row(&reading, object.line, cells, absent, each)?;
                }
                Err(reason) => {
                    let fault = Fault { field: "object", value: object.text.into(), reason: reason.into() };
                    self.bad_row(&reading, object.line, fault)?;
                }
            }
        }
        Ok(())
    }

    /// Processes one row: calls `each` with it, or counts it as bad. `absent` is the reason for a
    /// missing field.
    pub(super) fn row(
        &mut self,
        reading: &Reading,
        line: u64,
        cells: [Cell; SLOTS],
        absent: impl Fn() -> Cow<'static, str>,
        each: Each,
    ) -> Result<(), DataError> {
        // Used for numeric ids of columnar files; otherwise they allocate nothing.
        let mut buffers = [const { String::new() }; 2];
        match self.parse(reading, line, &cells, absent, &mut buffers) {
            Ok(Some(row)) => each(row),
            Ok(None) => Ok(()),
            Err(fault) => self.bad_row(reading, line, fault),
        }
    }

    fn parse<'r>(
        &mut self,
        reading: &'r Reading,
        line: u64,
        cells: &'r [Cell; SLOTS],
        absent: impl Fn() -> Cow<'static, str>,
        [user_buffer, item_buffer]: &'r mut [String; 2],
    ) -> Result<Option<Row<'r>>, Fault<'r>> {
        let name = |role: Role| {
            reading.columns[role as usize].as_ref().map_or(role.name(), |column: &Column| &column.name)
        };
        let fault = |role: Role, reason: Cow<'static, str>| Fault {
            field: name(role),
            value: cells[role as usize].text(),
            reason,
        };
        let present = |role: Role| match &cells[role as usize] {
            Cell::Absent => Err(fault(role, absent())),
            cell => Ok(cell),
        };
        let user =
            id(present(Role::User)?, user_buffer).map_err(|reason| fault(Role::User, reason.into()))?;
        let item =
            id(present(Role::Item)?, item_buffer).map_err(|reason| fault(Role::Item, reason.into()))?;
        let time = present(Role::Time)?;
        let stamp = match reading.columns[Role::Date as usize] {
            None => time.stamp().map_err(|reason| (Role::Time, reason)),
            Some(_) => time::day_and_time(&present(Role::Date)?.text(), &time.text()),
        };
        let stamp = stamp.map_err(|(role, reason)| fault(role, reason.into()))?;
        let verdict = match reading.rule {
            Rule::Every => Verdict::Liked,
            rule => {
                let label = present(Role::Label)?;
                let verdict = match label {
                    Cell::Text(text) => rule.judge(text),
                    Cell::Whole(number) => rule.judge_number(*number as f64),
                    Cell::Natural(number) => rule.judge_number(*number as f64),
                    Cell::Real(number) => rule.judge_number(*number),
                    Cell::Decimal { number, scale } => {
                        rule.judge_number(*number as f64 / 10f64.powi((*scale).into()))
                    }
                    Cell::Flag(flag) => rule.judge_flag(*flag),
                    Cell::Instant(_) | Cell::Absent => Err("not a number"),
                };
                verdict.map_err(|reason| fault(Role::Label, reason.into()))?
            }
        };
        // Only rows that are used count for the unit; other events are not.
        if verdict == Verdict::Other {
            let label = String::from_utf8_lossy(&cells[Role::Label as usize].text()).into_owned();
            self.count_other(label);
            return Ok(None);
        }
        let seen = || TimeSighting {
            path: reading.name.to_owned(),
            line,
            value: String::from_utf8_lossy(&cells[Role::Time as usize].text()).into_owned(),
        };
        let time = self.clock.take(stamp, seen).map_err(|reason| fault(Role::Time, reason.into()))?;
        Ok(Some(Row { user, item, time, liked: verdict == Verdict::Liked }))
    }

    fn count_other(&mut self, label: String) {
        self.other_events += 1;
        // Ids in the place of names would fill the memory.
        let label = if self.others.len() < 1000 || self.others.contains_key(&label) {
            label
        } else {
            "...".to_owned()
        };
        *self.others.entry(label).or_default() += 1;
    }

    /// Counts a bad row; fails above the allowed number.
    pub(super) fn bad_row(&mut self, reading: &Reading, line: u64, fault: Fault) -> Result<(), DataError> {
        const SHOWN: usize = 80;
        let value = String::from_utf8_lossy(&fault.value);
        let row = BadRow {
            path: reading.name.to_owned(),
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

    /// Records the columns of a log and its rule for liked events.
    pub(super) fn decided(&mut self, reading: &Reading, header: &str) {
        let file = last_part(reading.name);
        let mut words = format!("{file}: {header}");
        for role in [Role::User, Role::Item, Role::Date, Role::Time, Role::Label] {
            if let Some(column) = &reading.columns[role as usize] {
                let by_number = column.name == role.name();
                let (name, index) = (&column.name, column.index);
                // Writing to a String cannot fail.
                let _ = match by_number && header == NO_HEADER {
                    true => write!(words, ", {} in column {index}", role.name()),
                    false if by_number => write!(words, ", {name}"),
                    false => write!(words, ", {} = {name}", role.name()),
                };
            }
        }
        let label = reading.columns[Role::Label as usize].as_ref().map_or("label", |column| &column.name);
        let rule = reading.rule.words(label);
        let _ = write!(words, "; liked: {rule}");
        match self.rules.iter_mut().find(|(known, _)| *known == rule) {
            Some((_, files)) => files.push(file),
            None => self.rules.push((rule, vec![file])),
        }
        self.note(words);
    }

    /// Reports a decision, and records it for the protocol.
    pub(super) fn note(&mut self, words: String) {
        self.progress.note(&words);
        self.decisions.push(words);
    }

    /// The rule for liked events in the protocol: one rule, or each with its logs.
    pub(super) fn rule(&self) -> String {
        match &self.rules[..] {
            [] => String::new(),
            [(rule, _)] => rule.clone(),
            rules => {
                let each = rules.iter().map(|(rule, files)| format!("{rule} ({})", files.join(", ")));
                each.collect::<Vec<_>>().join("; ")
            }
        }
    }

    /// Refuses events with names in neither list, unless they are to be ignored.
    pub(super) fn check_others(&mut self) -> Result<(), DataError> {
        if self.other_events == 0 {
            return Ok(());
        }
        let mut names: Vec<(String, u64)> = std::mem::take(&mut self.others).into_iter().collect();
        names.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        names.truncate(LISTED_NAMES);
        if let Liked::Named { ignore_others: true, .. } = self.options.liked {
            let list: Vec<String> = names.iter().map(|(name, count)| format!("{count} {name}")).collect();
            self.note(format!("ignored: {} other events ({})", self.other_events, list.join(", ")));
            return Ok(());
        }
        Err(DataError::OtherEvents { count: self.other_events, names })
    }
}

impl Cell<'_> {
    /// The field as a text.
    fn text(&self) -> Cow<'_, [u8]> {
        let owned = |text: String| Cow::Owned(text.into_bytes());
        match self {
            Cell::Absent => Cow::Borrowed(b""),
            Cell::Text(text) => Cow::Borrowed(text),
            Cell::Whole(number) => owned(number.to_string()),
            Cell::Natural(number) => owned(number.to_string()),
            Cell::Real(number) => owned(number.to_string()),
            Cell::Decimal { number, scale } => owned(format!("{number}e{}", -i32::from(*scale))),
            Cell::Flag(flag) => owned(flag.to_string()),
            Cell::Instant(time) => owned(time.whole.to_string()),
        }
    }

    fn stamp(&self) -> Result<Stamp, &'static str> {
        match self {
            Cell::Text(text) => time::parse(text),
            Cell::Whole(number) => Ok(Stamp::Number(RawTime { whole: *number, billionths: 0 })),
            Cell::Real(number) => RawTime::from_f64(*number).map(Stamp::Number),
            Cell::Decimal { number, scale } => {
                RawTime::decimal(*number, *scale).map(Stamp::Number).ok_or(time::TOO_LARGE)
            }
            Cell::Flag(_) => Err("not a time"),
            Cell::Instant(time) => Ok(Stamp::Instant(*time)),
            Cell::Natural(_) => Err(time::TOO_LARGE),
            Cell::Absent => Err("missing"),
        }
    }
}

/// An id: any text without line ends.
fn id<'r>(cell: &'r Cell, buffer: &'r mut String) -> Result<&'r str, &'static str> {
    let text = match cell {
        Cell::Text(text) => std::str::from_utf8(text).map_err(|_| "not UTF-8")?,
        other => {
            buffer.clear();
            buffer.push_str(std::str::from_utf8(&other.text()).expect("numbers are ASCII"));
            buffer
        }
    };
    match text {
        "" => Err("empty"),
        text if text.bytes().any(|byte| matches!(byte, b'\n' | b'\r')) => Err("a line end within an id"),
        text => Ok(text),
    }
}

/// The name of a file without its folder; for a member, preceded by the archive's.
fn last_part(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
