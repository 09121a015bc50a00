//! Vector clocks: which work is behind which, by stream order, events and synchronisation.
//!
//! Work gets its clock when it is enqueued, so the verdict does not depend on when it runs. The
//! host counts as one timeline: all its threads are in the order of their calls.

/// Times by timeline. Timeline 0 is the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clock(Vec<u32>);

/// A moment of one timeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    pub timeline: u32,
    /// 0: never.
    pub time: u32,
}

impl Clock {
    /// Whether this clock is behind `moment`.
    pub fn is_behind(&self, moment: Moment) -> bool {
        moment.time == 0 || self.0.get(moment.timeline as usize).is_some_and(|&time| time >= moment.time)
    }

    /// Puts this clock behind all that `other` is behind.
    pub fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        self.0.iter_mut().zip(&other.0).for_each(|(mine, &other)| *mine = (*mine).max(other));
    }

    /// Advances one timeline.
    pub fn tick(&mut self, timeline: u32) -> Moment {
        let at = timeline as usize;
        if self.0.len() <= at {
            self.0.resize(at + 1, 0);
        }
        self.0[at] += 1;
        Moment { timeline, time: self.0[at] }
    }
}

/// The last accesses of a page.
#[derive(Clone, Debug, Default)]
pub struct Touch {
    written: Moment,
    /// The last read of each timeline since then; `more` is rarely needed.
    read: Moment,
    more: Vec<Moment>,
}

impl Touch {
    /// Notes an access. Returns whether an earlier access conflicts with it: (moment, written).
    pub fn access(&mut self, clock: &Clock, now: Moment, writes: bool) -> Option<(Moment, bool)> {
        let mut reads = std::iter::once(&self.read).chain(&self.more);
        let conflict = if !clock.is_behind(self.written) {
            Some((self.written, true))
        } else if writes {
            reads.find(|&&read| !clock.is_behind(read)).map(|&read| (read, false))
        } else {
            None
        };
        if writes {
            *self = Self { written: now, ..Self::default() };
        } else if self.read.time == 0 || self.read.timeline == now.timeline {
            self.read = now;
        } else {
            match self.more.iter_mut().find(|read| read.timeline == now.timeline) {
                Some(read) => *read = now,
                None => self.more.push(now),
            }
        }
        conflict
    }
}
