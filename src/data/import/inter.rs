//! RecBole's atomic files, `.inter`: tabs, and a header of `name:type`.
//!
//! A `rating` column holds ratings, a `label` column flags; other names are given by options.

use super::fields::Delimiter;
use super::layout::Schema;

pub(super) const SCHEMA: Schema = Schema {
    names: [
        &["user_id"],
        &["item_id", "business_id", "video_id"],
        &["timestamp", "time_ms", "time"],
        &["rating", "label"],
    ],
    positions: None,
    delimiters: &[Delimiter::Byte(b'\t'), Delimiter::Byte(b',')],
    typed: true,
    threshold: |column| (column == "rating").then_some(3.0),
    order: None,
    other_members: &["*.item", "*.user", "*.kg", "*.link", "*.net"],
};
