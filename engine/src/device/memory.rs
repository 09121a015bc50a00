//! Buffers and copies between host and device.

use super::DeviceError;

/// A number that a device buffer can hold.
pub trait Element: bytemuck::Pod + Send + Sync {}
impl Element for f32 {}
impl Element for u32 {}
impl Element for u8 {}
impl Element for f64 {}

/// Memory owned by a device. Dropping it returns the memory to the pool of the device.
pub trait Buffer<T>: Send {
    /// Number of values.
    fn len(&self) -> usize;
    /// Whether the buffer holds no values.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `f32` values on a device.
pub type Floats<D> = <D as Memory>::Buffer<f32>;
/// `u32` indices on a device.
pub type Indices<D> = <D as Memory>::Buffer<u32>;

/// How an operation stores its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Replaces the values of the output.
    Overwrite,
    /// Adds to the values of the output.
    Add,
}

/// An output buffer and how the operation stores to it.
#[derive(Clone, Copy, Debug)]
pub struct Output<F> {
    /// The buffer.
    pub values: F,
    /// Overwrite or add.
    pub store: Store,
}

impl<F> Output<F> {
    /// An output whose values are replaced.
    pub fn overwrite(values: F) -> Self {
        Self { values, store: Store::Overwrite }
    }

    /// An output whose values are added to.
    pub fn add(values: F) -> Self {
        Self { values, store: Store::Add }
    }
}

/// The place of a scalar result on the device: one value of a buffer. One download then fetches
/// several results.
pub struct Slot<'a, F: ?Sized> {
    /// The buffer.
    pub values: &'a mut F,
    /// Position of the value.
    pub index: usize,
}

/// Allocation and copies.
pub trait Memory: Send + Sync {
    /// Memory of this device.
    type Buffer<T: Element>: Buffer<T>;
    /// Host arrays that one copy uploads together, such as a pinned staging buffer. See
    /// [`Memory::stage`].
    type Staging: Send;
    /// A copy to the host, in flight or complete. See [`Memory::begin_download`].
    type Download<T: Element>: Send;

    /// Checks, before any allocation, that `copies` f32 values per parameter fit the free memory.
    ///
    /// # Errors
    /// The memory is too small; the error names the sizes.
    fn check_room(&self, parameters: usize, copies: usize) -> Result<(), DeviceError> {
        let _ = (parameters, copies);
        Ok(())
    }

    /// Allocates `len` values of unspecified content.
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>, DeviceError>;

    /// Allocates `len` zeros.
    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>, DeviceError>;

    /// Copies `host` to the device.
    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buffer<T>, DeviceError>;

    /// Creates an empty staging buffer. Any thread may fill it while the device computes.
    fn staging(&self) -> Result<Self::Staging, DeviceError>;

    /// Appends `host` to the staging buffer and returns its device buffer, valid for operations
    /// called after [`Memory::send`].
    fn stage<T: Element>(
        &self,
        staging: &mut Self::Staging,
        host: &[T],
    ) -> Result<Self::Buffer<T>, DeviceError>;

    /// Uploads a staging buffer in one copy. The copy may overlap operations in flight.
    fn send(&self, staging: Self::Staging) -> Result<(), DeviceError>;

    /// Copies `buffer` to the host. Waits for the operations that write it.
    fn download<T: Element>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>, DeviceError>;

    /// Starts a copy of a few values of `buffer` to the host, behind the operations called so far.
    /// Later operations may change the buffer, and it may be dropped.
    fn begin_download<T: Element>(&self, buffer: &Self::Buffer<T>) -> Result<Self::Download<T>, DeviceError>;

    /// The values of a download. Waits for the operations before the download, not for later ones.
    fn finish_download<T: Element>(&self, download: Self::Download<T>) -> Result<Vec<T>, DeviceError>;
}
