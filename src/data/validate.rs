//! Checks every value of a data set file whose header, table and checksums are correct.
//!
//! A checksum shows that the bytes are as written, not that they are valid: the program that wrote
//! the file may be faulty, or its author malicious.

use super::DataError;
use super::format::{Contents, Section};
use super::split::Part;
use rayon::prelude::*;
use std::path::Path;

/// An invalid value: its index within the section, and the reason.
type Fault = (usize, &'static str);

/// Checks all values. Afterwards, every id is within its table, every range within its section,
/// every history is in time order, every name is text, and the groups are exactly the validation
/// and test events.
pub(super) fn validate(contents: &Contents, bytes: &[u8], path: &Path) -> Result<(), DataError> {
    let fail = |section: Section| {
        move |(index, reason): Fault| DataError::Value {
            path: path.to_owned(),
            section: section.name(),
            index: index as u64,
            reason,
        }
    };
    let offsets: &[u64] = contents.slice(bytes, Section::UserOffsets);
    check_offsets(offsets, contents.events).map_err(fail(Section::UserOffsets))?;
    let splits: &[[u32; 2]] = contents.slice(bytes, Section::Split);
    check_splits(offsets, splits).map_err(fail(Section::Split))?;
    let items: &[u32] = contents.slice(bytes, Section::Items);
    check_below(items, contents.items, "no such item").map_err(fail(Section::Items))?;
    let feedback: &[u8] = contents.slice(bytes, Section::Feedback);
    check_feedback(feedback).map_err(fail(Section::Feedback))?;
    let times: &[i64] = contents.slice(bytes, Section::Times);
    check_times(offsets, times).map_err(fail(Section::Times))?;

    for (count, starts, text, order) in [
        (contents.users, Section::UserNameOffsets, Section::UserNames, Section::UserOrder),
        (contents.items, Section::ItemNameOffsets, Section::ItemNames, Section::ItemOrder),
    ] {
        let offsets: &[u64] = contents.slice(bytes, starts);
        let names: &[u8] = contents.slice(bytes, text);
        check_offsets(offsets, names.len()).map_err(fail(starts))?;
        let names = check_names(names, offsets).map_err(fail(text))?;
        check_order(contents.slice(bytes, order), count, names, offsets).map_err(fail(order))?;
    }

    for part in [Part::Valid, Part::Test] {
        let [users, events, negatives, ceiling] = part.sections();
        check_groups(part, offsets, splits, contents.slice(bytes, users), contents.slice(bytes, events))
            .map_err(fail(users))?;
        let groups = GroupItems {
            offsets,
            items,
            users: contents.slice(bytes, users),
            events: contents.slice(bytes, events),
            negatives: contents.slice(bytes, negatives),
            per_group: contents.negatives,
        };
        check_below(groups.negatives, contents.items, "no such item").map_err(fail(negatives))?;
        groups.check().map_err(fail(negatives))?;
        let scores: &[f32] = contents.slice(bytes, ceiling);
        match scores.iter().position(|score| !score.is_finite()) {
            Some(index) => return Err(fail(ceiling)((index, "not a finite number"))),
            None => continue,
        }
    }
    Ok(())
}

fn check_offsets(offsets: &[u64], end: usize) -> Result<(), Fault> {
    if offsets[0] != 0 {
        return Err((0, "the first offset is not 0"));
    }
    if let Some(index) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        return Err((index + 1, "offsets decrease"));
    }
    match offsets[offsets.len() - 1] == end as u64 {
        true => Ok(()),
        false => Err((offsets.len() - 1, "the last offset is not the number of entries")),
    }
}

fn check_splits(offsets: &[u64], splits: &[[u32; 2]]) -> Result<(), Fault> {
    let fault = splits.iter().zip(offsets.windows(2)).position(|(split, range)| {
        let length = range[1] - range[0];
        length > u64::from(u32::MAX) || split[0] > split[1] || u64::from(split[1]) > length
    });
    fault.map_or(Ok(()), |index| Err((2 * index, "the parts do not follow one another within the history")))
}

fn check_below(ids: &[u32], count: usize, reason: &'static str) -> Result<(), Fault> {
    ids.par_iter().position_first(|&id| id as usize >= count).map_or(Ok(()), |index| Err((index, reason)))
}

fn check_feedback(feedback: &[u8]) -> Result<(), Fault> {
    feedback.par_iter().position_first(|&y| y > 1).map_or(Ok(()), |index| Err((index, "neither 0 nor 1")))
}

fn check_times(offsets: &[u64], times: &[i64]) -> Result<(), Fault> {
    let fault = offsets.par_windows(2).find_map_first(|range| {
        let start = range[0] as usize;
        let own = &times[start..range[1] as usize];
        own.windows(2).position(|pair| pair[0] > pair[1]).map(|index| start + index + 1)
    });
    fault.map_or(Ok(()), |index| Err((index, "earlier than the event before it")))
}

/// Every name is UTF-8 by itself: no character spans two names.
fn check_names<'a>(names: &'a [u8], offsets: &[u64]) -> Result<&'a str, Fault> {
    let text = std::str::from_utf8(names).map_err(|error| (error.valid_up_to(), "not UTF-8"))?;
    match offsets.iter().find(|&&offset| !text.is_char_boundary(offset as usize)) {
        Some(&offset) => Err((offset as usize, "a name ends within a character")),
        None => Ok(text),
    }
}

/// The order lists ids by strictly increasing name, so it is a permutation and names are unique.
fn check_order(order: &[u32], count: usize, names: &str, offsets: &[u64]) -> Result<(), Fault> {
    check_below(order, count, "no such name")?;
    let name = |id: u32| &names[offsets[id as usize] as usize..offsets[id as usize + 1] as usize];
    let fault = order.par_windows(2).position_first(|pair| name(pair[0]) >= name(pair[1]));
    fault.map_or(Ok(()), |index| Err((index + 1, "names do not increase")))
}

/// The groups of a part are exactly its events, in order.
fn check_groups(
    part: Part,
    offsets: &[u64],
    splits: &[[u32; 2]],
    users: &[u32],
    events: &[u32],
) -> Result<(), Fault> {
    let mut group = 0;
    for (user, (split, range)) in splits.iter().zip(offsets.windows(2)).enumerate() {
        for event in part.events(*split, (range[1] - range[0]) as usize) {
            if users.get(group) != Some(&(user as u32)) || events.get(group) != Some(&(event as u32)) {
                return Err((group, "the groups are not the events of the part, in order"));
            }
            group += 1;
        }
    }
    match group == users.len() {
        true => Ok(()),
        false => Err((group, "more groups than events of the part")),
    }
}

struct GroupItems<'a> {
    offsets: &'a [u64],
    items: &'a [u32],
    users: &'a [u32],
    events: &'a [u32],
    negatives: &'a [u32],
    per_group: usize,
}

impl GroupItems<'_> {
    /// No negative is the target or occurs twice in its group.
    fn check(&self) -> Result<(), Fault> {
        if self.per_group == 0 {
            return Ok(());
        }
        let check = |sorted: &mut Vec<u32>, (group, own): (usize, &[u32])| {
            let fault = |reason| Some((group * self.per_group, reason));
            let event = self.offsets[self.users[group] as usize] as usize + self.events[group] as usize;
            if own.contains(&self.items[event]) {
                return fault("the target is among the negatives of its group");
            }
            sorted.clear();
            sorted.extend_from_slice(own);
            sorted.sort_unstable();
            match sorted.windows(2).any(|pair| pair[0] == pair[1]) {
                true => fault("a negative occurs twice in its group"),
                false => None,
            }
        };
        let groups = self.negatives.par_chunks_exact(self.per_group).enumerate();
        let fault = groups.map_init(Vec::new, check).find_map_first(|fault| fault);
        fault.map_or(Ok(()), Err)
    }
}
