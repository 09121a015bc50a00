//! Everything unsafe about the driver: memory that nobody wrote yet, modules, launches.

use super::CudaError;
use super::params::{AttentionParams, Pointer};
use super::plan::Launch;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig,
    PushKernelArg, result, sys,
};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;

// SAFETY: a C struct of addresses, integers and a float without padding, as params.cuh declares it.
unsafe impl DeviceRepr for AttentionParams {}
// SAFETY: four integers, as seqlen.cuh declares it.
unsafe impl DeviceRepr for super::params::Item {}

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

/// Memory with unspecified content, for a kernel to write.
pub(super) fn unwritten<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<T>, CudaError> {
    // SAFETY: any bytes are a T (DeviceRepr here is f32, bf16, f16 or an integer), so reading it early yields numbers.
    unsafe { stream.alloc::<T>(len.max(1)) }
        .map_err(|error| CudaError::driver("allocating", error, len * size_of::<T>()))
}

/// Address of a buffer, for use on `stream`.
pub(super) fn address<T>(buffer: &CudaSlice<T>, stream: &CudaStream) -> Pointer {
    buffer.device_ptr(stream).0
}

/// Loads machine code and looks up its kernels.
pub(super) fn load<const COUNT: usize>(
    context: &Arc<CudaContext>,
    code: Vec<u8>,
    entries: [&str; COUNT],
) -> Result<[CudaFunction; COUNT], DriverError> {
    let module = context.load_module(Ptx::from_binary(code))?;
    let mut functions = Vec::with_capacity(COUNT);
    for entry in entries {
        functions.push(module.load_function(entry)?);
    }
    Ok(functions.try_into().expect("one was looked up for each entry"))
}

/// Lets launches of `function` use `bytes` of dynamic shared memory; without this it is 48 KiB at most.
pub(super) fn allow_shared_memory(function: &CudaFunction, bytes: usize) -> Result<(), DriverError> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(attribute, bytes as i32)
}

/// Puts a kernel of `attention.cu` on the stream.
///
/// # Safety
/// `function` is a kernel of `attention.cu` for the element type and width of the tensors; `params` and `launch` come
/// from one plan; and each pointer that the kernel's contract names is to device memory of the shape in params.cuh,
/// writable where it is written, that lives until the stream has passed this launch.
pub(super) unsafe fn attention(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    launch: Launch,
    params: &AttentionParams,
) -> Result<(), DriverError> {
    let Launch { grid: [x, y], threads, shared_bytes } = launch;
    if x == 0 || y == 0 {
        return Ok(());
    }
    let config =
        LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads, 1, 1), shared_mem_bytes: shared_bytes };
    // SAFETY: the caller's promises; the argument is the one parameter the kernel declares, and the driver copies it.
    unsafe { stream.launch_builder(function).arg(params).launch(config) }.map(|_| ())
}
