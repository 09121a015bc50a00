//! The emulator as a [`Runtime`]: the library's own checks, plans and launches run on it unchanged.

use super::Device;
use dfar::device::cuda::driver::graph::Node;
use dfar::device::cuda::driver::landing::Landing;
use dfar::device::cuda::kernel::{Kernel, Launch, Pointer};
use dfar::device::cuda::runtime::{Gemm, Limits, Memory, Runtime, Start};
use dfar::device::cuda::{CudaError, Gpu, Precision};
use dfar::device::{Activation, Store};
use half::bf16;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// An emulated device. A fault of a kernel is an error of its launch.
pub struct Emulated {
    device: Mutex<Device>,
    limits: Limits,
    to_device: AtomicUsize,
    to_host: AtomicUsize,
    overlapped: AtomicUsize,
    capture: Mutex<Option<Recording>>,
    /// `Some`: what is asked for and not done yet.
    behind: Option<Mutex<Recording>>,
    /// Memory that a copy may be sent to: taken, and nothing sent to it so far.
    landing: Mutex<HashSet<Pointer>>,
    /// Memory of copies that was given back, until the host has waited.
    resting: Mutex<Landing>,
    /// The sequences captured so far.
    graphs: Mutex<HashSet<Vec<Node>>>,
}

/// What is asked for, as it is asked for, to be done later: when a capture is over, or the host waits.
#[derive(Default)]
struct Recording {
    requests: Vec<Request>,
    /// Memory given back, by its size: what is asked for later gets it again, as from the pool of a GPU.
    released: HashMap<usize, Vec<(Pointer, usize)>>,
}

enum Request {
    Launch(Kernel, Launch, Vec<u8>),
    Products(Gemm, usize),
    Zero(Pointer, usize),
    Write(Pointer, Vec<u8>),
    Release(Pointer, usize),
    /// The memory released last of this size, once more.
    Allocate(Pointer, usize),
}

impl Request {
    fn node(&self) -> Option<Node> {
        match self {
            Request::Launch(kernel, ..) => Some(Node::Kernel(*kernel)),
            Request::Products(..) => Some(Node::Product),
            Request::Zero(..) => Some(Node::Zero),
            Request::Write(..) | Request::Release(..) | Request::Allocate(..) => None,
        }
    }
}

/// Memory of the same class is given to each other's next owner.
fn size_class(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

/// Copies between the host and the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    /// From the host.
    pub to_device: usize,
    /// From the device.
    pub to_host: usize,
    /// Of those from the host, the ones that came before work that was asked for earlier. Only where the device lags.
    pub overlapped: usize,
}

// SAFETY: a device may be used from any thread, by one at a time, which the mutex sees to.
unsafe impl Send for Emulated {}
// SAFETY: as above.
unsafe impl Sync for Emulated {}

impl Default for Emulated {
    /// With the shared memory of sm_80, the smallest of the data-centre devices, and few multiprocessors.
    fn default() -> Self {
        Self {
            device: Mutex::new(Device::new()),
            limits: Limits { shared_per_block: 163 << 10, multiprocessors: 4, cache_bytes: 1 << 20 },
            to_device: AtomicUsize::new(0),
            to_host: AtomicUsize::new(0),
            overlapped: AtomicUsize::new(0),
            capture: Mutex::default(),
            behind: None,
            landing: Mutex::default(),
            resting: Mutex::default(),
            graphs: Mutex::default(),
        }
    }
}

/// A fresh emulated device with all the operations.
pub fn gpu(precision: Precision) -> Gpu<Emulated> {
    Gpu::new(Emulated::default(), precision)
}

impl Emulated {
    /// One that does nothing before the host waits for it, but for what is sent, which comes at once: a GPU as far behind the
    /// host as it can be, with copies as far ahead. It captures nothing.
    pub fn lagging() -> Self {
        Self { behind: Some(Mutex::default()), ..Self::default() }
    }

    /// Does what was asked for.
    fn catch_up(&self) -> Result<(), CudaError> {
        let Some(behind) = &self.behind else { return Ok(()) };
        let Recording { requests, .. } = std::mem::take(&mut *lock(behind));
        requests.into_iter().try_for_each(|request| self.carry_out(request))
    }

    /// Records what is asked for, where that is done. False where it is to be done at once.
    fn recording(&self, act: impl FnOnce(&mut Recording)) -> bool {
        match (&mut *lock(&self.capture), &self.behind) {
            (Some(capture), _) => act(capture),
            (None, Some(behind)) => act(&mut lock(behind)),
            (None, None) => return false,
        }
        true
    }

    /// Copies so far.
    pub fn copies(&self) -> Copies {
        let counts = [&self.to_device, &self.to_host, &self.overlapped];
        let [to_device, to_host, overlapped] = counts.map(|n| n.load(Ordering::Relaxed));
        Copies { to_device, to_host, overlapped }
    }

    /// Replaces bytes inside one array.
    fn put(&self, at: Pointer, bytes: &[u8], read_only: bool) -> Result<(), CudaError> {
        let device = self.device();
        let to = at as *mut u8;
        if !device.is_owned(to, bytes.len()) {
            return Err(fault("write")("a copy that is not inside one array".to_owned()));
        }
        // SAFETY: owned, as just found; no kernel is running, and the host's memory is not the device's.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            device.mark(to, bytes.len(), read_only);
        }
        Ok(())
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        lock(&self.device)
    }

    /// Refuses what cannot be recorded.
    fn check_no_capture(&self, action: &'static str) -> Result<(), CudaError> {
        if lock(&self.capture).is_some() { Err(CudaError::NotCaptured { action }) } else { Ok(()) }
    }

    /// Records a request during a capture, or does it.
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
            Request::Release(at, bytes) => {
                // SAFETY: recorded of `free`, whose caller promised; nothing has released it since.
                unsafe { self.device().release(at as *mut u8, bytes) };
                Ok(())
            }
            Request::Allocate(at, bytes) => match self.allocate(bytes)? {
                found if found == at => Ok(()),
                found => Err(fault("replay")(format!("memory at {found:#x}, not {at:#x} again"))),
            },
        }
    }
}

/// Nothing here is left half-changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fault(action: &'static str) -> impl FnOnce(String) -> CudaError {
    move |message| CudaError::Driver { action, message }
}

/// A matrix in the device's memory; an error when it is not, or not written.
fn matrix<'a>(device: &'a Device, at: Pointer, len: usize, name: &str) -> Result<&'a [f32], CudaError> {
    let (at, bytes) = (at as *const u8, len * size_of::<f32>());
    if !device.is_owned(at, bytes) {
        return Err(fault("gemm")(format!("{name} is not {len} values of one array")));
    }
    // SAFETY: owned, as just found.
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

    /// As between allocations.
    const GAP: usize = 4096;

    fn mark(&self) -> Result<Instant, CudaError> {
        self.check_no_capture("marking a moment")?;
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
        let recorded = self.recording(|Recording { requests, released }| {
            requests.push(Request::Release(at, bytes));
            released.entry(size_class(bytes)).or_default().push((at, bytes));
        });
        if !recorded {
            // SAFETY: the caller's promise.
            unsafe { self.device().release(at as *mut u8, bytes) }
        }
    }

    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError> {
        // Not what was given back in a recording: that may still be used.
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

    /// At once, whatever else is still to be done. What is sent is input: kernels may not write it. What lies between the parts
    /// becomes nobody's.
    unsafe fn send(&self, at: Pointer, from: Vec<u8>, parts: &[Range<usize>]) -> Result<(), CudaError> {
        self.check_no_capture("copying to the device")?;
        self.to_device.fetch_add(1, Ordering::Relaxed);
        if !lock(&self.landing).remove(&at) {
            return Err(fault("send")(format!("a copy to {at:#x}, which is not idle memory for copies")));
        }
        if let Some(behind) = &self.behind
            && lock(behind).requests.iter().any(|request| request.node().is_some())
        {
            self.overlapped.fetch_add(1, Ordering::Relaxed);
        }
        let mut end = 0;
        for part in parts {
            if end > 0 && part.start < end + Self::GAP {
                return Err(fault("send")(format!("{part:?} is too near to what ends at {end}")));
            }
            self.put(at + part.start as Pointer, &from[part.clone()], true)?;
            // SAFETY: between two parts of one allocation, which were just found to be owned.
            unsafe { self.device().disown((at + end as Pointer) as *mut u8, part.start - end) };
            end = part.end;
        }
        Ok(())
    }

    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError> {
        self.check_no_capture("copying from the device")?;
        self.to_host.fetch_add(1, Ordering::Relaxed);
        let moment = lock(&self.resting).now();
        self.catch_up()?;
        let idle = {
            let mut resting = lock(&self.resting);
            resting.settle(moment);
            resting.take_idle()
        };
        for (at, bytes) in idle {
            // SAFETY: given back by `free_landing`, whose caller promised, and to nobody since.
            unsafe { self.device().release(at as *mut u8, bytes) };
        }
        let device = self.device();
        let from = at as *const u8;
        if !device.is_owned(from, host.len()) {
            return Err(fault("read")("a copy that is not inside one array".to_owned()));
        }
        // SAFETY: owned, as just found.
        let unwritten = unsafe { device.unwritten(from, host.len()) };
        if unwritten > 0 {
            return Err(fault("read")(format!("{unwritten} of {} bytes were never written", host.len())));
        }
        // SAFETY: owned and written; the host's memory is not the device's.
        unsafe { std::ptr::copy_nonoverlapping(from, host.as_mut_ptr(), host.len()) };
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
            return Err(CudaError::NotCaptured { action: "work of a device that lags" });
        }
        *lock(&self.capture) = Some(Recording::default());
        Ok(())
    }

    fn start_capture(&self) -> Result<Start, CudaError> {
        let Some(recording) = lock(&self.capture).take() else {
            return Err(CudaError::NotCaptured { action: "the end of no capture" });
        };
        let nodes = recording.requests.iter().filter_map(Request::node).collect();
        recording.requests.into_iter().try_for_each(|request| self.carry_out(request))?;
        Ok(if lock(&self.graphs).insert(nodes) { Start::Instantiated } else { Start::Updated })
    }

    fn forget_capture(&self) {
        let recording = lock(&self.capture).take().unwrap_or_default();
        for (at, bytes) in recording.released.into_values().flatten() {
            // SAFETY: recorded of `free`, whose caller promised; nothing has released it since, or taken it again.
            unsafe { self.device().release(at as *mut u8, bytes) };
        }
    }
}

impl Emulated {
    fn products(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError> {
        let [m, n, k] = gemm.shape;
        if count != 1 && (gemm.bias != 0 || gemm.activation != Activation::None) {
            return Err(fault("gemm")(format!("{gemm:?} is not a product that runtimes offer")));
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
            return Err(fault("gemm")(format!("{gemm:?} is not a product that runtimes offer")));
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
                // Unlike f32::max, keeps a NaN.
                if gemm.activation == Activation::Relu && *c < 0.0 {
                    *c = 0.0;
                }
            }
        }
        drop(device);
        self.put(gemm.c, bytemuck::cast_slice(&c), false)
    }
}
