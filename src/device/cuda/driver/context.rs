//! [`Cuda`]: an open GPU with its context, streams, limits, loaded modules and memory.

use super::blas::Blas;
use super::compile::Cache;
use super::graph::{Node, Recent};
use super::landing::{Given, Landing};
use super::launch;
use super::nvrtc::Nvrtc;
use super::once::Once;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Arch, Kernel, Launch, Module, Pointer};
use crate::device::cuda::runtime::{Gemm, Held, Limits, Memory, Runtime, Start, lock};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// One GPU. All work except the copies of [`Runtime::send`] goes to one compute stream, in order.
///
/// Those copies have their own stream, which waits for nothing: a batch is copied while the
/// previous step is in flight. Two rules keep them correct:
/// - Later work sees the copy: the compute stream waits for a CUDA event recorded behind it.
/// - Work in flight is not disturbed: the destination is memory that no work in flight uses. See
///   [`Landing`].
///
/// The optimizer's address table is copied the same way in the middle of a step. The host is
/// usually ahead of the device, so the table arrives before its kernel starts.
///
/// On a stream of another library (`Cuda::on_stream`), these copies too go to that stream, and
/// the rules hold by its order.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Whether the stream belongs to another library.
    borrowed: bool,
    /// Stream of driver allocations, which keeps them out of a capture.
    allocations: Arc<CudaStream>,
    /// Stream of the copies of [`Runtime::send`].
    copies: Arc<CudaStream>,
    name: String,
    arch: Arch,
    limits: Limits,
    cache: Cache,
    /// Loaded modules. Compiling one takes seconds.
    modules: Arc<Once<Module, Arc<CudaModule>>>,
    kernels: Arc<Once<Kernel, LoadedKernel>>,
    /// Blocks that a multiprocessor holds at once, by kernel, threads and shared memory.
    resident: Arc<Once<(Kernel, u32, u32), usize>>,
    /// Memory pool by size class. A driver allocation takes microseconds, and a step makes a few
    /// hundred.
    pool: Mutex<BTreeMap<usize, Vec<Pointer>>>,
    held: Held,
    /// Landing memory of [`Runtime::send`].
    landing: Mutex<Landing>,
    /// Pinned staging buffers of copies in flight, oldest first.
    sent: Mutex<VecDeque<launch::Pinned>>,
    /// Idle pinned buffers of [`Runtime::begin_read`].
    read: Mutex<Vec<launch::Pinned>>,
    blas: Mutex<Option<Blas>>,
    /// Requests recorded so far; `None` outside a capture.
    capture: Mutex<Option<Vec<Node>>>,
    /// Graph executable cache, keyed by the recorded requests and the number of graph nodes.
    graphs: Mutex<Recent<(Vec<Node>, usize), launch::Executable>>,
}

/// A copy to the host in flight.
pub struct Reading {
    to: launch::Pinned,
    bytes: usize,
    /// Landing memory that was freed before this moment is idle once the copy has finished.
    moment: Given,
}

/// A kernel ready to launch.
#[derive(Clone)]
struct LoadedKernel {
    function: CudaFunction,
    /// Size of its parameter, if the driver can tell.
    parameter_bytes: Option<usize>,
}

/// Maximum copies in flight; the next one waits for the oldest. Two steps need four: a batch and an
/// optimizer table each.
const COPIES: usize = 4;

/// The same on a stream of another library, where a copy waits for all earlier work. More, so that
/// the host may be some calls ahead.
const BORROWED_COPIES: usize = 16;

/// Maximum resting landing allocations before an allocation synchronises. A step frees two, and the
/// host waits for its losses soon; the limit is for callers that send repeatedly and never read.
const RESTING: usize = 16;

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Cuda").field("name", &self.name).field("arch", &self.arch).finish_non_exhaustive()
    }
}

/// Number of GPUs that the driver reports.
///
/// # Errors
/// [`CudaError::NoDriver`] without an NVIDIA driver, or another driver error.
pub fn device_count() -> Result<usize, CudaError> {
    if !launch::driver_is_present() {
        return Err(CudaError::NoDriver);
    }
    let count =
        CudaContext::device_count().map_err(|e| CudaError::driver("initializing the driver", e, 0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

impl Cuda {
    /// Opens GPU `ordinal` with the cache of [`Cache::from_environment`].
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::NoDevice`], [`CudaError::OldDevice`], or a driver
    /// error.
    pub fn new(ordinal: usize) -> Result<Cuda, CudaError> {
        Self::with_cache(ordinal, Cache::from_environment())
    }

    /// Opens GPU `ordinal` with the given kernel cache.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn with_cache(ordinal: usize, cache: Cache) -> Result<Cuda, CudaError> {
        let found = device_count()?;
        if ordinal >= found {
            return Err(CudaError::NoDevice { ordinal, found });
        }
        let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
        let name = context.name().map_err(failed("querying the device's name"))?;
        let attribute =
            |attribute| context.attribute(attribute).map_err(failed("querying the device's limits"));
        let (major, minor) =
            context.compute_capability().map_err(failed("querying the compute capability"))?;
        let arch = Arch { major: major as u32, minor: minor as u32 };
        if arch < Arch::OLDEST {
            return Err(CudaError::OldDevice { name, arch });
        }
        let limits = Limits {
            shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            cache_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        };
        // With event tracking, cudarc would synchronise the context when it makes the first stream,
        // and so invalidate a capture of another `Cuda` in this process.
        // SAFETY: no `CudaSlice` is made; this module orders all uses of memory itself.
        unsafe { context.disable_event_tracking() };
        // The default stream cannot be captured.
        let stream = || context.new_stream().map_err(failed("creating a stream"));
        let (stream, allocations, copies) = (stream()?, stream()?, stream()?);
        Ok(Cuda {
            context,
            stream,
            borrowed: false,
            allocations,
            copies,
            name,
            arch,
            limits,
            cache,
            modules: Arc::default(),
            kernels: Arc::default(),
            resident: Arc::default(),
            pool: Mutex::default(),
            held: Held::default(),
            landing: Mutex::default(),
            sent: Mutex::default(),
            read: Mutex::default(),
            blas: Mutex::default(),
            capture: Mutex::default(),
            graphs: Mutex::default(),
        })
    }

    /// The same GPU with a stream of another library as its compute stream. Loaded kernels are
    /// shared, memory is not: its order is that of the stream.
    ///
    /// # Errors
    /// A driver error.
    ///
    /// # Safety
    /// `stream` is a stream of the GPU's primary context, or 0 or 1 for the legacy default stream. It
    /// exists until the result is dropped.
    pub(crate) unsafe fn on_stream(&self, stream: u64) -> Result<Cuda, CudaError> {
        // SAFETY: guaranteed by the caller; `CudaContext::new` retains the primary context.
        let stream = unsafe { launch::borrowed_stream(&self.context, stream) };
        Ok(Cuda {
            context: self.context.clone(),
            copies: stream.clone(),
            stream,
            borrowed: true,
            allocations: self.context.new_stream().map_err(failed("creating a stream"))?,
            name: self.name.clone(),
            arch: self.arch,
            limits: self.limits,
            cache: self.cache.clone(),
            modules: self.modules.clone(),
            kernels: self.kernels.clone(),
            resident: self.resident.clone(),
            pool: Mutex::default(),
            held: Held::default(),
            landing: Mutex::default(),
            sent: Mutex::default(),
            read: Mutex::default(),
            blas: Mutex::default(),
            capture: Mutex::default(),
            graphs: Mutex::default(),
        })
    }

    /// Compute capability.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Loads NVRTC and cuBLASLt, so that a missing library is reported before the run starts.
    ///
    /// # Errors
    /// [`CudaError::NoNvrtc`], [`CudaError::OldNvrtc`], [`CudaError::NoBlas`].
    pub fn require_libraries(&self) -> Result<(), CudaError> {
        Nvrtc::get()?;
        self.blas(|_| Ok(()))
    }

    /// Calls `run` with cuBLASLt, which is opened on first use.
    fn blas(&self, run: impl FnOnce(&mut Blas) -> Result<(), CudaError>) -> Result<(), CudaError> {
        self.bind()?;
        let mut blas = lock(&self.blas);
        if blas.is_none() {
            self.check_no_capture("opening cuBLASLt")?;
            let workspace = self.allocate(Blas::WORKSPACE)?;
            let opened = Blas::new(workspace);
            if opened.is_err() {
                // SAFETY: allocated above and not shared yet.
                unsafe { self.free(workspace, Blas::WORKSPACE) };
            }
            *blas = Some(opened?);
        }
        run(blas.as_mut().expect("it was just made"))
    }

    /// Waits for all work in flight.
    ///
    /// # Errors
    /// A driver error, including a failure of earlier launches.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.check_no_capture("waiting for the device")?;
        let moment = lock(&self.landing).now();
        self.stream.synchronize().map_err(failed("synchronising with the device"))?;
        lock(&self.landing).settle(moment);
        Ok(())
    }

    /// Binds the context to the calling thread.
    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(|error| CudaError::driver("binding the context", error, 0))
    }

    /// Rejects an action that cannot be recorded.
    fn check_no_capture(&self, action: &'static str) -> Result<(), CudaError> {
        if lock(&self.capture).is_some() { Err(CudaError::NotCaptured { action }) } else { Ok(()) }
    }

    /// Appends a request to the recording, if a capture is in progress.
    fn note(&self, node: Node) {
        if let Some(nodes) = &mut *lock(&self.capture) {
            nodes.push(node);
        }
    }

    /// As [`Cuda::new_memory`]. If out of memory, returns unused pool memory to the driver and
    /// tries again.
    fn new_memory_or_room(&self, bytes: usize) -> Result<Pointer, CudaError> {
        match self.new_memory(bytes) {
            Err(CudaError::OutOfMemory { .. }) => {
                // The recording may use memory of the pool.
                self.check_no_capture("returning memory to the driver")?;
                self.synchronize()?; // resting landing memory becomes idle
                self.empty_pool();
                self.synchronize()?;
                self.new_memory(bytes)
            }
            result => result,
        }
    }

    /// Allocates from the driver. The allocation has completed on return, so no stream needs to
    /// wait for it.
    fn new_memory(&self, bytes: usize) -> Result<Pointer, CudaError> {
        self.bind()?;
        let at = launch::allocate(&self.allocations, bytes)?;
        self.allocations.synchronize().map(|()| at).map_err(|error| {
            // SAFETY: just allocated, and not shared.
            let _ = unsafe { launch::free(&self.allocations, at) };
            CudaError::driver("allocating", error, bytes)
        })
    }

    /// A loaded kernel. Compiles its module or reads it from the disk cache if necessary.
    fn kernel(&self, kernel: Kernel) -> Result<LoadedKernel, CudaError> {
        self.kernels.get(kernel, || {
            // Loading may synchronise with the device.
            self.check_no_capture("loading a kernel")?;
            let failed = |error| CudaError::driver("loading the kernels", error, 0);
            let module = self.modules.get(kernel.module, || {
                let code = self.cache.load(kernel.module, self.arch)?;
                launch::load(&self.context, code).map_err(failed)
            })?;
            let function = launch::function(&module, kernel.entry, self.limits.shared_per_block);
            let function = function.map_err(failed)?;
            Ok(LoadedKernel { parameter_bytes: launch::parameter_bytes(&function), function })
        })
    }

    /// Waits for the device before an executable, which may be running, is destroyed.
    fn retire(&self, executable: Option<launch::Executable>) -> Result<(), CudaError> {
        if executable.is_some() { self.synchronize() } else { Ok(()) }
    }

    /// Returns the pool and idle landing memory to the driver.
    fn empty_pool(&self) {
        let pool = std::mem::take(&mut *lock(&self.pool)).into_values().flatten();
        let idle = lock(&self.landing).take_idle().map(|(at, _)| at);
        for at in pool.chain(idle) {
            // SAFETY: no array owns this memory. The last use of pool memory precedes the free on
            // the stream; no stream uses idle landing memory. A failure leaks it.
            let _ = unsafe { launch::free(&self.stream, at) };
        }
    }
}

/// Rounds up to an eighth of a power of two, so that batches of nearly equal size reuse memory.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(256);
    bytes.next_multiple_of((bytes.next_power_of_two() / 8).max(256))
}

impl Runtime for Cuda {
    type Mark = CudaEvent;
    type Pinned = launch::Pinned;
    type Reading = Reading;

    fn mark(&self) -> Result<CudaEvent, CudaError> {
        self.check_no_capture("recording an event")?;
        let event = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.map_err(failed("recording an event"))
    }

    fn seconds_between(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64, CudaError> {
        let milliseconds = to.synchronize().and_then(|()| from.elapsed_ms(to));
        milliseconds.map(|ms| f64::from(ms) * 1e-3).map_err(failed("reading the time between events"))
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn memory(&self) -> Result<Memory, CudaError> {
        self.bind()?;
        let (free, total) = result::mem_get_info()
            .map_err(|error| CudaError::driver("querying the device's memory", error, 0))?;
        // Memory of the pool is used again, or returned when an allocation fails.
        let idle: usize = lock(&self.pool).iter().map(|(size, blocks)| size * blocks.len()).sum();
        Ok(Memory { free: free + idle, total })
    }

    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError> {
        let size = size_class(bytes);
        if let Some(at) = lock(&self.pool).get_mut(&size).and_then(Vec::pop) {
            return Ok(at);
        }
        // Out of memory, other size classes of the pool may still hold some.
        self.new_memory_or_room(size)
    }

    unsafe fn free(&self, at: Pointer, bytes: usize) {
        if !self.held.keeps(at, bytes) {
            lock(&self.pool).entry(size_class(bytes)).or_default().push(at);
        }
    }

    fn held(&self) -> &Held {
        &self.held
    }

    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError> {
        if self.borrowed {
            // The copy is behind the work in flight.
            return self.allocate(bytes);
        }
        let size = Landing::size(bytes);
        let (found, resting) = {
            let mut landing = lock(&self.landing);
            (landing.take(size), landing.resting())
        };
        if let Some(at) = found {
            return Ok(at);
        }
        if resting >= RESTING {
            self.synchronize()?;
            if let Some(at) = lock(&self.landing).take(size) {
                return Ok(at);
            }
        }
        self.new_memory_or_room(size)
    }

    unsafe fn free_landing(&self, at: Pointer, bytes: usize) {
        if self.borrowed {
            // SAFETY: from `allocate` in `allocate_landing`; not freed yet, as the caller
            // guarantees.
            return unsafe { self.free(at, bytes) };
        }
        // All uses are on the compute stream, behind the wait for the copy. After the host has
        // synchronised with that stream, the uses and the copy have finished.
        lock(&self.landing).give_back(at, Landing::size(bytes));
    }

    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: guaranteed by the caller.
        unsafe { launch::zero(&self.stream, at, bytes) }.map_err(failed("filling memory"))?;
        self.note(Node::Zero);
        Ok(())
    }

    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError> {
        self.check_no_capture("copying to the device")?;
        self.bind()?;
        // SAFETY: guaranteed by the caller.
        unsafe { launch::write(&self.stream, at, host) }.map_err(failed("copying to the device"))
    }

    fn pinned(&self, bytes: usize) -> Result<launch::Pinned, CudaError> {
        let failed = |error| CudaError::driver("staging a copy", error, 0);
        self.bind()?; // any thread may call it
        let most = if self.borrowed { BORROWED_COPIES } else { COPIES };
        let oldest = {
            let mut sent = lock(&self.sent);
            let is_free = match sent.front() {
                Some(oldest) => sent.len() >= most || oldest.is_copied().map_err(failed)?,
                None => false,
            };
            if is_free { sent.pop_front() } else { None }
        };
        if let Some(oldest) = oldest {
            oldest.wait().map_err(failed)?;
            if oldest.len() >= bytes {
                return Ok(oldest);
            }
        }
        launch::Pinned::new(&self.context, bytes).map_err(failed)
    }

    unsafe fn send(
        &self,
        at: Pointer,
        from: launch::Pinned,
        parts: &[Range<usize>],
    ) -> Result<(), CudaError> {
        // A graph must not contain the wait for the copy.
        self.check_no_capture("copying to the device")?;
        self.bind()?;
        let bytes = parts.last().map_or(0, |last| last.end);
        // SAFETY: guaranteed by the caller. `allocate_landing` returned idle or new memory, so no
        // other copy or kernel uses it.
        let sent = unsafe { from.send(&self.copies, at, bytes) }.and_then(|()| from.let_wait(&self.stream));
        if sent.is_err() {
            // The memory is freed without a wait on the compute stream, so the copy must finish
            // here.
            let _ = self.copies.synchronize();
        }
        lock(&self.sent).push_back(from);
        sent.map_err(failed("copying to the device"))
    }

    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError> {
        self.check_no_capture("copying from the device")?;
        self.bind()?;
        let moment = lock(&self.landing).now();
        // SAFETY: guaranteed by the caller.
        unsafe { launch::read(&self.stream, at, host) }.map_err(failed("copying from the device"))?;
        // The read has waited for all earlier work on the compute stream.
        lock(&self.landing).settle(moment);
        Ok(())
    }

    unsafe fn begin_read(&self, at: Pointer, bytes: usize) -> Result<Reading, CudaError> {
        self.check_no_capture("copying from the device")?;
        self.bind()?;
        let failed = |error| CudaError::driver("copying from the device", error, 0);
        let idle = lock(&self.read).pop().filter(|idle| idle.len() >= bytes);
        let mut to = match idle {
            Some(idle) => idle,
            None => launch::Pinned::new(&self.context, bytes).map_err(failed)?,
        };
        let moment = lock(&self.landing).now();
        // SAFETY: guaranteed by the caller.
        if let Err(error) = unsafe { to.fetch(&self.stream, at, bytes) } {
            // The copy, if it was started, must finish before the buffer is freed here.
            let _ = self.stream.synchronize();
            return Err(failed(error));
        }
        Ok(Reading { to, bytes, moment })
    }

    fn end_read(&self, reading: Reading, host: &mut [u8]) -> Result<(), CudaError> {
        let Reading { to, bytes, moment } = reading;
        to.wait().map_err(failed("copying from the device"))?;
        host.copy_from_slice(&to[..bytes]);
        // All work before the copy on the compute stream is complete.
        lock(&self.landing).settle(moment);
        lock(&self.read).push(to);
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError> {
        self.bind()?;
        let LoadedKernel { function, parameter_bytes } = self.kernel(kernel)?;
        if let Some(needed) = parameter_bytes.filter(|&needed| needed != params.len()) {
            return Err(CudaError::Parameter { kernel: kernel.entry, given: params.len(), needed });
        }
        // SAFETY: guaranteed by the caller.
        unsafe { launch::launch(&self.stream, &function, launch, params) }.map_err(failed(kernel.entry))?;
        self.note(Node::Kernel(kernel));
        Ok(())
    }

    fn resident_blocks(&self, kernel: Kernel, threads: u32, shared_bytes: u32) -> Result<usize, CudaError> {
        self.bind()?;
        let LoadedKernel { function, .. } = self.kernel(kernel)?;
        self.resident.get((kernel, threads, shared_bytes), || {
            launch::resident_blocks(&function, threads, shared_bytes)
                .map_err(failed("querying how many blocks fit"))
        })
    }

    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller; only this stream uses the workspace.
        self.blas(|blas| unsafe { blas.gemm(gemm, count, self.stream.cu_stream()) })?;
        self.note(Node::Product);
        Ok(())
    }

    fn begin_capture(&self) -> Result<(), CudaError> {
        self.check_no_capture("another capture")?;
        self.bind()?;
        launch::begin_capture(&self.stream).map_err(failed("beginning a capture"))?;
        *lock(&self.capture) = Some(Vec::new());
        Ok(())
    }

    fn start_capture(&self) -> Result<Start, CudaError> {
        let Some(requests) = lock(&self.capture).take() else {
            return Err(CudaError::NotCaptured { action: "ending a capture that was not started" });
        };
        self.bind()?;
        let graph = launch::end_capture(&self.stream).map_err(failed("ending a capture"))?;
        let key = (requests, graph.nodes().map_err(failed("counting a graph's nodes"))?);
        let mut graphs = lock(&self.graphs);
        let mut found = graphs.take(&key);
        let updated = found.as_mut().is_some_and(|executable| executable.update(&graph));
        let (mut executable, start) = match found {
            Some(executable) if updated => (executable, Start::Updated),
            refused => {
                self.retire(refused.or_else(|| graphs.make_room()))?;
                (graph.instantiate().map_err(failed("instantiating a graph"))?, Start::Instantiated)
            }
        };
        // SAFETY: each recorded launch met its contract. Memory freed since then is reused only by
        // later work on the same stream.
        unsafe { executable.start(&self.stream) }.map_err(failed("starting a graph"))?;
        graphs.put(key, executable);
        Ok(start)
    }

    fn forget_capture(&self) {
        if lock(&self.capture).take().is_some() && self.bind().is_ok() {
            // Ending an invalidated capture returns an error.
            let _ = launch::end_capture(&self.stream);
        }
    }
}

fn failed(action: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |error| CudaError::driver(action, error, 0)
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if let Some(blas) = lock(&self.blas).take() {
            let workspace = blas.workspace();
            drop(blas);
            // SAFETY: allocated when cuBLASLt was opened. Later work on the stream only frees the
            // pool, behind all products.
            unsafe { self.free(workspace, Blas::WORKSPACE) };
        }
        // Executables may be running.
        let _ = self.synchronize();
        *lock(&self.graphs) = Recent::default();
        self.empty_pool();
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn memory_is_rounded_up_by_a_quarter_at_most() {
        for bytes in [1, 255, 256, 257, 1000, 4096, 5000, 1 << 20, (1 << 20) + 1, 12_345_678] {
            let size = size_class(bytes);
            assert!(
                size >= bytes && size.is_multiple_of(256) && size <= bytes + bytes / 4 + 256,
                "{bytes}: {size}"
            );
        }
    }
}
