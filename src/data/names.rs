//! Original ids: each distinct id is stored once and numbered in order of first appearance.

use super::DataError;
use crate::memory::fallible;
use std::hash::{BuildHasher, RandomState};
use std::hint::black_box;

/// Marks a free slot; hence ids go up to `u32::MAX - 1`.
const FREE: u32 = u32::MAX;

/// Longest name that its slot holds.
const SHORT: usize = 11;

/// Number of names whose slots are read together.
const GROUP: usize = 32;

/// Distinct names, end to end in one buffer, found through a hash table: 23 to 46 bytes plus the
/// name for each, where a `HashMap<String, u32>` takes 60. (Tens of millions of items are common.)
/// Finding a short name reads one slot, which is the only cache miss.
#[derive(Debug, Default)]
pub(super) struct Names {
    what: &'static str,
    text: String,
    ends: Vec<u64>,
    slots: Vec<Slot>,
    hasher: RandomState,
}

/// A slot of the hash table: an id and a summary of its name.
#[derive(Debug, Clone, Copy)]
struct Slot {
    id: u32,
    key: Key,
}

/// The length and the bytes of a short name, or a mark and the hash of a longer one.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Key([u8; SHORT + 1]);

impl Key {
    fn new(name: &str, hash: u64) -> Key {
        let mut key = [0; SHORT + 1];
        if name.len() <= SHORT {
            key[0] = name.len() as u8;
            key[1..=name.len()].copy_from_slice(name.as_bytes());
        } else {
            key[0] = u8::MAX;
            key[1..9].copy_from_slice(&hash.to_ne_bytes());
        }
        Key(key)
    }

    /// Whether equal keys mean equal names.
    fn is_whole(self) -> bool {
        usize::from(self.0[0]) <= SHORT
    }
}

impl Names {
    /// An empty set; `what` (users, items) is for messages.
    pub(super) fn new(what: &'static str) -> Names {
        Names { what, ..Names::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// # Panics
    /// If there is no such id.
    pub(super) fn get(&self, id: u32) -> &str {
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.text[start as usize..self.ends[id as usize] as usize]
    }

    /// The id of a name; a new name gets the next id.
    pub(super) fn intern(&mut self, name: &str) -> Result<u32, DataError> {
        let mut id = [0];
        self.intern_all(&[name], &mut id)?;
        Ok(id[0])
    }

    /// The ids of names; each new name gets the next id. The slots of several names are read
    /// together: most are cache misses, whose waits then overlap.
    pub(super) fn intern_all(&mut self, names: &[&str], ids: &mut [u32]) -> Result<(), DataError> {
        for (names, ids) in names.chunks(GROUP).zip(ids.chunks_mut(GROUP)) {
            self.make_room(names.len())?;
            let mut places = [(0, Key::default()); GROUP];
            for (place, name) in places.iter_mut().zip(names) {
                *place = self.place(name);
            }
            for (slot, _) in &places[..names.len()] {
                // Only to have the slot in the cache below.
                black_box(self.slots[*slot].id);
            }
            for ((id, name), (slot, key)) in ids.iter_mut().zip(names).zip(places) {
                let slot = self.find(slot, name, key);
                *id = match self.slots[slot].id {
                    FREE => self.add(slot, name, key)?,
                    id => id,
                };
            }
        }
        Ok(())
    }

    /// Adds a new name, whose free slot this is.
    fn add(&mut self, slot: usize, name: &str, key: Key) -> Result<u32, DataError> {
        let id = self.len() as u32;
        if id == FREE {
            return Err(DataError::TooMany { what: self.what, limit: u64::from(FREE) });
        }
        let (what, bytes) = (self.what, self.text.len() + name.len());
        let refused = |_| DataError::Memory { what, bytes };
        fallible(|| self.text.try_reserve(name.len())).map_err(refused)?;
        fallible(|| self.ends.try_reserve(1)).map_err(refused)?;
        self.slots[slot] = Slot { id, key };
        self.text.push_str(name);
        self.ends.push(self.text.len() as u64);
        Ok(id)
    }

    /// Keeps the names marked `true` and renumbers them in their old order. Drops the hash table;
    /// the next `intern` builds it again.
    pub(super) fn retain(&mut self, keep: &[bool]) {
        if keep.iter().all(|&keep| keep) {
            self.slots = Vec::new();
            return;
        }
        let mut kept = Names::new(self.what);
        for (id, _) in keep.iter().enumerate().filter(|&(_, &keep)| keep) {
            kept.text.push_str(self.get(id as u32));
            kept.ends.push(kept.text.len() as u64);
        }
        *self = kept;
    }

    /// The slot at which the search for a name begins, and its key.
    fn place(&self, name: &str) -> (usize, Key) {
        let hash = self.hasher.hash_one(name);
        (hash as usize & (self.slots.len() - 1), Key::new(name, hash))
    }

    /// The slot that holds the name, or the free slot for it.
    fn find(&self, mut slot: usize, name: &str, key: Key) -> usize {
        let mask = self.slots.len() - 1;
        loop {
            let found = self.slots[slot];
            let equal = found.key == key && (key.is_whole() || self.get(found.id) == name);
            if found.id == FREE || equal {
                return slot;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Makes room for `more` names: at most 70 % of the slots are taken, so that searches are short.
    fn make_room(&mut self, more: usize) -> Result<(), DataError> {
        if 7 * self.slots.len() >= 10 * (self.len() + more) {
            return Ok(());
        }
        let count = (2 * (self.len() + more)).next_power_of_two().max(64);
        self.slots = Vec::new();
        fallible(|| self.slots.try_reserve_exact(count))
            .map_err(|_| DataError::Memory { what: self.what, bytes: size_of::<Slot>() * count })?;
        self.slots.resize(count, Slot { id: FREE, key: Key::default() });
        for id in 0..self.len() as u32 {
            let name = self.get(id);
            let (slot, key) = self.place(name);
            let slot = self.find(slot, name, key);
            self.slots[slot] = Slot { id, key };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn numbers_by_first_appearance(words in prop::collection::vec("[ab]{0,6}|[ab]{10,13}|\u{0}{0,12}|é{4,7}", 0..300)) {
            let mut names = Names::new("users");
            let mut model = HashMap::new();
            let mut ids = Vec::new();
            for word in &words {
                let next = model.len() as u32;
                ids.push(*model.entry(word.clone()).or_insert(next));
                prop_assert_eq!(names.intern(word).unwrap(), ids[ids.len() - 1]);
            }
            let (mut together, mut found) = (Names::new("users"), vec![0; ids.len()]);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            together.intern_all(&words, &mut found).unwrap();
            prop_assert_eq!(&found, &ids);
            // Once more, when all are known.
            together.intern_all(&words, &mut found).unwrap();
            prop_assert_eq!((found, together.len()), (ids, model.len()));
            prop_assert_eq!(names.len(), model.len());
            for (word, id) in model {
                prop_assert_eq!(names.get(id), word);
            }
        }
    }

    #[test]
    fn retaining_renumbers_in_order() {
        let mut names = Names::new("items");
        for name in ["a", "bb", "", "ccc"] {
            names.intern(name).unwrap();
        }
        names.retain(&[false, true, false, true]);
        assert_eq!((names.len(), names.get(0), names.get(1)), (2, "bb", "ccc"));
        assert_eq!(names.intern("ccc").unwrap(), 1);
        assert_eq!(names.intern("a").unwrap(), 2);
    }
}
