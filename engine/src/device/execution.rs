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
}
