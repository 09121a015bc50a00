//! Finds the columns of a log, and whether its first line is a header.

use super::fields::{Delimiter, SLOTS, count_delimiters, split};
use super::label::Rule;
use super::lines::Lines;
use super::source::matches;
use super::time;
use super::{ColumnOptions, DataError, ImportOptions, Liked};
use std::path::Path;

/// The properties of a log format.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schema {
    /// Names of the user, item, time and label columns, the preferred one first.
    pub names: [&'static [&'static str]; 4],
    /// The columns of a log without header: user, item, time, label; `None` if a header is
    /// required.
    pub positions: Option<[usize; 4]>,
    /// Possible delimiters; if several are equally frequent, the first is chosen.
    pub delimiters: &'static [Delimiter],
    /// Whether a header has the form `name:type`.
    pub typed: bool,
    /// The threshold of a label column with this name; `None` if it holds flags.
    pub threshold: fn(&str) -> Option<f64>,
    /// Finds `positions` from the first rows, for formats with several column orders.
    #[expect(clippy::type_complexity, reason = "a field of a table of constants")]
    pub order: Option<fn(&[Vec<String>]) -> Result<[usize; 4], &'static str>>,
    /// Archive members that are not logs, besides [`NEVER_LOGS`].
    pub other_members: &'static [&'static str],
}

/// Number of lines to examine where one is not enough.
const VOTERS: usize = 200;
/// Files beside the logs in any archive.
const NEVER_LOGS: &[&str] =
    &["README*", "LICENSE*", "*.md", "*.py", "*.ipynb", "*.html", "*.pdf", "*.sh", "*.pl"];
/// Comma and tab, the delimiters of most formats.
pub(super) const COMMA_OR_TAB: &[Delimiter] = &[Delimiter::Byte(b','), Delimiter::Byte(b'\t')];

impl Schema {
    /// Whether an archive member is a log: by the given pattern, or else by the files that the
    /// format is known to ship beside its logs.
    pub(super) fn is_log(&self, member: &Path, pattern: Option<&str>) -> bool {
        match pattern {
            Some(pattern) => matches(pattern, member),
            None => ![NEVER_LOGS, self.other_members].concat().iter().any(|other| matches(other, member)),
        }
    }
}

/// The role of a column; its number is the column's slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    User,
    Item,
    Time,
    Label,
    /// The day, if the time column holds only the time of day.
    Date,
}

impl Role {
    pub(super) const ALL: [Role; SLOTS] = [Role::User, Role::Item, Role::Time, Role::Label, Role::Date];

    pub(super) fn name(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Item => "item",
            Role::Time => "time",
            Role::Label => "label",
            Role::Date => "date",
        }
    }

    /// The column that the options give for this role.
    pub(super) fn wanted(self, options: &ColumnOptions) -> Option<&str> {
        match self {
            Role::User => options.user.as_deref(),
            Role::Item => options.item.as_deref(),
            Role::Time => options.time.as_deref(),
            Role::Label => options.label.as_deref(),
            Role::Date => options.date.as_deref(),
        }
    }

    /// The names of the role's column in this format.
    fn aliases(self, schema: &Schema) -> &'static [&'static str] {
        schema.names.get(self as usize).copied().unwrap_or(&[])
    }

    /// Whether every row must have this column.
    fn needed(self, options: &ImportOptions) -> bool {
        match self {
            Role::User | Role::Item | Role::Time => true,
            Role::Label => options.liked != Liked::Every,
            Role::Date => options.columns.date.is_some(),
        }
    }
}

/// A column, with its name in messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    pub index: usize,
    pub name: String,
}

/// The columns of the roles that are read.
pub(super) type Columns = [Option<Column>; SLOTS];

/// The name of the label column.
pub(super) fn label_name(columns: &Columns) -> Option<&str> {
    columns[Role::Label as usize].as_ref().map(|column| &*column.name)
}

/// How the lines of a delimited text are read.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub delimiter: Delimiter,
    /// The header's text, trimmed.
    pub header: Option<Vec<u8>>,
    /// Number of fields of a whole row, and the line it was taken from.
    pub fields: (usize, u64),
    pub columns: Columns,
    pub rule: Rule,
}

/// The log whose layout is sought.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub name: &'a Path,
    pub options: &'a ImportOptions,
    pub schema: &'a Schema,
}

impl Context<'_> {
    /// The log does not have the stated format.
    pub(super) fn unknown(&self, reason: impl Into<String>) -> DataError {
        DataError::UnknownLayout {
            path: self.name.to_owned(),
            format: self.options.format.name(),
            reason: reason.into(),
        }
    }

    /// Finds columns by the names of a header or schema.
    pub(super) fn by_names(&self, names: &[String]) -> Result<Columns, DataError> {
        let mut columns = [const { None }; SLOTS];
        for role in Role::ALL.into_iter().filter(|role| role.needed(self.options)) {
            columns[role as usize] = Some(self.by_name(role, names)?);
        }
        Ok(columns)
    }

    fn by_name(&self, role: Role, names: &[String]) -> Result<Column, DataError> {
        let aliases = role.aliases(self.schema);
        let wanted = role.wanted(&self.options.columns);
        let find = |wanted: &str| names.iter().position(|name| name == wanted);
        let index = match wanted {
            Some(wanted) => {
                find(wanted).or_else(|| wanted.parse().ok().filter(|&index: &usize| index < names.len()))
            }
            None => aliases.iter().find_map(|alias| find(alias)),
        };
        let missing = || DataError::MissingColumn {
            path: self.name.to_owned(),
            role: role.name(),
            column: wanted.map_or_else(|| aliases.join(" or "), str::to_owned),
            available: names.to_vec(),
        };
        let index = index.ok_or_else(missing)?;
        let by_number = wanted.is_some_and(|wanted| *wanted != names[index]);
        match names[index + 1..].iter().position(|name| *name == names[index]) {
            Some(again) if !by_number => Err(DataError::AmbiguousColumn {
                path: self.name.to_owned(),
                column: names[index].clone(),
                option: role.name(),
                numbers: [index, index + 1 + again],
            }),
            _ => Ok(Column { index, name: names[index].clone() }),
        }
    }

    /// Columns by number: the given ones, or else `usual`. `None` if a column is given by name or
    /// not at all.
    fn by_numbers(&self, usual: Option<[usize; 4]>) -> Option<Columns> {
        let mut columns = [const { None }; SLOTS];
        for role in Role::ALL.into_iter().filter(|role| role.needed(self.options)) {
            let index = match role.wanted(&self.options.columns) {
                Some(wanted) => wanted.parse().ok()?,
                None => *usual?.get(role as usize)?,
            };
            columns[role as usize] = Some(Column { index, name: role.name().to_owned() });
        }
        Some(columns)
    }

    /// The rule for a label column with this name.
    pub(super) fn rule(&self, label: Option<&str>) -> Rule {
        Rule::new(self.options, (self.schema.threshold)(label.unwrap_or_default()))
    }

    /// The layout of a delimited text, from its first lines.
    pub(super) fn delimited(&self, lines: &Lines) -> Result<Layout, DataError> {
        let first = lines
            .head()
            .next()
            .ok_or_else(|| self.unknown("it is empty (of an archive, choose members with --member)"))?;
        let delimiter = self.delimiter(lines)?;
        let header = |names: &[String], columns: Columns| Layout {
            delimiter,
            header: Some(first.text.trim_ascii().to_vec()),
            fields: (names.len(), first.number),
            rule: self.rule(label_name(&columns)),
            columns,
        };
        let by_numbers = self.by_numbers(self.schema.positions);
        if by_numbers.is_none() && std::str::from_utf8(first.text).is_err() {
            return Err(self.unknown("its first line, which must name the columns, is not UTF-8 text"));
        }
        let names = match split(first.text, delimiter) {
            Ok(fields) => texts(&fields),
            Err(_) if by_numbers.is_some() => return self.without_header(lines, delimiter),
            Err(broken) => {
                return Err(self.unknown(format!("its first line names no columns: {}", broken.reason())));
            }
        };
        let typed = self.schema.typed && names.iter().any(|name| name.contains(':'));
        let clean: Vec<String> = match typed {
            true => names.iter().map(|name| untyped(name).to_owned()).collect(),
            false => names.clone(),
        };
        match by_numbers {
            // Columns given by name, or found by name, need a header.
            None if self.schema.typed && !typed => Err(self.unknown("its header has no name:type columns")),
            None => Ok(header(&names, self.by_names(&clean)?)),
            Some(_) if is_count(&names) => Ok(header(&names, self.positional(lines, delimiter)?)),
            Some(columns) if typed || self.names_columns(&clean, &columns) => {
                Ok(header(&names, self.by_names(&clean)?))
            }
            Some(_) => self.without_header(lines, delimiter),
        }
    }

    fn without_header(&self, lines: &Lines, delimiter: Delimiter) -> Result<Layout, DataError> {
        let columns = self.positional(lines, delimiter)?;
        let (rule, fields) = (self.rule(label_name(&columns)), most_common_count(lines, delimiter));
        Ok(Layout { delimiter, header: None, fields, columns, rule })
    }

    /// Columns by number. If the format has several orders, the first rows decide.
    fn positional(&self, lines: &Lines, delimiter: Delimiter) -> Result<Columns, DataError> {
        let given = |role: Role| role.wanted(&self.options.columns).is_some();
        let positions = match self.schema.order {
            Some(order) if !(given(Role::User) && given(Role::Item)) => {
                let rows = lines.head().take(VOTERS).filter_map(|line| split(line.text, delimiter).ok());
                let rows: Vec<Vec<String>> = rows.map(|fields| texts(&fields)).collect();
                Some(order(&rows).map_err(|reason| self.unknown(reason))?)
            }
            _ => self.schema.positions,
        };
        Ok(self.by_numbers(positions).expect("the caller has seen that all columns have numbers"))
    }

    /// The given delimiter, or else the format's delimiter that is most frequent in the first line;
    /// if that line has none (it may be a bad row), the first line with one decides.
    fn delimiter(&self, lines: &Lines) -> Result<Delimiter, DataError> {
        if let Some(delimiter) = self.options.columns.delimiter {
            return Ok(Delimiter::Byte(delimiter));
        }
        let most_of = |line: &[u8]| {
            let counts = self
                .schema
                .delimiters
                .iter()
                .map(|&delimiter| (count_delimiters(line, delimiter), delimiter));
            // Of equal counts the first is wanted, and `max_by_key` returns the last.
            let (count, delimiter) = counts.rev().max_by_key(|&(count, _)| count)?;
            (count > 0).then_some(delimiter)
        };
        let found = lines.head().take(VOTERS).find_map(|line| most_of(line.text));
        found.ok_or_else(|| self.unknown("its first lines have no delimiter that is known; give --delimiter"))
    }

    /// Whether the first line is certainly a header: it contains a name that the format knows, or
    /// words where times and labels are numbers.
    fn names_columns(&self, fields: &[String], columns: &Columns) -> bool {
        let known = |role: Role| {
            role.wanted(&self.options.columns).is_none()
                && role.aliases(self.schema).iter().any(|alias| fields.iter().any(|field| field == alias))
        };
        if Role::ALL.into_iter().any(known) {
            return true;
        }
        let rule = self.rule(label_name(columns));
        let numeric = |role: Role| match role {
            Role::Time | Role::Date => true,
            Role::Label => rule.numeric(),
            Role::User | Role::Item => false,
        };
        let cells: Vec<&str> = Role::ALL
            .into_iter()
            .filter(|&role| numeric(role))
            .filter_map(|role| columns[role as usize].as_ref())
            .map(|column| fields.get(column.index).map_or("", |field| field))
            .collect();
        let all_words = cells.iter().all(|cell| is_word(cell));
        // A single word may be a bad time.
        all_words && (cells.len() > 1 || fields.iter().any(|field| is_usual_name(field)))
    }
}

/// Whether the names are `0,1,2,3`, possibly after an empty name: pandas writes this header for
/// unnamed columns.
fn is_count(names: &[String]) -> bool {
    let names = match names.split_first() {
        Some((first, rest)) if first.is_empty() => rest,
        _ => names,
    };
    names.len() >= 3 && names.iter().enumerate().all(|(number, name)| *name == number.to_string())
}

/// Whether a field cannot be a number, a date or a missing value.
fn is_word(field: &str) -> bool {
    const MISSING: [&str; 8] = ["na", "n/a", "nan", "null", "none", "nil", "true", "false"];
    field.starts_with(|first: char| first.is_alphabetic() || first == '_')
        && !MISSING.contains(&&*field.to_ascii_lowercase())
        && time::parse(field.as_bytes()).is_err()
}

/// Whether this is a common name for a column.
fn is_usual_name(field: &str) -> bool {
    const PARTS: [&str; 16] = [
        "user", "item", "time", "date", "rating", "label", "movie", "video", "product", "event", "click",
        "score", "session", "visitor", "stars", "asin",
    ];
    let field = field.to_ascii_lowercase();
    let is_id = field.ends_with("id") && field.len() <= 12 && is_word(&field);
    let has_digit = field.bytes().any(|byte| byte.is_ascii_digit());
    !has_digit && (is_id || PARTS.iter().any(|part| field.contains(part)))
}

/// `user_id` of `user_id:token`.
fn untyped(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(name, _)| name)
}

fn texts(fields: &[std::borrow::Cow<'_, [u8]>]) -> Vec<String> {
    fields.iter().map(|field| String::from_utf8_lossy(field).into_owned()).collect()
}

/// The most common number of fields in the head, and the first line with this number.
fn most_common_count(lines: &Lines, delimiter: Delimiter) -> (usize, u64) {
    let mut counts: Vec<(usize, u64, usize)> = Vec::new();
    for line in lines.head().take(VOTERS) {
        let Ok(fields) = split(line.text, delimiter) else { continue };
        match counts.iter_mut().find(|(count, ..)| *count == fields.len()) {
            Some((_, _, times)) => *times += 1,
            None => counts.push((fields.len(), line.number, 1)),
        }
    }
    // Of equal counts, the first: `max_by_key` returns the last.
    let best = counts.iter().rev().max_by_key(|(.., times)| *times);
    best.map_or((0, 1), |&(count, line, _)| (count, line))
}
