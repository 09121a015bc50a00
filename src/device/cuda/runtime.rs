//! The floor everything stands on: memory, launches and matrix products of one machine that runs the kernels.
//!
//! [`Cuda`](super::Cuda) is a GPU; `tests/emulator` is the same kernels on the CPU. All that is above (checks, plans, the
//! order of launches) is written once over this trait, in [`Gpu`](super::Gpu), and so is tested where there is no GPU.
//!
//! Everything asked of a runtime happens in the order it was asked for, but for the copies of [`Runtime::send`], which may come
//! earlier; only [`Runtime::read`] waits for all of it.

use super::CudaError;
use super::compile::Module;
use super::graph::Start;
use super::params::Pointer;
use crate::device::{Activation, Buffer, Store};
use bytemuck::Pod;
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;
use std::ops::{DerefMut, Range};
use std::sync::{Arc, OnceLock};

/// What a kernel is called: the module it is compiled in, and its name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Source and macros.
    pub module: Module,
    /// Name.
    pub entry: &'static str,
}

/// Grid and block of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x and y. Nothing is to be launched when one is 0.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// What products are computed with; sums are f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Factors as they are.
    #[default]
    F32,
    /// Factors rounded to bf16, on the tensor cores.
    Bf16,
}

impl Precision {
    /// Its name, as in `--precision`.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// `c = activation(a b + bias)`, all f32, row-major and packed: `a: [m, k]`, `b: [k, n]`, `c: [m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// `m`, `n`, `k`; none of them 0.
    pub shape: [usize; 3],
    /// Address of `a`.
    pub a: Pointer,
    /// Whether `a` lies in memory as `[k, m]`.
    pub a_transposed: bool,
    /// Address of `b`.
    pub b: Pointer,
    /// Whether `b` lies in memory as `[n, k]`.
    pub b_transposed: bool,
    /// Address of `c`.
    pub c: Pointer,
    /// Whether the result replaces `c` or is added to it. Adding goes with neither bias nor activation.
    pub store: Store,
    /// `[n]`, or null.
    pub bias: Pointer,
    /// Applied last.
    pub activation: Activation,
    /// Of the factors.
    pub precision: Precision,
}

/// What the machine offers a block, and how many blocks at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory a block may have, in bytes.
    pub shared_per_block: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of the cache that all of them share.
    pub cache_bytes: usize,
}

/// Device memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Not taken, by anybody.
    pub free: usize,
    /// In all.
    pub total: usize,
}

/// A machine that runs the kernels.
pub trait Runtime: Send + Sync + 'static {
    /// A moment in the course of the work.
    type Mark: Send;

    /// Host memory that the machine copies from by itself, while the host goes on.
    type Pinned: DerefMut<Target = [u8]> + Send;

    /// Bytes to leave between the arrays of a [`Staging`], besides those that align them: for a machine that finds accesses
    /// outside an array by what lies around it.
    const GAP: usize = 0;

    /// Marks the moment when all that was asked for so far is done.
    ///
    /// # Errors
    /// What the driver reports.
    fn mark(&self) -> Result<Self::Mark, CudaError>;

    /// Seconds between two moments; waits for the later one.
    ///
    /// # Errors
    /// What the driver reports, including failures of earlier launches.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError>;

    /// What it is, for logs.
    fn name(&self) -> String;

    /// Its limits.
    fn limits(&self) -> Limits;

    /// Its memory.
    ///
    /// # Errors
    /// What the driver reports.
    fn memory(&self) -> Result<Memory, CudaError>;

    /// `bytes` bytes (not 0) of unspecified content, at a multiple of 256.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Gives memory back, for what is asked for later.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate`] of this runtime with as many `bytes`, and was not freed.
    unsafe fn free(&self, at: Pointer, bytes: usize);

    /// Memory as [`Runtime::allocate`] gives it, for [`Runtime::send`]. Nothing that was asked for earlier uses it: a copy to it
    /// may come before all that.
    ///
    /// # Errors
    /// As [`Runtime::allocate`], and [`CudaError::NotCaptured`] if it has to wait for the device during a capture.
    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Gives such memory back. What was asked for so far may use it.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`] of this runtime with as many `bytes`, and was not freed.
    unsafe fn free_landing(&self, at: Pointer, bytes: usize);

    /// Fills memory with zeros.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError>;

    /// Copies from the host; `host` may be changed as soon as this returns.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError>;

    /// Host memory of at least `bytes` bytes, unspecified content, that no copy reads any more. Waits for an earlier
    /// [`Runtime::send`] where too many are under way.
    ///
    /// # Errors
    /// What the driver reports.
    fn pinned(&self, bytes: usize) -> Result<Self::Pinned, CudaError>;

    /// Copies `parts` of `from`, which ascend, to the same places from `at` on, in one piece: what lies between them may be
    /// copied with them. Takes the host memory back, to give it to somebody else when the copy is done. What is asked for from
    /// now on finds the copy; what was asked for before need not be done when it is made.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// If a part ends outside `from`.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`] with at least as many bytes as the last part ends at, and nothing that was
    /// asked for since uses it.
    unsafe fn send(&self, at: Pointer, from: Self::Pinned, parts: &[Range<usize>]) -> Result<(), CudaError>;

    /// Copies to the host, after all that was asked for before.
    ///
    /// # Errors
    /// What the driver reports, including failures of earlier launches.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError>;

    /// Starts a kernel.
    ///
    /// # Errors
    /// A kernel that cannot be compiled, and what the driver reports.
    ///
    /// # Safety
    /// `params` are the bytes of the argument that the kernel declares; with this grid, each of its pointers is to memory
    /// of the shape the kernel's contract names.
    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError>;

    /// Starts a matrix product.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// The addresses are of matrices of the shapes named, `c` overlapping no other.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), CudaError> {
        // SAFETY: the caller's promises.
        unsafe { self.gemm_batch(gemm, 1) }
    }

    /// Starts `count` matrix products of one shape, whose matrices follow each other in memory. More than one goes with
    /// neither bias nor activation.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// As [`Runtime::gemm`], for all of them.
    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError>;

    /// Records launches, products and fills from here on, with their arguments as they are now, in the place of doing them.
    /// Memory may be asked for and given back meanwhile, by the rule that holds without a capture: what is recorded later may
    /// use it again. Pinned memory may be asked for, by any thread; everything else is refused with
    /// [`CudaError::NotCaptured`], and is for one thread alone.
    ///
    /// # Errors
    /// [`CudaError::NotCaptured`] during a capture, and what the driver reports.
    fn begin_capture(&self) -> Result<(), CudaError>;

    /// Ends the capture and starts what was recorded, in the order in which it was asked for.
    ///
    /// # Errors
    /// What the driver reports. None of it was started then, and the capture is over.
    fn start_capture(&self) -> Result<Start, CudaError>;

    /// Ends the capture and forgets what was recorded.
    fn forget_capture(&self);
}

/// Memory of a runtime, given back when dropped.
struct Allocation<R: Runtime> {
    runtime: Arc<R>,
    /// Whether [`Runtime::send`] copies to it.
    landing: bool,
    /// Address and bytes; unset until it is known how many there are. Null where there are none.
    taken: OnceLock<(Pointer, usize)>,
}

impl<R: Runtime> Allocation<R> {
    /// For [`Runtime::send`], of no size yet.
    fn landing(runtime: &Arc<R>) -> Self {
        Self { runtime: runtime.clone(), landing: true, taken: OnceLock::new() }
    }

    fn new(runtime: &Arc<R>, bytes: usize) -> Result<Self, CudaError> {
        let allocation = Self { runtime: runtime.clone(), landing: false, taken: OnceLock::new() };
        allocation.take(bytes)?;
        Ok(allocation)
    }

    fn take(&self, bytes: usize) -> Result<Pointer, CudaError> {
        let at = match self.landing {
            _ if bytes == 0 => 0,
            true => self.runtime.allocate_landing(bytes)?,
            false => self.runtime.allocate(bytes)?,
        };
        self.taken.set((at, bytes)).expect("memory is taken once");
        Ok(at)
    }

    fn at(&self) -> Pointer {
        self.taken.get().expect("an array is used before its staging was sent").0
    }
}

impl<R: Runtime> Drop for Allocation<R> {
    fn drop(&mut self) {
        if let Some(&(at, bytes)) = self.taken.get()
            && bytes > 0
        {
            // SAFETY: allocated in `take`, of this kind and with this many bytes; nothing else frees it.
            unsafe {
                match self.landing {
                    true => self.runtime.free_landing(at, bytes),
                    false => self.runtime.free(at, bytes),
                }
            }
        }
    }
}

/// An array in a runtime's memory: an allocation of its own, or one shared with the other arrays of a [`Staging`], which is
/// given back when the last of them is dropped. One of length 0 has a null address.
pub struct Array<R: Runtime, T> {
    memory: Arc<Allocation<R>>,
    /// Bytes before it.
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

// SAFETY: a runtime may be used from any thread, and the array is an address for it: no T is ever borrowed through it.
unsafe impl<R: Runtime, T> Send for Array<R, T> {}
// SAFETY: as above.
unsafe impl<R: Runtime, T> Sync for Array<R, T> {}

impl<R: Runtime, T: Pod> Array<R, T> {
    /// Room for `len` values, content unspecified.
    ///
    /// # Errors
    /// As [`Runtime::allocate`].
    pub fn new(runtime: &Arc<R>, len: usize) -> Result<Self, CudaError> {
        let memory = Arc::new(Allocation::new(runtime, len * size_of::<T>())?);
        Ok(Self { memory, offset: 0, len, element: PhantomData })
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::zero`].
    pub fn zeros(runtime: &Arc<R>, len: usize) -> Result<Self, CudaError> {
        let mut array = Self::new(runtime, len)?;
        array.zero()?;
        Ok(array)
    }

    /// A copy of `host`.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::write`].
    pub fn of(runtime: &Arc<R>, host: &[T]) -> Result<Self, CudaError> {
        let mut array = Self::new(runtime, host.len())?;
        array.copy_from(host)?;
        Ok(array)
    }

    /// Replaces all values.
    ///
    /// # Errors
    /// As [`Runtime::write`].
    ///
    /// # Panics
    /// If `host` is not as long.
    pub fn copy_from(&mut self, host: &[T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy from the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the array has this many bytes.
            unsafe { self.memory.runtime.write(self.pointer(), bytemuck::cast_slice(host))? };
        }
        Ok(())
    }

    /// Makes all values 0.
    ///
    /// # Errors
    /// As [`Runtime::zero`].
    pub fn zero(&mut self) -> Result<(), CudaError> {
        if self.len > 0 {
            // SAFETY: the array's own bytes.
            unsafe { self.memory.runtime.zero(self.pointer(), self.len * size_of::<T>())? };
        }
        Ok(())
    }

    /// The values, on the host.
    ///
    /// # Errors
    /// As [`Runtime::read`].
    pub fn to_vec(&self) -> Result<Vec<T>, CudaError> {
        let mut host = vec![T::zeroed(); self.len];
        self.copy_to(&mut host)?;
        Ok(host)
    }

    /// Copies the values to the host.
    ///
    /// # Errors
    /// As [`Runtime::read`].
    ///
    /// # Panics
    /// If `host` is not as long.
    pub fn copy_to(&self, host: &mut [T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy to the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the array has this many bytes.
            unsafe { self.memory.runtime.read(self.pointer(), bytemuck::cast_slice_mut(host))? };
        }
        Ok(())
    }

    /// Its address, for arguments of kernels.
    ///
    /// # Panics
    /// If it is of a [`Staging`] that was not sent.
    pub fn pointer(&self) -> Pointer {
        if self.len == 0 { 0 } else { self.memory.at() + self.offset as Pointer }
    }

    /// Address of the value `index`, which may be one past the last.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn pointer_at(&self, index: usize) -> Pointer {
        assert!(index <= self.len, "value {index} of {}", self.len);
        self.pointer() + (index * size_of::<T>()) as Pointer
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it lies in the memory of `runtime`.
    pub fn is_on(&self, runtime: &Arc<R>) -> bool {
        Arc::ptr_eq(&self.memory.runtime, runtime)
    }
}

impl<R: Runtime, T: Pod> Buffer<T> for Array<R, T> {
    fn len(&self) -> usize {
        self.len
    }
}

/// Arrays on their way to the device, in one copy. Each is 256-byte aligned, as an allocation of its own would be; none may be
/// used before [`Staging::send`].
pub struct Staging<R: Runtime> {
    memory: Arc<Allocation<R>>,
    host: R::Pinned,
    parts: Vec<Range<usize>>,
}

impl<R: Runtime> Staging<R> {
    /// Bytes of host memory that a staging begins with.
    const BYTES: usize = 1 << 20;

    /// With no arrays.
    ///
    /// # Errors
    /// As [`Runtime::pinned`].
    pub fn new(runtime: &Arc<R>) -> Result<Self, CudaError> {
        let host = runtime.pinned(Self::BYTES)?;
        Ok(Self { memory: Arc::new(Allocation::landing(runtime)), host, parts: Vec::new() })
    }

    /// One more array: a copy of `host`.
    ///
    /// # Errors
    /// As [`Runtime::pinned`].
    pub fn add<T: Pod>(&mut self, host: &[T]) -> Result<Array<R, T>, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(host);
        let offset = self.parts.last().map_or(0, |last| (last.end + R::GAP).next_multiple_of(256));
        if !bytes.is_empty() {
            let part = offset..offset + bytes.len();
            if part.end > self.host.len() {
                let mut larger = self.memory.runtime.pinned(part.end.next_power_of_two())?;
                larger[..self.host.len()].copy_from_slice(&self.host);
                self.host = larger;
            }
            self.host[part.clone()].copy_from_slice(bytes);
            self.parts.push(part);
        }
        Ok(Array { memory: self.memory.clone(), offset, len: host.len(), element: PhantomData })
    }

    /// Starts the copy. What is asked of the runtime from now on finds the arrays.
    ///
    /// # Errors
    /// As [`Runtime::allocate_landing`] and [`Runtime::send`].
    pub fn send(self) -> Result<(), CudaError> {
        let Self { memory, host, parts } = self;
        let bytes = parts.last().map_or(0, |last| last.end);
        let at = memory.take(bytes)?;
        if bytes > 0 {
            // SAFETY: the memory was just taken with as many bytes as the last part ends at; no array has had an address so far.
            unsafe { memory.runtime.send(at, host, &parts)? };
        }
        Ok(())
    }
}
