//! Any log. Columns have common names, or the user gives them by name, or all of them by number.
//!
//! The label is a flag unless a threshold or names of events are given.

use super::fields::Delimiter;
use super::layout::Schema;

pub(super) const SCHEMA: Schema = Schema {
    names: [
        &["user", "user_id", "userId"],
        &["item", "item_id", "itemId"],
        &["time", "timestamp"],
        &["label"],
    ],
    positions: None,
    delimiters: &[
        Delimiter::Byte(b','),
        Delimiter::Byte(b'\t'),
        Delimiter::Byte(b';'),
        Delimiter::Byte(b'|'),
    ],
    typed: false,
    threshold: |_| None,
    order: None,
    other_members: &[],
};
