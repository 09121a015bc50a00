//! KuaiRand: `log_*.csv`. Columns are found by name, so excerpts with other columns, or with tabs,
//! work too.
//!
//! The label is one of the log's flags: by default `long_view` (effective view); an option names
//! another, e.g. `is_click`, or the `label` of an excerpt. Times are milliseconds.

use super::layout::{COMMA_OR_TAB, Schema};

pub(super) const SCHEMA: Schema = Schema {
    names: [&["user_id"], &["video_id"], &["time_ms"], &["long_view"]],
    positions: None,
    delimiters: COMMA_OR_TAB,
    typed: false,
    threshold: |_| None,
    order: None,
    other_members: &["user_features*", "video_features*"],
};
