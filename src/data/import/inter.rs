//! RecBole's atomic files, `.inter`: tabs, and a header of `name:type`.
//!
//! A `rating` column is read as ratings, a `label` column as a flag; other names are options.

use super::DataError;
use super::layout::{Head, Layout, delimited};

pub(super) fn layout(head: &Head) -> Result<Layout, DataError> {
    if !head.first_line()?.contains(':') {
        return Err(head.unknown("its header has no name:type columns"));
    }
    let delimiter = head.delimiter(b"\t,")?;
    let names: [&[&str]; 4] = [
        &["user_id"],
        &["item_id", "business_id", "video_id"],
        &["timestamp", "time_ms", "time"],
        &["rating", "label"],
    ];
    let columns = head.by_header(delimiter, false, names, name_of)?;
    let flag = columns[3].name != "rating";
    Ok(delimited(columns, delimiter, false, true, flag))
}

/// `user_id` of `user_id:token`.
fn name_of(column: &str) -> &str {
    column.rsplit_once(':').map_or(column, |(name, _)| name)
}
