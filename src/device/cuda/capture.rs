//! Work as a CUDA graph: a sequence of launches is recorded, and started in one piece.
//!
//! Recording changes nothing on the device. Work that cannot be recorded is simply done again, plainly.

use super::error::CudaError;
use super::runtime::{Runtime, Start};
use crate::device::DeviceError;
use std::fmt;
use std::sync::{Mutex, PoisonError};

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

/// See [`crate::device::Execution::captured`].
pub(super) fn captured<R: Runtime, T>(
    runtime: &R,
    captures: Option<&Mutex<Captures>>,
    mut work: impl FnMut() -> Result<T, DeviceError>,
) -> Result<T, DeviceError> {
    let Some(captures) = captures else { return work() };
    let mut attempt = || -> Result<(T, Start), DeviceError> {
        let capture = Capture::begin(runtime)?;
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
