//! Any log. The user names the columns, or gives all of them by number.
//!
//! The label is a flag unless a threshold or names of events are given.

use super::fields::Delimiter;
use super::layout::Schema;

pub(super) const SCHEMA: Schema = Schema {
    names: [&[]; 4],
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
