//! Attention on tensors of another library: memory and streams that the test makes through the
//! driver, as PyTorch does. The driver notices work that is not ordered by the stream.

mod common;

use common::{Control, on_the_driver};
use dfar::attention::{self, AttentionError, FhaOptions, Gradients as HostGradients, Inputs};
use dfar::device::cuda::tensors::{Gradients, Packed, Place, Streams, Tensors};
use dfar::device::cuda::{CudaError, Element};
use libloading::Symbol;

/// Calls an entry point; the types of its arguments follow from the arguments.
macro_rules! cu {
    ($other:expr, $name:ident($($argument:expr),*)) => {{
        // SAFETY: the arguments have the types of cuda.h, and pointers are valid for the call.
        let code = unsafe {
            let function: Symbol<unsafe extern "C" fn($(cu!(@any $argument)),*) -> i32> =
                $other.control.0.get(concat!(stringify!($name), "\0").as_bytes()).expect("it is exported");
            function($($argument),*)
        };
        assert_eq!(code, 0, "{}", stringify!($name));
    }};
    (@any $argument:expr) => { _ };
}

/// The other library: the primary context, and streams and memory of its own.
struct Other {
    control: Control,
}

impl Other {
    fn new() -> Self {
        let other = Self { control: Control::new() };
        cu!(other, cuInit(0u32));
        let mut context = 0u64;
        cu!(other, cuDevicePrimaryCtxRetain(&raw mut context, 0i32));
        cu!(other, cuCtxSetCurrent(context));
        other
    }

    fn stream(&self) -> u64 {
        self.stream_with(1)
    }

    /// A stream with these flags; 0: ordered with the legacy default stream.
    fn stream_with(&self, flags: u32) -> u64 {
        let mut stream = 0u64;
        cu!(self, cuStreamCreate(&raw mut stream, flags));
        stream
    }

    fn empty(&self, stream: u64, values: usize) -> u64 {
        let mut at = 0u64;
        cu!(self, cuMemAllocAsync(&raw mut at, values * 4, stream));
        at
    }

    /// A tensor whose values are there once the stream has come to it.
    fn tensor(&self, stream: u64, values: &[f32]) -> u64 {
        let at = self.empty(stream, values.len());
        cu!(self, cuMemcpyHtoDAsync_v2(at, values.as_ptr(), values.len() * 4, stream));
        at
    }

    fn free(&self, stream: u64, tensors: &[u64]) {
        tensors.iter().for_each(|&at| cu!(self, cuMemFreeAsync(at, stream)));
    }

    fn read(&self, stream: u64, at: u64, values: usize) -> Vec<f32> {
        let mut host = vec![0.0f32; values];
        cu!(self, cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), at, values * 4, stream));
        host
    }

    /// Destroys the streams and releases the context; the driver reports what is left over.
    fn end(self, streams: &[u64]) {
        for &stream in streams {
            cu!(self, cuStreamSynchronize(stream));
            cu!(self, cuStreamDestroy_v2(stream));
        }
        cu!(self, cuDevicePrimaryCtxRelease_v2(0i32));
        self.control.assert_no_fault();
    }
}

/// A batch on the host.
struct Batch {
    options: FhaOptions,
    cu_seqlens: Vec<u32>,
    label: Vec<u8>,
    qkv: [Vec<f32>; 3],
    d_o: Vec<f32>,
}

impl Batch {
    fn new(lengths: &[u32], heads: usize, head_dim: usize) -> Self {
        let options = FhaOptions::new(heads, head_dim);
        let cu_seqlens: Vec<u32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |end, length| {
                *end += length;
                Some(*end)
            }))
            .collect();
        let tokens = *cu_seqlens.last().expect("the start") as usize;
        let mut state = 7u32;
        let mut draw = |n: usize| -> Vec<f32> {
            let mut value = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(|_| value()).collect()
        };
        let wide = tokens * heads * head_dim;
        let qkv = [draw(wide), draw(wide), draw(wide)];
        let d_o = draw(options.output_len(tokens));
        let label = (0..tokens).map(|token| (token * 7 / 3 % 2) as u8).collect();
        Self { options, cu_seqlens, label, qkv, d_o }
    }

    fn packed(&self) -> Packed<'_> {
        let tokens = self.label.len();
        Packed { options: &self.options, tokens, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }

    /// o, lse, dq, dk, dv on the CPU.
    fn expected(&self) -> [Vec<f32>; 5] {
        let [q, k, v] = &self.qkv;
        let inputs = Inputs { q, k, v, cu_seqlens: &self.cu_seqlens, label: &self.label };
        let n = self.label.len();
        let (mut o, mut lse) = (vec![0.0; self.d_o.len()], vec![0.0; self.options.lse_len(n)]);
        attention::forward(&self.options, inputs, &mut o, &mut lse).expect("good arguments");
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0.0; q.len()]);
        let gradients = HostGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        attention::backward(&self.options, inputs, &o, &lse, &self.d_o, gradients).expect("good arguments");
        [o, lse, dq, dk, dv]
    }

    /// The same on the device: both passes enqueued on the stream, without a wait, and the inputs
    /// freed behind them.
    fn on(&self, other: &Other, streams: &Streams, stream: u64) -> [Vec<f32>; 5] {
        let n = self.label.len();
        let (wide, out, rows) = (self.qkv[0].len(), self.d_o.len(), self.options.lse_len(n));
        let qkv = self.qkv.each_ref().map(|values| other.tensor(stream, values));
        let tensors = Tensors {
            element: Element::F32,
            qkv,
            o: other.empty(stream, out),
            lse: other.empty(stream, rows),
        };
        let at = Place { ordinal: 0, stream };
        // SAFETY: tensors of these shapes, allocated on the stream.
        unsafe { streams.forward(at, self.packed(), &tensors) }.expect("forward should run");
        let d_o = other.tensor(stream, &self.d_o);
        let gradients = Gradients { d_o, qkv: [(); 3].map(|()| other.empty(stream, wide)) };
        // SAFETY: as above.
        unsafe { streams.backward(at, self.packed(), &tensors, &gradients) }.expect("backward should run");
        other.free(stream, &tensors.qkv);
        other.free(stream, &[d_o]);
        let [dq, dk, dv] = gradients.qkv.map(|at| other.read(stream, at, wide));
        let (o, lse) = (other.read(stream, tensors.o, out), other.read(stream, tensors.lse, rows));
        other.free(stream, &gradients.qkv);
        other.free(stream, &[tensors.o, tensors.lse]);
        [o, lse, dq, dk, dv]
    }
}

#[track_caller]
fn assert_close(found: &[Vec<f32>; 5], expected: &[Vec<f32>; 5]) {
    let names = ["o", "lse", "dq", "dk", "dv"];
    for ((name, found), expected) in names.iter().zip(found).zip(expected) {
        let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        assert_eq!(found.len(), expected.len(), "{name}");
        assert!(found.iter().all(|x| x.is_finite()), "{name}: {found:?}");
        let error = found.iter().zip(expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        let bound = if name.starts_with('d') { 5e-5 } else { 1e-5 };
        assert!(error <= bound * largest, "{name}: {error} of {largest}");
    }
}

/// Short sequences, one that is streamed, an empty one.
fn streamed() -> Batch {
    Batch::new(&[3, 0, 9, 130], 2, 8)
}

/// Heads of a width without kernels.
fn padded() -> Batch {
    Batch::new(&[5, 6], 4, 12)
}

fn both_passes(seed: &str, batches: &[fn() -> Batch]) {
    on_the_driver(&[("DFAR_DRIVER_SEED", seed)], || {
        let other = Other::new();
        let (one, two) = (other.stream(), other.stream());
        let streams = Streams::default();
        for batch in batches.iter().map(|batch| batch()) {
            let expected = batch.expected();
            let first = batch.on(&other, &streams, one);
            assert_close(&first, &expected);
            // Scratch memory is used again on a stream, and not shared between streams.
            assert_eq!(batch.on(&other, &streams, two), first);
            assert_eq!(batch.on(&other, &streams, one), first);
        }
        drop(streams);
        other.end(&[one, two]);
    });
}

#[test]
fn work_that_runs_at_once() {
    both_passes("0", &[streamed]);
}

#[test]
fn work_that_runs_as_late_as_possible() {
    both_passes("1", &[streamed, padded]);
}

#[test]
fn work_that_runs_in_any_order() {
    both_passes("20261127", &[streamed]);
}

/// PyTorch's current stream is the legacy default stream, handle 0, unless the program chooses one.
fn on_default_streams(seed: &str) {
    on_the_driver(&[("DFAR_DRIVER_SEED", seed)], || {
        let other = Other::new();
        let blocking = other.stream_with(0);
        let (streams, batch) = (Streams::default(), streamed());
        let first = batch.on(&other, &streams, 0);
        assert_close(&first, &batch.expected());
        for stream in [0, 1, blocking, 0] {
            assert_eq!(batch.on(&other, &streams, stream), first);
        }
        drop(streams);
        cu!(other, cuStreamSynchronize(0u64));
        other.end(&[blocking]);
    });
}

#[test]
fn default_streams_with_work_that_runs_at_once() {
    on_default_streams("0");
}

#[test]
fn default_streams_with_work_that_runs_as_late_as_possible() {
    on_default_streams("1");
}

#[test]
fn default_streams_with_work_that_runs_in_any_order() {
    on_default_streams("20261127");
}

/// Writes `q` on a default stream and calls the forward pass on a stream with these flags. Returns
/// the fault.
fn written_on_the_default_stream(flags: u32) -> Option<String> {
    let other = Other::new();
    let stream = other.stream_with(flags);
    let (streams, batch) = (Streams::default(), Batch::new(&[3, 4], 2, 8));
    let qkv = batch.qkv.each_ref().map(|values| other.tensor(stream, values));
    let (out, rows) = (batch.d_o.len(), batch.options.lse_len(7));
    let (o, lse) = (other.empty(stream, out), other.empty(stream, rows));
    // So that only the order of the write and the kernel is in question.
    cu!(other, cuStreamSynchronize(stream));
    cu!(other, cuMemcpyHtoDAsync_v2(qkv[0], batch.qkv[0].as_ptr(), batch.qkv[0].len() * 4, 0u64));
    let tensors = Tensors { element: Element::F32, qkv, o, lse };
    // SAFETY: tensors of these shapes; the driver notices the missing order and runs no further.
    let _ = unsafe { streams.forward(Place { ordinal: 0, stream }, batch.packed(), &tensors) };
    let fault = other.control.fault();
    // A context with a fault can no longer be cleaned up.
    std::mem::forget(streams);
    fault
}

#[test]
fn a_tensor_of_the_default_stream_needs_an_order_on_a_non_blocking_stream() {
    on_the_driver(&[("DFAR_DRIVER_FAULTS", "return")], || {
        let fault = written_on_the_default_stream(1).expect("a race");
        assert!(fault.contains("race: a read"), "{fault}");
    });
}

#[test]
fn a_tensor_of_the_default_stream_is_ordered_on_a_blocking_stream() {
    on_the_driver(&[("DFAR_DRIVER_FAULTS", "return")], || {
        assert_eq!(written_on_the_default_stream(0), None);
    });
}

/// More calls in flight than there are staging buffers.
#[test]
fn the_host_may_be_many_calls_ahead() {
    on_the_driver(&[("DFAR_DRIVER_SEED", "1")], || {
        let other = Other::new();
        let stream = other.stream();
        let (streams, batch) = (Streams::default(), Batch::new(&[3, 4], 2, 8));
        let (out, rows) = (batch.d_o.len(), batch.options.lse_len(7));
        let qkv = batch.qkv.each_ref().map(|values| other.tensor(stream, values));
        let all = [(); 40].map(|()| {
            let (o, lse) = (other.empty(stream, out), other.empty(stream, rows));
            let tensors = Tensors { element: Element::F32, qkv, o, lse };
            // SAFETY: tensors of these shapes, allocated on the stream.
            unsafe { streams.forward(Place { ordinal: 0, stream }, batch.packed(), &tensors) }
                .expect("forward should run");
            tensors
        });
        let expected = other.read(stream, all[0].o, out);
        for tensors in all {
            assert_eq!(other.read(stream, tensors.o, out), expected);
            other.free(stream, &[tensors.o, tensors.lse]);
        }
        other.free(stream, &qkv);
        drop(streams);
        other.end(&[stream]);
    });
}

#[test]
fn bad_arguments_are_refused_before_anything_is_enqueued() {
    on_the_driver(&[], || {
        let other = Other::new();
        let stream = other.stream();
        let (streams, batch) = (Streams::default(), Batch::new(&[3, 4], 2, 8));
        let at = Place { ordinal: 0, stream };
        let good = Tensors { element: Element::F32, qkv: [256; 3], o: 256, lse: 256 };
        let refused = |packed: Packed, tensors: &Tensors, at: Place| {
            // SAFETY: the arguments are refused, so nothing uses the addresses.
            let error = unsafe { streams.forward(at, packed, tensors) }.expect_err("a bad argument");
            let error = CudaError::of(&error).expect("an error of this device").to_string();
            assert_eq!(other.control.calls("cuLaunchKernel"), 0);
            error
        };
        let odd = Tensors { qkv: [256, 260, 256], ..good };
        assert!(refused(batch.packed(), &odd, at).contains("k is at address 0x104"));
        let null = Tensors { lse: 0, ..good };
        assert!(refused(batch.packed(), &null, at).contains("lse is at address 0x0"));
        let short = Packed { tokens: 6, ..batch.packed() };
        assert!(!refused(short, &good, at).is_empty());
        let wide = Batch::new(&[3], 2, 136);
        assert!(refused(wide.packed(), &good, at).contains("head_dim is 136"));
        let narrow = Batch::new(&[3], 2, 12);
        let half = Tensors { element: Element::Bf16, ..good };
        assert!(refused(narrow.packed(), &half, at).contains("head_dim is 12"));
        let nowhere = Place { ordinal: 3, ..at };
        assert!(refused(batch.packed(), &good, nowhere).contains("device 3 does not exist"));
        let shared = Place { stream: 2, ..at };
        assert!(refused(batch.packed(), &good, shared).contains("per-thread default stream"));
        let gap = Batch { label: vec![0; 3], ..Batch::new(&[3, 4], 2, 8) };
        let labels = Packed { tokens: 7, ..gap.packed() };
        // SAFETY: as above.
        let error = unsafe { streams.forward(at, labels, &good) }.expect_err("labels are missing");
        let error = CudaError::of(&error).expect("an error of this device");
        assert!(
            matches!(error, CudaError::Attention(AttentionError::Length { name: "label", .. })),
            "{error}"
        );
        drop(streams);
        other.end(&[stream]);
    });
}
