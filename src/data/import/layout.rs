//! Where a log has its columns.

use super::{ColumnOptions, DataError, LogFormat};
use std::path::Path;

/// How the rows of a log are read.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Layout {
    /// One row a line, fields between delimiters.
    Delimited(Delimited),
    /// One JSON object a line, a review of one of the Amazon data sets.
    AmazonJson,
}

/// Delimited text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Delimited {
    /// The byte between fields. (`::` is `:` with an empty field between: columns are 0, 2, 4 ...)
    pub delimiter: u8,
    /// Whether fields may be quoted with `"`.
    pub quoted: bool,
    /// Whether the first line names the columns.
    pub header: bool,
    pub user: Column,
    pub item: Column,
    pub time: Column,
    pub label: Column,
    /// Whether the label is a flag (0 or 1) rather than a rating.
    pub flag: bool,
}

/// A column with the name that messages call it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    pub index: usize,
    pub name: String,
}

/// The roles a column can have, in the order of [`ColumnOptions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    User,
    Item,
    Time,
    Label,
}

impl Role {
    pub(super) const ALL: [Role; 4] = [Role::User, Role::Item, Role::Time, Role::Label];

    fn name(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Item => "item",
            Role::Time => "time",
            Role::Label => "label",
        }
    }

    /// What the caller asked for.
    pub(super) fn wanted(self, options: &ColumnOptions) -> Option<&str> {
        match self {
            Role::User => options.user.as_deref(),
            Role::Item => options.item.as_deref(),
            Role::Time => options.time.as_deref(),
            Role::Label => options.label.as_deref(),
        }
    }
}

/// The first lines of a log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head<'a> {
    pub path: &'a Path,
    pub format: LogFormat,
    pub options: &'a ColumnOptions,
    pub text: &'a [u8],
}

impl<'a> Head<'a> {
    /// Lines that are not empty, line ends taken off.
    pub(super) fn lines(&self) -> impl Iterator<Item = &'a [u8]> {
        self.text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty())
    }

    /// The first line, as text.
    pub(super) fn first_line(&self) -> Result<&'a str, DataError> {
        let line = self.lines().next().ok_or_else(|| self.unknown("it is empty"))?;
        std::str::from_utf8(line).map_err(|_| self.unknown("its first line is not UTF-8 text"))
    }

    /// That the log is not what it is said to be.
    pub(super) fn unknown(&self, reason: impl Into<String>) -> DataError {
        DataError::UnknownLayout {
            path: self.path.to_owned(),
            format: self.format.name(),
            reason: reason.into(),
        }
    }

    /// The delimiter asked for, or that of `choices` which the first line has most of.
    pub(super) fn delimiter(&self, choices: &[u8]) -> Result<u8, DataError> {
        if let Some(delimiter) = self.options.delimiter {
            return Ok(delimiter);
        }
        let line = self.first_line()?.as_bytes();
        let count = |delimiter: u8| line.iter().filter(|&&byte| byte == delimiter).count();
        // The first of equals: max_by_key takes the last.
        let best = choices.iter().copied().rev().max_by_key(|&delimiter| count(delimiter));
        best.filter(|&delimiter| count(delimiter) > 0)
            .ok_or_else(|| self.unknown("its first line has no delimiter that is known; give --delimiter"))
    }

    /// Columns by the names of the header line: those asked for, or else the first of each role's `aliases`.
    pub(super) fn by_header(
        &self,
        delimiter: u8,
        quoted: bool,
        aliases: [&[&str]; 4],
        clean: fn(&str) -> &str,
    ) -> Result<[Column; 4], DataError> {
        let names: Vec<String> = split(self.first_line()?, delimiter, quoted)
            .iter()
            .map(|name| clean(name.trim()).to_owned())
            .collect();
        let find = |role: Role| {
            let aliases = aliases[role as usize];
            let wanted = role.wanted(self.options);
            let by_name = |wanted: &str| names.iter().position(|name| name == wanted);
            let index = match wanted {
                Some(wanted) => by_name(wanted)
                    .or_else(|| wanted.parse().ok().filter(|&index: &usize| index < names.len())),
                None => aliases.iter().find_map(|alias| by_name(alias)),
            };
            let missing = || DataError::MissingColumn {
                path: self.path.to_owned(),
                column: match wanted {
                    Some(wanted) => wanted.to_owned(),
                    None if aliases.is_empty() => {
                        format!("for the {0}: give --{0}-column", role.name())
                    }
                    None => aliases.join(" or "),
                },
                available: names.clone(),
            };
            let index = index.ok_or_else(missing)?;
            Ok(Column { index, name: names[index].clone() })
        };
        Ok([find(Role::User)?, find(Role::Item)?, find(Role::Time)?, find(Role::Label)?])
    }

    /// Columns of a log without header: the numbers asked for, or else `usual`. `stride` is 2 for `::`.
    pub(super) fn by_number(
        &self,
        usual: [Option<usize>; 4],
        stride: usize,
    ) -> Result<[Column; 4], DataError> {
        let find = |role: Role| {
            let wanted = role.wanted(self.options);
            let index = match wanted {
                Some(wanted) => wanted.parse().ok(),
                None => usual[role as usize],
            };
            let missing = || {
                let wanted = wanted.map_or(String::new(), |wanted| format!(" {wanted}"));
                self.unknown(format!(
                    "it has no header, so --{}-column{wanted} must be a number, counted from 0",
                    role.name()
                ))
            };
            let index: usize = index.ok_or_else(missing)?;
            Ok(Column { index: index * stride, name: role.name().to_owned() })
        };
        Ok([find(Role::User)?, find(Role::Item)?, find(Role::Time)?, find(Role::Label)?])
    }
}

/// The fields of one line.
pub(super) fn split(line: &str, delimiter: u8, quoted: bool) -> Vec<String> {
    let mut reader = ::csv::ReaderBuilder::new()
        .has_headers(false)
        .delimiter(delimiter)
        .quoting(quoted)
        .from_reader(line.as_bytes());
    let record = reader.records().next();
    record.and_then(Result::ok).map_or_else(Vec::new, |record| record.iter().map(str::to_owned).collect())
}

/// A layout of four columns.
pub(super) fn delimited(
    [user, item, time, label]: [Column; 4],
    delimiter: u8,
    quoted: bool,
    header: bool,
    flag: bool,
) -> Layout {
    Layout::Delimited(Delimited { delimiter, quoted, header, user, item, time, label, flag })
}

/// Whether a field reads as a number: then its line is no header.
pub(super) fn is_number(field: &str) -> bool {
    field.trim().parse::<f64>().is_ok()
}
