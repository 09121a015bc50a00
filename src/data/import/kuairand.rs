//! KuaiRand: `log_*.csv`, whose columns are found by name, so excerpts with other columns or tabs
//! are fine.
//!
//! The label is one of the log's flags: `long_view` (effective view) unless another is given, e.g.
//! `is_click` or an excerpt's `label`. Times are milliseconds.

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
