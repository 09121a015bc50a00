//! Everything unsafe about the driver: memory, modules, launches.

use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Launch, Pointer};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Whether the driver's library can be loaded. cudarc panics where it is used and cannot.
pub(crate) fn driver_is_present() -> bool {
    // SAFETY: loads libcuda, whose initialisers do nothing before cuInit.
    unsafe { sys::is_culib_present() }
}

/// Tells the pool of the context's device to keep what is freed, so that a step allocates nothing from the system.
pub(crate) fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    context.bind_to_thread()?;
    let mut threshold = u64::MAX;
    // SAFETY: the device is the context's; the release threshold is a 64-bit integer that the driver copies.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result()
    }
}

/// Memory with unspecified content, there when the stream has come to this point.
pub(crate) fn allocate(stream: &CudaStream, bytes: usize) -> Result<Pointer, CudaError> {
    // SAFETY: the stream is the context's; the driver checks the size.
    unsafe { result::malloc_async(stream.cu_stream(), bytes) }
        .map_err(|error| CudaError::driver("allocating", error, bytes))
}

/// Gives memory back when the stream has come to this point.
///
/// # Safety
/// `at` is from [`allocate`], has come to be there, and is not freed.
pub(crate) unsafe fn free(stream: &CudaStream, at: Pointer) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { result::free_async(at, stream.cu_stream()) }
}

/// Fills memory with zeros.
///
/// # Safety
/// The bytes lie inside one allocation.
pub(crate) unsafe fn zero(stream: &CudaStream, at: Pointer, bytes: usize) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { result::memset_d8_async(at, 0, bytes, stream.cu_stream()) }
}

/// Copies from the host. The driver has read `host` when this returns: it is pageable memory.
///
/// # Safety
/// `host.len()` bytes from `at` on lie inside one allocation.
pub(crate) unsafe fn write(stream: &CudaStream, at: Pointer, host: &[u8]) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { result::memcpy_htod_async(at, host, stream.cu_stream()) }
}

/// Copies to the host, and waits for it.
///
/// # Safety
/// `host.len()` bytes from `at` on lie inside one allocation.
pub(crate) unsafe fn read(stream: &CudaStream, at: Pointer, host: &mut [u8]) -> Result<(), DriverError> {
    // SAFETY: the caller's promise; the host's memory is borrowed until the stream is done.
    unsafe { result::memcpy_dtoh_async(host, at, stream.cu_stream())? };
    stream.synchronize()
}

/// Page-locked host memory, which the device reads by itself, and the moment when it has. That is an event, recorded anew by every
/// copy; a stream that was made to wait for it waits for the copy before, whatever is recorded later.
pub struct Pinned {
    at: NonNull<u8>,
    bytes: usize,
    read: CudaEvent,
}

// SAFETY: owned memory of the process; the driver may be used from any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Zeros.
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, DriverError> {
        // Of an event that was never recorded all is done.
        let read = context.new_event(None)?;
        // SAFETY: `new_event` has made the context the thread's; no flags: cached, for this context.
        let at = unsafe { result::malloc_host(bytes, 0)? }.cast::<u8>();
        // SAFETY: allocated with this many bytes.
        unsafe { at.write_bytes(0, bytes) };
        let at = NonNull::new(at).expect("the driver reports a failure rather than return null");
        Ok(Self { at, bytes, read })
    }

    /// Whether the last copy from it is done.
    pub(crate) fn is_read(&self) -> Result<bool, DriverError> {
        self.read.try_is_complete()
    }

    /// Waits until it is.
    pub(crate) fn wait(&self) -> Result<(), DriverError> {
        self.read.synchronize()
    }

    /// Lets what is put on the stream from now on wait for the last copy.
    pub(crate) fn let_wait(&self, stream: &CudaStream) -> Result<(), DriverError> {
        stream.wait(&self.read)
    }

    /// Starts a copy of the first `bytes` bytes. They may be changed when [`Pinned::is_read`] says so.
    ///
    /// # Safety
    /// `bytes` bytes from `at` on lie inside one allocation, which nothing on another stream uses before it waits for the copy.
    pub(crate) unsafe fn send(
        &self,
        stream: &CudaStream,
        at: Pointer,
        bytes: usize,
    ) -> Result<(), DriverError> {
        // SAFETY: the caller's promise; this memory is neither lent nor freed before the event, which comes behind the copy.
        unsafe { result::memcpy_htod_async(at, &self[..bytes], stream.cu_stream())? };
        self.read.record(stream)
    }
}

impl Deref for Pinned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this many bytes, and written in `new`.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A context that fails here has failed elsewhere too, and said so.
        if self.wait().is_ok() && self.read.context().bind_to_thread().is_ok() {
            // SAFETY: from `malloc_host`, freed once, and no copy reads it any more.
            let _ = unsafe { result::free_host(self.at.as_ptr().cast()) };
        }
    }
}

/// Records what is put on the stream from now on. Relaxed: what has nothing to do with the stream (memory from another one,
/// pinned memory, on any thread) is as free as ever. The legacy stream cannot be recorded.
pub(crate) fn begin_capture(stream: &CudaStream) -> Result<(), DriverError> {
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
}

/// Ends the recording.
pub(crate) fn end_capture(stream: &CudaStream) -> Result<Graph, DriverError> {
    // SAFETY: the stream is alive; the graph is the caller's from now on.
    let graph = unsafe { result::stream::end_capture(stream.cu_stream())? };
    Ok(Graph(graph))
}

/// What was recorded.
pub(crate) struct Graph(sys::CUgraph);

impl Graph {
    /// How many nodes it has: a product may be more than one.
    pub(crate) fn nodes(&self) -> Result<usize, DriverError> {
        let mut count = 0;
        // SAFETY: the graph is alive; without room for nodes, their number is written.
        unsafe { sys::cuGraphGetNodes(self.0, std::ptr::null_mut(), &mut count).result()? };
        Ok(count)
    }

    /// Makes an executable of it.
    pub(crate) fn instantiate(&self) -> Result<Executable, DriverError> {
        // SAFETY: the graph is alive, and not needed by what is made of it.
        let executable = unsafe { result::graph::instantiate(self.0, sys::CUgraphInstantiate_flags(0))? };
        Ok(Executable(executable))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `end_capture`, and destroyed once. A failure leaks it.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

/// A graph that can be started.
pub(crate) struct Executable(sys::CUgraphExec);

// SAFETY: the driver may be used from any thread; an executable is used by one at a time, as starting and updating it need `&mut`.
unsafe impl Send for Executable {}

impl Executable {
    /// Gives it the arguments of another graph, for later starts. False where the driver refuses: it is of no use then.
    pub(crate) fn update(&mut self, graph: &Graph) -> bool {
        let mut info = sys::CUgraphExecUpdateResultInfo {
            result: sys::CUgraphExecUpdateResult::CU_GRAPH_EXEC_UPDATE_SUCCESS,
            errorNode: std::ptr::null_mut(),
            errorFromNode: std::ptr::null_mut(),
        };
        // SAFETY: both are alive; `info` is written before the call returns.
        unsafe { sys::cuGraphExecUpdate_v2(self.0, graph.0, &mut info) }.result().is_ok()
    }

    /// Puts it on the stream.
    ///
    /// # Safety
    /// The promises made for each launch that it holds are still kept.
    pub(crate) unsafe fn start(&mut self, stream: &CudaStream) -> Result<(), DriverError> {
        // SAFETY: both are alive; the rest is the caller's promise.
        unsafe { result::graph::launch(self.0, stream.cu_stream()) }
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: made by `instantiate`, and destroyed once. A failure leaks it.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// Loads machine code.
pub(crate) fn load(context: &Arc<CudaContext>, code: Vec<u8>) -> Result<Arc<CudaModule>, DriverError> {
    context.load_module(Ptx::from_binary(code))
}

/// Looks a kernel up and lets it use `bytes` of dynamic shared memory; without this it is 48 KiB at most.
pub(crate) fn function(
    module: &Arc<CudaModule>,
    entry: &str,
    bytes: usize,
) -> Result<CudaFunction, DriverError> {
    let function = module.load_function(entry)?;
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(attribute, bytes as i32)?;
    Ok(function)
}

/// Puts a kernel on the stream.
///
/// # Safety
/// As [`super::runtime::Runtime::launch`], for the kernel that `function` is.
pub(crate) unsafe fn launch(
    stream: &CudaStream,
    function: &CudaFunction,
    launch: Launch,
    params: &[u8],
) -> Result<(), DriverError> {
    let Launch { grid: [x, y], threads, shared_bytes } = launch;
    // The driver reads the argument through this pointer, with the size the kernel declares, before it returns.
    let mut argument = [params.as_ptr().cast_mut().cast::<c_void>()];
    // SAFETY: the caller's promises; the kernel's one parameter is as large as `params`.
    unsafe {
        result::launch_kernel(
            function.cu_function(),
            (x, y, 1),
            (threads, 1, 1),
            shared_bytes,
            stream.cu_stream(),
            &mut argument,
        )
    }
}
