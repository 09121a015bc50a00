//! The state of the driver: contexts, streams, events, graphs, and the order in which work runs.
//!
//! Work waits in the queue of its stream. `DFAR_DRIVER_SEED` chooses when it runs: 0 (or unset) at
//! once; 1 when something waits for it; any other seed at some time between, in an order drawn from
//! the seed among those that streams and events allow.

use crate::clock::{Clock, Moment};
use crate::code::{Code, Done, Failure, fault, handle};
use crate::handles::{Handles, Kind};
use crate::machine::{Entry, Machine};
use crate::memory::{Host, Memory};
use crate::product::Product;
use crate::streams::{LEGACY, Stream, Streams};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ThreadId;
use std::time::Instant;

/// Work of a stream.
#[derive(Clone, Debug)]
pub enum Work {
    Launch { entry: Entry, grid: [u32; 2], threads: u32, shared_bytes: usize, params: Vec<u64> },
    Product(Box<Product>),
    Fill { at: u64, value: u8, bytes: usize },
    Upload { at: u64, from: Host },
    Download { at: u64, to: usize, bytes: usize, pinned: bool },
    Free { at: u64 },
    Record { event: Arc<Progress>, version: u64 },
    Wait { event: Arc<Progress>, version: u64 },
}

impl Work {
    /// Whether a graph executable can be updated from one to the other.
    fn is_like(&self, other: &Work) -> bool {
        match (self, other) {
            (Work::Launch { entry, .. }, Work::Launch { entry: other, .. }) => entry == other,
            (Work::Product(_), Work::Product(_)) | (Work::Fill { .. }, Work::Fill { .. }) => true,
            _ => false,
        }
    }
}

/// How far an event's recordings have run.
#[derive(Debug, Default)]
pub struct Progress {
    run: AtomicU64,
    /// Nanoseconds since the driver began, of the last recording that ran.
    at: AtomicU64,
}

#[derive(Debug)]
pub struct Event {
    progress: Arc<Progress>,
    recorded: u64,
    clock: Clock,
    timed: bool,
    /// Last recorded in a stream that was capturing.
    captured: bool,
}

/// Work that has not run.
#[derive(Debug)]
pub struct Queued {
    work: Work,
    clock: Arc<Clock>,
    now: Moment,
    executable: Option<Arc<AtomicU64>>,
}

/// What a stream records instead of running it.
#[derive(Debug)]
pub struct Capture {
    nodes: Vec<Work>,
    invalid: bool,
    thread: ThreadId,
}

/// A kernel of a module.
#[derive(Clone, Debug)]
pub struct Function {
    pub module: u64,
    pub entry: Entry,
    /// Largest dynamic shared memory that launches may ask for.
    pub shared_limit: usize,
    pub registers: i32,
}

#[derive(Debug)]
pub struct Graph {
    nodes: Vec<Work>,
}

#[derive(Debug)]
pub struct Executable {
    nodes: Vec<Work>,
    /// Nodes enqueued that have not run.
    pending: Arc<AtomicU64>,
}

pub struct State {
    pub machine: Machine,
    pub memory: Memory,
    pub contexts: Handles<u32>,
    pub primary: u64,
    pub streams: Streams,
    pub events: Handles<Event>,
    pub modules: Handles<u64>,
    pub functions: Handles<Function>,
    pub graphs: Handles<Graph>,
    pub executables: Handles<Executable>,
    pub blas: crate::blas::Tables,
    host: Clock,
    random: u64,
    late: bool,
    latest: bool,
    began: Instant,
    /// The error of a kernel that ended badly: every later call returns it.
    sticky: Option<Code>,
    pub calls: HashMap<String, u64>,
    /// Calls that shall fail: entry point, how many calls from now on, result.
    pub planted: Vec<(String, u64, i32)>,
}

/// Dynamic shared memory without an opt-in.
pub const SHARED_DEFAULT: usize = 48 << 10;

impl State {
    pub fn new() -> Result<State, String> {
        let number =
            |name, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
        let seed = number("DFAR_DRIVER_SEED", 0);
        let total = number("DFAR_DRIVER_MEMORY_MIB", 1024) as usize;
        Ok(State {
            machine: Machine::new()?,
            memory: Memory::new(total << 20),
            contexts: Handles::new(Kind::Context),
            primary: 0,
            streams: Streams::new(),
            events: Handles::new(Kind::Event),
            modules: Handles::new(Kind::Module),
            functions: Handles::new(Kind::Function),
            graphs: Handles::new(Kind::Graph),
            executables: Handles::new(Kind::Executable),
            blas: crate::blas::Tables::default(),
            host: Clock::default(),
            random: u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15) | 1,
            late: seed != 0,
            latest: seed == 1,
            began: Instant::now(),
            sticky: None,
            calls: HashMap::new(),
            planted: Vec::new(),
        })
    }

    /// A number below `n`.
    fn draw(&mut self, n: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 33) as usize % n
    }

    /// # Errors
    /// The error of a kernel that ended badly.
    pub fn healthy(&self) -> Done {
        self.sticky.map_or(Ok(()), |code| Err(Failure::Answer(code)))
    }

    /// Counts a call, and fails it if a test planted that.
    pub fn count(&mut self, name: &str) -> Option<i32> {
        *self.calls.entry(name.to_owned()).or_default() += 1;
        let mut failed = None;
        self.planted.retain_mut(|(planted, calls, result)| {
            if planted != name {
                return true;
            }
            *calls -= 1;
            if *calls == 0 {
                failed = Some(*result);
            }
            *calls > 0
        });
        failed
    }

    // ------------------------------------------------------------------------------------- streams

    pub fn new_stream(&mut self, blocking: bool) -> u64 {
        self.streams.add(self.host.clone(), blocking)
    }

    pub fn destroy_stream(&mut self, stream: u64) -> Done {
        // The driver destroys it once its work has run.
        self.finish(stream)?;
        let number = self.streams.number(stream);
        let mut stream = self.streams.remove(number).map_err(handle)?;
        if stream.capture.take().is_some() {
            return fault(Code::ILLEGAL_STATE, "a capturing stream is destroyed");
        }
        Ok(())
    }

    fn stream(&mut self, stream: u64) -> Done<&mut Stream> {
        let number = self.streams.number(stream);
        self.streams.get(number).map_err(handle)
    }

    pub fn is_capturing(&mut self, stream: u64) -> Done<bool> {
        Ok(self.stream(stream)?.capture.is_some())
    }

    /// Enqueues work, or records it.
    pub fn enqueue(&mut self, stream: u64, work: Work) -> Done<Moment> {
        let held = self.stream(stream)?;
        if let Some(capture) = &mut held.capture {
            if capture.invalid {
                return Err(Failure::Answer(Code::CAPTURE_INVALIDATED));
            }
            capture.nodes.push(work);
            return Ok(Moment::default());
        }
        let now = self.append(stream, work, None)?;
        self.run_some()?;
        Ok(now)
    }

    /// A new moment of a stream.
    pub fn tick(&mut self, stream: u64) -> Done<Moment> {
        self.order_default(stream)?;
        let host = self.host.clone();
        let held = self.stream(stream)?;
        held.clock.join(&host);
        Ok(held.clock.tick(held.timeline))
    }

    /// Puts the next work of a stream behind that of the streams that it is ordered with without an
    /// event: the legacy default stream and the blocking streams.
    fn order_default(&mut self, stream: u64) -> Done {
        let number = self.streams.number(stream);
        for other in self.streams.before(number).map_err(handle)? {
            let before = self.stream(other)?;
            if let Some(capture) = &mut before.capture {
                capture.invalid = true;
                return fault(
                    Code::CAPTURE_IMPLICIT,
                    "work on the legacy default stream while a blocking stream is captured",
                );
            }
            let clock = before.clock.clone();
            if !before.queue.is_empty() {
                // As by an event.
                let event = Arc::new(Progress::default());
                let (version, mark) = (1, Moment::default());
                let queued = |work| {
                    let clock = Arc::new(clock.clone());
                    Queued { work, clock, now: mark, executable: None }
                };
                before.queue.push_back(queued(Work::Record { event: event.clone(), version }));
                self.stream(number)?.queue.push_back(queued(Work::Wait { event, version }));
            }
            self.stream(number)?.clock.join(&clock);
        }
        Ok(())
    }

    /// Runs all work.
    pub fn drain(&mut self) -> Done {
        let all: Vec<u64> = self.streams.iter().map(|(stream, _)| stream).collect();
        all.into_iter().try_for_each(|stream| self.finish(stream))
    }

    fn append(&mut self, stream: u64, work: Work, executable: Option<Arc<AtomicU64>>) -> Done<Moment> {
        self.order_default(stream)?;
        let host = self.host.clone();
        let held = self.stream(stream)?;
        held.clock.join(&host);
        let now = held.clock.tick(held.timeline);
        let clock = Arc::new(held.clock.clone());
        held.queue.push_back(Queued { work, clock, now, executable });
        Ok(now)
    }

    /// Runs work that nobody waits for: all of it without a seed, some of it with one.
    fn run_some(&mut self) -> Done {
        if self.late {
            let count = if self.latest { 0 } else { self.draw(3) };
            for _ in 0..count {
                self.run_any(None)?;
            }
            return Ok(());
        }
        while self.run_any(None)? {}
        Ok(())
    }

    /// Runs one piece of work of any stream, or of `only`. False if none can run.
    fn run_any(&mut self, only: Option<u64>) -> Done<bool> {
        let able: Vec<u64> = self
            .streams
            .iter()
            .filter(|(stream, held)| {
                only.is_none_or(|only| only == *stream)
                    && held.queue.front().is_some_and(|queued| can_run(&queued.work))
            })
            .map(|(stream, _)| stream)
            .collect();
        if able.is_empty() {
            return Ok(false);
        }
        let drawn = self.draw(able.len());
        let queued = self.streams.get(able[drawn]).map_err(handle)?.queue.pop_front();
        let Queued { work, clock, now, executable } = queued.expect("its queue has a first");
        let result = self.run(work, &clock, now);
        if let Some(pending) = executable {
            pending.fetch_sub(1, Ordering::Relaxed);
        }
        result.map(|()| true)
    }

    /// Runs work until the queue of `stream` is empty.
    pub fn finish(&mut self, stream: u64) -> Done {
        let stream = self.streams.number(stream);
        while !self.stream(stream)?.queue.is_empty() {
            // Streams that it waits for must run too; others may.
            let own = self.run_any(Some(stream));
            if self.late && !self.latest && self.draw(2) == 0 {
                self.run_any(None)?;
            }
            if !own? && !self.run_any(None)? {
                return fault(Code::LAUNCH_FAILED, "a hang: a stream waits for an event that never comes");
            }
        }
        Ok(())
    }

    pub fn synchronize_stream(&mut self, stream: u64) -> Done {
        if let Some(capture) = &mut self.stream(stream)?.capture {
            capture.invalid = true;
            return fault(Code::CAPTURE_UNSUPPORTED, "a synchronisation with a capturing stream");
        }
        self.finish(stream)?;
        let clock = self.stream(stream)?.clock.clone();
        self.host.join(&clock);
        Ok(())
    }

    pub fn synchronize_context(&mut self) -> Done {
        let mut capturing = false;
        for (_, stream) in self.streams.iter_mut() {
            if let Some(capture) = &mut stream.capture {
                capture.invalid = true;
                capturing = true;
            }
        }
        if capturing {
            return fault(
                Code::CAPTURE_UNSUPPORTED,
                "a synchronisation with the context while a stream is capturing",
            );
        }
        let all: Vec<u64> = self.streams.iter().map(|(stream, _)| stream).collect();
        all.into_iter().try_for_each(|stream| self.synchronize_stream(stream))
    }

    /// Refuses what a capture of this thread cannot contain.
    pub fn refuse_in_capture(&mut self, what: &str) -> Done {
        let me = std::thread::current().id();
        for (_, stream) in self.streams.iter_mut() {
            if let Some(capture) = &mut stream.capture
                && capture.thread == me
            {
                capture.invalid = true;
                return fault(
                    Code::CAPTURE_UNSUPPORTED,
                    format!("{what} while this thread captures a stream"),
                );
            }
        }
        Ok(())
    }

    /// Refuses what a graph should not contain.
    pub fn refuse_on_capturing(&mut self, stream: u64, what: &str) -> Done {
        if let Some(capture) = &mut self.stream(stream)?.capture {
            capture.invalid = true;
            return fault(Code::CAPTURE_UNSUPPORTED, format!("{what} on a capturing stream"));
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------------- running

    fn run(&mut self, work: Work, clock: &Clock, now: Moment) -> Done {
        let result = self.carry_out(work, clock, now);
        result.map_err(|message| {
            self.sticky = Some(Code::ILLEGAL_ADDRESS);
            Failure::Fault(Code::ILLEGAL_ADDRESS, message)
        })
    }

    fn carry_out(&mut self, work: Work, clock: &Clock, now: Moment) -> Result<(), String> {
        let Self { machine, memory, .. } = self;
        match work {
            Work::Launch { entry, grid, threads, shared_bytes, params } => {
                let named = |error: String| format!("{}: {error}", entry.name);
                let (pages, result) = machine.launch(&entry, &params, grid, threads, shared_bytes);
                result.map_err(named)?;
                let mut all = pages.into_iter();
                all.try_for_each(|(page, writes)| memory.access(page, 1, writes, clock, now)).map_err(named)
            }
            Work::Product(product) => {
                for (name, at, bytes, writes) in product.accesses() {
                    memory
                        .access(at, bytes, writes, clock, now)
                        .map_err(|error| format!("{name} of a product: {error}"))?;
                }
                product.run(machine)
            }
            Work::Fill { at, value, bytes } => {
                memory.access(at, bytes, true, clock, now).map_err(|error| format!("a fill: {error}"))?;
                machine.bytes_mut(at, bytes).fill(value);
                Ok(())
            }
            Work::Upload { at, from } => {
                let bytes = match from {
                    Host::Read(bytes) => bytes,
                    Host::Pinned { at, expected } => {
                        memory.end_copy(at);
                        // SAFETY: pinned memory is not freed before its copies have run.
                        let found = unsafe { std::slice::from_raw_parts(at as *const u8, expected.len()) };
                        if found != expected {
                            return Err(format!("pinned memory at {at:#x} changed before its copy ran"));
                        }
                        expected
                    }
                };
                memory
                    .access(at, bytes.len(), true, clock, now)
                    .map_err(|error| format!("a copy: {error}"))?;
                machine.bytes_mut(at, bytes.len()).copy_from_slice(&bytes);
                Ok(())
            }
            Work::Download { at, to, bytes, pinned } => {
                memory.access(at, bytes, false, clock, now).map_err(|error| format!("a copy: {error}"))?;
                let unwritten = machine.unwritten(at, bytes);
                if unwritten > 0 {
                    return Err(format!(
                        "a copy to the host reads {unwritten} bytes that nothing has written"
                    ));
                }
                // SAFETY: the caller of the copy guarantees the memory until it synchronises.
                unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) }
                    .copy_from_slice(machine.bytes(at, bytes));
                if pinned {
                    memory.end_copy(to);
                }
                Ok(())
            }
            Work::Free { at } => memory.free(machine, at, clock, now),
            Work::Record { event, version } => {
                event.run.fetch_max(version, Ordering::Relaxed);
                event.at.store(self.began.elapsed().as_nanos() as u64, Ordering::Relaxed);
                Ok(())
            }
            Work::Wait { .. } => Ok(()),
        }
    }

    // -------------------------------------------------------------------------------------- events

    pub fn new_event(&mut self, timed: bool) -> u64 {
        let progress = Arc::new(Progress::default());
        self.events.add(Event { progress, recorded: 0, clock: Clock::default(), timed, captured: false })
    }

    pub fn record(&mut self, event: u64, stream: u64) -> Done {
        let capturing = self.is_capturing(stream)?;
        let held = self.events.get(event).map_err(handle)?;
        held.captured = capturing;
        if capturing {
            return Ok(());
        }
        held.recorded += 1;
        let (progress, version) = (held.progress.clone(), held.recorded);
        self.append(stream, Work::Record { event: progress, version }, None)?;
        let clock = self.stream(stream)?.clock.clone();
        self.events.get(event).map_err(handle)?.clock = clock;
        self.run_some()
    }

    pub fn wait(&mut self, stream: u64, event: u64) -> Done {
        let held = self.events.get(event).map_err(handle)?;
        let (progress, version, clock, captured) =
            (held.progress.clone(), held.recorded, held.clock.clone(), held.captured);
        if captured {
            return fault(
                Code::NOT_SUPPORTED,
                "a wait for an event of a capture: one stream is captured at a time",
            );
        }
        if let Some(capture) = &mut self.stream(stream)?.capture {
            capture.invalid = true;
            return fault(
                Code::CAPTURE_ISOLATION,
                "a capturing stream waits for an event outside the capture",
            );
        }
        self.stream(stream)?.clock.join(&clock);
        self.append(stream, Work::Wait { event: progress, version }, None)?;
        self.run_some()
    }

    /// Whether all recorded work has run.
    pub fn query(&mut self, event: u64) -> Done<bool> {
        if self.events.get(event).map_err(handle)?.captured {
            return fault(Code::CAPTURED_EVENT, "a query of an event of a capture");
        }
        self.run_some()?; // so that a loop of queries ends
        let held = self.events.get(event).map_err(handle)?;
        let done = held.progress.run.load(Ordering::Relaxed) >= held.recorded;
        if done {
            let clock = held.clock.clone();
            self.host.join(&clock);
        } else {
            self.run_any(None)?;
        }
        Ok(done)
    }

    pub fn synchronize_event(&mut self, event: u64) -> Done {
        let held = self.events.get(event).map_err(handle)?;
        if held.captured {
            return fault(Code::CAPTURED_EVENT, "a synchronisation with an event of a capture");
        }
        let (progress, recorded, clock) = (held.progress.clone(), held.recorded, held.clock.clone());
        while progress.run.load(Ordering::Relaxed) < recorded {
            if !self.run_any(None)? {
                return fault(Code::LAUNCH_FAILED, "a hang: the host waits for an event that never comes");
            }
        }
        self.host.join(&clock);
        Ok(())
    }

    /// Milliseconds between two events.
    pub fn elapsed(&mut self, from: u64, to: u64) -> Done<f32> {
        let mut at = |event| -> Done<u64> {
            let held = self.events.get(event).map_err(handle)?;
            if held.recorded == 0 || !held.timed {
                return fault(
                    Code::INVALID_HANDLE,
                    "the time of an event that was not recorded, or has no timing",
                );
            }
            if held.progress.run.load(Ordering::Relaxed) < held.recorded {
                return Err(Failure::Answer(Code::NOT_READY));
            }
            Ok(held.progress.at.load(Ordering::Relaxed))
        };
        let (from, to) = (at(from)?, at(to)?);
        Ok((to as f64 - from as f64) as f32 * 1e-6)
    }

    // -------------------------------------------------------------------------------------- graphs

    pub fn begin_capture(&mut self, stream: u64) -> Done {
        if self.streams.number(stream) == LEGACY {
            return fault(Code::CAPTURE_UNSUPPORTED, "a capture of the legacy default stream");
        }
        let held = self.stream(stream)?;
        if held.capture.is_some() {
            return fault(Code::ILLEGAL_STATE, "a capture of a stream that is capturing");
        }
        held.capture = Some(Capture { nodes: vec![], invalid: false, thread: std::thread::current().id() });
        Ok(())
    }

    pub fn end_capture(&mut self, stream: u64) -> Done<u64> {
        let Some(capture) = self.stream(stream)?.capture.take() else {
            return fault(Code::ILLEGAL_STATE, "the end of a capture that was not begun");
        };
        if capture.invalid {
            return Err(Failure::Answer(Code::CAPTURE_INVALIDATED));
        }
        Ok(self.graphs.add(Graph { nodes: capture.nodes }))
    }

    pub fn graph_nodes(&mut self, graph: u64) -> Done<usize> {
        Ok(self.graphs.get(graph).map_err(handle)?.nodes.len())
    }

    pub fn instantiate(&mut self, graph: u64) -> Done<u64> {
        let nodes = self.graphs.get(graph).map_err(handle)?.nodes.clone();
        Ok(self.executables.add(Executable { nodes, pending: Arc::default() }))
    }

    /// Whether the update was possible.
    pub fn update(&mut self, executable: u64, graph: u64) -> Done<bool> {
        let nodes = self.graphs.get(graph).map_err(handle)?.nodes.clone();
        let held = self.executables.get(executable).map_err(handle)?;
        let alike = held.nodes.len() == nodes.len()
            && held.nodes.iter().zip(&nodes).all(|(old, new)| old.is_like(new));
        if alike {
            held.nodes = nodes;
        }
        Ok(alike)
    }

    pub fn start_graph(&mut self, executable: u64, stream: u64) -> Done {
        self.refuse_on_capturing(stream, "a graph")?;
        let held = self.executables.get(executable).map_err(handle)?;
        let (nodes, pending) = (held.nodes.clone(), held.pending.clone());
        for node in nodes {
            pending.fetch_add(1, Ordering::Relaxed);
            self.append(stream, node, Some(pending.clone()))?;
        }
        self.run_some()
    }

    pub fn destroy_executable(&mut self, executable: u64) -> Done {
        let held = self.executables.remove(executable).map_err(handle)?;
        if held.pending.load(Ordering::Relaxed) > 0 {
            return fault(Code::INVALID_VALUE, "a graph executable is destroyed before its work has run");
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------------ contexts

    /// The objects that nothing destroyed.
    pub fn leaks(&self) -> Vec<String> {
        let (allocations, pinned) = self.memory.counts();
        [
            (self.streams.made(), "streams"),
            (self.events.len(), "events"),
            (self.modules.len(), "modules"),
            (self.graphs.len(), "graphs"),
            (self.executables.len(), "graph executables"),
            (self.blas.live(), "cuBLASLt objects"),
            (allocations, "device allocations"),
            (pinned, "pinned allocations"),
        ]
        .into_iter()
        .filter(|&(count, _)| count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect()
    }
}

fn can_run(work: &Work) -> bool {
    match work {
        Work::Wait { event, version } => event.run.load(Ordering::Relaxed) >= *version,
        _ => true,
    }
}
