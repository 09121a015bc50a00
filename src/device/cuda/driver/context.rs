//! A GPU in use: its context and streams, its limits, the modules compiled for it, its memory.

use super::blas::Blas;
use super::compile::Cache;
use super::graph::{Node, Recent};
use super::landing::Landing;
use super::launch;
use super::nvrtc::Nvrtc;
use super::once::Once;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Arch, Kernel, Launch, Module, Pointer};
use crate::device::cuda::runtime::{Gemm, Limits, Memory, Runtime, Start};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One GPU. All work but the copies of [`Runtime::send`] goes to one stream, so it happens in the order it was asked for.
///
/// Those copies go to a stream of their own, which waits for nothing: a batch comes up while the step before is at work. Two
/// things keep the order that is promised:
/// - What is asked for after a copy finds it: the work's stream waits for an event behind the copy before it goes on.
/// - What was asked for before is not disturbed: the copy goes to memory that the host knows to be idle. See [`Landing`].
///
/// The optimiser's table of addresses goes the same way, though it is sent in the middle of a step: the same two things keep its
/// place, and as the host is mostly ahead of the device, it is there before its kernel's turn. One kind of copy is enough.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Where memory is asked for, so that this is never part of a capture.
    allocations: Arc<CudaStream>,
    /// Where [`Runtime::send`] copies.
    copies: Arc<CudaStream>,
    name: String,
    arch: Arch,
    limits: Limits,
    cache: Cache,
    /// Modules that are loaded; compiling one takes seconds.
    modules: Once<Module, Arc<CudaModule>>,
    kernels: Once<Kernel, CudaFunction>,
    /// Memory to be used again, by size: asking the driver takes microseconds, and a step asks a few hundred times.
    pool: Mutex<BTreeMap<usize, Vec<Pointer>>>,
    /// Memory that [`Runtime::send`] copies to.
    landing: Mutex<Landing>,
    /// Host memory that copies were started from, the oldest first.
    sent: Mutex<VecDeque<launch::Pinned>>,
    blas: Mutex<Option<Blas>>,
    /// What has been recorded, during a capture.
    capture: Mutex<Option<Vec<Node>>>,
    /// Executables by what they were made of: requests, and the nodes that those became.
    graphs: Mutex<Recent<(Vec<Node>, usize), launch::Executable>>,
}

/// Copies that may be under way before the next one waits for the first: the batch and the optimiser's table of two steps.
const COPIES: usize = 4;

/// Memory of copies that may be given back before the host waits for the device. A step gives back two pieces and then waits for
/// its losses; this is for whoever sends again and again and never reads.
const RESTING: usize = 16;

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Cuda").field("name", &self.name).field("arch", &self.arch).finish_non_exhaustive()
    }
}

/// How many GPUs the driver shows.
///
/// # Errors
/// [`CudaError::NoDriver`] where there is none, and what the driver reports.
pub fn device_count() -> Result<usize, CudaError> {
    if !launch::driver_is_present() {
        return Err(CudaError::NoDriver);
    }
    let count =
        CudaContext::device_count().map_err(|e| CudaError::driver("initialising the driver", e, 0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

impl Cuda {
    /// Opens GPU `ordinal`, compiling into the cache that the environment names (see [`Cache::from_environment`]).
    ///
    /// # Errors
    /// No driver, no such GPU, or one older than [`Arch::OLDEST`].
    pub fn new(ordinal: usize) -> Result<Cuda, CudaError> {
        Self::with_cache(ordinal, Cache::from_environment())
    }

    /// Opens GPU `ordinal` with a cache of the caller's choice.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn with_cache(ordinal: usize, cache: Cache) -> Result<Cuda, CudaError> {
        let found = device_count()?;
        if ordinal >= found {
            return Err(CudaError::NoDevice { ordinal, found });
        }
        let failed = |action| move |error| CudaError::driver(action, error, 0);
        let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
        let name = context.name().map_err(failed("asking for the device's name"))?;
        let attribute =
            |attribute| context.attribute(attribute).map_err(failed("asking for the device's limits"));
        let (major, minor) =
            context.compute_capability().map_err(failed("asking for the device's version"))?;
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
        launch::keep_freed_memory(&context).map_err(failed("setting up the memory pool"))?;
        // Not the default stream: it cannot be captured.
        let stream = || context.new_stream().map_err(failed("making a stream"));
        let (stream, allocations, copies) = (stream()?, stream()?, stream()?);
        Ok(Cuda {
            context,
            stream,
            allocations,
            copies,
            name,
            arch,
            limits,
            cache,
            modules: Once::default(),
            kernels: Once::default(),
            pool: Mutex::default(),
            landing: Mutex::default(),
            sent: Mutex::default(),
            blas: Mutex::default(),
            capture: Mutex::default(),
            graphs: Mutex::default(),
        })
    }

    /// Its compute capability.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Loads what training needs besides the driver, so that a library that is missing is found before anything begins.
    ///
    /// # Errors
    /// [`CudaError::NoNvrtc`], [`CudaError::OldNvrtc`], [`CudaError::NoBlas`].
    pub fn require_libraries(&self) -> Result<(), CudaError> {
        Nvrtc::get()?;
        self.blas(|_| Ok(()))
    }

    /// With cuBLASLt, opened when first needed.
    fn blas(&self, run: impl FnOnce(&mut Blas) -> Result<(), CudaError>) -> Result<(), CudaError> {
        self.bind()?;
        let mut blas = lock(&self.blas);
        if blas.is_none() {
            self.check_no_capture("opening cuBLASLt")?;
            let workspace = self.allocate(Blas::WORKSPACE)?;
            let opened = Blas::new(workspace);
            if opened.is_err() {
                // SAFETY: it was just allocated, and nobody else has it.
                unsafe { self.free(workspace, Blas::WORKSPACE) };
            }
            *blas = Some(opened?);
        }
        run(blas.as_mut().expect("it was just made"))
    }

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// What went wrong on the device since the last call.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.check_no_capture("waiting for the device")?;
        let moment = lock(&self.landing).now();
        self.stream.synchronize().map_err(failed("finishing the work given"))?;
        lock(&self.landing).settle(moment);
        Ok(())
    }

    /// The driver's context is the calling thread's.
    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(|error| CudaError::driver("using the device", error, 0))
    }

    /// Refuses what cannot be recorded.
    fn check_no_capture(&self, action: &'static str) -> Result<(), CudaError> {
        if lock(&self.capture).is_some() { Err(CudaError::NotCaptured { action }) } else { Ok(()) }
    }

    /// Notes what was just put on the stream, during a capture.
    fn note(&self, node: Node) {
        if let Some(nodes) = &mut *lock(&self.capture) {
            nodes.push(node);
        }
    }

    /// As [`Cuda::new_memory`]; where there is no more, what nobody uses is given back to the driver first.
    fn new_memory_or_room(&self, bytes: usize) -> Result<Pointer, CudaError> {
        match self.new_memory(bytes) {
            Err(CudaError::OutOfMemory { .. }) => {
                // (Some of the pool may be used by what is being recorded.)
                self.check_no_capture("giving memory back to the driver")?;
                self.synchronize()?; // what rests is idle then
                self.empty_pool();
                self.synchronize()?;
                self.new_memory(bytes)
            }
            result => result,
        }
    }

    /// Memory from the driver. The stream that uses it need not wait: it is there when this returns.
    fn new_memory(&self, bytes: usize) -> Result<Pointer, CudaError> {
        self.bind()?;
        let at = launch::allocate(&self.allocations, bytes)?;
        self.allocations.synchronize().map_err(|error| CudaError::driver("allocating", error, bytes))?;
        Ok(at)
    }

    /// A kernel: loaded, from the disk's cache or compiled.
    fn kernel(&self, kernel: Kernel) -> Result<CudaFunction, CudaError> {
        self.kernels.get(kernel, || {
            // The driver may wait for the device as it loads.
            self.check_no_capture("loading a kernel")?;
            let failed = |error| CudaError::driver("loading the kernels", error, 0);
            let module = self.modules.get(kernel.module, || {
                let code = self.cache.load(kernel.module, self.arch)?;
                launch::load(&self.context, code).map_err(failed)
            })?;
            launch::function(&module, kernel.entry, self.limits.shared_per_block).map_err(failed)
        })
    }

    /// Destroys an executable, which may be running.
    fn retire(&self, executable: Option<launch::Executable>) -> Result<(), CudaError> {
        if executable.is_some() { self.synchronize() } else { Ok(()) }
    }

    /// Gives the pool's memory and what is idle of the copies' back to the driver.
    fn empty_pool(&self) {
        let pool = std::mem::take(&mut *lock(&self.pool)).into_values().flatten();
        let idle = lock(&self.landing).take_idle().map(|(at, _)| at);
        for at in pool.chain(idle) {
            // SAFETY: what is in the pool was allocated and belongs to nobody; whatever used it is before this on the
            // stream. What is idle is so too, and nothing uses it on any stream. A failure leaks it.
            let _ = unsafe { launch::free(&self.stream, at) };
        }
    }
}

/// Nothing here is left half-changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rounds up to an eighth of a power of two, so that batches of nearly equal size share memory.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(256);
    bytes.next_multiple_of((bytes.next_power_of_two() / 8).max(256))
}

impl Runtime for Cuda {
    type Mark = CudaEvent;
    type Pinned = launch::Pinned;

    fn mark(&self) -> Result<CudaEvent, CudaError> {
        self.check_no_capture("marking a moment")?;
        let event = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.map_err(failed("marking a moment"))
    }

    fn seconds_between(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64, CudaError> {
        let milliseconds = to.synchronize().and_then(|()| from.elapsed_ms(to));
        milliseconds.map(|ms| f64::from(ms) * 1e-3).map_err(failed("measuring time"))
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
            .map_err(|error| CudaError::driver("asking for the device's memory", error, 0))?;
        Ok(Memory { free, total })
    }

    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError> {
        let size = size_class(bytes);
        if let Some(at) = lock(&self.pool).get_mut(&size).and_then(Vec::pop) {
            return Ok(at);
        }
        // Other sizes may hold what is missing.
        self.new_memory_or_room(size)
    }

    unsafe fn free(&self, at: Pointer, bytes: usize) {
        lock(&self.pool).entry(size_class(bytes)).or_default().push(at);
    }

    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError> {
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
        // What uses it was asked for by now, and is on the work's stream behind the wait for the copy: once the host has waited
        // for that stream, all of it is done, and so is the copy, even if nothing ever used what it brought.
        lock(&self.landing).give_back(at, Landing::size(bytes));
    }

    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { launch::zero(&self.stream, at, bytes) }.map_err(failed("filling memory"))?;
        self.note(Node::Zero);
        Ok(())
    }

    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError> {
        self.check_no_capture("copying to the device")?;
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { launch::write(&self.stream, at, host) }.map_err(failed("copying to the device"))
    }

    fn pinned(&self, bytes: usize) -> Result<launch::Pinned, CudaError> {
        let failed = |error| CudaError::driver("staging a copy", error, 0);
        self.bind()?; // any thread may ask
        let oldest = {
            let mut sent = lock(&self.sent);
            let is_free = match sent.front() {
                Some(oldest) => sent.len() >= COPIES || oldest.is_read().map_err(failed)?,
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
        // The wait must not become part of a graph: it is for this copy only.
        self.check_no_capture("copying to the device")?;
        self.bind()?;
        let bytes = parts.last().map_or(0, |last| last.end);
        // SAFETY: the caller's promise. The memory is from `allocate_landing`, so it was idle or new, and no other copy or
        // kernel uses it.
        let sent = unsafe { from.send(&self.copies, at, bytes) }.and_then(|()| from.let_wait(&self.stream));
        if sent.is_err() {
            // The memory will be given back without a wait on the work's stream: nothing may be on its way to it then.
            let _ = self.copies.synchronize();
        }
        lock(&self.sent).push_back(from);
        sent.map_err(failed("copying to the device"))
    }

    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError> {
        self.check_no_capture("copying from the device")?;
        self.bind()?;
        let moment = lock(&self.landing).now();
        // SAFETY: the caller's promise.
        unsafe { launch::read(&self.stream, at, host) }.map_err(failed("copying from the device"))?;
        // It has waited for all that was on the work's stream at that moment.
        lock(&self.landing).settle(moment);
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError> {
        self.bind()?;
        let function = self.kernel(kernel)?;
        // SAFETY: the caller's promises.
        unsafe { launch::launch(&self.stream, &function, launch, params) }.map_err(failed(kernel.entry))?;
        self.note(Node::Kernel(kernel));
        Ok(())
    }

    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promises; the workspace is used on this stream only.
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
            return Err(CudaError::NotCaptured { action: "the end of no capture" });
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
        // SAFETY: the promises made when each launch was recorded; whatever was given back since is used again by later
        // work on the same stream only.
        unsafe { executable.start(&self.stream) }.map_err(failed("starting a graph"))?;
        graphs.put(key, executable);
        Ok(start)
    }

    fn forget_capture(&self) {
        if lock(&self.capture).take().is_some() && self.bind().is_ok() {
            // A capture that something has invalidated ends with an error, and is over.
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
            // SAFETY: allocated when the library was opened, and no other product will use it: what is in the pool is given back
            // to the driver behind the products on the stream.
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
    fn memory_is_rounded_up_by_an_eighth_at_most() {
        for bytes in [1, 255, 256, 257, 1000, 4096, 5000, 1 << 20, (1 << 20) + 1, 12_345_678] {
            let size = size_class(bytes);
            assert!(
                size >= bytes && size.is_multiple_of(256) && size <= bytes + bytes / 4 + 256,
                "{bytes}: {size}"
            );
        }
    }
}
