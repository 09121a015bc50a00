//! The emulator as a [`Runtime`]: tests run the library's own checks, plans and launches on it.

use super::Device;
use dfar::device::cuda::driver::graph::Node;
use dfar::device::cuda::driver::landing::{Given, Landing};
use dfar::device::cuda::kernel::{Kernel, Launch, Pointer};
use dfar::device::cuda::runtime::{Gemm, Held, Limits, Memory, Runtime, Start};
use dfar::device::cuda::{CudaError, Gpu, Precision};
use dfar::device::{Activation, Store};
use half::bf16;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// An emulated device. A fault of a kernel is an error of its launch.
pub struct Emulated {
    device: Mutex<Device>,
    limits: Limits,
    to_device: AtomicUsize,
    to_host: AtomicUsize,
    overlapped: AtomicUsize,
    capture: Mutex<Option<Recording>>,
    /// `Some`: the device lags; holds the enqueued requests.
    behind: Option<Mutex<Recording>>,
    held: Held,
    /// Allocated landing memory without a copy so far.
    landing: Mutex<HashSet<Pointer>>,
    /// Freed landing memory, until the host synchronises.
    resting: Mutex<Landing>,
    /// The node sequences captured so far.
    graphs: Mutex<HashSet<Vec<Node>>>,
}

/// Requests in order, executed later: at the end of a capture, or when the host synchronises.
#[derive(Default)]
struct Recording {
    requests: Vec<Request>,
    /// Freed memory by size class. A later allocation takes it, as from the memory pool of a GPU.
    released: HashMap<usize, Vec<(Pointer, usize)>>,
}

enum Request {
    Launch(Kernel, Launch, Vec<u8>),
    Products(Gemm, usize),
    Zero(Pointer, usize),
    Write(Pointer, Vec<u8>),
    /// Copies bytes to the host.
    Read(Pointer, usize, Arc<Mutex<Vec<u8>>>),
    Release(Pointer, usize),
    /// Allocates the memory released last of this size class.
    Allocate(Pointer, usize),
}

impl Request {
    fn node(&self) -> Option<Node> {
        match self {
            Request::Launch(kernel, ..) => Some(Node::Kernel(*kernel)),
            Request::Products(..) => Some(Node::Product),
            Request::Zero(..) => Some(Node::Zero),
            Request::Write(..) | Request::Read(..) | Request::Release(..) | Request::Allocate(..) => None,
        }
    }
}

/// A copy to the host.
pub struct Reading {
    bytes: Arc<Mutex<Vec<u8>>>,
    moment: Given,
}

/// Freed memory is reused by allocations of the same size class.
fn size_class(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

/// Numbers of copies between host and device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    /// From the host to the device.
    pub to_device: usize,
    /// From the device to the host.
    pub to_host: usize,
    /// Copies to the device that ran ahead of work enqueued earlier. Only a lagging device has any.
    pub overlapped: usize,
}

// SAFETY: any thread may use a device, one at a time; the mutex ensures that.
unsafe impl Send for Emulated {}
// SAFETY: as above.
unsafe impl Sync for Emulated {}

impl Default for Emulated {
    /// A device with the shared memory of sm_80, the smallest of the data-centre GPUs, and few
    /// multiprocessors.
    fn default() -> Self {
        Self {
            device: Mutex::new(Device::new()),
            limits: Limits { shared_per_block: 163 << 10, multiprocessors: 4, cache_bytes: 1 << 20 },
            to_device: AtomicUsize::new(0),
            to_host: AtomicUsize::new(0),
            overlapped: AtomicUsize::new(0),
            capture: Mutex::default(),
            behind: None,
            held: Held::default(),
            landing: Mutex::default(),
            resting: Mutex::default(),
            graphs: Mutex::default(),
        }
    }
}

/// A new emulated device.
pub fn gpu(precision: Precision) -> Gpu<Emulated> {
    Gpu::new(Emulated::default(), precision)
}

impl Emulated {
    /// A lagging device: it executes nothing until the host synchronises, except copies by
    /// [`Runtime::send`], which it executes at once. This is the extreme of a GPU in which the
    /// compute stream is late and the copy stream early. It supports no capture.
    pub fn lagging() -> Self {
        Self { behind: Some(Mutex::default()), ..Self::default() }
    }

    /// Executes all enqueued requests.
    fn catch_up(&self) -> Result<(), CudaError> {
        let Some(behind) = &self.behind else { return Ok(()) };
        let Recording { requests, .. } = std::mem::take(&mut *lock(behind));
        requests.into_iter().try_for_each(|request| self.carry_out(request))
    }

    /// Records a request during a capture or on a lagging device. Otherwise returns false: the
    /// caller executes the request.
    fn recording(&self, act: impl FnOnce(&mut Recording)) -> bool {
        match (&mut *lock(&self.capture), &self.behind) {
            (Some(capture), _) => act(capture),
            (None, Some(behind)) => act(&mut lock(behind)),
            (None, None) => return false,
        }
        true
    }

    /// Numbers of copies so far.
    pub fn copies(&self) -> Copies {
        let counts = [&self.to_device, &self.to_host, &self.overlapped];
        let [to_device, to_host, overlapped] = counts.map(|n| n.load(Ordering::Relaxed));
        Copies { to_device, to_host, overlapped }
    }

    /// Writes bytes inside one array.
    fn put(&self, at: Pointer, bytes: &[u8], read_only: bool) -> Result<(), CudaError> {
        let device = self.device();
        let to = at as *mut u8;
        if !device.is_owned(to, bytes.len()) {
            return Err(fault("write")("a copy that is not inside one array".to_owned()));
        }
        // SAFETY: owned, as checked above; no kernel is running; host and device memory are
        // disjoint.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            device.mark(to, bytes.len(), read_only);
        }
        Ok(())
    }

    /// Reads bytes inside one array.
    fn get(&self, at: Pointer, bytes: usize) -> Result<Vec<u8>, CudaError> {
        let device = self.device();
        let from = at as *const u8;
        if !device.is_owned(from, bytes) {
            return Err(fault("read")("a copy that is not inside one array".to_owned()));
        }
        // SAFETY: owned, as checked above.
        let unwritten = unsafe { device.unwritten(from, bytes) };
        if unwritten > 0 {
            return Err(fault("read")(format!("{unwritten} of {bytes} bytes were never written")));
        }
        // SAFETY: owned and written; no kernel is running.
        Ok(unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec())
    }

    /// Landing memory freed before `moment` becomes idle, and is released.
    fn settle(&self, moment: Given) {
        let idle = {
            let mut resting = lock(&self.resting);
            resting.settle(moment);
            resting.take_idle()
        };
        for (at, bytes) in idle {
            // SAFETY: freed by `free_landing`, whose caller guarantees it; not released since.
            unsafe { self.device().release(at as *mut u8, bytes) };
        }
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        lock(&self.device)
    }

    /// Rejects an action that cannot be recorded.
    fn check_no_capture(&self, action: &'static str) -> Result<(), CudaError> {
        if lock(&self.capture).is_some() { Err(CudaError::NotCaptured { action }) } else { Ok(()) }
    }

    /// Records a request, or executes it.
    fn ask(&self, request: Request) -> Result<(), CudaError> {
        let mut request = Some(request);
        self.recording(|recording| recording.requests.extend(request.take()));
        request.map_or(Ok(()), |request| self.carry_out(request))
    }

    fn carry_out(&self, request: Request) -> Result<(), CudaError> {
        match request {
            Request::Launch(kernel, launch, params) => {
                self.device().launch_bytes(kernel, launch, &params).map_err(fault(kernel.entry))
            }
            Request::Products(gemm, count) => self.products(&gemm, count),
            Request::Zero(at, bytes) => self.put(at, &vec![0; bytes], false),
            Request::Write(at, bytes) => self.put(at, &bytes, false),
            Request::Read(at, bytes, to) => {
                *lock(&to) = self.get(at, bytes)?;
                Ok(())
            }
            Request::Release(at, bytes) => {
                // SAFETY: recorded by `free`, whose caller guarantees it; not released since.
                unsafe { self.device().release(at as *mut u8, bytes) };
                Ok(())
            }
            Request::Allocate(at, bytes) => match self.allocate(bytes)? {
                found if found == at => Ok(()),
                found => Err(fault("replay")(format!("allocated {found:#x}, but the recording has {at:#x}"))),
            },
        }
    }
}

/// Ignores poisoning: no critical section leaves partial state on a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fault(action: &'static str) -> impl FnOnce(String) -> CudaError {
    move |message| CudaError::Driver { action, message }
}

/// A matrix in device memory. An error if it is not inside one array, or not fully written.
fn matrix<'a>(device: &'a Device, at: Pointer, len: usize, name: &str) -> Result<&'a [f32], CudaError> {
    let (at, bytes) = (at as *const u8, len * size_of::<f32>());
    if !device.is_owned(at, bytes) {
        return Err(fault("gemm")(format!("{name} is not {len} values of one array")));
    }
    // SAFETY: owned, as checked above.
    let unwritten = unsafe { device.unwritten(at, bytes) };
    if unwritten > 0 {
        return Err(fault("gemm")(format!("{unwritten} bytes of {name} were never written")));
    }
    // SAFETY: owned and written; any bytes are an f32; no kernel is running.
    Ok(unsafe { std::slice::from_raw_parts(at.cast(), len) })
}

impl Runtime for Emulated {
    type Mark = Instant;
    type Pinned = Vec<u8>;
    type Reading = Reading;

    /// Equal to the gap between allocations.
    const GAP: usize = 4096;

    fn mark(&self) -> Result<Instant, CudaError> {
        self.check_no_capture("recording an event")?;
        Ok(Instant::now())
    }

    fn seconds_between(&self, from: &Instant, to: &Instant) -> Result<f64, CudaError> {
        Ok((*to - *from).as_secs_f64())
    }

    fn name(&self) -> String {
        "emulator".to_owned()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    /// By shared memory; registers allow two, as `__launch_bounds__` says of the kernels that ask.
    fn resident_blocks(&self, _: Kernel, _: u32, shared_bytes: u32) -> Result<usize, CudaError> {
        Ok(((self.limits.shared_per_block + 1024) / (shared_bytes as usize + 1024)).clamp(1, 2))
    }

    fn memory(&self) -> Result<Memory, CudaError> {
        Ok(Memory { free: 1 << 30, total: 1 << 30 })
    }

    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError> {
        let mut found = None;
        self.recording(|Recording { requests, released }| {
            found = released.get_mut(&size_class(bytes)).and_then(Vec::pop);
            requests.extend(found.map(|(at, _)| Request::Allocate(at, bytes)));
        });
        if let Some((at, _)) = found {
            return Ok(at);
        }
        self.device().allocate_bytes(bytes).map(|at| at as Pointer).ok_or(CudaError::OutOfMemory { bytes })
    }

    unsafe fn free(&self, at: Pointer, bytes: usize) {
        if self.held.keeps(at, bytes) {
            return;
        }
        let recorded = self.recording(|Recording { requests, released }| {
            requests.push(Request::Release(at, bytes));
            released.entry(size_class(bytes)).or_default().push((at, bytes));
        });
        if !recorded {
            // SAFETY: guaranteed by the caller.
            unsafe { self.device().release(at as *mut u8, bytes) }
        }
    }

    fn held(&self) -> &Held {
        &self.held
    }

    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError> {
        // Memory freed in a recording may still be in use, so it is not taken.
        let at = self.device().allocate_bytes(bytes).ok_or(CudaError::OutOfMemory { bytes })? as Pointer;
        lock(&self.landing).insert(at);
        Ok(at)
    }

    unsafe fn free_landing(&self, at: Pointer, bytes: usize) {
        lock(&self.landing).remove(&at);
        lock(&self.resting).give_back(at, bytes);
    }

    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError> {
        self.ask(Request::Zero(at, bytes))
    }

    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError> {
        self.check_no_capture("copying to the device")?;
        self.to_device.fetch_add(1, Ordering::Relaxed);
        self.ask(Request::Write(at, host.to_vec()))
    }

    fn pinned(&self, bytes: usize) -> Result<Vec<u8>, CudaError> {
        Ok(vec![0; bytes])
    }

    /// Executed at once, ahead of enqueued work. The parts are inputs, which kernels may not write;
    /// the gaps between them become out of bounds.
    unsafe fn send(&self, at: Pointer, from: Vec<u8>, parts: &[Range<usize>]) -> Result<(), CudaError> {
        self.check_no_capture("copying to the device")?;
        self.to_device.fetch_add(1, Ordering::Relaxed);
        if !lock(&self.landing).remove(&at) {
            return Err(fault("send")(format!("a copy to {at:#x}, which is not idle landing memory")));
        }
        if let Some(behind) = &self.behind
            && lock(behind).requests.iter().any(|request| request.node().is_some())
        {
            self.overlapped.fetch_add(1, Ordering::Relaxed);
        }
        let mut end = 0;
        for part in parts {
            if end > 0 && part.start < end + Self::GAP {
                return Err(fault("send")(format!("{part:?} begins less than the gap after byte {end}")));
            }
            self.put(at + part.start as Pointer, &from[part.clone()], true)?;
            // SAFETY: between two parts of one allocation, which is owned as checked above.
            unsafe { self.device().disown((at + end as Pointer) as *mut u8, part.start - end) };
            end = part.end;
        }
        Ok(())
    }

    unsafe fn begin_read(&self, at: Pointer, bytes: usize) -> Result<Reading, CudaError> {
        self.check_no_capture("copying from the device")?;
        self.to_host.fetch_add(1, Ordering::Relaxed);
        let moment = lock(&self.resting).now();
        let to = Arc::default();
        self.ask(Request::Read(at, bytes, Arc::clone(&to)))?;
        Ok(Reading { bytes: to, moment })
    }

    /// Executes later work too: a GPU may have.
    fn end_read(&self, reading: Reading, host: &mut [u8]) -> Result<(), CudaError> {
        self.catch_up()?;
        self.settle(reading.moment);
        host.copy_from_slice(&lock(&reading.bytes));
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError> {
        self.ask(Request::Launch(kernel, launch, params.to_vec()))
    }

    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError> {
        self.ask(Request::Products(*gemm, count))
    }

    fn begin_capture(&self) -> Result<(), CudaError> {
        self.check_no_capture("another capture")?;
        if self.behind.is_some() {
            return Err(CudaError::NotCaptured { action: "work on a lagging device" });
        }
        *lock(&self.capture) = Some(Recording::default());
        Ok(())
    }

    fn start_capture(&self) -> Result<Start, CudaError> {
        let Some(recording) = lock(&self.capture).take() else {
            return Err(CudaError::NotCaptured { action: "ending a capture that was not started" });
        };
        let nodes = recording.requests.iter().filter_map(Request::node).collect();
        recording.requests.into_iter().try_for_each(|request| self.carry_out(request))?;
        Ok(if lock(&self.graphs).insert(nodes) { Start::Instantiated } else { Start::Updated })
    }

    fn forget_capture(&self) {
        let recording = lock(&self.capture).take().unwrap_or_default();
        for (at, bytes) in recording.released.into_values().flatten() {
            // SAFETY: recorded by `free`, whose caller guarantees it; neither released nor
            // allocated since.
            unsafe { self.device().release(at as *mut u8, bytes) };
        }
    }
}

impl Emulated {
    fn products(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError> {
        let [m, n, k] = gemm.shape;
        if count != 1 && (gemm.bias != 0 || gemm.activation != Activation::None) {
            return Err(fault("gemm")(format!("unsupported product: {gemm:?}")));
        }
        for i in 0..count {
            let [a, b, c] = [(gemm.a, m * k), (gemm.b, k * n), (gemm.c, m * n)]
                .map(|(at, len)| at + (i * len * size_of::<f32>()) as Pointer);
            self.product(&Gemm { a, b, c, ..*gemm })?;
        }
        Ok(())
    }

    fn product(&self, gemm: &Gemm) -> Result<(), CudaError> {
        let device = self.device();
        let [m, n, k] = gemm.shape;
        if m * n * k == 0
            || (gemm.store == Store::Add && (gemm.bias != 0 || gemm.activation != Activation::None))
        {
            return Err(fault("gemm")(format!("unsupported product: {gemm:?}")));
        }
        let round = |x: f32| match gemm.precision {
            Precision::F32 => x,
            Precision::Bf16 => bf16::from_f32(x).to_f32(),
        };
        // Both row-major, so that the innermost loop runs along rows.
        let packed =
            |at, transposed: bool, rows: usize, columns: usize, name| -> Result<Vec<f32>, CudaError> {
                let values = matrix(&device, at, rows * columns, name)?;
                Ok((0..rows * columns)
                    .map(|i| {
                        round(if transposed { values[i % columns * rows + i / columns] } else { values[i] })
                    })
                    .collect())
            };
        let a = packed(gemm.a, gemm.a_transposed, m, k, "a")?;
        let b = packed(gemm.b, gemm.b_transposed, k, n, "b")?;
        let bias =
            if gemm.bias == 0 { vec![0.0; n] } else { matrix(&device, gemm.bias, n, "bias")?.to_vec() };
        let mut c = match gemm.store {
            Store::Add => matrix(&device, gemm.c, m * n, "c")?.to_vec(),
            Store::Overwrite => vec![0.0; m * n],
        };
        for (row, c) in c.chunks_exact_mut(n).enumerate() {
            let mut sums = vec![0.0f32; n];
            for (a, b) in a[row * k..][..k].iter().zip(b.chunks_exact(n)) {
                sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
            }
            for ((c, sum), bias) in c.iter_mut().zip(sums).zip(&bias) {
                *c += sum + bias;
                // Unlike f32::max, this keeps a NaN.
                if gemm.activation == Activation::Relu && *c < 0.0 {
                    *c = 0.0;
                }
            }
        }
        drop(device);
        self.put(gemm.c, bytemuck::cast_slice(&c), false)
    }
}
