//! The threads of this process.

use crate::errors;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, Mutex, PoisonError};

/// Calls on at most this many tokens run on the calling thread: the engine does not divide them.
const SMALL: usize = 256;

/// The pool, with the id of the process that started its threads. After `fork` the child has a copy
/// of the pool without its threads, and starts its own.
struct Pool {
    process: u32,
    threads: usize,
    pool: Option<Arc<ThreadPool>>,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { process: 0, threads: 0, pool: None });

fn pool() -> PyResult<Arc<ThreadPool>> {
    let mut state = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if state.process != process {
        // Dropping the parent's pool would wait for threads that do not exist here.
        std::mem::forget(state.pool.take());
        state.process = process;
    }
    if let Some(pool) = &state.pool {
        return Ok(pool.clone());
    }
    let started = ThreadPoolBuilder::new().num_threads(state.threads).build();
    let pool = Arc::new(
        started.map_err(|error| errors::python(dfar::Error::Threads { reason: error.to_string() }))?,
    );
    Ok(state.pool.insert(pool).clone())
}

/// Sets the number of threads of later calls; 0: one per core.
#[pyfunction]
pub fn set_threads(count: usize) -> PyResult<()> {
    if count > 65_536 {
        return Err(PyValueError::new_err(format!("count is {count}, but must be at most 65536")));
    }
    let mut state = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if state.process == std::process::id() {
        state.pool = None;
    }
    state.threads = count;
    Ok(())
}

/// The number of threads.
#[pyfunction]
pub fn threads() -> PyResult<usize> {
    Ok(pool()?.current_num_threads())
}

/// Computes on the pool's threads. Call it without the GIL.
pub fn compute<T: Send>(tokens: usize, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    if tokens <= SMALL { Ok(work()) } else { Ok(pool()?.install(work)) }
}
