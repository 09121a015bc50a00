//! Filters events: drops repeated pairs, rare items and rare users.

use super::external_sort::{RecordFile, RecordWriter};
use super::log::{Event, ItemSet, Log};
use super::names::Names;
use super::protocol::{CountedRecords, KCore};
use super::{DataError, PreparationStep, Repeats};
use std::path::Path;

/// Passes on the first event of each (user, item) pair; expects events by user and time.
#[derive(Debug)]
pub(super) struct RepeatFilter {
    repeats: Repeats,
    met: ItemSet,
    user: Option<u32>,
    /// Events dropped so far.
    pub dropped: u64,
}

impl RepeatFilter {
    pub(super) fn new(repeats: Repeats, items: usize) -> RepeatFilter {
        RepeatFilter { repeats, met: ItemSet::new(items), user: None, dropped: 0 }
    }

    pub(super) fn keeps(&mut self, event: &Event) -> bool {
        if self.repeats == Repeats::Keep {
            return true;
        }
        if self.user != Some(event.user) {
            self.user = Some(event.user);
            self.met.clear();
        }
        let first = self.met.insert(event.item);
        self.dropped += u64::from(!first);
        first
    }
}

/// Applies the frequency filter, then renumbers the remaining users and items without gaps.
///
/// Items are counted first, then users over the events of the remaining items; `until_stable`
/// repeats both. The events stay on disk; each count is one pass over them.
pub(super) fn filter(
    mut events: RecordFile<Event>,
    mut users: Names,
    mut items: Names,
    rule: Option<KCore>,
    folder: &Path,
) -> Result<Log, DataError> {
    let before = events.len();
    let mut keep_user = vec![true; users.len()];
    let mut keep_item = vec![true; items.len()];
    if let Some(rule) = rule {
        loop {
            let dropped_items = drop_rare(&mut events, rule, &mut keep_item, &keep_user, |event| {
                (event.item as usize, event.user as usize)
            })?;
            let dropped_users = drop_rare(&mut events, rule, &mut keep_user, &keep_item, |event| {
                (event.user as usize, event.item as usize)
            })?;
            if !rule.until_stable || (!dropped_items && !dropped_users) {
                break;
            }
        }
    }

    // Nothing was dropped: every user and item has an event, because the filter for repeated pairs
    // keeps the first.
    if keep_user.iter().chain(&keep_item).all(|&keep| keep) && before > 0 {
        // Drops the hash tables.
        users.retain(&keep_user);
        items.retain(&keep_item);
        return Ok(Log { events, users, items });
    }

    // An item may have passed the filter and then lost all its users.
    let mut user_left = vec![false; users.len()];
    let mut item_left = vec![false; items.len()];
    let mut reader = events.read()?;
    while let Some(event) = reader.next()? {
        if keep_user[event.user as usize] && keep_item[event.item as usize] {
            user_left[event.user as usize] = true;
            item_left[event.item as usize] = true;
        }
    }
    let (new_user, new_item) = (renumber(&user_left), renumber(&item_left));
    users.retain(&user_left);
    items.retain(&item_left);
    let mut kept = RecordWriter::new(folder);
    let mut reader = events.read()?;
    while let Some(event) = reader.next()? {
        if keep_user[event.user as usize] && keep_item[event.item as usize] {
            let user = new_user[event.user as usize];
            kept.push(&Event { user, item: new_item[event.item as usize], ..event })?;
        }
    }
    let events = kept.finish()?;
    if events.len() == 0 {
        return Err(DataError::NothingLeft { step: PreparationStep::KCore, before });
    }
    Ok(Log { events, users, items })
}

/// Drops ids with too few counted records among the remaining events. `ids` maps an event to its
/// index in `keep` and in `other`. Returns whether any id was dropped.
fn drop_rare(
    events: &mut RecordFile<Event>,
    rule: KCore,
    keep: &mut [bool],
    other: &[bool],
    ids: impl Fn(&Event) -> (usize, usize),
) -> Result<bool, DataError> {
    let mut counts = vec![0u32; keep.len()];
    let mut reader = events.read()?;
    while let Some(event) = reader.next()? {
        let (own, their) = ids(&event);
        if other[their] && (rule.on == CountedRecords::All || event.liked()) {
            counts[own] = counts[own].saturating_add(1);
        }
    }
    let mut dropped = false;
    for (keep, count) in keep.iter_mut().zip(counts) {
        if *keep && count < rule.k {
            *keep = false;
            dropped = true;
        }
    }
    Ok(dropped)
}

/// The new number of each remaining id.
fn renumber(left: &[bool]) -> Vec<u32> {
    let number = |next: &mut u32, &left: &bool| {
        let own = *next;
        *next += u32::from(left);
        Some(own)
    };
    left.iter().scan(0, number).collect()
}
