//! MovieLens: `u.data` (tabs), `ratings.dat` (`::`), `ratings.csv` (commas and a header).
//!
//! All have user, item, rating (1 to 5, half stars from 10M on) and time in seconds.

use super::fields::Delimiter;
use super::layout::Schema;

pub(super) const SCHEMA: Schema = Schema {
    names: [&["userId", "user_id"], &["movieId", "movie_id", "item_id"], &["timestamp"], &["rating"]],
    positions: Some([0, 1, 3, 2]),
    delimiters: &[Delimiter::Colons, Delimiter::Byte(b'\t'), Delimiter::Byte(b',')],
    typed: false,
    threshold: |_| Some(3.0),
    order: None,
    other_members: &[
        "u.item",
        "u.user",
        "u.genre",
        "u.info",
        "u.occupation",
        "u?.base",
        "u?.test",
        "movies.*",
        "users.*",
        "tags.*",
        "links.*",
        "genome-*",
    ],
};
