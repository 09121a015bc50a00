//! Device memory and pinned host memory, and who accesses them when.

use crate::clock::{Clock, Moment, Touch};
use crate::code::{Code, Done, Failure, fault};
use crate::machine::{Machine, PAGE};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

/// A device allocation.
#[derive(Debug)]
struct Allocation {
    bytes: usize,
    pages: Vec<Touch>,
    /// A free is enqueued.
    freed: bool,
}

/// A pinned allocation of the host.
#[derive(Debug)]
struct Pinned {
    layout: Layout,
    /// Copies from or to it that have not run.
    copies: usize,
}

/// The source of a copy to the device.
#[derive(Clone, Debug)]
pub enum Host {
    /// Pageable: read when the copy was enqueued.
    Read(Vec<u8>),
    /// Pinned: read when the copy runs. It must then hold what it held when the copy was enqueued.
    Pinned { at: usize, expected: Vec<u8> },
}

/// All memory.
#[derive(Debug)]
pub struct Memory {
    total: usize,
    used: usize,
    live: BTreeMap<u64, Allocation>,
    pinned: BTreeMap<usize, Pinned>,
}

impl Memory {
    pub fn new(total: usize) -> Memory {
        Memory { total, used: 0, live: BTreeMap::new(), pinned: BTreeMap::new() }
    }

    /// Free and total bytes.
    pub fn info(&self) -> (usize, usize) {
        (self.total - self.used, self.total)
    }

    /// Live device allocations and pinned allocations.
    pub fn counts(&self) -> (usize, usize) {
        (self.live.len(), self.pinned.len())
    }

    /// Allocates device memory; work that is not behind `now` must not use it.
    pub fn allocate(&mut self, machine: &Machine, bytes: usize, now: Moment) -> Done<u64> {
        if bytes == 0 {
            return fault(Code::INVALID_VALUE, "an allocation of 0 bytes");
        }
        if bytes > self.total - self.used {
            return Err(Failure::Answer(Code::OUT_OF_MEMORY));
        }
        let at = machine.allocate(bytes).ok_or(Failure::Answer(Code::OUT_OF_MEMORY))?;
        self.used += bytes;
        let mut touch = Touch::default();
        touch.access(&Clock::default(), now, true);
        let pages = vec![touch; bytes.div_ceil(PAGE)];
        self.live.insert(at, Allocation { bytes, pages, freed: false });
        Ok(at)
    }

    /// Notes that a free is enqueued.
    pub fn begin_free(&mut self, at: u64) -> Done {
        match self.live.get_mut(&at) {
            Some(allocation) if allocation.freed => {
                fault(Code::INVALID_VALUE, format!("{at:#x} is freed a second time"))
            }
            Some(allocation) => {
                allocation.freed = true;
                Ok(())
            }
            None => fault(Code::INVALID_VALUE, format!("a free of {at:#x}, which is no allocation")),
        }
    }

    /// Carries out a free, which must be behind all uses.
    pub fn free(&mut self, machine: &Machine, at: u64, clock: &Clock, now: Moment) -> Result<(), String> {
        let Some(allocation) = self.live.get(&at) else {
            return Err(format!("a free of {at:#x}, freed already"));
        };
        let bytes = allocation.bytes;
        self.access(at, bytes, true, clock, now).map_err(|error| format!("a free: {error}"))?;
        self.live.remove(&at);
        self.used -= bytes;
        machine.release(at, bytes);
        Ok(())
    }

    /// Notes an access of bytes inside one allocation.
    pub fn access(
        &mut self,
        at: u64,
        bytes: usize,
        writes: bool,
        clock: &Clock,
        now: Moment,
    ) -> Result<(), String> {
        let verb = if writes { "a write" } else { "a read" };
        let Some((&start, allocation)) = self.live.range_mut(..=at).next_back() else {
            return Err(format!("{verb} of {bytes} bytes at {at:#x}, outside all allocations"));
        };
        let offset = (at - start) as usize;
        if offset + bytes > allocation.bytes.next_multiple_of(PAGE) {
            return Err(format!(
                "{verb} of {bytes} bytes at byte {offset} of the {} that {start:#x} has",
                allocation.bytes
            ));
        }
        if bytes == 0 {
            return Ok(());
        }
        for page in &mut allocation.pages[offset / PAGE..=(offset + bytes - 1) / PAGE] {
            if let Some((moment, written)) = page.access(clock, now, writes) {
                let other = if written { "the write (or allocation)" } else { "the read" };
                return Err(format!(
                    "race: {verb} near byte {offset} of the allocation at {start:#x} (timeline {}, time {}) is not \
                     ordered behind {other} of timeline {}, time {}",
                    now.timeline, now.time, moment.timeline, moment.time
                ));
            }
        }
        Ok(())
    }

    /// Whether the bytes lie inside one allocation that is not freed. Checked when work is
    /// enqueued.
    pub fn check(&self, what: &str, at: u64, bytes: usize) -> Done {
        let inside = self.live.range(..=at).next_back().is_some_and(|(&start, allocation)| {
            !allocation.freed && (at - start) as usize + bytes <= allocation.bytes
        });
        if inside {
            Ok(())
        } else {
            fault(
                Code::INVALID_VALUE,
                format!("{what}: {bytes} bytes at {at:#x} are not inside one live allocation"),
            )
        }
    }

    /// Allocates pinned memory, filled with a pattern.
    pub fn pin(&mut self, bytes: usize) -> Done<usize> {
        let Ok(layout) = Layout::from_size_align(bytes.max(1), 4096) else {
            return Err(Failure::Answer(Code::OUT_OF_MEMORY));
        };
        // SAFETY: the size is not 0.
        let at = unsafe { alloc(layout) };
        if at.is_null() {
            return Err(Failure::Answer(Code::OUT_OF_MEMORY));
        }
        // SAFETY: just allocated with this size.
        unsafe { at.write_bytes(0xab, layout.size()) };
        self.pinned.insert(at as usize, Pinned { layout, copies: 0 });
        Ok(at as usize)
    }

    pub fn unpin(&mut self, at: usize) -> Done {
        let Some(pinned) = self.pinned.remove(&at) else {
            return fault(Code::INVALID_VALUE, format!("{at:#x} is not pinned memory"));
        };
        if pinned.copies > 0 {
            let message =
                format!("pinned memory at {at:#x} is freed before {} of its copies have run", pinned.copies);
            self.pinned.insert(at, pinned);
            return fault(Code::INVALID_VALUE, message);
        }
        // SAFETY: allocated by `pin` with this layout, and just removed.
        unsafe { dealloc(at as *mut u8, pinned.layout) };
        Ok(())
    }

    fn pinned_of(&mut self, at: usize) -> Option<&mut Pinned> {
        let (&start, pinned) = self.pinned.range_mut(..=at).next_back()?;
        (at - start < pinned.layout.size()).then_some(pinned)
    }

    /// Whether the address is in pinned memory; counts a copy that has not run.
    pub fn begin_copy(&mut self, at: usize) -> bool {
        self.pinned_of(at).map(|pinned| pinned.copies += 1).is_some()
    }

    /// A copy has run.
    pub fn end_copy(&mut self, at: usize) {
        if let Some(pinned) = self.pinned_of(at) {
            pinned.copies -= 1;
        }
    }
}
