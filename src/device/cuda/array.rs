//! Device arrays, and staging of several arrays for one copy.

use super::error::CudaError;
use super::kernel::Pointer;
use super::runtime::Runtime;
use crate::device::Buffer;
use bytemuck::Pod;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Whose memory it is.
#[derive(Clone, Copy)]
enum Kind {
    /// From [`Runtime::allocate`].
    Own,
    /// Landing memory, the destination of [`Runtime::send`].
    Landing,
    /// Of another library, which frees it.
    Borrowed,
}

/// Device memory of a runtime, freed on drop.
struct Allocation<R: Runtime> {
    runtime: Arc<R>,
    kind: Kind,
    /// Address and size in bytes, set on allocation. The address of an empty array is null.
    taken: OnceLock<(Pointer, usize)>,
}

impl<R: Runtime> Allocation<R> {
    /// Landing memory, allocated by a later [`Allocation::take`].
    fn landing(runtime: &Arc<R>) -> Self {
        Self { runtime: runtime.clone(), kind: Kind::Landing, taken: OnceLock::new() }
    }

    fn new(runtime: &Arc<R>, bytes: usize) -> Result<Self, CudaError> {
        let allocation = Self { runtime: runtime.clone(), kind: Kind::Own, taken: OnceLock::new() };
        allocation.take(bytes)?;
        Ok(allocation)
    }

    fn take(&self, bytes: usize) -> Result<Pointer, CudaError> {
        let at = match self.kind {
            _ if bytes == 0 => 0,
            Kind::Landing => self.runtime.allocate_landing(bytes)?,
            Kind::Own => self.runtime.allocate(bytes)?,
            Kind::Borrowed => unreachable!("borrowed memory has its address from the start"),
        };
        self.taken.set((at, bytes)).expect("memory is allocated once");
        Ok(at)
    }

    fn at(&self) -> Pointer {
        self.taken.get().expect("an array is used before its staging was sent").0
    }
}

impl<R: Runtime> Drop for Allocation<R> {
    fn drop(&mut self) {
        if let Some(&(at, bytes)) = self.taken.get()
            && bytes > 0
        {
            // SAFETY: `take` allocated it with this kind and size, and only this drop frees it.
            unsafe {
                match self.kind {
                    Kind::Landing => self.runtime.free_landing(at, bytes),
                    Kind::Own => self.runtime.free(at, bytes),
                    Kind::Borrowed => {}
                }
            }
        }
    }
}

/// An array in device memory: an allocation of its own, or a part of one shared with the other
/// arrays of a [`Staging`] and freed with the last of them. The address of an empty array is null.
pub struct Array<R: Runtime, T> {
    memory: Arc<Allocation<R>>,
    /// Offset in bytes.
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

// SAFETY: a runtime may be used from any thread. The array holds an address and lends no `T`.
unsafe impl<R: Runtime, T> Send for Array<R, T> {}
// SAFETY: as above.
unsafe impl<R: Runtime, T> Sync for Array<R, T> {}

impl<R: Runtime, T: Pod> Array<R, T> {
    /// `len` values of unspecified content.
    ///
    /// # Errors
    /// As [`Runtime::allocate`].
    pub fn new(runtime: &Arc<R>, len: usize) -> Result<Self, CudaError> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(CudaError::OutOfMemory { bytes: usize::MAX })?;
        let memory = Arc::new(Allocation::new(runtime, bytes)?);
        Ok(Self { memory, offset: 0, len, element: PhantomData })
    }

    /// An array over memory of another library, which this one does not free.
    ///
    /// # Safety
    /// `len` values from `at` on lie inside one allocation that the device can access. It stays
    /// until the work that uses the array has run. Work outside the runtime's stream neither writes
    /// it meanwhile nor, if that work writes, reads it.
    pub(crate) unsafe fn borrowed(runtime: &Arc<R>, at: Pointer, len: usize) -> Self {
        let taken = OnceLock::from((at, len * size_of::<T>()));
        let memory = Arc::new(Allocation { runtime: runtime.clone(), kind: Kind::Borrowed, taken });
        Self { memory, offset: 0, len, element: PhantomData }
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::zero`].
    pub fn zeros(runtime: &Arc<R>, len: usize) -> Result<Self, CudaError> {
        let mut array = Self::new(runtime, len)?;
        array.zero()?;
        Ok(array)
    }

    /// A copy of `host`.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::write`].
    pub fn of(runtime: &Arc<R>, host: &[T]) -> Result<Self, CudaError> {
        let mut array = Self::new(runtime, host.len())?;
        array.copy_from(host)?;
        Ok(array)
    }

    /// Overwrites all values.
    ///
    /// # Errors
    /// As [`Runtime::write`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from(&mut self, host: &[T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy from the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the allocation has this many bytes from the address on.
            unsafe { self.memory.runtime.write(self.pointer(), bytemuck::cast_slice(host))? };
        }
        Ok(())
    }

    /// Sets all values to 0.
    ///
    /// # Errors
    /// As [`Runtime::zero`].
    pub fn zero(&mut self) -> Result<(), CudaError> {
        if self.len > 0 {
            // SAFETY: the allocation has this many bytes from the address on.
            unsafe { self.memory.runtime.zero(self.pointer(), self.len * size_of::<T>())? };
        }
        Ok(())
    }

    /// Copies the values to a new host vector.
    ///
    /// # Errors
    /// As [`Runtime::read`].
    pub fn to_vec(&self) -> Result<Vec<T>, CudaError> {
        let mut host = vec![T::zeroed(); self.len];
        self.copy_to(&mut host)?;
        Ok(host)
    }

    /// Copies the values to the host.
    ///
    /// # Errors
    /// As [`Runtime::read`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_to(&self, host: &mut [T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy to the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the allocation has this many bytes from the address on.
            unsafe { self.memory.runtime.read(self.pointer(), bytemuck::cast_slice_mut(host))? };
        }
        Ok(())
    }

    /// Starts a copy of a few values to the host, behind all earlier work. Later work may overwrite
    /// the array, and it may be dropped.
    ///
    /// # Errors
    /// As [`Runtime::begin_read`].
    pub fn begin_download(&self) -> Result<Download<R, T>, CudaError> {
        let Allocation { runtime, .. } = &*self.memory;
        let reading = match self.len * size_of::<T>() {
            0 => None,
            // SAFETY: the allocation has this many bytes from the address on.
            bytes => Some(unsafe { runtime.begin_read(self.pointer(), bytes)? }),
        };
        Ok(Download { runtime: runtime.clone(), reading, len: self.len, element: PhantomData })
    }

    /// Device address of the first value, for kernel arguments.
    ///
    /// # Panics
    /// If it belongs to a [`Staging`] that was not sent.
    pub fn pointer(&self) -> Pointer {
        if self.len == 0 { 0 } else { self.memory.at() + self.offset as Pointer }
    }

    /// Device address of value `index`; `index == len` is one past the last.
    ///
    /// # Panics
    /// If `index > len`.
    pub fn pointer_at(&self, index: usize) -> Pointer {
        assert!(index <= self.len, "value {index} of {}", self.len);
        self.pointer() + (index * size_of::<T>()) as Pointer
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same memory, which lives as long as one of the arrays.
    pub(super) fn share(&self) -> Self {
        self.part(0, self.len)
    }

    /// `len` values from `first` on, in the same memory.
    pub(super) fn part(&self, first: usize, len: usize) -> Self {
        assert!(first + len <= self.len, "a part outside the array");
        let offset = self.offset + first * size_of::<T>();
        Self { memory: self.memory.clone(), offset, len, element: PhantomData }
    }

    /// Whether it was allocated by `runtime`.
    pub fn is_on(&self, runtime: &Arc<R>) -> bool {
        Arc::ptr_eq(&self.memory.runtime, runtime)
    }
}

impl<R: Runtime, T: Pod> Buffer<T> for Array<R, T> {
    fn len(&self) -> usize {
        self.len
    }
}

/// A copy of an array to the host, in flight or complete.
pub struct Download<R: Runtime, T> {
    runtime: Arc<R>,
    /// `None` for an empty array.
    reading: Option<R::Reading>,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<R: Runtime, T: Pod> Download<R, T> {
    /// The values. Waits for the work before the copy.
    ///
    /// # Errors
    /// As [`Runtime::end_read`].
    pub fn finish(self) -> Result<Vec<T>, CudaError> {
        let mut host = vec![T::zeroed(); self.len];
        if let Some(reading) = self.reading {
            self.runtime.end_read(reading, bytemuck::cast_slice_mut(&mut host))?;
        }
        Ok(host)
    }
}

/// Arrays in one pinned staging buffer, copied to the device in one copy. Each array is 256-byte
/// aligned. No array may be used before [`Staging::send`].
pub struct Staging<R: Runtime> {
    memory: Arc<Allocation<R>>,
    host: R::Pinned,
    parts: Vec<Range<usize>>,
}

impl<R: Runtime> Staging<R> {
    /// Initial size of the staging buffer in bytes.
    const BYTES: usize = 1 << 20;

    /// An empty staging buffer.
    ///
    /// # Errors
    /// As [`Runtime::pinned`].
    pub fn new(runtime: &Arc<R>) -> Result<Self, CudaError> {
        let host = runtime.pinned(Self::BYTES)?;
        Ok(Self { memory: Arc::new(Allocation::landing(runtime)), host, parts: Vec::new() })
    }

    /// Appends a copy of `host` as an array.
    ///
    /// # Errors
    /// As [`Runtime::pinned`].
    pub fn add<T: Pod>(&mut self, host: &[T]) -> Result<Array<R, T>, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(host);
        let offset = self.parts.last().map_or(0, |last| (last.end + R::GAP).next_multiple_of(256));
        if !bytes.is_empty() {
            let part = offset..offset + bytes.len();
            if part.end > self.host.len() {
                let mut larger = self.memory.runtime.pinned(part.end.next_power_of_two())?;
                larger[..self.host.len()].copy_from_slice(&self.host);
                self.host = larger;
            }
            self.host[part.clone()].copy_from_slice(bytes);
            self.parts.push(part);
        }
        Ok(Array { memory: self.memory.clone(), offset, len: host.len(), element: PhantomData })
    }

    /// Starts the copy. Work enqueued later sees the arrays.
    ///
    /// # Errors
    /// As [`Runtime::allocate_landing`] and [`Runtime::send`].
    pub fn send(self) -> Result<(), CudaError> {
        let Self { memory, host, parts } = self;
        let bytes = parts.last().map_or(0, |last| last.end);
        let at = memory.take(bytes)?;
        if bytes > 0 {
            // SAFETY: the allocation ends with the last part, and no array had an address before,
            // so no work in flight uses it.
            unsafe { memory.runtime.send(at, host, &parts)? };
        }
        Ok(())
    }
}
