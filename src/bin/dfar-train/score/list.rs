//! Items and events on the command line: `a,b,c` and `a:1,b:0`.
//!
//! A label follows the last colon. An id with a comma, a quote or blanks around it is quoted as in
//! CSV: `"..."`, with `""` for a quote. The text in quotes is the id, byte for byte.

/// An id of a list. Blanks around an unquoted id may belong to the list or to the id.
#[derive(Debug, PartialEq)]
pub struct Id {
    pub text: String,
    pub quoted: bool,
}

/// Splits a list at its commas. Each part is an id and the text after it, which is empty for an
/// unquoted id.
fn split(list: &str) -> Result<Vec<(Id, &str)>, String> {
    let mut parts = Vec::new();
    let mut rest = Some(list);
    while let Some(list) = rest {
        let start = list.trim_ascii_start();
        if let Some(quoted) = start.strip_prefix('"') {
            let (text, after) =
                unquote(quoted).ok_or_else(|| format!("the quote in `{start}` is not closed"))?;
            let (after, next) = cut(after);
            parts.push((Id { text, quoted: true }, after));
            rest = next;
        } else {
            let (part, next) = cut(list);
            if !part.trim_ascii().is_empty() {
                parts.push((Id { text: part.to_owned(), quoted: false }, ""));
            }
            rest = next;
        }
    }
    Ok(parts)
}

/// The text before and after the first comma.
fn cut(list: &str) -> (&str, Option<&str>) {
    list.split_once(',').map_or((list, None), |(part, rest)| (part, Some(rest)))
}

/// The text up to the closing quote, and the text after it.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut rest = quoted;
    loop {
        let (before, after) = rest.split_once('"')?;
        text.push_str(before);
        match after.strip_prefix('"') {
            Some(after) => {
                text.push('"');
                rest = after;
            }
            None => return Some((text, after)),
        }
    }
}

/// The ids of `a,b,c`.
pub fn items(list: &str) -> Result<Vec<Id>, String> {
    let item = |(id, after): (Id, &str)| match after.trim_ascii() {
        "" => Ok(id),
        after => Err(format!("`{after}` follows a closing quote; separate items with commas")),
    };
    split(list)?.into_iter().map(item).collect()
}

/// The ids and labels of `a:1,b:0`.
pub fn events(list: &str) -> Result<Vec<(Id, u8)>, String> {
    let event = |(mut id, after): (Id, &str)| {
        let label = if id.quoted {
            after.trim_ascii_start().strip_prefix(':').map(str::to_owned)
        } else {
            // An id may contain colons; the label follows the last one.
            let parts = id.text.rsplit_once(':').map(|(item, label)| (item.to_owned(), label.to_owned()));
            parts.map(|(item, label)| {
                id.text = item;
                label
            })
        };
        match label.as_deref().map(str::trim_ascii) {
            Some("0") => Ok((id, 0)),
            Some("1") => Ok((id, 1)),
            _ => {
                let label = label.map(|label| format!(":{label}")).unwrap_or_default();
                Err(format!("`{}{label}` is not ITEM:1 (liked) or ITEM:0 (skipped)", id.text))
            }
        }
    };
    split(list)?.into_iter().map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_id_can_be_quoted(ids in prop::collection::vec("[a,:\" \u{a0}\n-]{0,6}", 0..6)) {
            let quoted = ids.iter().map(|id| format!("\"{}\":1", id.replace('"', "\"\"")));
            let list = quoted.collect::<Vec<_>>().join(", ");
            let found: Vec<String> = events(&list).unwrap().into_iter().map(|(id, _)| id.text).collect();
            prop_assert_eq!(found, ids);
        }
    }

    #[test]
    fn unquoted_ids_keep_their_bytes() {
        let found = events("-a:1, b:c:0,\u{a0}d:1").unwrap();
        let found: Vec<(&str, u8)> = found.iter().map(|(id, label)| (&id.text[..], *label)).collect();
        assert_eq!(found, [("-a", 1), (" b:c", 0), ("\u{a0}d", 1)]);
        assert!(events("\"a:1").is_err() && events("\"a\"x:1").is_err() && items("\"a\"b").is_err());
    }
}
