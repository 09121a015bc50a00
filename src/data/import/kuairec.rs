//! KuaiRec: `big_matrix.csv` and `small_matrix.csv`.
//!
//! There is no flag; its authors suggest a watch ratio above 2 as liked. Times are seconds with a fraction;
//! some rows have none, which makes them bad rows (`--skip-bad-rows`).

use super::DataError;
use super::layout::{Head, Layout, delimited};

pub(super) fn layout(head: &Head) -> Result<Layout, DataError> {
    let delimiter = head.delimiter(b",\t")?;
    let names: [&[&str]; 4] = [&["user_id"], &["video_id"], &["timestamp"], &["watch_ratio"]];
    Ok(delimited(head.by_header(delimiter, true, names, |name| name)?, delimiter, true, true, false))
}
