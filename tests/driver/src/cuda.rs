//! The entry points of `libcuda` that the library uses, with the types of cuda.h.

use crate::code::{Code, Done, Failure, TEXTS, fault, handle};
use crate::machine::Machine;
use crate::memory::Host;
use crate::nvrtc;
use crate::state::{Function, SHARED_DEFAULT, State, Work};
use crate::{CURRENT, Needs, enter, lock, report};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// The name says that this is no GPU.
const NAME: &str = "dfar test driver (no GPU)";

// Limits of an H100 (CUDA programming guide, compute capability 9.0).
const SHARED_LIMIT: usize = 227 << 10;
const SHARED_PER_MULTIPROCESSOR: usize = 228 << 10;
/// Shared memory of a block that the system takes.
const SHARED_RESERVED: usize = 1 << 10;
const REGISTERS: i32 = 65_536;
const MULTIPROCESSORS: i32 = 132;
const THREADS_PER_MULTIPROCESSOR: i32 = 2048;

fn whole_warps(threads: c_int) -> c_int {
    (threads + 31) / 32 * 32
}

/// Writes a result through a pointer of the caller.
///
/// # Safety
/// `to` is null or valid for writing.
unsafe fn put<T>(to: *mut T, value: T) -> Done {
    if to.is_null() {
        return fault(Code::INVALID_VALUE, "a null pointer for a result");
    }
    // SAFETY: not null, and guaranteed by the caller.
    unsafe { to.write(value) };
    Ok(())
}

fn device_exists(device: c_int) -> Done {
    if device == 0 { Ok(()) } else { Err(Failure::Answer(Code::INVALID_DEVICE)) }
}

// -------------------------------------------------------------------------------------------
// device

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> c_int {
    if flags != 0 {
        return Code::INVALID_VALUE.0;
    }
    let mut state = lock();
    if state.is_none() {
        match State::new() {
            Ok(new) => *state = Some(new),
            Err(error) => {
                drop(state);
                return report("cuInit", Failure::Fault(Code::NOT_INITIALIZED, error)).0;
            }
        }
    }
    Code::SUCCESS.0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    let given = std::env::var("DFAR_DRIVER_VERSION").ok().and_then(|text| text.parse().ok());
    // SAFETY: the caller's pointer; allowed before cuInit.
    unsafe { put(version, given.unwrap_or(12_090)) }.map_or(Code::INVALID_VALUE.0, |()| 0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    // SAFETY: the caller's pointer.
    enter("cuDeviceGetCount", Needs::Driver, |_| unsafe { put(count, 1) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    enter("cuDeviceGet", Needs::Driver, |_| {
        device_exists(ordinal)?;
        // SAFETY: the caller's pointer.
        unsafe { put(device, ordinal) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, bytes: c_int, device: c_int) -> c_int {
    enter("cuDeviceGetName", Needs::Driver, |_| {
        device_exists(device)?;
        let length = NAME.len().min(bytes.max(1) as usize - 1);
        // SAFETY: the caller's buffer of this size.
        unsafe {
            std::ptr::copy_nonoverlapping(NAME.as_ptr().cast(), name, length);
            put(name.add(length), 0)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> c_int {
    enter("cuDeviceGetAttribute", Needs::Driver, |_| {
        device_exists(device)?;
        let found = match attribute {
            1 => 1024,                                // threads per block
            8 => SHARED_DEFAULT as c_int,             // shared memory per block
            10 => 32,                                 // warp
            16 => MULTIPROCESSORS,                    // multiprocessors
            38 => 50 << 20,                           // L2 cache
            39 => THREADS_PER_MULTIPROCESSOR,         // threads per multiprocessor
            75 => 9,                                  // compute capability, major
            76 => 0,                                  // and minor
            81 => SHARED_PER_MULTIPROCESSOR as c_int, // shared memory per multiprocessor
            82 => REGISTERS,                          // registers per multiprocessor
            97 => SHARED_LIMIT as c_int,              // shared memory per block, opted in
            115 => 1,                                 // memory pools
            _ => {
                return fault(
                    Code::INVALID_VALUE,
                    format!("device attribute {attribute} is not implemented"),
                );
            }
        };
        // SAFETY: the caller's pointer.
        unsafe { put(value, found) }
    })
}

// ---------------------------------------------------------------------------------------- contexts

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut u64, device: c_int) -> c_int {
    enter("cuDevicePrimaryCtxRetain", Needs::Driver, |state| {
        device_exists(device)?;
        if state.contexts.get(state.primary).is_err() {
            state.primary = state.contexts.add(0);
        }
        let primary = state.primary;
        *state.contexts.get(primary).map_err(handle)? += 1;
        // SAFETY: the caller's pointer.
        unsafe { put(context, primary) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    enter("cuDevicePrimaryCtxRelease_v2", Needs::Driver, |state| {
        device_exists(device)?;
        let primary = state.primary;
        let Ok(retained) = state.contexts.get(primary) else {
            return fault(Code::INVALID_CONTEXT, "the primary context is released more often than retained");
        };
        *retained -= 1;
        if *retained > 0 {
            return Ok(());
        }
        state.drain()?;
        state.contexts.remove(primary).map_err(handle)?;
        let leaks = state.leaks();
        if leaks.is_empty() {
            Ok(())
        } else {
            fault(
                Code::SUCCESS,
                format!("the context is released, but nothing destroyed {}", leaks.join(", ")),
            )
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut u64) -> c_int {
    // SAFETY: the caller's pointer.
    enter("cuCtxGetCurrent", Needs::Driver, |_| unsafe { put(context, CURRENT.get()) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: u64) -> c_int {
    enter("cuCtxSetCurrent", Needs::Driver, |state| {
        if context != 0 {
            state.contexts.get(context).map_err(|error| Failure::Fault(Code::INVALID_CONTEXT, error))?;
        }
        CURRENT.set(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    enter("cuCtxSynchronize", Needs::Context, State::synchronize_context)
}

// ------------------------------------------------------------------------------------------ memory

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    enter("cuMemGetInfo_v2", Needs::Context, |state| {
        let info = state.memory.info();
        // SAFETY: the caller's pointers.
        unsafe { put(free, info.0).and_then(|()| put(total, info.1)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(at: *mut u64, bytes: usize, stream: u64) -> c_int {
    enter("cuMemAllocAsync", Needs::Context, |state| {
        state.refuse_on_capturing(stream, "an allocation")?;
        let allocated = state.allocate(bytes, stream)?;
        // SAFETY: the caller's pointer.
        unsafe { put(at, allocated) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(at: u64, stream: u64) -> c_int {
    enter("cuMemFreeAsync", Needs::CleanUp, |state| {
        state.refuse_on_capturing(stream, "a free")?;
        state.memory.begin_free(at)?;
        state.enqueue(stream, Work::Free { at }).map(|_| ())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(at: *mut usize, bytes: usize, _flags: c_uint) -> c_int {
    enter("cuMemHostAlloc", Needs::Context, |state| {
        let pinned = state.memory.pin(bytes)?;
        // SAFETY: the caller's pointer.
        unsafe { put(at, pinned) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(at: usize) -> c_int {
    enter("cuMemFreeHost", Needs::CleanUp, |state| state.memory.unpin(at))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(at: u64, from: *const u8, bytes: usize, stream: u64) -> c_int {
    enter("cuMemcpyHtoDAsync_v2", Needs::Context, |state| {
        state.refuse_on_capturing(stream, "a copy of host memory")?;
        state.memory.check("a copy to the device", at, bytes)?;
        // SAFETY: the caller's memory.
        let held = unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec();
        let host = if state.memory.begin_copy(from as usize) {
            Host::Pinned { at: from as usize, expected: held }
        } else {
            Host::Read(held)
        };
        state.enqueue(stream, Work::Upload { at, from: host }).map(|_| ())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, at: u64, bytes: usize, stream: u64) -> c_int {
    enter("cuMemcpyDtoHAsync_v2", Needs::Context, |state| {
        state.refuse_on_capturing(stream, "a copy to host memory")?;
        state.memory.check("a copy from the device", at, bytes)?;
        let pinned = state.memory.begin_copy(to as usize);
        state.enqueue(stream, Work::Download { at, to: to as usize, bytes, pinned })?;
        // Into pageable memory, the call returns after the copy.
        if pinned { Ok(()) } else { state.synchronize_stream(stream) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(at: u64, value: u8, bytes: usize, stream: u64) -> c_int {
    enter("cuMemsetD8Async", Needs::Context, |state| {
        state.memory.check("a fill", at, bytes)?;
        state.enqueue(stream, Work::Fill { at, value, bytes }).map(|_| ())
    })
}

// ------------------------------------------------------------------------------ streams and events

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut u64, flags: c_uint) -> c_int {
    // SAFETY: the caller's pointer. 1: not ordered with the legacy default stream.
    enter("cuStreamCreate", Needs::Context, |state| unsafe { put(stream, state.new_stream(flags & 1 == 0)) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: u64) -> c_int {
    enter("cuStreamDestroy_v2", Needs::CleanUp, |state| state.destroy_stream(stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: u64) -> c_int {
    enter("cuStreamSynchronize", Needs::Context, |state| state.synchronize_stream(stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, _flags: c_uint) -> c_int {
    enter("cuStreamWaitEvent", Needs::Context, |state| state.wait(stream, event))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: u64, mode: c_int) -> c_int {
    enter("cuStreamBeginCapture_v2", Needs::Context, |state| {
        // 2: relaxed.
        if mode != 2 {
            return fault(Code::NOT_SUPPORTED, "a capture mode other than relaxed");
        }
        state.begin_capture(stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: u64, graph: *mut u64) -> c_int {
    let code = enter("cuStreamEndCapture", Needs::Context, |state| {
        // SAFETY: the caller's pointer.
        unsafe { put(graph, 0)? };
        let recorded = state.end_capture(stream)?;
        // SAFETY: the caller's pointer.
        unsafe { put(graph, recorded) }
    });
    // A planted failure, too, ends the capture, as that of an invalidated capture does.
    if code != Code::SUCCESS.0
        && let Some(state) = &mut *lock()
        && let Ok(recorded) = state.end_capture(stream)
    {
        let _ = state.graphs.remove(recorded);
    }
    code
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut u64, flags: c_uint) -> c_int {
    // SAFETY: the caller's pointer. 2: no timing.
    enter("cuEventCreate", Needs::Context, |state| unsafe { put(event, state.new_event(flags & 2 == 0)) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: u64) -> c_int {
    enter("cuEventDestroy_v2", Needs::CleanUp, |state| state.events.remove(event).map(|_| ()).map_err(handle))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: u64, stream: u64) -> c_int {
    enter("cuEventRecord", Needs::Context, |state| state.record(event, stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: u64) -> c_int {
    enter("cuEventSynchronize", Needs::Context, |state| state.synchronize_event(event))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: u64) -> c_int {
    enter("cuEventQuery", Needs::Context, |state| {
        if state.query(event)? { Ok(()) } else { Err(Failure::Answer(Code::NOT_READY)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, from: u64, to: u64) -> c_int {
    enter("cuEventElapsedTime", Needs::Context, |state| {
        let elapsed = state.elapsed(from, to)?;
        // SAFETY: the caller's pointer.
        unsafe { put(milliseconds, elapsed) }
    })
}

// ----------------------------------------------------------------------------------------- modules

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut u64, image: *const c_void) -> c_int {
    enter("cuModuleLoadData", Needs::Context, |state| {
        state.refuse_in_capture("loading a module")?;
        // SAFETY: the caller's image, which begins with the header of `nvrtc` or is refused.
        let Some((arch, source)) = (unsafe { nvrtc::read(image.cast()) }) else {
            return fault(Code::INVALID_IMAGE, "the image is not one that this driver's NVRTC made");
        };
        // Machine code runs on its own major version, from its own minor version on.
        if !matches!(arch.as_str(), "sm_90" | "sm_90a") {
            eprintln!("dfar test driver: code for {arch} does not run on compute capability 9.0");
            return Err(Failure::Answer(Code::NO_BINARY_FOR_GPU));
        }
        let key =
            state.machine.load(&source).map_err(|error| Failure::Fault(Code::NO_BINARY_FOR_GPU, error))?;
        let loaded = state.modules.add(key);
        // SAFETY: the caller's pointer.
        unsafe { put(module, loaded) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: u64) -> c_int {
    enter("cuModuleUnload", Needs::CleanUp, |state| {
        state.modules.remove(module).map_err(handle)?;
        let gone: Vec<u64> = state
            .functions
            .iter()
            .filter(|(_, function)| function.module == module)
            .map(|(f, _)| f)
            .collect();
        gone.into_iter().try_for_each(|f| state.functions.remove(f).map(|_| ()).map_err(handle))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) -> c_int {
    enter("cuModuleGetFunction", Needs::Context, |state| {
        let key = *state.modules.get(module).map_err(handle)?;
        // SAFETY: the caller's zero-terminated string.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        let Some(entry) = state.machine.find(key, &name) else {
            return Err(Failure::Answer(Code::NOT_FOUND));
        };
        let [threads, blocks] = entry.bounds.map(|bound| bound.max(1));
        // What __launch_bounds__ leaves to ptxas at most: it may use fewer.
        let registers = (REGISTERS / (whole_warps(threads) * blocks)).min(255) / 8 * 8;
        let found = state.functions.add(Function { module, entry, shared_limit: SHARED_DEFAULT, registers });
        // SAFETY: the caller's pointer.
        unsafe { put(function, found) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: u64, attribute: c_int, value: c_int) -> c_int {
    enter("cuFuncSetAttribute", Needs::Context, |state| {
        let held = state.functions.get(function).map_err(handle)?;
        // 8: the largest dynamic shared memory.
        if attribute != 8 || !(0..=SHARED_LIMIT as c_int).contains(&value) {
            return fault(Code::INVALID_VALUE, format!("function attribute {attribute} set to {value}"));
        }
        held.shared_limit = value as usize;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetParamInfo(
    function: u64,
    index: usize,
    offset: *mut usize,
    bytes: *mut usize,
) -> c_int {
    enter("cuFuncGetParamInfo", Needs::Context, |state| {
        let size = state.functions.get(function).map_err(handle)?.entry.params_bytes;
        // Every kernel has one parameter.
        if index != 0 {
            return Err(Failure::Answer(Code::INVALID_VALUE));
        }
        // SAFETY: the caller's pointers; the size may be null.
        unsafe {
            put(offset, 0)?;
            if bytes.is_null() { Ok(()) } else { put(bytes, size) }
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    function: u64,
    threads: c_int,
    shared_bytes: usize,
) -> c_int {
    enter("cuOccupancyMaxActiveBlocksPerMultiprocessor", Needs::Context, |state| {
        let held = state.functions.get(function).map_err(handle)?;
        if !(1..=1024).contains(&threads) || shared_bytes > held.shared_limit {
            return fault(
                Code::INVALID_VALUE,
                format!("occupancy of {threads} threads, {shared_bytes} bytes"),
            );
        }
        let registers = held.registers * whole_warps(threads);
        let by_shared = SHARED_PER_MULTIPROCESSOR / (shared_bytes + SHARED_RESERVED);
        let found = (REGISTERS / registers.max(1))
            .min(THREADS_PER_MULTIPROCESSOR / threads)
            .min(by_shared as c_int)
            .min(32);
        // SAFETY: the caller's pointer.
        unsafe { put(blocks, found) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: u64,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: u64,
    params: *const *const u8,
    extra: *const *const c_void,
) -> c_int {
    enter("cuLaunchKernel", Needs::Context, |state| {
        let Function { entry, shared_limit, .. } = state.functions.get(function).map_err(handle)?.clone();
        let bad = |what: String| fault(Code::INVALID_VALUE, format!("{}: {what}", entry.name));
        if grid_x == 0 || grid_y == 0 || grid_x > i32::MAX as u32 || grid_y > 65_535 || grid_z != 1 {
            return bad(format!("a grid of {grid_x} x {grid_y} x {grid_z} blocks"));
        }
        let limit = if entry.bounds[0] > 0 { entry.bounds[0] as u32 } else { 1024 };
        if block_x == 0 || block_x > limit || block_y != 1 || block_z != 1 {
            return bad(format!("a block of {block_x} x {block_y} x {block_z} threads, of at most {limit}"));
        }
        if shared_bytes as usize > shared_limit {
            return bad(format!("{shared_bytes} bytes of shared memory; the function allows {shared_limit}"));
        }
        if params.is_null() || !extra.is_null() {
            return bad("no parameters".to_owned());
        }
        let mut copied = vec![0u64; entry.params_bytes.div_ceil(8).max(1)];
        // SAFETY: the caller gives one parameter of the size that the kernel declares; the copy has
        // room for it, and no overlap.
        unsafe {
            if (*params).is_null() {
                return bad("a null parameter".to_owned());
            }
            std::ptr::copy_nonoverlapping(*params, copied.as_mut_ptr().cast(), entry.params_bytes);
        }
        let work = Work::Launch {
            entry,
            grid: [grid_x, grid_y],
            threads: block_x,
            shared_bytes: shared_bytes as usize,
            params: copied,
        };
        state.enqueue(stream, work).map(|_| ())
    })
}

// ------------------------------------------------------------------------------------------ graphs

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(graph: u64, nodes: *mut c_void, count: *mut usize) -> c_int {
    enter("cuGraphGetNodes", Needs::Context, |state| {
        let found = state.graph_nodes(graph)?;
        if !nodes.is_null() {
            return fault(Code::NOT_SUPPORTED, "the nodes of a graph; only their number is known");
        }
        // SAFETY: the caller's pointer.
        unsafe { put(count, found) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: u64) -> c_int {
    enter("cuGraphDestroy", Needs::CleanUp, |state| state.graphs.remove(graph).map(|_| ()).map_err(handle))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(executable: *mut u64, graph: u64, flags: u64) -> c_int {
    enter("cuGraphInstantiateWithFlags", Needs::Context, |state| {
        if flags != 0 {
            return fault(Code::NOT_SUPPORTED, format!("a graph with flags {flags:#x}"));
        }
        let made = state.instantiate(graph)?;
        // SAFETY: the caller's pointer.
        unsafe { put(executable, made) }
    })
}

/// `CUgraphExecUpdateResultInfo`
#[repr(C)]
pub struct UpdateInfo {
    result: c_int,
    node: u64,
    from: u64,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecUpdate_v2(executable: u64, graph: u64, info: *mut UpdateInfo) -> c_int {
    enter("cuGraphExecUpdate_v2", Needs::Context, |state| {
        let alike = state.update(executable, graph)?;
        // SAFETY: the caller's pointer. 1: an error that nothing more is known of.
        unsafe { put(info, UpdateInfo { result: c_int::from(!alike), node: 0, from: 0 })? };
        if alike { Ok(()) } else { Err(Failure::Answer(Code::UPDATE_FAILURE)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(executable: u64, stream: u64) -> c_int {
    enter("cuGraphLaunch", Needs::Context, |state| state.start_graph(executable, stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(executable: u64) -> c_int {
    enter("cuGraphExecDestroy", Needs::CleanUp, |state| state.destroy_executable(executable))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: c_int, text: *mut *const c_char) -> c_int {
    let found = TEXTS.iter().find(|(value, _)| *value == code);
    let string = found.map_or(std::ptr::null(), |(_, text)| text.as_ptr().cast());
    // SAFETY: the caller's pointer; allowed before cuInit.
    let put = unsafe { put(text, string) };
    if found.is_some() && put.is_ok() { 0 } else { Code::INVALID_VALUE.0 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: as above.
    unsafe { cuGetErrorString(code, text) }
}

impl State {
    /// Allocates in stream order.
    fn allocate(&mut self, bytes: usize, stream: u64) -> Done<u64> {
        let now = self.tick(stream)?;
        let machine: &Machine = &self.machine;
        self.memory.allocate(machine, bytes, now)
    }
}
