//! Pooled host memory: a training step allocates nothing once every size has been seen.

use super::{Cpu, Done};
use crate::device::{Buffer, DeviceError, Element, Memory};
use crate::memory::fallible;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// A cache line, the unit of allocation: every buffer starts on a 64-byte boundary.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Free memory, by capacity in lines.
#[derive(Default)]
pub struct Pool {
    free: Mutex<BTreeMap<usize, Vec<Vec<Line>>>>,
}

/// Values in pooled memory. Dropping the buffer returns the memory to the pool.
pub struct CpuBuffer<T: Element> {
    lines: Vec<Line>,
    len: usize,
    pool: Arc<Pool>,
    element: std::marker::PhantomData<T>,
}

impl Pool {
    /// `len` values of unspecified content.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn take<T: Element>(self: &Arc<Self>, len: usize) -> Result<CpuBuffer<T>, DeviceError> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(DeviceError::Memory { bytes: usize::MAX })?;
        let count = size_class(bytes.div_ceil(size_of::<Line>()));
        let recycled = self.lock().get_mut(&count).and_then(Vec::pop);
        let lines = match recycled {
            Some(lines) => lines,
            None => {
                let mut lines = Vec::new();
                fallible(|| lines.try_reserve_exact(count)).map_err(|_| DeviceError::Memory { bytes })?;
                lines.resize(count, bytemuck::Zeroable::zeroed());
                lines
            }
        };
        Ok(CpuBuffer { lines, len, pool: self.clone(), element: std::marker::PhantomData })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, Vec<Vec<Line>>>> {
        // Every change of the map is complete, so a panic of another thread leaves it valid.
        self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Rounds up to a multiple of an eighth of a power of two, so that batches of similar size share
/// buffers.
fn size_class(lines: usize) -> usize {
    let step = (lines.next_power_of_two() / 8).max(1);
    lines.next_multiple_of(step)
}

impl<T: Element> Drop for CpuBuffer<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if !lines.is_empty() {
            self.pool.lock().entry(lines.len()).or_default().push(lines);
        }
    }
}

impl<T: Element> Deref for CpuBuffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Element> DerefMut for CpuBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T: Element> Buffer<T> for CpuBuffer<T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl Memory for Cpu {
    type Buffer<T: Element> = CpuBuffer<T>;
    /// Nothing: [`Memory::stage`] copies at once.
    type Staging = ();
    /// The values: all operations are complete when they return.
    type Download<T: Element> = Vec<T>;

    /// Allocates the memory and frees it again. It adds one copy for the host values from which a
    /// model is created.
    fn check_room(&self, parameters: usize, copies: usize) -> Done {
        let bytes = parameters.saturating_mul((copies + 1) * size_of::<f32>());
        let mut memory = Vec::<u8>::new();
        let room = fallible(|| memory.try_reserve_exact(bytes)).map_err(|_| DeviceError::Memory { bytes });
        // Memory that nothing uses would not be allocated at all.
        std::hint::black_box(memory.as_ptr());
        room
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>, DeviceError> {
        self.pool.take(len)
    }
    fn zeros<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>, DeviceError> {
        let mut buffer = self.pool.take(len)?;
        buffer.fill(bytemuck::Zeroable::zeroed());
        Ok(buffer)
    }
    fn upload<T: Element>(&self, host: &[T]) -> Result<CpuBuffer<T>, DeviceError> {
        let mut buffer = self.pool.take(host.len())?;
        buffer.copy_from_slice(host);
        Ok(buffer)
    }
    fn staging(&self) -> Done {
        Ok(())
    }
    fn stage<T: Element>(&self, (): &mut (), host: &[T]) -> Result<CpuBuffer<T>, DeviceError> {
        self.upload(host)
    }
    fn send(&self, (): ()) -> Done {
        Ok(())
    }
    fn download<T: Element>(&self, buffer: &CpuBuffer<T>) -> Result<Vec<T>, DeviceError> {
        Ok(buffer.to_vec())
    }
    fn begin_download<T: Element>(&self, buffer: &CpuBuffer<T>) -> Result<Vec<T>, DeviceError> {
        self.download(buffer)
    }
    fn finish_download<T: Element>(&self, download: Vec<T>) -> Result<Vec<T>, DeviceError> {
        Ok(download)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_returns_to_the_pool() {
        let pool = Arc::new(Pool::default());
        let first = pool.take::<f32>(1000).unwrap();
        let address = first.as_ptr() as usize;
        assert_eq!(address % 64, 0);
        drop(first);
        let second = pool.take::<u32>(990).unwrap();
        assert_eq!(second.as_ptr() as usize, address, "a similar size reuses the memory");
        assert!(matches!(pool.take::<f32>(usize::MAX / 8), Err(DeviceError::Memory { .. })));
        assert_eq!((second.len(), pool.take::<u8>(0).unwrap().len()), (990, 0));
    }
}
