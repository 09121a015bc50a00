//! MovieLens: `u.data` (tabs), `ratings.dat` (`::`), `ratings.csv` (commas and a header).
//!
//! All have user, item, rating (1 to 5, half stars from 10M on), time in seconds.

use super::DataError;
use super::layout::{Head, Layout, delimited, is_number, split};

const ORDER: [Option<usize>; 4] = [Some(0), Some(1), Some(3), Some(2)];

pub(super) fn layout(head: &Head) -> Result<Layout, DataError> {
    let line = head.first_line()?;
    if head.options.delimiter.is_none() && line.contains("::") {
        return Ok(delimited(head.by_number(ORDER, 2)?, b':', false, false, false));
    }
    let delimiter = head.delimiter(b"\t,")?;
    if split(line, delimiter, true).first().is_some_and(|field| is_number(field)) {
        return Ok(delimited(head.by_number(ORDER, 1)?, delimiter, false, false, false));
    }
    let names: [&[&str]; 4] =
        [&["userId", "user_id"], &["movieId", "movie_id", "item_id"], &["timestamp"], &["rating"]];
    Ok(delimited(head.by_header(delimiter, true, names, |name| name)?, delimiter, true, true, false))
}
