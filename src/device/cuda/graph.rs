//! Work as a CUDA graph: a sequence of launches is recorded, and started in one piece.
//!
//! Batches are packed, so hardly two have the same sizes and addresses, but the same kernels follow each other. What is kept is
//! therefore not a sequence with its arguments but the executable that was made of it: the next sequence of the same nodes is
//! written over that.
//!
//! Recording changes nothing on the device. Work that cannot be recorded is simply done again, plainly.

use super::CudaError;
use super::gpu::Gpu;
use super::runtime::{Kernel, Runtime};
use crate::device::DeviceError;
use std::fmt;
use std::sync::PoisonError;

/// A request as a graph holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// A launch.
    Kernel(Kernel),
    /// Matrix products of one shape.
    Product,
    /// Memory filled with zeros.
    Zero,
}

/// How what was recorded was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// By an executable that was there, with new addresses and sizes.
    Updated,
    /// By one made for it.
    Instantiated,
}

/// What became of the work that was to be captured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captures {
    /// Times that an executable was there.
    pub updated: usize,
    /// Times that one was made.
    pub instantiated: usize,
    /// Times that the work ran plainly.
    pub refused: usize,
    /// Why, the last time.
    pub reason: Option<String>,
}

impl fmt::Display for Captures {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { updated, instantiated, refused, reason } = self;
        write!(
            f,
            "CUDA graphs: {updated} steps by one that was there, {instantiated} by a new one, {refused} without"
        )?;
        match reason {
            Some(reason) => write!(f, " (last: {reason})"),
            None => Ok(()),
        }
    }
}

/// A capture that has begun. Dropped, it ends and is forgotten.
struct Capture<'a, R: Runtime>(Option<&'a R>);

impl<'a, R: Runtime> Capture<'a, R> {
    fn begin(runtime: &'a R) -> Result<Self, CudaError> {
        runtime.begin_capture()?;
        Ok(Self(Some(runtime)))
    }

    fn start(mut self) -> Result<Start, CudaError> {
        self.0.take().expect("a capture ends once").start_capture()
    }
}

impl<R: Runtime> Drop for Capture<'_, R> {
    fn drop(&mut self) {
        if let Some(runtime) = self.0 {
            runtime.forget_capture();
        }
    }
}

/// See [`crate::device::Device::captured`].
pub(super) fn captured<R: Runtime, T>(
    gpu: &Gpu<R>,
    mut work: impl FnMut() -> Result<T, DeviceError>,
) -> Result<T, DeviceError> {
    let Some(captures) = &gpu.captures else { return work() };
    let mut attempt = || -> Result<(T, Start), DeviceError> {
        let capture = Capture::begin(&**gpu.runtime())?;
        let value = work()?;
        Ok((value, capture.start()?))
    };
    let outcome = attempt();
    {
        let mut captures = captures.lock().unwrap_or_else(PoisonError::into_inner);
        match &outcome {
            Ok((_, Start::Updated)) => captures.updated += 1,
            Ok((_, Start::Instantiated)) => captures.instantiated += 1,
            Err(reason) => {
                captures.refused += 1;
                captures.reason = Some(reason.to_string());
            }
        }
    }
    match outcome {
        Ok((value, _)) => Ok(value),
        // Nothing of it has run. If the capture was not at fault, the error comes again.
        Err(_) => work(),
    }
}

/// What was used last, by key: a few, the latest first.
pub(super) struct Recent<K, V> {
    entries: Vec<(K, V)>,
}

impl<K: PartialEq, V> Recent<K, V> {
    /// How many are kept. A run meets few sequences of nodes: they differ where a batch has no token of a label, or a
    /// segment is short.
    const KEPT: usize = 16;

    /// Takes one out.
    pub fn take(&mut self, key: &K) -> Option<V> {
        let at = self.entries.iter().position(|(k, _)| k == key)?;
        Some(self.entries.remove(at).1)
    }

    /// Takes the oldest out, where there is no place for one more.
    pub fn make_room(&mut self) -> Option<V> {
        if self.entries.len() < Self::KEPT { None } else { self.entries.pop().map(|(_, value)| value) }
    }

    /// Makes one the latest.
    pub fn put(&mut self, key: K, value: V) {
        self.entries.insert(0, (key, value));
    }
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept() {
        let mut recent = Recent::default();
        for key in 0..16 {
            assert_eq!(recent.make_room(), None);
            recent.put(key, key);
        }
        let first = recent.take(&0).expect("it is among the latest");
        assert_eq!((recent.take(&0), recent.make_room()), (None, None));
        recent.put(0, first);
        assert_eq!(recent.make_room(), Some(1));
        recent.put(16, 16);
        assert_eq!((recent.take(&1), recent.take(&0)), (None, Some(0)));
    }
}
