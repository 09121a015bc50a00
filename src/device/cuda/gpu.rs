//! [`Gpu`]: a runtime and the precision of its products. [`ops`](super::ops) implements its
//! operations.

pub(crate) mod products;
mod queue;
mod turn;

use super::array::Array;
use super::capture::{self, Captures};
use super::error::CudaError;
use super::kernel::{Kernel, Launch, Pointer};
use super::runtime::{Gemm, Runtime, lock};
use crate::device::DeviceError;
use crate::device::Precision;
use bytemuck::Pod;
use products::{Product, Sum};
use queue::{Recording, Request};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use turn::{Taken, Turn};

/// The device of the model: a GPU, or the emulator in tests.
///
/// Several threads may use it: each step, and each group of independent operations, is enqueued
/// whole before another thread's work. With CUDA graphs, only one thread may use it.
pub struct Gpu<R: Runtime> {
    runtime: Arc<R>,
    precision: Precision,
    /// `None` if CUDA graphs are off.
    captures: Option<Mutex<Captures>>,
    /// All matrix products by the runtime.
    products_by_library: bool,
    /// Taken by a thread for each request, group or step.
    turn: Turn,
    /// Independent operations in progress, of the thread that has the turn.
    recording: Mutex<Option<Recording>>,
    /// Gradients of parameters whose partial sums are not added yet, each of a thread.
    pending: Mutex<Vec<(ThreadId, Pending<R>)>>,
}

/// The sum of partial results, and the arrays that it uses.
struct Pending<R: Runtime> {
    sum: Sum,
    _arrays: [Array<R, f32>; 2],
}

/// Independent operations in progress. Drop discards what is recorded and lets memory go.
struct Independent<'a, R: Runtime>(&'a Gpu<R>);

impl<'a, R: Runtime> Independent<'a, R> {
    fn begin(gpu: &'a Gpu<R>, _turn: &Taken<'a>) -> Self {
        gpu.runtime.hold_freed();
        *lock(&gpu.recording) = Some(Recording::default());
        Self(gpu)
    }

    fn launch(self) -> Result<(), CudaError> {
        let recording = lock(&self.0.recording).take().unwrap_or_default();
        for request in recording.merged() {
            // SAFETY: each request met its contract when it was recorded. Memory freed since then
            // is held. Requests that share a launch are independent, as the caller of the
            // operations guarantees.
            unsafe { queue::issue(&*self.0.runtime, request)? };
        }
        Ok(())
    }
}

impl<R: Runtime> Drop for Independent<'_, R> {
    fn drop(&mut self) {
        *lock(&self.0.recording) = None;
        self.0.runtime.release_freed();
    }
}

impl<R: Runtime> Gpu<R> {
    /// A product of at least this many multiply-adds goes to the library, in a launch of its own:
    /// it takes longer than several launches, and tensor cores may pay.
    const LARGE: usize = 1 << 28;

    /// A device on `runtime`. `precision` is that of the matrix products; values in memory are f32.
    pub fn new(runtime: R, precision: Precision) -> Self {
        Self {
            runtime: Arc::new(runtime),
            precision,
            captures: None,
            products_by_library: false,
            turn: Turn::default(),
            recording: Mutex::default(),
            pending: Mutex::default(),
        }
    }

    /// Computes all matrix products of layers by the product library, each in its own launch.
    pub fn with_library_products(self) -> Self {
        Self { products_by_library: true, ..self }
    }

    /// Whether a product of this shape shares a launch with others.
    pub(super) fn shares_launch(&self, shape: [usize; 3]) -> bool {
        !self.products_by_library && shape.iter().product::<usize>() < Self::LARGE
    }

    /// Enables CUDA graphs in [`Execution::captured`](crate::device::Execution::captured).
    pub fn with_graphs(self) -> Self {
        Self { captures: Some(Mutex::default()), ..self }
    }

    /// Capture counts so far; `None` without [`Gpu::with_graphs`].
    pub fn captures(&self) -> Option<Captures> {
        self.captures.as_ref().map(|captures| lock(captures).clone())
    }

    /// The runtime.
    pub fn runtime(&self) -> &Arc<R> {
        &self.runtime
    }

    /// Precision of matrix products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// `len` values of unspecified content.
    ///
    /// # Errors
    /// As [`Runtime::allocate`].
    pub fn array<T: Pod>(&self, len: usize) -> Result<Array<R, T>, CudaError> {
        Array::new(&self.runtime, len)
    }

    /// A copy of `host` on the device.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::write`].
    pub fn copy_of<T: Pod>(&self, host: &[T]) -> Result<Array<R, T>, CudaError> {
        Array::of(&self.runtime, host)
    }

    /// See [`crate::device::Execution::captured`].
    pub(super) fn captured_work<T>(
        &self,
        mut work: impl FnMut() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let _turn = self.turn.take();
        capture::captured(&*self.runtime, self.captures.as_ref(), || {
            // Those of an attempt that failed.
            drop(self.own_pending());
            work()
        })
    }

    /// See [`crate::device::Execution::side_by_side`].
    pub(super) fn two_lanes<T>(
        &self,
        mut work: impl FnMut(usize) -> Result<T, DeviceError>,
    ) -> Result<[T; 2], DeviceError> {
        let turn = self.turn.take();
        if lock(&self.recording).is_some() {
            return Ok([work(0)?, work(1)?]);
        }
        let independent = Independent::begin(self, &turn);
        let first = work(0)?;
        if let Some(recording) = &mut *lock(&self.recording) {
            recording.lane = 1;
        }
        let second = work(1)?;
        independent.launch()?;
        Ok([first, second])
    }

    /// See [`crate::device::Execution::together`].
    pub(super) fn one_group<T, E: From<CudaError>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let turn = self.turn.take();
        let is_outermost = lock(&self.recording).is_none();
        let own = is_outermost.then(|| Independent::begin(self, &turn));
        let begins = lock(&self.recording).as_mut().is_some_and(Recording::begin_group);
        let value = work()?;
        if begins && let Some(recording) = &mut *lock(&self.recording) {
            recording.end_group();
        }
        if let Some(own) = own {
            own.launch()?;
        }
        Ok(value)
    }

    /// Takes the pending sums of this thread.
    fn own_pending(&self) -> Vec<Pending<R>> {
        let me = thread::current().id();
        lock(&self.pending).extract_if(.., |(thread, _)| *thread == me).map(|(_, pending)| pending).collect()
    }

    /// Adds the partial sums of this thread's gradients of parameters, in one launch.
    pub(super) fn settle_gradients(&self) -> Result<(), CudaError> {
        let pending = self.own_pending();
        // SAFETY: `sum_later` has checked the arrays, which live until the launch.
        unsafe { self.request(Request::Sums(pending.iter().map(|pending| pending.sum).collect())) }
    }

    /// Adds partial sums by the next [`Gpu::settle_gradients`] at the latest: of the columns from
    /// `first` on of rows `rows` of `partial: [.., stride]`.
    pub(super) fn sum_later(
        &self,
        partial: &Array<R, f32>,
        stride: usize,
        rows: std::ops::Range<usize>,
        first: usize,
        to: &mut Array<R, f32>,
    ) {
        let sum = Self::sum_of(partial, stride, rows, first, to);
        let pending = Pending { sum, _arrays: [partial.share(), to.share()] };
        lock(&self.pending).push((thread::current().id(), pending));
    }

    /// As [`Gpu::sum_later`], without the launch.
    pub(super) fn sum_of(
        partial: &Array<R, f32>,
        stride: usize,
        rows: std::ops::Range<usize>,
        first: usize,
        to: &mut Array<R, f32>,
    ) -> Sum {
        assert!(first + to.len() <= stride && rows.end * stride <= partial.len(), "sums outside the rows");
        Sum::new((partial.pointer(), stride), rows, first, (to.pointer(), to.len()))
    }

    /// Adds partial sums.
    ///
    /// # Safety
    /// The arrays of the sums are alive, and only these sums write the results.
    pub(super) unsafe fn sum_now(&self, sums: Vec<Sum>) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.request(Request::Sums(sums)) }
    }

    /// Multiplies matrices, in one launch.
    ///
    /// # Safety
    /// The matrices are alive and of the given shapes; no result overlaps a factor or another
    /// result.
    pub(super) unsafe fn multiply(&self, products: Vec<Product>) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.request(Request::Products(products)) }
    }

    /// [`Runtime::gemm`].
    ///
    /// # Safety
    /// As [`Runtime::gemm`].
    pub(super) unsafe fn gemm(&self, gemm: Gemm) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.request(Request::Gemm(gemm)) }
    }

    /// [`Runtime::zero`].
    ///
    /// # Safety
    /// As [`Runtime::zero`].
    pub(super) unsafe fn fill(&self, at: Pointer, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.request(Request::Zero(at, bytes)) }
    }

    /// Records a request among independent operations, or hands it to the runtime.
    ///
    /// # Safety
    /// As the method of [`Runtime`].
    unsafe fn request(&self, request: Request) -> Result<(), CudaError> {
        let _turn = self.turn.take();
        if let Some(recording) = &mut *lock(&self.recording) {
            recording.push(request);
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        unsafe { queue::issue(&*self.runtime, request) }
    }

    /// Launches a kernel unless its grid is empty.
    ///
    /// # Safety
    /// As [`Runtime::launch`].
    pub(super) unsafe fn launch<P: Pod>(
        &self,
        kernel: Kernel,
        launch: Launch,
        params: &P,
    ) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        unsafe { self.request(Request::Launch(kernel, launch, bytemuck::bytes_of(params).to_vec())) }
    }

    /// Launches a kernel for one or two problems on one, unless its grid is empty.
    ///
    /// # Safety
    /// As [`Runtime::launch`]; `params` is the argument of one problem.
    pub(super) unsafe fn launch_for_both<P: Pod>(
        &self,
        kernel: Kernel,
        launch: Launch,
        params: &P,
    ) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let problem = (launch, bytemuck::bytes_of(params).to_vec());
        // SAFETY: guaranteed by the caller.
        unsafe { self.request(Request::Both(kernel, vec![problem])) }
    }
}
