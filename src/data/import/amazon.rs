//! Amazon reviews, all three generations.
//!
//! - 2014 `ratings_<Category>.csv`: no header, `user,item,rating,timestamp` (s)
//! - 2018 `<Category>.csv`: no header, `item,user,rating,timestamp` (s): the first two are swapped
//! - 2023 `<Category>.csv`: header `user_id,parent_asin,rating,timestamp` (ms), sometimes with more columns
//! - JSON lines of each: `reviewerID, asin, overall, unixReviewTime` or `user_id, parent_asin, rating, timestamp`
//!
//! Which of the first two a file is cannot be told from its name (loaders in circulation disagree), but from
//! its ids: an item is an ASIN of ten characters, a user begins with `A` and has twelve or more.

use super::DataError;
use super::layout::split;
use super::layout::{Head, Layout, Role, delimited, is_number};

/// Lines that vote on the order of the columns.
const VOTERS: usize = 200;

pub(super) fn layout(head: &Head) -> Result<Layout, DataError> {
    let line = head.first_line()?;
    if line.starts_with('{') {
        return Ok(Layout::AmazonJson);
    }
    let delimiter = head.delimiter(b",\t")?;
    let fields = split(line, delimiter, true);
    if fields.get(2).is_some_and(|rating| !is_number(rating)) {
        let names: [&[&str]; 4] = [
            &["user_id", "reviewerID"],
            &["parent_asin", "asin"],
            &["timestamp", "sortTimestamp", "unixReviewTime"],
            &["rating", "overall"],
        ];
        let columns = head.by_header(delimiter, true, names, |name| name)?;
        return Ok(delimited(columns, delimiter, true, true, false));
    }
    let given = |role: Role| role.wanted(head.options).is_some();
    let (user, item) = if given(Role::User) && given(Role::Item) {
        (None, None)
    } else if user_first(head, delimiter)? {
        (Some(0), Some(1))
    } else {
        (Some(1), Some(0))
    };
    let columns = head.by_number([user, item, Some(3), Some(2)], 1)?;
    Ok(delimited(columns, delimiter, true, false, false))
}

/// Whether the user stands before the item, by the look of the ids.
fn user_first(head: &Head, delimiter: u8) -> Result<bool, DataError> {
    let mut votes = 0i32;
    for line in head.lines().take(VOTERS) {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        let fields = split(line, delimiter, true);
        let [first, second, ..] = &fields[..] else { continue };
        votes += i32::from(is_asin(second)) + i32::from(is_user(first));
        votes -= i32::from(is_asin(first)) + i32::from(is_user(second));
    }
    match votes {
        1.. => Ok(true),
        ..0 => Ok(false),
        0 => Err(head.unknown(
            "neither of the first two columns looks like users or items: give --user-column and --item-column \
             (2014 files: 0 and 1, 2018 files: 1 and 0)",
        )),
    }
}

fn is_asin(id: &str) -> bool {
    id.len() == 10 && id.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase())
}

fn is_user(id: &str) -> bool {
    id.len() >= 12 && id.starts_with('A')
}
