//! Streams: those that were made, and the two default streams that each context has.
//!
//! - The *legacy* default stream, handles 0 and 1, and all *blocking* streams (made without the
//!   flag `CU_STREAM_NON_BLOCKING`) are ordered: its work is behind all earlier work of those, and
//!   their later work is behind it.
//! - The *per-thread* default stream, handle 2, is a blocking stream that each thread has for
//!   itself.

use crate::clock::Clock;
use crate::handles::{Handles, Kind};
use crate::state::{Capture, Queued};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::thread::ThreadId;

#[derive(Debug)]
pub struct Stream {
    pub queue: VecDeque<Queued>,
    pub timeline: u32,
    pub clock: Clock,
    pub capture: Option<Capture>,
    /// Ordered with the legacy default stream.
    pub blocking: bool,
}

/// Number of the legacy default stream.
pub const LEGACY: u64 = 1;
const PER_THREAD: u64 = 2;

/// All streams, by number: the handle of a stream that was made; for the default streams, numbers
/// that are no such handles.
#[derive(Debug)]
pub struct Streams {
    made: Handles<Stream>,
    default: BTreeMap<u64, Stream>,
    threads: HashMap<ThreadId, u64>,
    timelines: u32,
}

impl Streams {
    pub fn new() -> Streams {
        let mut streams = Streams {
            made: Handles::new(Kind::Stream),
            default: BTreeMap::new(),
            threads: HashMap::new(),
            timelines: 0,
        };
        let legacy = streams.stream(Clock::default(), false);
        streams.default.insert(LEGACY, legacy);
        streams
    }

    fn stream(&mut self, clock: Clock, blocking: bool) -> Stream {
        self.timelines += 1;
        Stream { queue: VecDeque::new(), timeline: self.timelines, clock, capture: None, blocking }
    }

    /// Makes a stream, whose work is behind `clock`.
    pub fn add(&mut self, clock: Clock, blocking: bool) -> u64 {
        let stream = self.stream(clock, blocking);
        self.made.add(stream)
    }

    /// The number of the stream that a handle names on this thread.
    pub fn number(&mut self, handle: u64) -> u64 {
        match handle {
            0 => LEGACY,
            PER_THREAD => {
                let thread = std::thread::current().id();
                if let Some(&number) = self.threads.get(&thread) {
                    return number;
                }
                let number = LEGACY + PER_THREAD + self.threads.len() as u64;
                let stream = self.stream(Clock::default(), true);
                self.threads.insert(thread, number);
                self.default.insert(number, stream);
                number
            }
            _ => handle,
        }
    }

    /// The stream of a number.
    ///
    /// # Errors
    /// What is wrong with the handle.
    pub fn get(&mut self, number: u64) -> Result<&mut Stream, String> {
        match self.default.get_mut(&number) {
            Some(stream) => Ok(stream),
            None => self.made.get(number),
        }
    }

    /// Removes a stream that was made.
    ///
    /// # Errors
    /// As [`Streams::get`]; a default stream.
    pub fn remove(&mut self, handle: u64) -> Result<Stream, String> {
        if self.default.contains_key(&handle) {
            return Err("a default stream cannot be destroyed".to_owned());
        }
        self.made.remove(handle)
    }

    /// Streams that were made and not destroyed.
    pub fn made(&self) -> usize {
        self.made.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Stream)> {
        self.default.iter().map(|(&number, stream)| (number, stream)).chain(self.made.iter())
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Stream)> {
        self.default.iter_mut().map(|(&number, stream)| (number, stream)).chain(self.made.iter_mut())
    }

    /// The other streams whose earlier work the next work of a stream is behind.
    ///
    /// # Errors
    /// As [`Streams::get`].
    pub fn before(&mut self, number: u64) -> Result<Vec<u64>, String> {
        if number == LEGACY {
            return Ok(self.iter().filter(|(_, stream)| stream.blocking).map(|(other, _)| other).collect());
        }
        Ok(if self.get(number)?.blocking { vec![LEGACY] } else { Vec::new() })
    }
}
