//! Arrays in a runtime's memory, and staging of several for one copy.

use super::error::CudaError;
use super::kernel::Pointer;
use super::runtime::Runtime;
use crate::device::Buffer;
use bytemuck::Pod;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Memory of a runtime, given back when dropped.
struct Allocation<R: Runtime> {
    runtime: Arc<R>,
    /// Whether [`Runtime::send`] copies to it.
    landing: bool,
    /// Address and bytes; unset until it is known how many there are. Null where there are none.
    taken: OnceLock<(Pointer, usize)>,
}

impl<R: Runtime> Allocation<R> {
    /// For [`Runtime::send`], of no size yet.
    fn landing(runtime: &Arc<R>) -> Self {
        Self { runtime: runtime.clone(), landing: true, taken: OnceLock::new() }
    }

    fn new(runtime: &Arc<R>, bytes: usize) -> Result<Self, CudaError> {
        let allocation = Self { runtime: runtime.clone(), landing: false, taken: OnceLock::new() };
        allocation.take(bytes)?;
        Ok(allocation)
    }

    fn take(&self, bytes: usize) -> Result<Pointer, CudaError> {
        let at = match self.landing {
            _ if bytes == 0 => 0,
            true => self.runtime.allocate_landing(bytes)?,
            false => self.runtime.allocate(bytes)?,
        };
        self.taken.set((at, bytes)).expect("memory is taken once");
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
            // SAFETY: allocated in `take`, of this kind and with this many bytes; nothing else frees it.
            unsafe {
                match self.landing {
                    true => self.runtime.free_landing(at, bytes),
                    false => self.runtime.free(at, bytes),
                }
            }
        }
    }
}

/// An array in a runtime's memory: an allocation of its own, or one shared with the other arrays of a [`Staging`], which is
/// given back when the last of them is dropped. One of length 0 has a null address.
pub struct Array<R: Runtime, T> {
    memory: Arc<Allocation<R>>,
    /// Bytes before it.
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

// SAFETY: a runtime may be used from any thread, and the array is an address for it: no T is ever borrowed through it.
unsafe impl<R: Runtime, T> Send for Array<R, T> {}
// SAFETY: as above.
unsafe impl<R: Runtime, T> Sync for Array<R, T> {}

impl<R: Runtime, T: Pod> Array<R, T> {
    /// Room for `len` values, content unspecified.
    ///
    /// # Errors
    /// As [`Runtime::allocate`].
    pub fn new(runtime: &Arc<R>, len: usize) -> Result<Self, CudaError> {
        let memory = Arc::new(Allocation::new(runtime, len * size_of::<T>())?);
        Ok(Self { memory, offset: 0, len, element: PhantomData })
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

    /// Replaces all values.
    ///
    /// # Errors
    /// As [`Runtime::write`].
    ///
    /// # Panics
    /// If `host` is not as long.
    pub fn copy_from(&mut self, host: &[T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy from the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the array has this many bytes.
            unsafe { self.memory.runtime.write(self.pointer(), bytemuck::cast_slice(host))? };
        }
        Ok(())
    }

    /// Makes all values 0.
    ///
    /// # Errors
    /// As [`Runtime::zero`].
    pub fn zero(&mut self) -> Result<(), CudaError> {
        if self.len > 0 {
            // SAFETY: the array's own bytes.
            unsafe { self.memory.runtime.zero(self.pointer(), self.len * size_of::<T>())? };
        }
        Ok(())
    }

    /// The values, on the host.
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
    /// If `host` is not as long.
    pub fn copy_to(&self, host: &mut [T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy to the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the array has this many bytes.
            unsafe { self.memory.runtime.read(self.pointer(), bytemuck::cast_slice_mut(host))? };
        }
        Ok(())
    }

    /// Its address, for arguments of kernels.
    ///
    /// # Panics
    /// If it is of a [`Staging`] that was not sent.
    pub fn pointer(&self) -> Pointer {
        if self.len == 0 { 0 } else { self.memory.at() + self.offset as Pointer }
    }

    /// Address of the value `index`, which may be one past the last.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn pointer_at(&self, index: usize) -> Pointer {
        assert!(index <= self.len, "value {index} of {}", self.len);
        self.pointer() + (index * size_of::<T>()) as Pointer
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it lies in the memory of `runtime`.
    pub fn is_on(&self, runtime: &Arc<R>) -> bool {
        Arc::ptr_eq(&self.memory.runtime, runtime)
    }
}

impl<R: Runtime, T: Pod> Buffer<T> for Array<R, T> {
    fn len(&self) -> usize {
        self.len
    }
}

/// Arrays on their way to the device, in one copy. Each is 256-byte aligned, as an allocation of its own would be; none may be
/// used before [`Staging::send`].
pub struct Staging<R: Runtime> {
    memory: Arc<Allocation<R>>,
    host: R::Pinned,
    parts: Vec<Range<usize>>,
}

impl<R: Runtime> Staging<R> {
    /// Bytes of host memory that a staging begins with.
    const BYTES: usize = 1 << 20;

    /// With no arrays.
    ///
    /// # Errors
    /// As [`Runtime::pinned`].
    pub fn new(runtime: &Arc<R>) -> Result<Self, CudaError> {
        let host = runtime.pinned(Self::BYTES)?;
        Ok(Self { memory: Arc::new(Allocation::landing(runtime)), host, parts: Vec::new() })
    }

    /// One more array: a copy of `host`.
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

    /// Starts the copy. What is asked of the runtime from now on finds the arrays.
    ///
    /// # Errors
    /// As [`Runtime::allocate_landing`] and [`Runtime::send`].
    pub fn send(self) -> Result<(), CudaError> {
        let Self { memory, host, parts } = self;
        let bytes = parts.last().map_or(0, |last| last.end);
        let at = memory.take(bytes)?;
        if bytes > 0 {
            // SAFETY: the memory was just taken with as many bytes as the last part ends at; no array has had an address so far.
            unsafe { memory.runtime.send(at, host, &parts)? };
        }
        Ok(())
    }
}
