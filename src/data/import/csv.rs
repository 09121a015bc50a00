//! Any delimited text: the columns are given, by the names of the header or, all four, by number.
//!
//! The label is a flag unless a threshold is given.

use super::DataError;
use super::layout::{Head, Layout, Role, delimited};

pub(super) fn layout(head: &Head) -> Result<Layout, DataError> {
    let delimiter = head.delimiter(b",\t;|")?;
    let number = |role: Role| role.wanted(head.options).is_some_and(|column| column.parse::<usize>().is_ok());
    // A file whose header names a column "3" can still be read: by its other columns' names.
    let header = !Role::ALL.into_iter().all(number);
    let columns = if header {
        head.by_header(delimiter, true, [&[]; 4], |name| name)?
    } else {
        head.by_number([None; 4], 1)?
    };
    Ok(delimited(columns, delimiter, true, header, true))
}
