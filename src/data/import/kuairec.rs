//! KuaiRec: `big_matrix.csv` and `small_matrix.csv`.
//!
//! KuaiRec has no flag; its authors suggest to count a watch ratio above 2 as liked. Times are
//! seconds with a fraction; rows without a time are bad rows (`--skip-bad-rows`). The small matrix
//! repeats users and items of the big one, so only the big one is read from an archive.

use super::layout::{COMMA_OR_TAB, Schema};

pub(super) const SCHEMA: Schema = Schema {
    names: [&["user_id"], &["video_id"], &["timestamp"], &["watch_ratio"]],
    positions: None,
    delimiters: COMMA_OR_TAB,
    typed: false,
    threshold: |_| Some(2.0),
    order: None,
    other_members: &["small_matrix.csv", "*_features*", "*categor*", "social_network*", "item_daily*"],
};
