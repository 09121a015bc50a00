//! Each check of the driver finds a planted fault, and none where there is none.

mod common;

use common::{Control, on_the_driver};
use libloading::Symbol;
use std::ffi::CString;
use std::ptr::null_mut;

/// Calls an entry point; the types of its arguments follow from the arguments.
macro_rules! cu {
    ($driver:expr, $name:ident($($argument:expr),*)) => {{
        // SAFETY: the arguments have the types of cuda.h, and pointers are valid for the call.
        unsafe {
            let function: Symbol<unsafe extern "C" fn($(cu!(@any $argument)),*) -> i32> =
                $driver.control.0.get(concat!(stringify!($name), "\0").as_bytes()).expect("it is exported");
            function($($argument),*)
        }
    }};
    (@any $argument:expr) => { _ };
}

const RETURN: [(&str, &str); 1] = [("DFAR_DRIVER_FAULTS", "return")];
/// Work runs when something waits for it.
const LATEST: [(&str, &str); 2] = [("DFAR_DRIVER_FAULTS", "return"), ("DFAR_DRIVER_SEED", "1")];

const KERNELS: &str = r#"
#include "primitives.cuh"
struct P { float* data; unsigned long long count; };
KERNEL(write, P, 64) { if (threadIdx.x < p.count) p.data[threadIdx.x] = float(threadIdx.x); }
KERNEL(read, P, 64) { if (threadIdx.x < p.count && p.data[threadIdx.x] < 0.0f) p.data[threadIdx.x] = 1.0f; }
KERNEL(shared, P, 64) { reinterpret_cast<float*>(shared_memory())[threadIdx.x] = 1.0f; }
"#;

/// A context with the kernels above.
struct Driver {
    control: Control,
    context: u64,
    module: u64,
}

impl Driver {
    fn new() -> Driver {
        let mut driver = Driver { control: Control::new(), context: 0, module: 0 };
        assert_eq!(cu!(driver, cuInit(0u32)), 0);
        let mut context = 0u64;
        assert_eq!(cu!(driver, cuDevicePrimaryCtxRetain(&raw mut context, 0i32)), 0);
        assert_eq!(cu!(driver, cuCtxSetCurrent(context)), 0);
        driver.context = context;
        let code = driver.compile(c"sm_90a");
        let mut module = 0u64;
        assert_eq!(cu!(driver, cuModuleLoadData(&raw mut module, code.as_ptr())), 0);
        driver.module = module;
        driver
    }

    fn compile(&self, arch: &std::ffi::CStr) -> Vec<u8> {
        let (mut program, mut bytes) = (0u64, 0usize);
        let text = CString::new(KERNELS).expect("no zero byte");
        let header = CString::new(include_str!("../../../kernels/primitives.cuh")).expect("no zero byte");
        let (texts, names) = ([header.as_ptr()], [c"primitives.cuh".as_ptr()]);
        let option = CString::new(format!("--gpu-architecture={}", arch.to_string_lossy())).expect("no zero");
        let options = [option.as_ptr()];
        let (source, name) = (text.as_ptr(), c"test.cu".as_ptr());
        let (texts, names) = (texts.as_ptr(), names.as_ptr());
        assert_eq!(cu!(self, nvrtcCreateProgram(&raw mut program, source, name, 1i32, texts, names)), 0);
        assert_eq!(cu!(self, nvrtcCompileProgram(program, 1i32, options.as_ptr())), 0);
        assert_eq!(cu!(self, nvrtcGetCUBINSize(program, &raw mut bytes)), 0);
        let mut code = vec![0u8; bytes];
        assert_eq!(cu!(self, nvrtcGetCUBIN(program, code.as_mut_ptr())), 0);
        assert_eq!(cu!(self, nvrtcDestroyProgram(&raw mut program)), 0);
        code
    }

    fn stream(&self) -> u64 {
        self.stream_with(1)
    }

    /// A stream with these flags; 0: ordered with the legacy default stream.
    fn stream_with(&self, flags: u32) -> u64 {
        let mut stream = 0u64;
        assert_eq!(cu!(self, cuStreamCreate(&raw mut stream, flags)), 0);
        stream
    }

    fn event(&self) -> u64 {
        let mut event = 0u64;
        assert_eq!(cu!(self, cuEventCreate(&raw mut event, 0u32)), 0);
        event
    }

    fn function(&self, name: &str) -> u64 {
        let (mut function, name) = (0u64, CString::new(name).expect("no zero byte"));
        assert_eq!(cu!(self, cuModuleGetFunction(&raw mut function, self.module, name.as_ptr())), 0);
        function
    }

    /// Allocates in the order of `stream`.
    fn allocate(&self, bytes: usize, stream: u64) -> u64 {
        let mut at = 0u64;
        assert_eq!(cu!(self, cuMemAllocAsync(&raw mut at, bytes, stream)), 0);
        at
    }

    fn launch(
        &self,
        function: u64,
        at: u64,
        count: u64,
        [blocks, threads, shared]: [u32; 3],
        stream: u64,
    ) -> i32 {
        let params = [at, count];
        let mut list = [params.as_ptr()];
        let (one, list, extra) = (1u32, list.as_mut_ptr(), null_mut::<u8>());
        cu!(self, cuLaunchKernel(function, blocks, one, one, threads, one, one, shared, stream, list, extra))
    }

    fn synchronize(&self, stream: u64) -> i32 {
        cu!(self, cuStreamSynchronize(stream))
    }
}

const ONE_BLOCK: [u32; 3] = [1, 64, 0];

#[test]
fn sound_work_is_no_fault() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        let (first, second, event) = (d.stream(), d.stream(), d.event());
        let at = d.allocate(256, first);
        assert_eq!(d.launch(d.function("write"), at, 64, ONE_BLOCK, first), 0);
        assert_eq!(cu!(d, cuEventRecord(event, first)), 0);
        assert_eq!(cu!(d, cuStreamWaitEvent(second, event, 0u32)), 0);
        assert_eq!(d.launch(d.function("read"), at, 64, ONE_BLOCK, second), 0);
        let mut host = [0f32; 64];
        assert_eq!(cu!(d, cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), at, 256usize, second)), 0);
        assert!(host.iter().enumerate().all(|(i, &x)| x == i as f32));
        assert_eq!(cu!(d, cuMemFreeAsync(at, second)), 0);
        assert_eq!(cu!(d, cuModuleUnload(d.module)), 0);
        assert_eq!((cu!(d, cuStreamDestroy_v2(first)), cu!(d, cuStreamDestroy_v2(second))), (0, 0));
        assert_eq!(cu!(d, cuEventDestroy_v2(event)), 0);
        assert_eq!(cu!(d, cuDevicePrimaryCtxRelease_v2(0i32)), 0);
        d.control.assert_no_fault();
    });
}

#[test]
fn wrong_and_dead_handles_are_named() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let (stream, event) = (d.stream(), d.event());
        assert_eq!(cu!(d, cuStreamSynchronize(event)), 400);
        d.control.assert_fault("is no Stream");
        assert_eq!(cu!(d, cuEventDestroy_v2(event)), 0);
        assert_eq!(cu!(d, cuEventRecord(event, stream)), 400);
        d.control.assert_fault("was destroyed");
        assert_eq!(cu!(d, cuStreamSynchronize(stream + 0x5550)), 400);
        d.control.assert_fault("was never made");
        assert_eq!(cu!(d, cuStreamDestroy_v2(stream)), 0);
        assert_eq!(cu!(d, cuStreamDestroy_v2(stream)), 400);
        d.control.assert_fault("was destroyed");
        let function = d.function("write");
        assert_eq!(cu!(d, cuModuleUnload(d.module)), 0);
        assert_eq!(d.launch(function, 0, 0, ONE_BLOCK, d.stream()), 400);
        d.control.assert_fault("was destroyed");
    });
}

#[test]
fn leaks_are_found_when_the_context_is_released() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let stream = d.stream();
        d.allocate(100, stream);
        assert_eq!(cu!(d, cuStreamDestroy_v2(stream)), 0);
        d.event();
        cu!(d, cuDevicePrimaryCtxRelease_v2(0i32));
        d.control.assert_fault("nothing destroyed 1 events, 1 modules, 1 device allocations");
    });
}

#[test]
fn a_thread_without_a_context_is_refused() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let stream = d.stream();
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(d.synchronize(stream), 201));
        });
        d.control.assert_fault("no context is current");
        assert_eq!(d.synchronize(stream), 0);
    });
}

#[test]
fn launches_beyond_the_limits_are_refused() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let (stream, shared) = (d.stream(), d.function("shared"));
        let at = d.allocate(256, stream);
        let launch =
            |blocks, threads, shared_bytes| d.launch(shared, at, 64, [blocks, threads, shared_bytes], stream);
        assert_eq!(launch(1, 64, 48 << 10), 0);
        assert_eq!(launch(1, 64, (48 << 10) + 16), 1);
        d.control.assert_fault("the function allows 49152");
        assert_eq!(cu!(d, cuFuncSetAttribute(shared, 8i32, 227 << 10)), 0);
        assert_eq!(launch(1, 64, 227 << 10), 0);
        assert_eq!(cu!(d, cuFuncSetAttribute(shared, 8i32, (227 << 10) + 1)), 1);
        d.control.assert_fault("function attribute 8");
        assert_eq!(launch(1, 96, 1024), 1);
        d.control.assert_fault("of at most 64");
        assert_eq!(launch(0, 64, 1024), 1);
        d.control.assert_fault("a grid of 0");
        assert_eq!(launch(1 << 31, 64, 1024), 1);
        d.control.assert_fault("a grid of 2147483648");
        let (mut offset, mut bytes) = (0usize, 0usize);
        assert_eq!(cu!(d, cuFuncGetParamInfo(shared, 0usize, &raw mut offset, &raw mut bytes)), 0);
        assert_eq!((offset, bytes), (0, 16));
    });
}

#[test]
fn copies_and_fills_out_of_bounds_are_refused() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let stream = d.stream();
        let (at, mut host) = (d.allocate(100, stream), [0u8; 200]);
        assert_eq!(cu!(d, cuMemcpyHtoDAsync_v2(at, host.as_ptr(), 101usize, stream)), 1);
        d.control.assert_fault("not inside one live allocation");
        assert_eq!(cu!(d, cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), at - 1, 2usize, stream)), 1);
        d.control.assert_fault("not inside one live allocation");
        assert_eq!(cu!(d, cuMemsetD8Async(at + 90, 0u8, 11usize, stream)), 1);
        d.control.assert_fault("not inside one live allocation");
        assert_eq!(cu!(d, cuMemsetD8Async(at, 0u8, 50usize, stream)), 0);
        assert_eq!(cu!(d, cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), at, 51usize, stream)), 700);
        d.control.assert_fault("1 bytes that nothing has written");
    });
}

#[test]
fn a_kernel_out_of_bounds_ends_the_context() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let (stream, write) = (d.stream(), d.function("write"));
        let at = d.allocate(100, stream);
        assert_eq!(d.launch(write, at, 26, ONE_BLOCK, stream), 700);
        d.control.assert_fault("write: out-of-bounds write of 4 bytes");
        assert_eq!(d.synchronize(stream), 700, "every later call should fail too");
    });
}

#[test]
fn freed_memory_is_not_used_again() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        let (stream, write) = (d.stream(), d.function("write"));
        let at = d.allocate(256, stream);
        assert_eq!(d.launch(write, at, 64, ONE_BLOCK, stream), 0);
        assert_eq!(cu!(d, cuMemFreeAsync(at, stream)), 0);
        assert_eq!(cu!(d, cuMemFreeAsync(at, stream)), 1);
        d.control.assert_fault("freed a second time");
        assert_eq!(cu!(d, cuMemsetD8Async(at, 0u8, 1usize, stream)), 1);
        d.control.assert_fault("not inside one live allocation");
        assert_eq!(d.launch(write, at, 64, ONE_BLOCK, stream), 0, "it has not run yet");
        assert_eq!(d.synchronize(stream), 700);
        d.control.assert_fault("out-of-bounds");
    });
}

/// Two accesses of two streams; `orders` puts the second behind the first. Returns the last result.
fn two_streams(d: &Driver, second: &str, orders: impl FnOnce(u64, u64)) -> i32 {
    of_streams(d, [d.stream(), d.stream()], second, orders)
}

/// The same for given streams.
fn of_streams(d: &Driver, [a, b]: [u64; 2], second: &str, orders: impl FnOnce(u64, u64)) -> i32 {
    let at = d.allocate(256, a);
    assert_eq!(d.synchronize(a), 0);
    assert_eq!(d.launch(d.function("write"), at, 64, ONE_BLOCK, a), 0);
    orders(a, b);
    match (d.launch(d.function(second), at, 64, ONE_BLOCK, b), d.synchronize(a), d.synchronize(b)) {
        (0, 0, code) | (0, code, _) | (code, ..) => code,
    }
}

#[test]
fn accesses_of_two_streams_need_an_order() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        let by_event = |a, b| {
            let event = d.event();
            assert_eq!(cu!(d, cuEventRecord(event, a)), 0);
            assert_eq!(cu!(d, cuStreamWaitEvent(b, event, 0u32)), 0);
        };
        assert_eq!(two_streams(&d, "read", by_event), 0);
        assert_eq!(two_streams(&d, "write", |a, _| assert_eq!(d.synchronize(a), 0)), 0);
        d.control.assert_no_fault();
        // The event was recorded before the write.
        let too_early = |a, b| {
            let event = d.event();
            assert_eq!(cu!(d, cuStreamWaitEvent(b, event, 0u32)), 0);
            assert_eq!(cu!(d, cuEventRecord(event, a)), 0);
        };
        assert_eq!(two_streams(&d, "read", too_early), 700);
        d.control.assert_fault("race");
    });
}

/// The verdict does not depend on when the work runs.
#[test]
fn a_race_is_found_also_if_the_work_runs_in_order() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        assert_eq!(two_streams(&d, "write", |_, _| ()), 700);
        d.control.assert_fault("race");
    });
}

/// The legacy default stream, handles 0 and 1, needs no event to be ordered with streams that are
/// not non-blocking, and orders these with each other.
fn default_streams(variables: &[(&str, &str)]) {
    on_the_driver(variables, || {
        let d = Driver::new();
        let blocking = d.stream_with(0);
        for pair in [[0, 1], [0, blocking], [blocking, 0], [1, blocking], [blocking, 1], [0, 2], [2, 0]] {
            assert_eq!(of_streams(&d, pair, "write", |_, _| ()), 0, "{pair:?}");
        }
        let elsewhere = d.allocate(256, 0);
        let between = |_, _| assert_eq!(d.launch(d.function("write"), elsewhere, 64, ONE_BLOCK, 0), 0);
        assert_eq!(of_streams(&d, [blocking, d.stream_with(0)], "write", between), 0);
        // An event of the default stream is behind the blocking streams.
        let event = |_, b| {
            let event = d.event();
            assert_eq!(cu!(d, cuEventRecord(event, 0u64)), 0);
            assert_eq!(cu!(d, cuStreamWaitEvent(b, event, 0u32)), 0);
        };
        assert_eq!(of_streams(&d, [blocking, d.stream()], "write", event), 0);
        d.control.assert_no_fault();
    });
}

#[test]
fn the_legacy_default_stream_is_ordered_with_blocking_streams() {
    default_streams(&RETURN);
}

#[test]
fn the_legacy_default_stream_is_ordered_with_blocking_streams_if_work_runs_late() {
    default_streams(&LATEST);
}

#[test]
fn the_legacy_default_stream_is_ordered_with_blocking_streams_if_work_runs_in_any_order() {
    default_streams(&[RETURN[0], ("DFAR_DRIVER_SEED", "20261127")]);
}

/// A race between two streams, given which handles they have; `None`: a new non-blocking stream.
fn race(variables: &[(&str, &str)], handles: [Option<u64>; 2]) {
    on_the_driver(variables, || {
        let d = Driver::new();
        let pair = handles.map(|handle| handle.unwrap_or_else(|| d.stream()));
        assert_eq!(of_streams(&d, pair, "write", |_, _| ()), 700);
        d.control.assert_fault("race");
    });
}

#[test]
fn the_legacy_default_stream_before_a_non_blocking_one_needs_an_order() {
    race(&RETURN, [Some(0), None]);
}

#[test]
fn a_non_blocking_stream_before_the_legacy_default_one_needs_an_order() {
    race(&LATEST, [None, Some(0)]);
}

#[test]
fn handle_1_is_as_much_without_order_as_handle_0() {
    race(&LATEST, [Some(1), None]);
}

#[test]
fn the_per_thread_default_stream_needs_an_order_with_a_non_blocking_one() {
    race(&LATEST, [Some(2), None]);
}

#[test]
fn two_blocking_streams_need_an_order() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        assert_eq!(of_streams(&d, [d.stream_with(0), d.stream_with(0)], "write", |_, _| ()), 700);
        d.control.assert_fault("race");
    });
}

#[test]
fn each_thread_has_a_default_stream_of_its_own() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        let at = d.allocate(256, 2);
        assert_eq!(d.synchronize(2), 0);
        assert_eq!(d.launch(d.function("write"), at, 64, ONE_BLOCK, 2), 0);
        let code = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                assert_eq!(cu!(d, cuCtxSetCurrent(d.context)), 0);
                assert_eq!(d.launch(d.function("write"), at, 64, ONE_BLOCK, 2), 0);
                d.synchronize(2)
            });
            other.join().expect("it ends")
        });
        assert_eq!((code, d.synchronize(2)), (0, 700));
        d.control.assert_fault("race");
    });
}

#[test]
fn a_default_stream_is_neither_destroyed_nor_captured() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        for stream in [0u64, 1, 2] {
            assert_eq!(cu!(d, cuStreamDestroy_v2(stream)), 400);
            d.control.assert_fault("cannot be destroyed");
        }
        assert_eq!(cu!(d, cuStreamBeginCapture_v2(0u64, 2i32)), 900);
        d.control.assert_fault("a capture of the legacy default stream");
        let at = d.allocate(256, 0);
        let capture = |flags| {
            let stream = d.stream_with(flags);
            assert_eq!(cu!(d, cuStreamBeginCapture_v2(stream, 2i32)), 0);
            d.launch(d.function("write"), at, 64, ONE_BLOCK, 0)
        };
        assert_eq!(capture(1), 0);
        d.control.assert_no_fault();
        assert_eq!(capture(0), 906);
        d.control.assert_fault("while a blocking stream is captured");
    });
}

#[test]
fn memory_is_not_used_before_its_allocation() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let (a, b) = (d.stream(), d.stream());
        let at = d.allocate(256, a);
        assert_eq!(d.launch(d.function("write"), at, 64, ONE_BLOCK, b), 700);
        d.control.assert_fault("race");
    });
}

#[test]
fn a_free_is_behind_all_uses() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        let (a, b) = (d.stream(), d.stream());
        let at = d.allocate(256, a);
        assert_eq!(d.synchronize(a), 0);
        assert_eq!(d.launch(d.function("write"), at, 64, ONE_BLOCK, b), 0);
        assert_eq!(d.synchronize(b), 0);
        assert_eq!(d.launch(d.function("read"), at, 64, ONE_BLOCK, b), 0);
        assert_eq!(cu!(d, cuMemFreeAsync(at, a)), 0);
        assert_eq!((d.synchronize(b), d.synchronize(a)), (0, 700));
        d.control.assert_fault("a free: race");
    });
}

#[test]
fn pinned_memory_keeps_until_its_copy_has_run() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        let stream = d.stream();
        let (at, mut pinned) = (d.allocate(64, stream), null_mut::<u8>());
        assert_eq!(cu!(d, cuMemHostAlloc(&raw mut pinned, 64usize, 0u32)), 0);
        assert_eq!(cu!(d, cuMemcpyHtoDAsync_v2(at, pinned, 64usize, stream)), 0);
        assert_eq!(cu!(d, cuMemFreeHost(pinned)), 1);
        d.control.assert_fault("freed before 1 of its copies");
        assert_eq!(d.synchronize(stream), 0);
        assert_eq!(cu!(d, cuMemcpyHtoDAsync_v2(at, pinned, 64usize, stream)), 0);
        // SAFETY: inside the buffer, which the driver may read only at the synchronisation below.
        unsafe { pinned.add(5).write(1) };
        assert_eq!(d.synchronize(stream), 700);
        d.control.assert_fault("changed before its copy ran");
        assert_eq!(cu!(d, cuMemFreeHost(pinned)), 0);
    });
}

/// Begins a capture, makes a call that it does not allow, and ends it.
fn refused_in_a_capture(d: &Driver, fault: &str, call: impl FnOnce(u64)) {
    let (stream, mut graph) = (d.stream(), 7u64);
    assert_eq!(cu!(d, cuStreamBeginCapture_v2(stream, 2i32)), 0);
    call(stream);
    d.control.assert_fault(fault);
    assert_eq!((cu!(d, cuStreamEndCapture(stream, &raw mut graph)), graph), (901, 0));
}

#[test]
fn a_capture_allows_no_synchronisation_load_or_allocation() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        refused_in_a_capture(&d, "a capturing stream", |stream| assert_eq!(d.synchronize(stream), 900));
        refused_in_a_capture(&d, "the context", |_| assert_eq!(cu!(d, cuCtxSynchronize()), 900));
        refused_in_a_capture(&d, "loading a module", |_| {
            let (code, mut module) = (d.compile(c"sm_90a"), 0u64);
            assert_eq!(cu!(d, cuModuleLoadData(&raw mut module, code.as_ptr())), 900);
        });
        refused_in_a_capture(&d, "an allocation on a capturing stream", |stream| {
            let mut at = 0u64;
            assert_eq!(cu!(d, cuMemAllocAsync(&raw mut at, 8usize, stream)), 900);
        });
        refused_in_a_capture(&d, "a copy of host memory", |stream| {
            let (other, host) = (d.stream(), [0u8; 4]);
            let at = d.allocate(4, other);
            assert_eq!(cu!(d, cuMemcpyHtoDAsync_v2(at, host.as_ptr(), 4usize, stream)), 900);
        });
        refused_in_a_capture(&d, "outside the capture", |stream| {
            assert_eq!(cu!(d, cuStreamWaitEvent(stream, d.event(), 0u32)), 905);
        });
        let mut graph = 0u64;
        assert_eq!(cu!(d, cuStreamEndCapture(d.stream(), &raw mut graph)), 401);
        d.control.assert_fault("not begun");
    });
}

#[test]
fn a_graph_runs_when_it_is_launched_and_is_updated_to_the_same_kernels_only() {
    on_the_driver(&LATEST, || {
        let d = Driver::new();
        let stream = d.stream();
        let at = d.allocate(512, stream);
        let record = |function: &str, at| {
            let mut graph = 0u64;
            assert_eq!(cu!(d, cuStreamBeginCapture_v2(stream, 2i32)), 0);
            assert_eq!(d.launch(d.function(function), at, 64, ONE_BLOCK, stream), 0);
            assert_eq!(cu!(d, cuStreamEndCapture(stream, &raw mut graph)), 0);
            graph
        };
        let (graph, mut executable, mut info) = (record("write", at), 0u64, [0u64; 3]);
        assert_eq!(cu!(d, cuGraphInstantiateWithFlags(&raw mut executable, graph, 0u64)), 0);
        let update = |graph: u64, info: &mut [u64; 3]| {
            cu!(d, cuGraphExecUpdate_v2(executable, graph, std::ptr::from_mut(info)))
        };
        assert_eq!(update(record("write", at + 256), &mut info), 0);
        assert_eq!(cu!(d, cuGraphLaunch(executable, stream)), 0);
        assert_eq!(cu!(d, cuGraphExecDestroy(executable)), 1);
        d.control.assert_fault("before its work has run");
        let mut host = [9f32; 64];
        assert_eq!(cu!(d, cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), at + 256, 256usize, stream)), 0);
        assert!(host.iter().enumerate().all(|(i, &x)| x == i as f32), "the update's address is used");

        assert_eq!(cu!(d, cuGraphInstantiateWithFlags(&raw mut executable, graph, 0u64)), 0);
        let refused = cu!(d, cuGraphExecUpdate_v2(executable, record("read", at), info.as_mut_ptr()));
        assert_eq!(refused, 910);
        d.control.assert_no_fault();
    });
}

#[test]
fn code_of_another_architecture_is_refused() {
    on_the_driver(&RETURN, || {
        let d = Driver::new();
        let (code, mut module) = (d.compile(c"sm_80"), 0u64);
        assert_eq!(cu!(d, cuModuleLoadData(&raw mut module, code.as_ptr())), 209);
        assert_eq!(cu!(d, cuModuleLoadData(&raw mut module, [0u8; 32].as_ptr())), 200);
    });
}

#[test]
fn memory_is_limited() {
    on_the_driver(&[("DFAR_DRIVER_MEMORY_MIB", "1"), ("DFAR_DRIVER_FAULTS", "return")], || {
        let d = Driver::new();
        let (stream, mut at) = (d.stream(), 0u64);
        assert_eq!(cu!(d, cuMemAllocAsync(&raw mut at, (1usize << 20) + 1, stream)), 2);
        assert_eq!(cu!(d, cuMemAllocAsync(&raw mut at, 1usize << 20, stream)), 0);
        let (mut free, mut total) = (1usize, 1usize);
        assert_eq!(cu!(d, cuMemGetInfo_v2(&raw mut free, &raw mut total)), 0);
        assert_eq!((free, total), (0, 1 << 20));
        d.control.assert_no_fault();
    });
}
