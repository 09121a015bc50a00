//! Unsafe driver calls: memory, modules, launches, graphs.

use super::library;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Launch, Pointer};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;
use std::ffi::{c_int, c_void};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Whether libcuda can be loaded, and is not the toolkit's library for linking. cudarc panics
/// without it.
pub(crate) fn driver_is_present() -> bool {
    // SAFETY: loads libcuda, whose initializers do nothing before cuInit.
    let present = unsafe { sys::is_culib_present() };
    if !present {
        return false;
    }
    // SAFETY: as above; it is present, so that this does not panic.
    unsafe { sys::culib() };
    !library::driver_is_a_stub()
}

/// Latest CUDA version that the driver supports, e.g. 12090; `None` without a driver.
pub(crate) fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: writes an int; allowed before cuInit.
    let known = driver_is_present() && unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok();
    known.then_some(version)
}

/// A stream of another library, which owns it.
///
/// # Safety
/// `stream` is a stream of the context, or 0 or 1 for the legacy default stream. It exists until the
/// last clone of the result is dropped.
pub(crate) unsafe fn borrowed_stream(context: &Arc<CudaContext>, stream: u64) -> Arc<CudaStream> {
    // SAFETY: guaranteed by the caller.
    unsafe { context.wrap_borrowed_stream(std::ptr::without_provenance_mut(stream as usize)) }
}

/// Stream-ordered allocation of `bytes` bytes with unspecified content, from the device's default
/// memory pool. Other libraries of the process share that pool, so its attributes stay as they are.
pub(crate) fn allocate(stream: &CudaStream, bytes: usize) -> Result<Pointer, CudaError> {
    // SAFETY: the stream belongs to the context; the driver checks the size.
    unsafe { result::malloc_async(stream.cu_stream(), bytes) }
        .map_err(|error| CudaError::driver("allocating", error, bytes))
}

/// Stream-ordered free.
///
/// # Safety
/// `at` is from [`allocate`], which has completed, and is not freed yet.
pub(crate) unsafe fn free(stream: &CudaStream, at: Pointer) -> Result<(), DriverError> {
    // SAFETY: guaranteed by the caller.
    unsafe { result::free_async(at, stream.cu_stream()) }
}

/// Fills memory with zeros.
///
/// # Safety
/// The bytes lie inside one allocation.
pub(crate) unsafe fn zero(stream: &CudaStream, at: Pointer, bytes: usize) -> Result<(), DriverError> {
    // SAFETY: guaranteed by the caller.
    unsafe { result::memset_d8_async(at, 0, bytes, stream.cu_stream()) }
}

/// Copies from the host and waits for the copy: the driver would read page-locked memory later.
///
/// # Safety
/// `host.len()` bytes from `at` on lie inside one allocation.
pub(crate) unsafe fn write(stream: &CudaStream, at: Pointer, host: &[u8]) -> Result<(), DriverError> {
    // SAFETY: guaranteed by the caller; `host` is borrowed until the stream has synchronised.
    unsafe { result::memcpy_htod_async(at, host, stream.cu_stream())? };
    stream.synchronize()
}

/// Copies to the host and waits for the copy.
///
/// # Safety
/// `host.len()` bytes from `at` on lie inside one allocation.
pub(crate) unsafe fn read(stream: &CudaStream, at: Pointer, host: &mut [u8]) -> Result<(), DriverError> {
    // SAFETY: guaranteed by the caller; `host` is borrowed until the stream has synchronised.
    unsafe { result::memcpy_dtoh_async(host, at, stream.cu_stream())? };
    stream.synchronize()
}

/// A pinned buffer with a CUDA event. Every copy from or to the buffer records the event again; a
/// stream already waiting for an earlier recording is not affected.
pub struct Pinned {
    at: NonNull<u8>,
    bytes: usize,
    copied: CudaEvent,
}

// SAFETY: it owns its memory, and any thread may use the driver.
unsafe impl Send for Pinned {}

impl Pinned {
    /// A buffer of `bytes` zeros.
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, DriverError> {
        // An event that was never recorded counts as complete.
        let copied = context.new_event(None)?;
        // SAFETY: `new_event` has bound the context to this thread. Flags 0: cached, for this
        // context only.
        let at = unsafe { result::malloc_host(bytes, 0)? }.cast::<u8>();
        let at = NonNull::new(at).expect("the driver reports a failure rather than return null");
        // SAFETY: allocated with this many bytes.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Self { at, bytes, copied })
    }

    /// Whether the last copy has finished.
    pub(crate) fn is_copied(&self) -> Result<bool, DriverError> {
        self.copied.try_is_complete()
    }

    /// Waits for the last copy.
    pub(crate) fn wait(&self) -> Result<(), DriverError> {
        self.copied.synchronize()
    }

    /// Makes later work on the stream wait for the last copy from the buffer.
    pub(crate) fn let_wait(&self, stream: &CudaStream) -> Result<(), DriverError> {
        stream.wait(&self.copied)
    }

    /// Starts a copy of the first `bytes` bytes, which must not change before [`Pinned::is_copied`].
    ///
    /// # Safety
    /// `bytes` bytes from `at` on lie inside one allocation. No other stream uses them before it
    /// waits for the copy.
    pub(crate) unsafe fn send(
        &self,
        stream: &CudaStream,
        at: Pointer,
        bytes: usize,
    ) -> Result<(), DriverError> {
        // SAFETY: guaranteed by the caller. The buffer is neither reused nor freed before the event
        // behind the copy.
        unsafe { result::memcpy_htod_async(at, &self[..bytes], stream.cu_stream())? };
        self.copied.record(stream)
    }

    /// Starts a copy of `bytes` bytes of device memory to the buffer, which must not be read before
    /// [`Pinned::wait`].
    ///
    /// # Safety
    /// `bytes` bytes from `at` on lie inside one allocation.
    pub(crate) unsafe fn fetch(
        &mut self,
        stream: &CudaStream,
        at: Pointer,
        bytes: usize,
    ) -> Result<(), DriverError> {
        // SAFETY: guaranteed by the caller. The buffer is neither reused nor freed before the event
        // behind the copy.
        unsafe { result::memcpy_dtoh_async(&mut self[..bytes], at, stream.cu_stream())? };
        self.copied.record(stream)
    }
}

impl Deref for Pinned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this many bytes, which `new` initialized.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A context that fails here has already reported its error.
        if self.wait().is_ok() && self.copied.context().bind_to_thread().is_ok() {
            // SAFETY: from `malloc_host`; this drop alone frees it, and no copy reads it.
            let _ = unsafe { result::free_host(self.at.as_ptr().cast()) };
        }
    }
}

/// Starts a capture of the stream in relaxed mode: calls unrelated to the stream (allocations on
/// another stream, pinned memory, from any thread) remain allowed. The legacy stream cannot be
/// captured.
pub(crate) fn begin_capture(stream: &CudaStream) -> Result<(), DriverError> {
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
}

/// Ends the capture and returns the recorded graph.
pub(crate) fn end_capture(stream: &CudaStream) -> Result<Graph, DriverError> {
    // SAFETY: the stream is alive; the caller owns the graph.
    let graph = unsafe { result::stream::end_capture(stream.cu_stream())? };
    Ok(Graph(graph))
}

/// A recorded graph.
pub(crate) struct Graph(sys::CUgraph);

impl Graph {
    /// Number of nodes. A matrix product may have several.
    pub(crate) fn nodes(&self) -> Result<usize, DriverError> {
        let mut count = 0;
        // SAFETY: the graph is alive; with a null array, the driver writes only the count.
        unsafe { sys::cuGraphGetNodes(self.0, std::ptr::null_mut(), &mut count).result()? };
        Ok(count)
    }

    /// Instantiates a graph executable.
    pub(crate) fn instantiate(&self) -> Result<Executable, DriverError> {
        // SAFETY: the graph is alive, and the executable does not refer to it afterwards.
        let executable = unsafe { result::graph::instantiate(self.0, sys::CUgraphInstantiate_flags(0))? };
        Ok(Executable(executable))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: from `end_capture`; this drop alone destroys it. A failure leaks it.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

/// A graph executable.
pub(crate) struct Executable(sys::CUgraphExec);

// SAFETY: any thread may use the driver; `update` and `start` take `&mut`, so one thread at a time
// uses an executable.
unsafe impl Send for Executable {}

impl Executable {
    /// Updates the executable with the arguments of another graph. If it returns false, the driver
    /// refused, and the executable must not be used again.
    pub(crate) fn update(&mut self, graph: &Graph) -> bool {
        let mut info = sys::CUgraphExecUpdateResultInfo {
            result: sys::CUgraphExecUpdateResult::CU_GRAPH_EXEC_UPDATE_SUCCESS,
            errorNode: std::ptr::null_mut(),
            errorFromNode: std::ptr::null_mut(),
        };
        // SAFETY: both are alive; `info` is written before the call returns.
        unsafe { sys::cuGraphExecUpdate_v2(self.0, graph.0, &mut info) }.result().is_ok()
    }

    /// Launches it on the stream.
    ///
    /// # Safety
    /// Each recorded launch still meets its contract.
    pub(crate) unsafe fn start(&mut self, stream: &CudaStream) -> Result<(), DriverError> {
        // SAFETY: both are alive; the caller guarantees the launches.
        unsafe { result::graph::launch(self.0, stream.cu_stream()) }
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: from `instantiate`; this drop alone destroys it. A failure leaks it.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// Loads machine code as a module.
pub(crate) fn load(context: &Arc<CudaContext>, code: Vec<u8>) -> Result<Arc<CudaModule>, DriverError> {
    context.load_module(Ptx::from_binary(code))
}

/// Looks up a kernel and raises its limit of dynamic shared memory to `bytes`; the default is 48
/// KiB.
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

/// Size in bytes of a kernel's parameter; `None` if the driver is older than CUDA 12.4.
pub(crate) fn parameter_bytes(function: &CudaFunction) -> Option<usize> {
    type Info = unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> c_int;
    let (mut offset, mut bytes) = (0, 0);
    // SAFETY: the type is that of cuda.h; writes two sizes; the function is alive.
    let code = unsafe {
        let info = *sys::culib().get::<Info>(b"cuFuncGetParamInfo\0").ok()?;
        info(function.cu_function(), 0, &mut offset, &mut bytes)
    };
    (code == 0).then_some(bytes)
}

/// Blocks of this size that a multiprocessor holds at once.
pub(crate) fn resident_blocks(
    function: &CudaFunction,
    threads: u32,
    shared_bytes: u32,
) -> Result<usize, DriverError> {
    let (mut blocks, threads, shared) = (0, threads as c_int, shared_bytes as usize);
    let function = function.cu_function();
    // SAFETY: writes an int; the function is alive.
    unsafe { sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, threads, shared) }
        .result()?;
    Ok(usize::try_from(blocks).unwrap_or(0))
}

/// Launches a kernel on the stream.
///
/// # Safety
/// As [`Runtime::launch`](crate::device::cuda::runtime::Runtime::launch), for the kernel of
/// `function`.
pub(crate) unsafe fn launch(
    stream: &CudaStream,
    function: &CudaFunction,
    launch: Launch,
    params: &[u8],
) -> Result<(), DriverError> {
    let Launch { grid: [x, y], threads, shared_bytes } = launch;
    // The driver copies the argument, with the size that the kernel declares, before it returns.
    let mut argument = [params.as_ptr().cast_mut().cast::<c_void>()];
    // SAFETY: guaranteed by the caller; the kernel's only parameter has the size of `params`.
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
