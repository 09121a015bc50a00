//! KuaiRand: `log_*.csv`, whose columns are found by name, so excerpts with other columns or tabs are fine.
//!
//! The label is one of the log's flags: `long_view` (effective view) unless another is asked for, e.g.
//! `is_click` or an excerpt's `label`. Times are milliseconds.

use super::DataError;
use super::layout::{Head, Layout, delimited};

pub(super) fn layout(head: &Head) -> Result<Layout, DataError> {
    let delimiter = head.delimiter(b",\t")?;
    let names: [&[&str]; 4] = [&["user_id"], &["video_id"], &["time_ms"], &["long_view"]];
    Ok(delimited(head.by_header(delimiter, true, names, |name| name)?, delimiter, true, true, true))
}
