//! Starting threads, where the system may refuse memory.
//!
//! The system's refusal of a thread is an error. But where it gives the stack and then refuses the
//! signal stack, or an allocation before the thread's first own instruction, the standard library
//! panics outside of any `catch_unwind`, or glibc aborts: the process ends. So a thread is started
//! only where more than its stack fits, and the caller waits until its own work begins.

use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{Builder, Scope, ScopedJoinHandle};

/// The addresses that must be free: the start of a thread maps its stack (2 MiB), guard pages and
/// the signal stack; the rest is for what other threads allocate at the same time.
const ROOM: usize = 4 << 20;

/// A pool of `threads` threads; 0: one per core.
pub fn pool(threads: usize) -> Result<ThreadPool, ThreadPoolBuildError> {
    ThreadPoolBuilder::new().num_threads(threads).spawn_handler(start_worker).build()
}

/// The same for the pool of the process. Call it before any parallel computation, which would
/// otherwise start threads with other settings, and panic where the system refuses them.
pub fn global_pool(threads: usize) -> Result<(), ThreadPoolBuildError> {
    ThreadPoolBuilder::new().num_threads(threads).spawn_handler(start_worker).build_global()
}

/// A thread of `scope` that does `work`.
pub fn start<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    let (work, begun) = announced(work)?;
    let thread = Builder::new().spawn_scoped(scope, work)?;
    let _ = begun.recv();
    Ok(thread)
}

/// Whether one more thread can be started, as far as memory goes.
pub fn check_room() -> io::Result<()> {
    memmap2::MmapOptions::new().len(ROOM).map_anon().map(drop)
}

fn start_worker(worker: ThreadBuilder) -> io::Result<()> {
    let (work, begun) = announced(|| worker.run())?;
    Builder::new().spawn(work)?;
    let _ = begun.recv();
    Ok(())
}

/// `work` for a thread that has room, and a channel that closes when it begins.
fn announced<T>(work: impl FnOnce() -> T) -> io::Result<(impl FnOnce() -> T, Receiver<()>)> {
    check_room()?;
    let (begins, begun) = channel();
    let work = move || {
        drop(begins);
        work()
    };
    Ok((work, begun))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_has_its_threads_and_a_scope_its_results() {
        let pool = pool(3).unwrap();
        assert_eq!(pool.current_num_threads(), 3);
        assert_eq!(pool.broadcast(|thread| thread.index()), [0, 1, 2]);
        let text = String::from("borrowed");
        let length = std::thread::scope(|scope| start(scope, || text.len()).unwrap().join().unwrap());
        assert_eq!(length, 8);
    }

    /// Under every limit of the address space, from the present size of the process on, a thread
    /// starts or its start is an error. An abort would end the tests, so a child tries.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_starts_or_is_refused() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        const CHILD: &str = "DFAR_TEST_CHILD";
        if std::env::var_os(CHILD).is_none() {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "threads::tests::a_thread_starts_or_is_refused", "--nocapture"]);
            let output = child.env(CHILD, "1").output().unwrap();
            assert!(output.status.success(), "{output:?}");
            assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
            return;
        }
        let pages = || -> u64 {
            let sizes = std::fs::read_to_string("/proc/self/statm").unwrap();
            sizes.split(' ').next().unwrap().parse().unwrap()
        };
        let before = pages() * 4096;
        let maximum = getrlimit(Resource::As).maximum;
        let mut refused = Vec::new();
        for room in (0..3 * ROOM as u64).step_by(8 << 10) {
            setrlimit(Resource::As, Rlimit { current: Some(before + room), maximum }).unwrap();
            let result = std::thread::scope(|scope| start(scope, || 7).map(|thread| thread.join().unwrap()));
            setrlimit(Resource::As, Rlimit { current: maximum, maximum }).unwrap();
            match result {
                Ok(value) => assert_eq!(value, 7),
                Err(_) => refused.push(room),
            }
        }
        assert!(!refused.is_empty() && refused.last().unwrap() + (8 << 10) < 3 * ROOM as u64, "{refused:?}");
    }
}
