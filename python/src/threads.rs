//! The threads of this process, and long calls that Ctrl-C can stop.

use crate::errors;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rayon::ThreadPool;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Calls on at most this many tokens run on the calling thread: the engine does not divide them.
const SMALL: usize = 256;
/// Longest time until a Ctrl-C is noticed.
const POLL: Duration = Duration::from_millis(50);

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
    let pool = start(state.threads)?;
    Ok(state.pool.insert(pool).clone())
}

fn start(threads: usize) -> PyResult<Arc<ThreadPool>> {
    Ok(Arc::new(dfar::threads::pool(threads).map_err(errors::python)?))
}

/// Most threads. They start one after the other, which cannot be interrupted.
const MOST: usize = 1024;

fn check(name: &str, threads: usize) -> PyResult<()> {
    if threads <= MOST {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{name} is {threads}, but must be at most {MOST}")))
}

/// Sets the number of threads of later calls; 0: one per core.
#[pyfunction]
pub fn set_threads(count: usize) -> PyResult<()> {
    check("count", count)?;
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

/// How the work of [`interruptible`] talks to the thread that called it.
pub struct Link<M> {
    stop: Arc<AtomicBool>,
    messages: SyncSender<M>,
    answers: Receiver<()>,
}

impl<M> Link<M> {
    /// Whether to stop as soon as possible.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Hands a message to the calling thread and waits until it is dealt with.
    pub fn tell(&self, message: M) {
        // If the caller is gone, `stopped` says so.
        if self.messages.send(message).is_ok() {
            let _ = self.answers.recv();
        }
    }
}

/// Runs any work on the pool's threads. Call it without the GIL.
pub fn install<T: Send>(work: impl FnOnce() -> T + Send) -> PyResult<T> {
    Ok(pool()?.install(work))
}

/// Runs `work` on the pool. Meanwhile the calling thread deals with its messages and checks for
/// signals; it holds the GIL only for these.
///
/// If `deal` returns `false` or fails, or a signal handler raises, the work is told to stop.
/// Returns the result of the work and the exception, if there was one. `threads` other than 0 start
/// a pool for this call only.
pub fn interruptible<T: Send, M: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl FnOnce(Link<M>) -> T + Send,
    mut deal: impl FnMut(Python<'_>, M) -> PyResult<bool>,
) -> PyResult<(T, Option<PyErr>)> {
    check("threads", threads)?;
    let pool = if threads == 0 { pool()? } else { start(threads)? };
    let stop = Arc::new(AtomicBool::new(false));
    let (messages, mut inbox) = sync_channel(0);
    let (answer, answers) = sync_channel(1);
    let link = Link { stop: stop.clone(), messages, answers };
    let mut raised = None;
    let mut refuse = |error: PyErr| {
        stop.store(true, Ordering::SeqCst);
        raised.get_or_insert(error);
    };
    let result = std::thread::scope(|scope| {
        // `link` is moved, so that the channel closes when the work is done, or has panicked.
        let started = dfar::threads::start(scope, move || pool.install(|| work(link)));
        let worker =
            started.map_err(|error| errors::python(dfar::Error::Threads { reason: error.to_string() }))?;
        loop {
            let inbox = &mut inbox;
            match py.detach(move || inbox.recv_timeout(POLL)) {
                Ok(message) => {
                    match deal(py, message) {
                        Ok(true) => {}
                        Ok(false) => stop.store(true, Ordering::SeqCst),
                        Err(error) => refuse(error),
                    }
                    let _ = answer.send(());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if let Err(error) = py.check_signals() {
                refuse(error);
            }
        }
        Ok::<_, PyErr>(py.detach(|| worker.join()))
    })?;
    match result {
        Ok(result) => Ok((result, raised)),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
