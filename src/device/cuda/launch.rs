//! Everything unsafe about the driver: memory, modules, launches.

use super::CudaError;
use super::params::Pointer;
use super::runtime::Launch;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;
use std::ffi::c_void;
use std::sync::Arc;

/// Whether the driver's library can be loaded. cudarc panics where it is used and cannot.
pub(super) fn driver_is_present() -> bool {
    // SAFETY: loads libcuda, whose initialisers do nothing before cuInit.
    unsafe { sys::is_culib_present() }
}

/// Tells the pool of the context's device to keep what is freed, so that a step allocates nothing from the system.
pub(super) fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), DriverError> {
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

/// Memory with unspecified content, freed in stream order.
pub(super) fn allocate(stream: &CudaStream, bytes: usize) -> Result<Pointer, CudaError> {
    // SAFETY: the stream is the context's; the driver checks the size.
    unsafe { result::malloc_async(stream.cu_stream(), bytes) }
        .map_err(|error| CudaError::driver("allocating", error, bytes))
}

/// Gives memory back when the stream has come to this point.
///
/// # Safety
/// `at` is from [`allocate`] on the same stream, and not freed.
pub(super) unsafe fn free(stream: &CudaStream, at: Pointer) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { result::free_async(at, stream.cu_stream()) }
}

/// Fills memory with zeros.
///
/// # Safety
/// The bytes lie inside one allocation.
pub(super) unsafe fn zero(stream: &CudaStream, at: Pointer, bytes: usize) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { result::memset_d8_async(at, 0, bytes, stream.cu_stream()) }
}

/// Copies from the host. The driver has read `host` when this returns: it is pageable memory.
///
/// # Safety
/// `host.len()` bytes from `at` on lie inside one allocation.
pub(super) unsafe fn write(stream: &CudaStream, at: Pointer, host: &[u8]) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { result::memcpy_htod_async(at, host, stream.cu_stream()) }
}

/// Copies to the host, and waits for it.
///
/// # Safety
/// `host.len()` bytes from `at` on lie inside one allocation.
pub(super) unsafe fn read(stream: &CudaStream, at: Pointer, host: &mut [u8]) -> Result<(), DriverError> {
    // SAFETY: the caller's promise; the host's memory is borrowed until the stream is done.
    unsafe { result::memcpy_dtoh_async(host, at, stream.cu_stream())? };
    stream.synchronize()
}

/// Loads machine code.
pub(super) fn load(context: &Arc<CudaContext>, code: Vec<u8>) -> Result<Arc<CudaModule>, DriverError> {
    context.load_module(Ptx::from_binary(code))
}

/// Looks a kernel up and lets it use `bytes` of dynamic shared memory; without this it is 48 KiB at most.
pub(super) fn function(
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
pub(super) unsafe fn launch(
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
