//! Memory of results: NumPy arrays over memory that is used again.
//!
//! The system gives fresh memory page by page as it is first written, which can take as long as
//! attention over short sequences. The memory of a result that Python has freed therefore serves a
//! later one, as in PyTorch's and JAX's allocators for GPUs.

use numpy::PyArray;
use numpy::ndarray::{ArrayViewMut, Dimension};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A cache line, the unit of allocation: results start on a 64-byte boundary.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Values of a line.
const LINE: usize = 16;

/// Most lines that are kept free: 256 MiB.
const KEPT: usize = 4 << 20;

/// Results of fewer values (64 KiB) are left to NumPy: `malloc` keeps their memory.
const SMALLEST: usize = 16 << 10;

static POOL: Mutex<Pool> = Mutex::new(Pool { free: VecDeque::new(), lines: 0 });

/// Free memory, in the order in which it was freed.
struct Pool {
    free: VecDeque<Box<[Line]>>,
    /// Lines in `free`.
    lines: usize,
}

impl Pool {
    fn take(&mut self, lines: usize) -> Option<Box<[Line]>> {
        let at = self.free.iter().rposition(|free| free.len() == lines)?;
        self.lines -= lines;
        self.free.remove(at)
    }

    /// Keeps memory, in place of what was freed longest ago if it would be too much.
    fn give_back(&mut self, memory: Box<[Line]>) {
        self.lines += memory.len();
        self.free.push_back(memory);
        while self.lines > KEPT {
            let Some(oldest) = self.free.pop_front() else { break };
            self.lines -= oldest.len();
        }
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    // No critical section panics between two changes.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The owner of an array's memory, which returns to the pool with the last array over it.
#[pyclass(frozen, module = "dfar._dfar", name = "_Memory")]
pub struct Memory {
    lines: *mut [Line],
}

// SAFETY: it owns the lines, and lends none of them itself.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: from `Box::into_raw` in `unset`; no array refers to it any more.
        let memory = unsafe { Box::from_raw(self.lines) };
        pool().give_back(memory);
    }
}

fn fresh(lines: usize) -> PyResult<Box<[Line]>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(lines).map_err(|_| {
        PyMemoryError::new_err(format!("the system refused {} bytes for a result", lines * size_of::<Line>()))
    })?;
    memory.resize(lines, Line([0.0; LINE]));
    Ok(memory.into_boxed_slice())
}

/// A new array, for a caller that overwrites its values: they are 0 or those of an earlier result.
pub fn unset<D: Dimension>(py: Python<'_>, shape: D) -> PyResult<Bound<'_, PyArray<f32, D>>> {
    let len = shape.size();
    if len < SMALLEST {
        return Ok(PyArray::zeros(py, shape, false));
    }
    // Rounded up to a multiple of an eighth of a power of two, so that results of nearly equal size
    // use the same memory.
    let lines = len.next_multiple_of(len.next_power_of_two() / 8) / LINE;
    let free = pool().take(lines);
    let lines = Box::into_raw(match free {
        Some(memory) => memory,
        None => fresh(lines)?,
    });
    let owner = Bound::new(py, Memory { lines })?;
    // SAFETY: `len` values of the memory, which `owner` keeps and does not touch until the array,
    // and with it every view of the array, is gone.
    unsafe {
        let view = ArrayViewMut::from_shape_ptr(shape, lines.cast());
        Ok(PyArray::borrow_from_array(&view, owner.into_any()))
    }
}
