//! Amazon reviews, all three generations.
//!
//! - 2014 `ratings_<Category>.csv`: no header, `user,item,rating,timestamp` (s)
//! - 2018 `<Category>.csv`: no header, `item,user,rating,timestamp` (s): the first two are swapped
//! - 2023 `<Category>.csv`: header `user_id,parent_asin,rating,timestamp` (ms), sometimes with more
//!   columns
//! - JSON lines of each: `reviewerID, asin, overall, unixReviewTime` or
//!   `user_id, parent_asin, rating, timestamp`
//!
//! The files of 2014 and 2018 cannot be distinguished by name (published loaders disagree), but by
//! their ids: an item is an ASIN of ten characters; a user begins with `A` and has twelve or more.

use super::layout::{COMMA_OR_TAB, Schema};

pub(super) const SCHEMA: Schema = Schema {
    names: [
        &["user_id", "reviewerID"],
        &["parent_asin", "asin"],
        &["timestamp", "sortTimestamp", "unixReviewTime"],
        &["rating", "overall"],
    ],
    positions: Some([0, 1, 3, 2]),
    delimiters: COMMA_OR_TAB,
    typed: false,
    threshold: |_| Some(3.0),
    order: Some(order),
    other_members: &["meta_*"],
};

/// The column order, decided by the form of the ids.
fn order(rows: &[Vec<String>]) -> Result<[usize; 4], &'static str> {
    let vote = |row: &Vec<String>| {
        let [first, second, ..] = &row[..] else { return 0 };
        i32::from(is_asin(second)) + i32::from(is_user(first))
            - i32::from(is_asin(first))
            - i32::from(is_user(second))
    };
    match rows.iter().map(vote).sum() {
        1.. => Ok([0, 1, 3, 2]),
        ..0 => Ok([1, 0, 3, 2]),
        0 => Err("neither of the first two columns looks like users or items: give --user-column and \
                  --item-column (2014 files: 0 and 1, 2018 files: 1 and 0)"),
    }
}

fn is_asin(id: &str) -> bool {
    id.len() == 10 && id.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase())
}

fn is_user(id: &str) -> bool {
    id.len() >= 12 && id.starts_with('A')
}
