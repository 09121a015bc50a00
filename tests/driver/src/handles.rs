//! Handles: numbers that name an object of one kind. They are never addresses, and none is used
//! twice, so that a wrong, dead or invented handle is named as such.

use std::collections::BTreeMap;

/// What a handle names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Kind {
    Context = 1,
    Stream,
    Event,
    Module,
    Function,
    Graph,
    Executable,
    Program,
    Blas,
    Product,
    Layout,
    Preference,
}

const SHIFT: u32 = 40;

/// Objects of one kind, by handle.
#[derive(Debug)]
pub struct Handles<T> {
    kind: Kind,
    next: u64,
    live: BTreeMap<u64, T>,
}

impl<T> Handles<T> {
    pub fn new(kind: Kind) -> Self {
        Self { kind, next: 1, live: BTreeMap::new() }
    }

    /// Stores an object under a new handle.
    pub fn add(&mut self, object: T) -> u64 {
        let handle = (kind_bits(self.kind)) | (self.next << 4);
        self.next += 1;
        self.live.insert(handle, object);
        handle
    }

    /// # Errors
    /// What is wrong with the handle.
    pub fn get(&mut self, handle: u64) -> Result<&mut T, String> {
        let wrong = self.wrong(handle);
        self.live.get_mut(&handle).ok_or(wrong)
    }

    /// # Errors
    /// As [`Handles::get`].
    pub fn remove(&mut self, handle: u64) -> Result<T, String> {
        let wrong = self.wrong(handle);
        self.live.remove(&handle).ok_or(wrong)
    }

    pub fn len(&self) -> usize {
        self.live.len()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        self.live.iter_mut().map(|(&handle, object)| (handle, object))
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.live.iter().map(|(&handle, object)| (handle, object))
    }

    fn wrong(&self, handle: u64) -> String {
        let kind = self.kind;
        if handle & !((1 << SHIFT) - 1) != kind_bits(kind) {
            format!("{handle:#x} is no {kind:?}")
        } else if handle & 15 == 0 && (handle & ((1 << SHIFT) - 1)) >> 4 < self.next {
            format!("{kind:?} {handle:#x} was destroyed")
        } else {
            format!("{kind:?} {handle:#x} was never made")
        }
    }
}

fn kind_bits(kind: Kind) -> u64 {
    (kind as u64) << SHIFT
}
