//! CUDA graph capture: records the kernel launches of a function and starts them as one graph.
//!
//! A recording executes nothing. If it fails, the function runs again without a graph.

use super::error::CudaError;
use super::runtime::{Runtime, Start, lock};
use crate::device::DeviceError;
use std::fmt;
use std::sync::Mutex;

/// Counts of captured work, by how it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captures {
    /// Started by a cached graph executable.
    pub updated: usize,
    /// Started by a newly instantiated executable.
    pub instantiated: usize,
    /// Run without a graph.
    pub refused: usize,
    /// Reason of the last run without a graph.
    pub reason: Option<String>,
}

impl fmt::Display for Captures {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { updated, instantiated, refused, reason } = self;
        write!(
            f,
            "CUDA graphs: {updated} steps started by a cached executable, {instantiated} by a new one, \
             {refused} without a graph"
        )?;
        match reason {
            Some(reason) => write!(f, " (last: {reason})"),
            None => Ok(()),
        }
    }
}

/// A capture in progress. Drop discards the recording.
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
        let mut captures = lock(captures);
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
        // Nothing has been executed. An error that the capture did not cause occurs again.
        Err(_) => work(),
    }
}
