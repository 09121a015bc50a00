//! The course of execution: events, elapsed time, graph capture.

use super::DeviceError;

/// How a device runs its operations.
pub trait Execution: Send + Sync {
    /// A point in the order of operations, such as a CUDA event.
    type Event: Send;

    /// Name for logs, e.g. `cpu (avx512, 2 threads)`.
    fn name(&self) -> String;

    /// Default number of threads that draw and pack batches ahead of the device: a few, while the
    /// host has nothing else to compute.
    fn default_workers(&self) -> usize {
        std::thread::available_parallelism().map_or(1, |cores| (cores.get() - 1).clamp(1, 4))
    }

    /// Training steps to launch before the host reads the losses of the first. More than one keeps a
    /// device busy while the host reads losses and launches the next step.
    fn steps_in_flight(&self) -> usize {
        1
    }

    /// Records an event after all operations called so far.
    fn record_event(&self) -> Result<Self::Event, DeviceError>;

    /// Seconds between two events. Waits for the later one.
    fn seconds_between(&self, from: &Self::Event, to: &Self::Event) -> Result<f64, DeviceError>;

    /// Runs `work`. A device may capture the operations of `work` as a graph and launch them at
    /// once. When the capture fails, it runs `work` again without one. Hence `work` may only read
    /// buffers that exist before the call and write buffers that it allocates itself.
    fn captured<T>(&self, mut work: impl FnMut() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        work()
    }

    /// Calls `work(0)`, then `work(1)`. The operations of one call are independent of those of the
    /// other, except that both may add to an array by `linear_backward` or
    /// `target_attention_backward`. A device may execute them in any order that keeps that of each
    /// call, and similar ones at once.
    fn side_by_side<T>(
        &self,
        mut work: impl FnMut(usize) -> Result<T, DeviceError>,
    ) -> Result<[T; 2], DeviceError> {
        Ok([work(0)?, work(1)?])
    }

    /// Runs `work`, whose operations are independent of each other, except that several may add to
    /// an array by `linear_backward`. A device may execute similar ones at once.
    fn together<T>(&self, work: impl FnOnce() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        work()
    }

    /// Completes the gradients of parameters. Until then, a device may keep partial sums of them;
    /// a download and the optimizer complete them too.
    fn settle(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}
